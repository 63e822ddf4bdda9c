"""Where this process stands among the ranks of a tensor-parallel group. One rank for now; every layer asks here."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Parallel:
    """`rank` of `size` processes that hold slices of one model."""

    rank: int = 0
    size: int = 1

    def slice(self, length: int, what: str) -> slice:
        """The part of an axis of `length` that this rank owns; raises ValueError when it does not divide."""
        if length % self.size:
            raise ValueError(f"{what}={length} cannot be split over tp={self.size}")
        part = length // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        assert self.size == 1, "multi-rank groups are set up by the executor"
        return x
