"""Token embedding: ids to rows of the residual. A tied output head reads the same tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lmdeploy.checkpoint.source import WeightSource
from lmdeploy.layers.build import BuildContext

Tensor = torch.Tensor


class Embedding:
    """The table [V, M]; whole on every rank, for a rank's share of it would need a sum over ranks per step."""

    def __init__(self, ctx: BuildContext, name: str) -> None:
        self.name = name
        self.weight = ctx.empty(ctx.spec.vocab_size, ctx.spec.hidden_size)

    def load(self, source: WeightSource) -> None:
        """Pull the table."""
        source.take(f"{self.name}.weight", self.weight)

    def tensors(self) -> Iterator[Tensor]:
        """The table."""
        yield self.weight

    def forward(self, token_ids: Tensor, out: Tensor) -> None:
        """token_ids int64 [T] -> out [T, M]."""
        torch.index_select(self.weight, 0, token_ids, out=out)
