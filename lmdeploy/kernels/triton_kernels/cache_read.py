"""One tile of attention over the paged cache: read keys and values of any width, and take them into the running softmax.

Numbers go into the products as they are stored (0..255, 0..15 less their middle, float8: all exact in 16 bit); scale and offset are factored out,
q . (n s + o) = s (q . n) + o sum(q) and sum p (n s + o) = (p s) . n + sum p o, so that nothing is rounded but p, and nothing is dequantised in
memory. What is not visible is not loaded: the pool is uninitialised.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cache_rows(table_ptr: tl.tensor, place: tl.tensor, visible: tl.tensor, head: tl.tensor, HEADS: tl.constexpr, SLOTS: tl.constexpr) -> tl.tensor:
    """int64 [n]: numbers of the cache rows of keys at `place` of a sequence whose block table begins at table_ptr."""
    block = tl.load(table_ptr + place // SLOTS, mask=visible, other=0).to(tl.int64)
    return (block * HEADS + head) * SLOTS + place % SLOTS


@triton.jit
def numbers(
    cache_ptr: tl.tensor, row: tl.tensor, visible: tl.tensor, WIDTH: tl.constexpr, DTYPE: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Both halves [n, P] of rows as they are stored, 8- and 4-bit numbers less their middle."""
    dim = tl.arange(0, PADDED)[None, :]
    mask = visible[:, None] & (dim < HALF)
    row_ptr = cache_ptr + row[:, None] * (HALF if WIDTH == "4" else 2 * HALF) + dim
    lo = tl.load(row_ptr, mask=mask, other=0)
    if WIDTH == "4":
        hi = (lo >> 4).to(tl.float32) - 8.0
        lo = (lo & 15).to(tl.float32) - 8.0
    else:
        hi = tl.load(row_ptr + HALF, mask=mask, other=0)
        if WIDTH == "8":
            lo, hi = lo.to(tl.float32) - 128.0, hi.to(tl.float32) - 128.0
        if WIDTH == "fp8":
            lo, hi = lo.to(tl.float8e4nv, bitcast=True).to(tl.float32), hi.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return lo.to(DTYPE), hi.to(DTYPE)


@triton.jit
def scales(scales_ptr: tl.tensor, row: tl.tensor, visible: tl.tensor, WIDTH: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Scale and offset [n] of rows; the offset is that of the middle number."""
    scale = tl.load(scales_ptr + row * 2, mask=visible, other=0.0).to(tl.float32)
    offset = tl.load(scales_ptr + row * 2 + 1, mask=visible, other=0.0).to(tl.float32)
    MIDDLE: tl.constexpr = 128.0 if WIDTH == "8" else (8.0 if WIDTH == "4" else 0.0)
    return scale, offset + MIDDLE * scale


@triton.jit
def scores(
    q_lo: tl.tensor, q_hi: tl.tensor, q_sum: tl.tensor, cache_ptr: tl.tensor, scales_ptr: tl.tensor, row: tl.tensor, visible: tl.tensor,
    WIDTH: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """q . k, float32 [m, n]. q_lo and q_hi [m, P], q_sum float32 [m]."""
    lo, hi = numbers(cache_ptr, row, visible, WIDTH, q_lo.dtype, HALF, PADDED)
    product = tl.dot(q_lo, tl.trans(lo), input_precision="tf32x3")  # float32 models keep float32's accuracy on tensor cores
    product = tl.dot(q_hi, tl.trans(hi), product, input_precision="tf32x3")
    if WIDTH != "16":
        scale, offset = scales(scales_ptr, row, visible, WIDTH)
        product = product * scale[None, :] + q_sum[:, None] * offset[None, :]
    return product


@triton.jit
def weigh(
    p: tl.tensor, acc_lo: tl.tensor, acc_hi: tl.tensor, acc_offset: tl.tensor, cache_ptr: tl.tensor, scales_ptr: tl.tensor, row: tl.tensor,
    visible: tl.tensor, WIDTH: tl.constexpr, DTYPE: tl.constexpr, GAIN: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Add p [m, n] times the values: GAIN * (p s) . n to acc_lo and acc_hi [m, P], p . o to acc_offset [m]."""
    lo, hi = numbers(cache_ptr, row, visible, WIDTH, DTYPE, HALF, PADDED)
    if WIDTH != "16":
        scale, offset = scales(scales_ptr, row, visible, WIDTH)
        acc_offset += tl.sum(p * offset[None, :], 1)
        p = p * (scale * GAIN)[None, :]
    share = p.to(DTYPE)
    acc_lo = tl.dot(share, lo, acc_lo, input_precision="tf32x3")
    acc_hi = tl.dot(share, hi, acc_hi, input_precision="tf32x3")
    return acc_lo, acc_hi, acc_offset


@triton.jit
def attend(
    q_lo: tl.tensor, q_hi: tl.tensor, q_sum: tl.tensor, position: tl.tensor, head: tl.tensor, begin: tl.tensor, end: tl.tensor, oldest: tl.tensor,
    table_ptr: tl.tensor, key_ptr: tl.tensor, key_scales_ptr: tl.tensor, value_ptr: tl.tensor, value_scales_ptr: tl.tensor,
    scale: tl.tensor, window: tl.tensor,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, GAIN: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr,
    HALF: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Online softmax (Milakov and Gimelshein, arXiv 1805.02867) of m queries at `position` over keys begin..end - 1, none before `oldest` read.

    Keys go in tiles of N from `begin`, so a row's bits do not depend on the other rows: a tile that is wholly hidden from it changes nothing.
    Result: largest score in base 2 [m] (-inf where all are hidden), sum of 2^(score - largest), both halves of the weighted sum.
    """
    largest = tl.full([M], float("-inf"), tl.float32)
    total, acc_offset = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    acc_lo, acc_hi = tl.zeros([M, PADDED], tl.float32), tl.zeros([M, PADDED], tl.float32)
    for first in range(begin, end, N):
        place = first + tl.arange(0, N)
        visible = (place < end) & (place >= oldest)
        row = cache_rows(table_ptr, place, visible, head, HEADS, SLOTS)
        score = scores(q_lo, q_hi, q_sum, key_ptr, key_scales_ptr, row, visible, KEY_WIDTH, HALF, PADDED) * (scale * 1.4426950408889634)
        seen = visible[None, :] & (place[None, :] <= position[:, None])
        seen = seen & ((window <= 0) | (place[None, :] > position[:, None] - window))
        score = tl.where(seen, score, float("-inf"))
        new = tl.maximum(largest, tl.max(score, 1))
        level = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(score - level[:, None])
        fade = tl.exp2(largest - level)
        total = total * fade + tl.sum(p, 1)
        acc_lo, acc_hi, acc_offset = acc_lo * fade[:, None], acc_hi * fade[:, None], acc_offset * fade
        acc_lo, acc_hi, acc_offset = weigh(
            p, acc_lo, acc_hi, acc_offset, value_ptr, value_scales_ptr, row, visible, VALUE_WIDTH, q_lo.dtype, GAIN, HALF, PADDED
        )
        largest = new
    offset = acc_offset[:, None]
    return largest, total, acc_lo * (1 / GAIN) + offset, acc_hi * (1 / GAIN) + offset
