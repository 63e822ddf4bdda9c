"""The decoder with experts in place of the MLP in all layers but `spec.dense_layers`."""

from __future__ import annotations

from typing import ClassVar

from lmdeploy.layers.experts import ExpertNames, Experts
from lmdeploy.models.decoder import Block, Decoder, SmoothingGroup


class MoEDecoder(Decoder):
    """Router and experts below the layer's MLP name."""

    in_experts: ClassVar[ExpertNames] = ExpertNames()

    def build_mlp(self, prefix: str, index: int) -> Block:
        """Experts, or the dense MLP where the spec says so."""
        if index in self.spec.dense_layers:
            return super().build_mlp(prefix, index)
        return Experts(self.ctx, f"{prefix}.{self.names.mlp}", self.in_experts)

    def waits_for_device(self) -> bool:
        """Quantised experts are called one by one, those that have tokens."""
        return any(isinstance(layer.mlp, Experts) and layer.mlp.packed for layer in self.layers)

    def smoothing_groups(self) -> tuple[SmoothingGroup, ...]:
        """The second norm feeds the router and every expert; within an expert, up feeds down."""
        inside, block = self.in_experts, self.names.mlp
        experts = [f"{block}.{inside.experts}.{e}" for e in range(self.spec.num_experts)]
        fed = [f"{block}.{inside.router}"] + [f"{e}.{name}" for e in experts for name in (inside.gate, inside.up)]
        kept = tuple(g for g in super().smoothing_groups() if not g.source.startswith(f"{block}.") and g.source != self.names.post_norm)
        per_expert = tuple(SmoothingGroup(f"{e}.{inside.up}", (f"{e}.{inside.down}",), False) for e in experts)
        return (*kept, SmoothingGroup(self.names.post_norm, tuple(fed), True), *per_expert)

    def unquantised(self) -> tuple[str, ...]:
        """The router: it is tiny, and a token that goes to another expert is a large error."""
        return (f"{self.names.mlp}.{self.in_experts.router}",)
