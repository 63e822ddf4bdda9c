"""What the kernels of 4-bit products share: how sums end that are split among programs or stand between norms, how weights are asked for ahead of time."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from lmdeploy.kernels.triton_kernels.deferred import added, inverse, note_squares

Tensor = torch.Tensor
#: Sums that a launch splits at most.
MOST_SUMS = 1 << 16


@triton.jit
def weight_rows(block: tl.tensor, N: tl.tensor, SILU: tl.constexpr, BN: tl.constexpr) -> tl.tensor:
    """BN rows of the weight, N for those behind its end. With SILU eight of gate and their eight of up by turns, so that a thread of tensor cores has both."""
    place = tl.arange(0, BN)
    if SILU:
        col = block * (BN // 2) + place // 16 * 8 + place % 8
        rows = tl.where(col < N // 2, col + place // 8 % 2 * (N // 2), N)
    else:
        rows = tl.minimum(block * BN + place, N)
    return rows


@triton.jit
def surroundings(
    before: tl.tensor, eps: tl.tensor, residual: tl.tensor, gain: tl.tensor, cols: tl.tensor, rows: tl.tensor,
    T: tl.tensor, N: tl.tensor, K: tl.tensor, BEFORE: tl.constexpr, AFTER: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """What `finish` needs of the norms around a product (`deferred.py`): 1 / rms of the rows, what is in the residual, and the weights of the norm after."""
    factor, old, weighs = 1.0, 0.0, 1.0
    if BEFORE:
        factor = inverse(before, rows, T, K, eps)
    if AFTER:
        live = (cols < N)[:, None] & (rows < T)[None, :]
        old = tl.load(residual + rows[None, :] * N + cols[:, None], mask=live, other=0.0)
        weighs = tl.load(gain + cols, mask=cols < N, other=0.0).to(tl.float32)
    return factor, old, weighs


@triton.jit
def finish(
    total: tl.tensor, out: tl.tensor, bias: tl.tensor, parts: tl.tensor, arrived: tl.tensor, around: tl.tuple, residual: tl.tensor, squares: tl.tensor,
    cols: tl.tensor, rows: tl.tensor, block: tl.tensor, T: tl.tensor, N: tl.tensor, out_row: tl.tensor, split: tl.tensor, splits: tl.tensor,
    HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, SILU: tl.constexpr,
) -> None:  # fmt: skip
    """out[rows, cols] = total [BN, BM] + bias, with what is `around` it. With SPLIT a program has a part of the sum: the last one to arrive adds all of them,
    in their order."""
    mask = (cols < N)[:, None] & (rows < T)[None, :]
    here = True
    if SPLIT:
        part = parts + rows[None, :] * N + cols[:, None]
        tl.store(part + split * (T * N), total, mask=mask)
        tl.debug_barrier()
        here = tl.atomic_add(arrived, 1, sem="acq_rel") == splits - 1
        if here:
            tl.debug_barrier()
            total = tl.zeros_like(total)
            for other in range(splits):
                total += tl.load(part + other * (T * N), mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(arrived, 0)
    if here:
        factor, old, weighs = around
        if BEFORE:
            total *= factor[None, :]
        if HAS_BIAS:
            total += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[:, None]
        if AFTER:
            total = added(residual + rows[None, :] * N + cols[:, None], old, total, mask)
            note_squares(squares, rows, tl.sum(total * total, 0), rows < T)
            total *= weighs[:, None]
        if SILU:
            BN: tl.constexpr = total.shape[0]
            BM: tl.constexpr = total.shape[1]
            gate, up = tl.split(tl.permute(tl.reshape(total, (BN // 16, 2, 8, BM)), (0, 2, 3, 1)))
            result = tl.reshape(gate / (1.0 + tl.exp(-gate)) * up, (BN // 2, BM))
            place = block * (BN // 2) + tl.arange(0, BN // 2)
            stored = (place < N // 2)[:, None] & (rows < T)[None, :]
        else:
            result, place, stored = total, cols, mask
        tl.store(out + rows[None, :].to(tl.int64) * out_row + place[:, None], result.to(out.dtype.element_ty), mask=stored)


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
