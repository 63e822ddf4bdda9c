"""Mixture of experts: a router picks `experts_per_token` experts for each token, the experts' outputs are summed by its weights.

The router's softmax is float32 over all experts, before the choice, as Mixtral and Qwen3-MoE were trained. Each rank holds a slice
of every expert's width, so ranks stay balanced whatever the router chooses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lmdeploy.checkpoint.source import WeightSource
from lmdeploy.formats.weight_format import Part
from lmdeploy.inputs import ForwardInputs
from lmdeploy.layers.build import BuildContext, StepBuffers
from lmdeploy.layers.linear import Linear

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Checkpoint names below the layer's MoE block; an expert is `<experts>.<number>.<gate>`."""

    router: str = "gate"
    experts: str = "experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


class Experts:
    """Router and experts of one layer."""

    def __init__(self, ctx: BuildContext, prefix: str, names: ExpertNames) -> None:
        spec = ctx.spec
        self.prefix, self.names, self.kernels, self.parallel = prefix, names, ctx.kernels, ctx.parallel
        self.num_experts, self.top_k, self.normalise = spec.num_experts, spec.experts_per_token, spec.norm_topk_prob
        self.full_width, self.hidden_size = spec.moe_intermediate_size, spec.hidden_size
        self.share = ctx.parallel.slice(self.full_width, "moe_intermediate_size")
        self.width = self.share.stop - self.share.start
        self.router = Linear(ctx, [Part(f"{prefix}.{names.router}", spec.num_experts, spec.hidden_size)])
        self.gate_up = ctx.empty(spec.num_experts, 2 * self.width, spec.hidden_size)
        self.down = ctx.empty(spec.num_experts, spec.hidden_size, self.width)

    def load(self, source: WeightSource) -> None:
        """Pull the router and every expert's slice."""
        self.router.load(source)
        inner, outer = (self.full_width, self.hidden_size), (self.hidden_size, self.full_width)
        for expert in range(self.num_experts):
            name, gate_up = f"{self.prefix}.{self.names.experts}.{expert}", self.gate_up[expert]
            source.take(f"{name}.{self.names.gate}.weight", gate_up[: self.width], self.share, shape=inner)
            source.take(f"{name}.{self.names.up}.weight", gate_up[self.width :], self.share, shape=inner)
            source.take(f"{name}.{self.names.down}.weight", self.down[expert], None, self.share, shape=outer)

    def tensors(self) -> Iterator[Tensor]:
        """All weights."""
        yield from self.router.tensors()
        yield self.gate_up
        yield self.down

    def forward(self, inputs: ForwardInputs, step: StepBuffers) -> None:
        """step.normed [T, M] -> step.proj [T, M]."""
        scores = inputs.scratch.take("router", step.normed.shape[0], self.num_experts)
        self.router.forward(step.normed, scores)
        weights, chosen = torch.topk(torch.softmax(scores, dim=-1, dtype=torch.float32), self.top_k, dim=-1)  # [T, k]
        if self.normalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        self.kernels.experts(step.normed, self.gate_up, self.down, chosen, weights, step.proj)
        if self.parallel.size > 1:
            self.parallel.all_reduce(step.proj)
