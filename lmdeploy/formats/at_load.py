"""16-bit checkpoints that are quantised while they are loaded: `--model-format fp8`, and the output head by `--head-bits`.

Weights are read in blocks of rows, rounded, and forgotten, so a load holds one block in float32 beside what stays. Every row is rounded by itself: what
a rank holds is the slice of the whole, however it is cut (along inputs: where the cut is a multiple of the group).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from lmdeploy.checkpoint.source import WeightSource
from lmdeploy.errors import CheckpointError
from lmdeploy.formats import awq, packed8
from lmdeploy.formats.groups import GROUP, fitting_group
from lmdeploy.formats.packed4 import Packed4
from lmdeploy.formats.packed8 import WEIGHT, Packed8
from lmdeploy.formats.weight_format import Part, WeightFormat, all_cols, all_rows, load_bias

Tensor = torch.Tensor

#: Numbers that are rounded at once: 16 MiB in float32, and a few times as much while they are rounded.
BLOCK_NUMBERS = 1 << 22


class Rounding(Protocol):
    """How rows are rounded. `step`: inputs that are stored together."""

    @property
    def step(self) -> int:
        """1, or 2 for numbers in pairs."""
        ...

    def empty(self, rows: int, inputs: int, bias: bool, dtype: torch.dtype, device: torch.device) -> WeightFormat:
        """Uninitialised weights; `dtype` is that of the bias."""
        ...

    def fill(self, weight: WeightFormat, rows: slice, block: Tensor) -> bool:
        """Round block float32 [R, K] into rows of the weight. False: it held NaN or infinity."""
        ...


@dataclass(frozen=True, slots=True)
class Rounding8:
    """To int8 or float8_e4m3fn; `group` 0: one scale a row."""

    dtype: torch.dtype
    group: int
    step: ClassVar[int] = 1

    def empty(self, rows: int, inputs: int, bias: bool, dtype: torch.dtype, device: torch.device) -> Packed8:
        """Packed8 with the largest group that fits."""
        return Packed8.empty(rows, inputs, fitting_group(inputs, self.group), bias, (self.dtype, dtype), device)

    def fill(self, weight: WeightFormat, rows: slice, block: Tensor) -> bool:
        """Symmetric, to nearest."""
        assert isinstance(weight, Packed8)
        numbers, scales = packed8.quantise(block, self.dtype, block.shape[1] // weight.scales.shape[1])
        weight.qweight[rows], weight.scales[rows] = numbers, scales
        return bool(torch.isfinite(scales).all())


@dataclass(frozen=True, slots=True)
class Rounding4:
    """To 4 bits with a zero point for every group."""

    group: int
    step: ClassVar[int] = 2

    def empty(self, rows: int, inputs: int, bias: bool, dtype: torch.dtype, device: torch.device) -> Packed4:
        """Packed4 with the largest group that fits."""
        assert inputs % 2 == 0, f"{inputs} inputs in pairs"
        return Packed4.empty(rows, inputs, fitting_group(inputs, self.group), bias, dtype, device)

    def fill(self, weight: WeightFormat, rows: slice, block: Tensor) -> bool:
        """Asymmetric, to nearest."""
        assert isinstance(weight, Packed4)
        if not bool(torch.isfinite(block).all()):
            return False
        numbers, scales, zeros = awq.quantise(block, block.shape[1] // weight.scales.shape[1])
        weight.qweight[rows] = numbers[:, 0::2] | numbers[:, 1::2] << 4
        weight.scales[rows], weight.zeros[rows] = scales, zeros
        return True


@dataclass(frozen=True, slots=True)
class AtLoadFormat:
    """Files that hold the weight itself, rounded as they are read."""

    rounding: Rounding

    def load(self, source: WeightSource, parts: Sequence[Part], bias: bool, dtype: torch.dtype, device: torch.device) -> WeightFormat:
        """Allocate, and fill block by block."""
        cols = all_cols(parts[0])
        inputs = cols.stop - cols.start
        self._check(inputs, parts[0].name)
        weight = self.rounding.empty(sum(part.num_rows for part in parts), inputs, bias, dtype, device)
        start = 0
        for part in parts:
            load_bias(source, part, weight.bias, slice(start, start + part.num_rows))
            for wanted in _row_blocks(all_rows(part), inputs):
                block = torch.empty(wanted.stop - wanted.start, inputs, dtype=torch.float32, device=device)
                source.take_ranges(f"{part.name}.weight", block, [wanted], part.cols, shape=WEIGHT.shape(part.out_features, part.in_features))
                self._fill(weight, slice(start, start + block.shape[0]), block, part.name)
                start += block.shape[0]
        return weight

    def of_table(self, table: Tensor, name: str, dtype: torch.dtype) -> WeightFormat:
        """A copy of a weight [N, K] that is in memory already: an embedding table that is the output head too."""
        self._check(table.shape[1], name)
        weight = self.rounding.empty(table.shape[0], table.shape[1], False, dtype, table.device)
        for rows in _row_blocks([slice(0, table.shape[0])], table.shape[1]):
            self._fill(weight, rows, table[rows].float(), name)
        return weight

    def _check(self, inputs: int, name: str) -> None:
        if inputs % self.rounding.step:
            raise CheckpointError(f"{name}: {inputs} inputs cannot be held in 4 bits, which are stored in pairs; use 8 or 16 bits")

    def _fill(self, weight: WeightFormat, rows: slice, block: Tensor, name: str) -> None:
        if not self.rounding.fill(weight, rows, block):
            raise CheckpointError(f"tensor '{name}.weight' holds NaN or infinite numbers, which cannot be quantised; the checkpoint is broken")


#: `--model-format fp8`: groups of 128 inputs of one row, which are never worse than the 128 x 128 blocks of files and take the same memory here
FP8 = AtLoadFormat(Rounding8(torch.float8_e4m3fn, GROUP))
#: `--head-bits`
HEADS = {8: AtLoadFormat(Rounding8(torch.int8, 0)), 4: AtLoadFormat(Rounding4(GROUP))}


def _row_blocks(rows: Sequence[slice], inputs: int) -> Iterator[slice]:
    """The rows in blocks of at most BLOCK_NUMBERS numbers."""
    step = max(1, BLOCK_NUMBERS // max(1, inputs))
    for part in rows:
        for start in range(part.start or 0, part.stop, step):
            yield slice(start, min(start + step, part.stop))
