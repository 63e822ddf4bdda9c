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
    even, odd = tl.split(tl.reshape(numbers, (BLOCK // 4, 2, 2)))
    n0, n2 = tl.split(even)
    n1, n3 = tl.split(odd)
    word = first // 4 + tl.arange(0, BLOCK // 4)
    inside = word < width // 4
    place, quarter = out + (word // 32 * 4 * rows + row) * 32 + word % 32, rows * 32
    # Pairs are what a thread has of a quarter; for longer runs, which Triton would find, threads would exchange numbers first.
    tl.store(tl.max_contiguous(place, 2), n0, mask=inside)
    tl.store(tl.max_contiguous(place + quarter, 2), n1, mask=inside)
    tl.store(tl.max_contiguous(place + 2 * quarter, 2), n2, mask=inside)
    tl.store(tl.max_contiguous(place + 3 * quarter, 2), n3, mask=inside)
