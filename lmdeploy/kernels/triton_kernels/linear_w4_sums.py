"""What the kernels of 4-bit products share: how sums end that are split among programs, and how weights are asked for ahead of time."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor
#: Sums that a launch splits at most.
MOST_SUMS = 1 << 16


@triton.jit
def finish(
    total: tl.tensor, out: tl.tensor, bias: tl.tensor, parts: tl.tensor, arrived: tl.tensor, cols: tl.tensor, rows: tl.tensor, T: tl.tensor, N: tl.tensor,
    out_row: tl.tensor, split: tl.tensor, splits: tl.tensor, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
) -> None:  # fmt: skip
    """out[rows, cols] = total [BN, BM] + bias. With SPLIT a program has a part of the sum: the last one to arrive adds all of them, in their order."""
    place = out + rows[None, :].to(tl.int64) * out_row + cols[:, None]
    mask = (cols < N)[:, None] & (rows < T)[None, :]
    more = tl.zeros_like(total)
    if HAS_BIAS:
        more += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[:, None]
    if SPLIT:
        part = parts + rows[None, :] * N + cols[:, None]
        tl.store(part + split * (T * N), total, mask=mask)
        tl.debug_barrier()
        if tl.atomic_add(arrived, 1, sem="acq_rel") == splits - 1:
            tl.debug_barrier()
            total = tl.zeros_like(total)
            for other in range(splits):
                total += tl.load(part + other * (T * N), mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(place, (total + more).to(out.dtype.element_ty), mask=mask)
            tl.store(arrived, 0)
    else:
        tl.store(place, (total + more).to(out.dtype.element_ty), mask=mask)


@triton.jit
def ask(pointers: tl.tensor) -> tl.tensor:
    """Ask L2 for lines that will be read."""
    return tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1)


@cache
def arrivals(device: torch.device) -> Tensor:
    """How many programs of each sum that is split have done their part. Zero between launches, which therefore must follow each other on one stream."""
    return torch.zeros(MOST_SUMS, dtype=torch.int32, device=device)


def count_splits(programs: int, tiles: int, most: int) -> int:
    """Programs that share a sum, so that there are at most `most`, each with four tiles or more."""
    count = 1
    while count < 8 and programs * count * 2 <= most and tiles % (count * 2) == 0 and tiles >= count * 8:
        count *= 2
    return count
