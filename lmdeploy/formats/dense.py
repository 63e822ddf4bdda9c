"""`DenseWeight`: a linear layer in one floating type, as Hugging Face files store it ([out, in], and [out] for a bias).

The tensors are allocated once, at their final place and type; the checkpoint is copied straight into them, so no second copy exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lmdeploy.checkpoint.source import WeightSource
from lmdeploy.formats.weight_format import BIAS, Part, TensorSpec
from lmdeploy.kernels.api import Kernels

WEIGHT = TensorSpec("weight", out_axis=0, in_axis=1)


@dataclass(slots=True)
class DenseWeight:
    """`weight` [N, K] and `bias` [N] or None, in the model's type, on its device."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @classmethod
    def allocate(cls, out_features: int, in_features: int, bias: bool, dtype: torch.dtype, device: torch.device) -> DenseWeight:
        """Uninitialised weights."""
        weight = torch.empty(WEIGHT.shape(out_features, in_features), dtype=dtype, device=device)
        return cls(weight, torch.empty(BIAS.shape(out_features, in_features), dtype=dtype, device=device) if bias else None)

    def load(self, source: WeightSource, parts: Sequence[Part]) -> None:
        """Fill the rows, part after part; the parts must add up to all rows."""
        assert sum(p.num_rows for p in parts) == self.weight.shape[0], f"{[p.name for p in parts]} do not fill {self.weight.shape[0]} rows"
        start = 0
        for part in parts:
            stop = start + part.num_rows
            _take(WEIGHT, part, source, self.weight[start:stop])
            if self.bias is not None:
                _take(BIAS, part, source, self.bias[start:stop])
            start = stop

    def matmul(self, x: torch.Tensor, out: torch.Tensor, kernels: Kernels) -> None:
        """out [T, N] = x [T, K] @ weight.T + bias."""
        kernels.linear(x, self.weight, self.bias, out)

    def gated(self, x: torch.Tensor, both: torch.Tensor, out: torch.Tensor, kernels: Kernels) -> None:
        """out [T, N / 2] = silu(first half) * second half of the product; `both` [T, N] is room for it."""
        kernels.linear_silu(x, self.weight, self.bias, both, out)

    @property
    def operands(self) -> tuple[torch.Tensor, ...]:
        """The weight as `kernels.api.NormedProducts` wants it."""
        return (self.weight,)

    def memory(self) -> Iterator[torch.Tensor]:
        """Weight and bias."""
        yield self.weight
        if self.bias is not None:
            yield self.bias

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return sum(t.nbytes for t in self.memory())


class DenseFormat:
    """Files that hold the weight itself."""

    def load(self, source: WeightSource, parts: Sequence[Part], bias: bool, dtype: torch.dtype, device: torch.device) -> DenseWeight:
        """Allocate and fill."""
        cols = parts[0].cols
        in_features = parts[0].in_features if cols is None else cols.stop - cols.start
        weight = DenseWeight.allocate(sum(part.num_rows for part in parts), in_features, bias, dtype, device)
        weight.load(source, parts)
        return weight


def _take(spec: TensorSpec, part: Part, source: WeightSource, out: torch.Tensor) -> None:
    """Copy this rank's rows and columns of one tensor; a tensor without an input axis is not cut along it."""
    rows = part.rows if part.rows is not None else [slice(0, part.out_features)]
    cols = part.cols if spec.in_axis is not None else None
    source.take_ranges(f"{part.name}.{spec.suffix}", out, rows, cols, shape=spec.shape(part.out_features, part.in_features))
