"""Self-attention of one layer: project, rotate and write KV, attend, project back. No choice of backend here: `kernels` decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lmdeploy.checkpoint.source import WeightSource
from lmdeploy.inputs import ForwardInputs
from lmdeploy.kernels.api import Before
from lmdeploy.layers.build import BuildContext, Module, StepBuffers
from lmdeploy.layers.linear import QKVLinear, RowLinear
from lmdeploy.layers.norm import RMSNorm

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionNames:
    """Checkpoint names below the layer's attention. One name in `qkv` means a tensor that is fused on disk."""

    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    q_norm: str = "q_norm"
    k_norm: str = "k_norm"
    interleaved: bool = False  # fused on disk per KV group: its query heads, its key, its value


class Attention:
    """Attention over the paged cache of layer `index`; `window` > 0 limits how far back a query sees."""

    def __init__(self, ctx: BuildContext, prefix: str, index: int, window: int, names: AttentionNames) -> None:
        spec = ctx.spec
        self.index, self.window, self.kernels = index, window, ctx.kernels
        self.scale = spec.head_dim**-0.5
        self.qkv = QKVLinear(ctx, prefix, names.qkv, interleaved=names.interleaved)
        self.out = RowLinear(ctx, f"{prefix}.{names.out}", spec.num_heads * spec.head_dim, spec.hidden_size, expect_bias=spec.o_bias)
        self.norms: tuple[RMSNorm, ...] = ()
        if spec.qk_norm:
            self.norms = tuple(RMSNorm(ctx, f"{prefix}.{name}", spec.head_dim) for name in (names.q_norm, names.k_norm))
        self._parts: tuple[Module, ...] = (self.qkv, self.out, *self.norms)

    def load(self, source: WeightSource) -> None:
        """Pull all weights."""
        for part in self._parts:
            part.load(source)

    def tensors(self) -> Iterator[Tensor]:
        """All weights."""
        for part in self._parts:
            yield from part.tensors()

    def normed_rows(self) -> int:
        """Up to how many rows the norms around it can be part of its products; 0: none."""
        return min(self.qkv.normed_rows(), self.out.normed_rows())

    def forward(self, inputs: ForwardInputs, step: StepBuffers, before: Before | None = None) -> Tensor:
        """step.normed [T, M], as `before` says -> [T, H D], as a rule in step.attn; the new keys and values are in the cache after it. `project` is the rest."""
        assert inputs.cos is not None and inputs.sin is not None, "the model computes cos and sin before its layers"
        if before is None:
            self.qkv.forward(step.normed, step.qkv, step.kernels)
        else:
            self.qkv.normed(step.normed, step.qkv, before=before)
        if self.norms:
            self.norms[0].heads(step.q)
            self.norms[1].heads(step.k)
        kv, meta = inputs.kv[self.index], inputs.attention
        meta.whole_weights = self.qkv.whole
        if self.kernels.rope_attention is not None:
            rotary = (inputs.cos, inputs.sin, inputs.q_scale)
            return self.kernels.rope_attention(step.q, step.k, step.v, *rotary, kv, meta, self.scale, self.window, step.attn)
        self.kernels.rope_write_kv(step.q, step.k, step.v, inputs.cos, inputs.sin, inputs.q_scale, kv, meta.slot_mapping)
        self.kernels.attention(step.q, step.k, step.v, kv, meta, self.scale, self.window, step.attn)
        return step.attn

    def project(self, attn: Tensor, step: StepBuffers) -> bool:
        """What `forward` gave -> step.proj [T, M], or added to step.residual, and then True; apart from it because the last layer does this for fewer rows."""
        if self.out.add(attn, step.residual):
            return True
        self.out.forward(attn, step.proj)
        return False
