"""Rows in quarters, as 4-bit products of many rows read them: of each tile of TILE inputs every fourth one, for all rows, then the next fourth ones.

Number k of row t of x [T, K] lies at ((k // 128 * 4 + k % 4) * T + t) * 32 + k % 128 // 4, in the memory that x would take.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Inputs of a tile; widths are multiples of it.
TILE = 128


@triton.jit
def store_quarters(out: tl.tensor, numbers: tl.tensor, first: tl.tensor, row: tl.tensor, rows: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr) -> None:
    """BLOCK numbers of a row, from `first` on, as far as `width`."""
    parted = tl.permute(tl.reshape(numbers, (BLOCK // 128, 32, 4)), (0, 2, 1))
    tile = first // 128 + tl.arange(0, BLOCK // 128)[:, None, None]
    quarter, place = tl.arange(0, 4)[None, :, None], tl.arange(0, 32)[None, None, :]
    tl.store(out + ((tile * 4 + quarter) * rows + row) * 32 + place, parted, mask=tile < width // 128)
