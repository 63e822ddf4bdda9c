"""What a weight format of a linear layer must offer, so that `layers/linear.py` slices for ranks once, for all formats.

A layer states its `Part`s: which module of the checkpoint, its full size there, and which of its output rows and input columns this rank owns.
A `FileFormat` reads them into a `WeightFormat`, which multiplies and counts its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

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
    """The weights of one linear layer on one rank, as they stay in memory."""

    bias: torch.Tensor | None

    def matmul(self, x: torch.Tensor, out: torch.Tensor, kernels: Kernels) -> None:
        """out [T, N] = x [T, K] @ W.T + bias."""
        ...

    def gated(self, x: torch.Tensor, both: torch.Tensor, out: torch.Tensor, kernels: Kernels) -> None:
        """out [T, N / 2] = silu(first half) * second half of the product; `both` [T, N] is room for it."""
        ...

    @property
    def operands(self) -> tuple[torch.Tensor, ...]:
        """The weight as `kernels.api.NormedProducts` wants it; empty where it is none that they know."""
        ...

    def memory(self) -> Iterator[torch.Tensor]:
        """Every tensor that is kept."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that the weights take."""
        ...


class FileFormat(Protocol):
    """How a checkpoint stores a linear layer."""

    def load(self, source: WeightSource, parts: Sequence[Part], bias: bool, dtype: torch.dtype, device: torch.device) -> WeightFormat:
        """The layer's weights, allocated once and filled part after part, straight from the checkpoint."""
        ...


class QuantisedFormat(FileFormat, Protocol):
    """A file format in which some modules of a checkpoint are stored."""

    def holds(self, source: WeightSource, name: str) -> bool | None:
        """Whether the files hold this module so; None where they hold it both ways or neither, and config.json has to say."""
        ...


BIAS = TensorSpec("bias", out_axis=0, in_axis=None)


def all_rows(part: Part) -> Sequence[slice]:
    """The output rows that a part wants."""
    return part.rows if part.rows is not None else [slice(0, part.out_features)]


def all_cols(part: Part) -> slice:
    """The input columns that a part wants."""
    return part.cols if part.cols is not None else slice(0, part.in_features)


def load_bias(source: WeightSource, part: Part, bias: torch.Tensor | None, rows: slice) -> None:
    """The bias of a part, to rows of the layer's [N], where it has one."""
    if bias is not None:
        source.take_ranges(f"{part.name}.bias", bias[rows], all_rows(part), shape=BIAS.shape(part.out_features, part.in_features))
