"""What a weight format of a linear layer must offer, so that `layers/linear.py` slices for ranks once, for all formats.

A format declares its tensors with the axes that run along the layer's outputs and inputs (`TensorSpec`). A layer states its `Part`s: which module of the
checkpoint, its full size there, and which of its output rows and input columns this rank owns. The format then loads, multiplies and counts its bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from lmdeploy.checkpoint.source import WeightSource
from lmdeploy.kernels.api import Kernels


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a linear layer: `<module>.<suffix>`, and its axes; None = the tensor has no such axis."""

    suffix: str
    out_axis: int | None
    in_axis: int | None

    def shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Shape of the tensor for a layer of that size."""
        sizes = {self.out_axis: out_features, self.in_axis: in_features}
        return tuple(sizes[axis] for axis in range(2) if axis in sizes)


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive output rows of a layer that come from one module of the checkpoint.

    `out_features`, `in_features`: the module's full size in the file, which is checked. `rows`: the output rows that this rank wants, in this order
    (several for a fused tensor such as InternLM2's wqkv); None = all. `cols`: its input columns (row-parallel layers); None = all.
    """

    name: str
    out_features: int
    in_features: int
    rows: Sequence[slice] | None = None
    cols: slice | None = None

    @property
    def num_rows(self) -> int:
        """How many output rows this part fills."""
        if self.rows is None:
            return self.out_features
        return sum(r.stop - (r.start or 0) for r in self.rows)


class WeightFormat(Protocol):
    """The weights of one linear layer on one rank."""

    tensors: ClassVar[tuple[TensorSpec, ...]]

    @classmethod
    def allocate(cls, out_features: int, in_features: int, bias: bool, dtype: torch.dtype, device: torch.device) -> WeightFormat:
        """Uninitialised weights of this rank's size."""
        ...

    def load(self, source: WeightSource, parts: Sequence[Part]) -> None:
        """Fill the rows, part after part, straight from the checkpoint."""
        ...

    def matmul(self, x: torch.Tensor, out: torch.Tensor, kernels: Kernels) -> None:
        """out [T, N] = x [T, K] @ W.T + bias."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that the weights take."""
        ...
