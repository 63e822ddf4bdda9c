"""The gated MLP: down(silu(gate(x)) * up(x))."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lmdeploy.checkpoint.source import WeightSource
from lmdeploy.inputs import ForwardInputs
from lmdeploy.layers.build import BuildContext, StepBuffers
from lmdeploy.layers.linear import GateUpLinear, RowLinear


@dataclass(frozen=True, slots=True)
class MLPNames:
    """Checkpoint names below the layer's MLP. One name in `gate_up` means a tensor that is stacked on disk."""

    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"


class MLP:
    """Dense MLP of width `intermediate_size`."""

    def __init__(self, ctx: BuildContext, prefix: str, names: MLPNames) -> None:
        spec = ctx.spec
        self.gate_up = GateUpLinear(ctx, prefix, names.gate_up, spec.intermediate_size)
        self.down = RowLinear(ctx, f"{prefix}.{names.down}", spec.intermediate_size, spec.hidden_size, expect_bias=spec.mlp_bias)

    def load(self, source: WeightSource) -> None:
        """Pull all weights."""
        self.gate_up.load(source)
        self.down.load(source)

    def tensors(self) -> Iterator[torch.Tensor]:
        """All weights."""
        yield from self.gate_up.tensors()
        yield from self.down.tensors()

    def forward(self, inputs: ForwardInputs, step: StepBuffers) -> bool:
        """step.normed [T, M] -> step.proj [T, M], or added to step.residual, and then True."""
        self.gate_up.gated(step.normed, step.gate_up, step.act, step.kernels)
        if self.down.add(step.act, step.residual):
            return True
        self.down.forward(step.act, step.proj, step.kernels)
        return False

    def normed_rows(self) -> int:
        """Up to how many rows the norms around it can be part of its products; 0: none."""
        return min(self.gate_up.normed_rows(silu=True), self.down.normed_rows())
