"""`Packed8`: a linear layer in 8 bits as it stays in memory, and the reader of every file that holds its 8-bit numbers as they are.

Numbers are int8 or float8_e4m3fn, w = q * scale. Files differ in the name of the scales and in what one scale belongs to: the whole tensor, an output row,
a group of inputs, or a block of rows and inputs. In memory every row has its own scales, so one operator serves all of them and ranks cut anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lmdeploy.checkpoint.source import WeightSource
from lmdeploy.errors import CheckpointError
from lmdeploy.formats.weight_format import Part, TensorSpec, all_cols, all_rows, load_bias
from lmdeploy.kernels.api import Kernels
from lmdeploy.kernels.kv_quant import divided
from lmdeploy.kernels.reference import dequantise_w8

Tensor = torch.Tensor

WEIGHT = TensorSpec("weight", out_axis=0, in_axis=1)
#: type of the numbers -> the largest of them
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
#: the smallest scale, so that a row of zeros has one
TINY = 1e-12
#: Scales of fewer inputs than this would take more memory than the numbers save.
MIN_GROUP = 8


@dataclass(slots=True)
class Packed8:
    """`qweight` int8 or float8_e4m3fn [N, K], `scales` float32 [N, K/g], `bias` [N] in the model's type or None.

    `quantise_inputs`: x is brought to the type of the weight while it runs, one scale a row of x; needs g = K.
    """

    qweight: Tensor
    scales: Tensor
    bias: Tensor | None = None
    quantise_inputs: bool = False

    @classmethod
    def empty(cls, rows: int, inputs: int, group: int, bias: bool, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device) -> Packed8:
        """Uninitialised weights; `dtypes` are those of the numbers and of the bias."""
        assert inputs % group == 0, f"{inputs} inputs in groups of {group}"
        qweight = torch.empty(rows, inputs, dtype=dtypes[0], device=device)
        scales = torch.empty(rows, inputs // group, dtype=torch.float32, device=device)
        return cls(qweight, scales, torch.empty(rows, dtype=dtypes[1], device=device) if bias else None)

    def matmul(self, x: Tensor, out: Tensor, kernels: Kernels) -> None:
        """out [T, N] = x [T, K] @ W.T + bias."""
        product = kernels.linear_w8a8 if self.quantise_inputs else kernels.linear_w8
        product(x, self.qweight, self.scales, self.bias, out)

    def gated(self, x: Tensor, both: Tensor, out: Tensor, kernels: Kernels) -> None:
        """out [T, N / 2] = silu(first half) * second half of the product; `both` [T, N] is room for it."""
        self.matmul(x, both, kernels)
        kernels.silu_mul(both, out)

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """The weight as `kernels.api.NormedProducts` wants it: nothing, they know no 8 bits."""
        return ()

    def memory(self) -> Iterator[Tensor]:
        """Every tensor that is kept."""
        yield from (t for t in (self.qweight, self.scales, self.bias) if t is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.memory())

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] written out."""
        return dequantise_w8(self.qweight, self.scales, dtype)


def quantise(weight: Tensor, dtype: torch.dtype, group: int) -> tuple[Tensor, Tensor]:
    """(q [N, K] of `dtype`, scales float32 [N, K/g]) of a weight [N, K]: scale = max|w| / 127 (int8) or / 448 (float8_e4m3fn), rounded to nearest even."""
    rows, inner = weight.shape
    assert inner % group == 0, f"{inner} inputs in groups of {group}"
    grouped, largest = weight.float().view(rows, inner // group, group), LARGEST[dtype]
    scales = divided(grouped.abs().amax(-1), largest).clamp_(min=TINY)
    numbers = (grouped / scales.unsqueeze(-1)).clamp_(-largest, largest)
    return (numbers.round_() if dtype is torch.int8 else numbers).to(dtype).view(rows, inner), scales


@dataclass(frozen=True, slots=True)
class ScaledFormat:
    """`<module>.weight` in 8 bits and `<module>.<suffix>`, the scales; `suffixes` are the names that they may have.

    `block`: (rows, inputs) of one scale; without it the shape of the scales says what they belong to. `quantise_inputs` is obeyed where every row has one scale.
    """

    suffixes: tuple[str, ...]
    dtype: torch.dtype
    quantise_inputs: bool = False
    block: tuple[int, int] | None = None

    def holds(self, source: WeightSource, name: str) -> bool | None:
        """Whether the module is stored so; None where the source has anything that is asked for."""
        found = any(source.has(f"{name}.{suffix}") for suffix in self.suffixes)
        return None if found and source.has(f"{name}.qweight") else found

    def load(self, source: WeightSource, parts: Sequence[Part], bias: bool, dtype: torch.dtype, device: torch.device) -> Packed8:
        """The weights of a layer, part after part, straight from the checkpoint."""
        cols = all_cols(parts[0])
        tables = [load_table(source, part, self._suffix(source, part), self.block, device) for part in parts]
        group = local_group(parts[0].name, cols, [table.block[1] for table in tables])
        weight = Packed8.empty(sum(part.num_rows for part in parts), cols.stop - cols.start, group, bias, (self.dtype, dtype), device)
        weight.quantise_inputs = self.quantise_inputs and weight.scales.shape[1] == 1
        start = 0
        for part, table in zip(parts, tables, strict=True):
            rows = slice(start, start + part.num_rows)
            self.load_numbers(source, part, weight.qweight[rows])
            table.spread(part, weight.scales[rows])
            load_bias(source, part, weight.bias, rows)
            start = rows.stop
        return weight

    def load_numbers(self, source: WeightSource, part: Part, out: Tensor) -> None:
        """The numbers of this rank, out [n, K]."""
        source.take_ranges(f"{part.name}.weight", out, all_rows(part), part.cols, shape=WEIGHT.shape(part.out_features, part.in_features))

    def _suffix(self, source: WeightSource, part: Part) -> str:
        return next((suffix for suffix in self.suffixes if source.has(f"{part.name}.{suffix}")), self.suffixes[0])


@dataclass(frozen=True, slots=True)
class ScaleTable:
    """Scales as a file holds them, float32 [rows / R, inputs / C] rounded up: one for every `block` = (R, C) of a module."""

    values: Tensor
    block: tuple[int, int]

    def spread(self, part: Part, out: Tensor) -> None:
        """The scales of this rank's rows and groups, out [n, K/g]."""
        cols, device = all_cols(part), out.device
        rows = torch.cat([torch.arange(r.start, r.stop, device=device) for r in all_rows(part)]) // self.block[0]
        step = (cols.stop - cols.start) // out.shape[1]
        groups = (torch.arange(out.shape[1], device=device) * step + cols.start) // self.block[1]
        out.copy_(self.values[rows[:, None], groups[None, :]])


def load_table(source: WeightSource, part: Part, suffix: str, block: tuple[int, int] | None, device: torch.device) -> ScaleTable:
    """The scales of a module, checked. Without `block`, shapes [], [1], [N], [N, 1] and [N, K/g] are told apart."""
    name, rows, inputs = f"{part.name}.{suffix}", part.out_features, part.in_features
    shape = (-(-rows // block[0]), -(-inputs // block[1])) if block else source.shape(name)
    block = block or _block_of(name, shape, rows, inputs)
    values = torch.empty(shape, dtype=torch.float32, device=device)
    source.take(name, values, shape=shape)
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"tensor '{name}' holds infinite numbers or NaN; the checkpoint is broken")
    return ScaleTable(values.view(-(-rows // block[0]), -(-inputs // block[1])), block)


def _block_of(name: str, shape: tuple[int, ...], rows: int, inputs: int) -> tuple[int, int]:
    """(rows, inputs) that one scale of a tensor of that shape belongs to."""
    if math.prod(shape) == 1:
        return rows, inputs
    if len(shape) in (1, 2) and shape[0] == rows and (count := math.prod(shape[1:])) and inputs % count == 0:
        return 1, inputs // count
    raise CheckpointError(
        f"tensor '{name}' has shape {list(shape)}, which fits no weight of {rows} outputs and {inputs} inputs: one scale for all, one a row, or groups of inputs"
    )


def local_group(name: str, cols: slice, blocks: Sequence[int]) -> int:
    """The largest group of a rank's inputs in which none lies across two scales of the file."""
    inputs = cols.stop - cols.start
    inside = all((cols.stop - 1) // block == cols.start // block for block in blocks)
    group = inputs if inside else math.gcd(*blocks, cols.start, inputs)
    if group < min(MIN_GROUP, inputs):
        raise CheckpointError(
            f"{name}: inputs {cols.start}..{cols.stop} and scales for {min(blocks)} of them have no common group of {MIN_GROUP} or more; "
            "such a layer cannot stay in 8 bits (with tp > 1, use a smaller tp)"
        )
    return group
