"""One tile of attention over the paged cache: read keys and values of any width, and take them into the running softmax.

Numbers go into the products as they are stored (0..255, 0..15 less their middle, float8: all exact in float16); scale and offset are factored out,
q . (n s + o) = s (q . n) + o sum(q) and sum p (n s + o) = (p s) . n + sum p o, so that nothing is rounded but p, and nothing is dequantised in
memory. What is not visible is not loaded: the pool is uninitialised.

Integers become float16 by bits: 0x6400 | n is 1024 + n. The instructions are written out, two numbers each, because a conversion of a byte is an
instruction a number and slow; where tensors are float32 (such models, and Triton's interpreter) the same numbers come by plain conversions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lmdeploy.kernels.triton_kernels.kv_write import padded_half, product_type
from lmdeploy.kernels.triton_kernels.rows import turned
from lmdeploy.kv_layer import KVLayer

Tensor = torch.Tensor
SPREAD = tl.constexpr(256)  # a load of as many words as a program has threads, or more, has its own layout
SMALLEST = tl.constexpr(-100)  # exponent of a unit
TURNED = tl.constexpr(32)  # dims of a result that are turned back at once
#: bytes a b c d -> float16 pairs (a, b) and (c, d) of 1024 + n
BYTES_TO_SHIFTED = tl.constexpr("""
prmt.b32 $0, $2, 0x64646464, 0x4140;
prmt.b32 $1, $2, 0x64646464, 0x4342;
""")
#: the same of the low halves of four bytes, then of the high ones, 16 times as high: 1024 + n and 1024 + 16 n
NIBBLES_TO_SHIFTED = tl.constexpr("""{
.reg .b32 ab, cd, one;
mov.b32 one, 0x64006400;
prmt.b32 ab, $4, 0, 0x4140;
prmt.b32 cd, $4, 0, 0x4342;
lop3.b32 $0, ab, 0x000F000F, one, 0xEA;
lop3.b32 $1, cd, 0x000F000F, one, 0xEA;
lop3.b32 $2, ab, 0x00F000F0, one, 0xEA;
lop3.b32 $3, cd, 0x00F000F0, one, 0xEA;
}""")
#: bytes a b c d -> float16 pairs (a, b) and (c, d) of n - 128
BYTES_TO_HALVES = tl.constexpr("""{
.reg .b32 middle;
mov.b32 middle, 0x64806480;
prmt.b32 $0, $2, 0x64646464, 0x4140;
prmt.b32 $1, $2, 0x64646464, 0x4342;
sub.f16x2 $0, $0, middle;
sub.f16x2 $1, $1, middle;
}""")
#: the low halves of four bytes, then the high ones, as n - 8
NIBBLES_TO_HALVES = tl.constexpr("""{
.reg .b32 ab, cd, one, middle, sixteenth, lower;
mov.b32 one, 0x64006400;
mov.b32 middle, 0x64086408;
mov.b32 sixteenth, 0x2C002C00;
mov.b32 lower, 0xD480D480;
prmt.b32 ab, $4, 0, 0x4140;
prmt.b32 cd, $4, 0, 0x4342;
lop3.b32 $0, ab, 0x000F000F, one, 0xEA;
lop3.b32 $1, cd, 0x000F000F, one, 0xEA;
lop3.b32 $2, ab, 0x00F000F0, one, 0xEA;
lop3.b32 $3, cd, 0x00F000F0, one, 0xEA;
sub.f16x2 $0, $0, middle;
sub.f16x2 $1, $1, middle;
fma.rn.f16x2 $2, $2, sixteenth, lower;
fma.rn.f16x2 $3, $3, sixteenth, lower;
}""")

#: float8 e4m3 -> float16 with the same bits of exponent and mantissa, which stands for a 256th of it, subnormals included; NaN is lost, scales tell it
FLOAT8_TO_HALVES = tl.constexpr("""{
.reg .b32 ab, cd, x, y, sign;
mov.b32 sign, 0x80008000;
prmt.b32 ab, $2, 0, 0x1404;
prmt.b32 cd, $2, 0, 0x3424;
and.b32 x, ab, 0x7F007F00;
and.b32 y, cd, 0x7F007F00;
shr.u32 x, x, 1;
shr.u32 y, y, 1;
lop3.b32 $0, ab, sign, x, 0xEA;
lop3.b32 $1, cd, sign, y, 0xEA;
}""")


@triton.jit
def block_of(table_ptr: tl.tensor, first: tl.tensor, end: tl.tensor, SLOTS: tl.constexpr) -> tl.tensor:
    """Number of the block that key `first` of a sequence is in; 0 from `end` on, where the table says nothing."""
    return tl.load(table_ptr + first // SLOTS, mask=first < end, other=0)


@triton.jit
def cache_rows(
    table_ptr: tl.tensor, block: tl.tensor, first: tl.tensor, visible: tl.tensor, head: tl.tensor, HEADS: tl.constexpr, SLOTS: tl.constexpr, N: tl.constexpr
) -> tl.tensor:
    """int64 [N]: numbers of the cache rows of keys `first` .. `first` + N - 1, a multiple of N that is in `block`, of a sequence."""
    if SLOTS % N == 0:  # one block holds them all
        row = (block.to(tl.int64) * HEADS + head) * SLOTS + first % SLOTS + tl.arange(0, N)
    else:
        place = first + tl.arange(0, N)
        blocks = tl.load(table_ptr + place // SLOTS, mask=visible, other=0).to(tl.int64)
        row = (blocks * HEADS + head) * SLOTS + place % SLOTS
    return row


@triton.jit
def as_numbers(
    stored: tl.tensor, WIDTH: tl.constexpr, TYPE: tl.constexpr, SHIFTED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Bytes as numbers of TYPE, less the middle of 8- and 4-bit ones, float8 perhaps a 256th; of 4 bits the low and the high ones, else both alike.

    SHIFTED leaves float16 integers at 1024 + n, and high halves at 1024 + 16 n, which spares a subtraction. The others are for values: they go into
    products in the layout that they were loaded in, for which their instructions are marked as if they did more than compute.
    """
    if tl.float16 == TYPE:
        if WIDTH == "4":
            NIBBLES: tl.constexpr = NIBBLES_TO_SHIFTED if SHIFTED else NIBBLES_TO_HALVES
            low, high = tl.inline_asm_elementwise(NIBBLES, "=&r,=&r,=&r,=&r,r", [stored], dtype=(tl.float16, tl.float16), is_pure=SHIFTED, pack=4)
        else:
            BYTES: tl.constexpr = FLOAT8_TO_HALVES if WIDTH == "fp8" else (BYTES_TO_SHIFTED if SHIFTED else BYTES_TO_HALVES)
            low = tl.inline_asm_elementwise(BYTES, "=&r,=&r,r", [stored], dtype=tl.float16, is_pure=SHIFTED, pack=4)
            high = low
    else:
        if WIDTH == "4":
            low, high = (stored & 15).to(tl.float32) - 8.0, (stored >> 4).to(tl.float32) - 8.0
        else:
            low = stored.to(tl.float32) - 128.0 if WIDTH == "8" else stored.to(tl.float8e4nv, bitcast=True).to(tl.float32)
            high = low
    return low, high


@triton.jit
def numbers(
    cache_ptr: tl.tensor, row: tl.tensor, visible: tl.tensor, WIDTH: tl.constexpr, TYPE: tl.constexpr, SHIFTED: tl.constexpr,
    HALF: tl.constexpr, PADDED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Both halves [n, P] of rows as `as_numbers` makes them."""
    dim = tl.arange(0, PADDED)[None, :]
    mask = visible[:, None] & (dim < HALF)
    row_ptr = cache_ptr + row[:, None] * (HALF if WIDTH == "4" else 2 * HALF) + dim
    lo = tl.load(row_ptr, mask=mask, other=0)
    if WIDTH == "4":
        lo, hi = as_numbers(lo, WIDTH, TYPE, SHIFTED)
    else:
        hi = tl.load(row_ptr + HALF, mask=mask, other=0)
        if WIDTH == "16":
            lo, hi = lo.to(TYPE), hi.to(TYPE)
        else:
            lo, hi = as_numbers(lo, WIDTH, TYPE, SHIFTED)[0], as_numbers(hi, WIDTH, TYPE, SHIFTED)[0]
    return lo, hi


@triton.jit
def scales(
    scales_ptr: tl.tensor, row: tl.tensor, visible: tl.tensor, WIDTH: tl.constexpr, TYPE: tl.constexpr, APART: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Scale and offset float32 [n] of rows, stored as one word of two bfloat16; as `numbers` of TYPE want them: the offset is that of the middle number."""
    if APART:
        pair = tl.load(scales_ptr + row, mask=visible, other=0)
    else:
        column = tl.arange(0, SPREAD // row.shape[0])[None, :]  # of which one is read; without the others every thread that uses a word would load it
        place = row[:, None] + column * 0
        pair = tl.sum(tl.load(scales_ptr + place, mask=visible[:, None] & (column == 0), other=0), 1)
    scale = (pair << 16).to(tl.float32, bitcast=True)
    offset = (pair & -0x10000).to(tl.float32, bitcast=True)
    if WIDTH == "fp8" and tl.float16 == TYPE:
        scale = scale * 256.0
    MIDDLE: tl.constexpr = 128.0 if WIDTH == "8" else (8.0 if WIDTH == "4" else 0.0)
    return scale, offset + MIDDLE * scale


@triton.jit
def exponent_of(x: tl.tensor) -> tl.tensor:
    """int32: the largest e with 2^e <= x for x >= 0, at least SMALLEST; 128 for infinity and NaN."""
    return tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 0xFF, SMALLEST + 127) - 127


@triton.jit
def power_of_two(exponent: tl.tensor) -> tl.tensor:
    """2^exponent, infinity for 128."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def query_rows(q_ptr: tl.tensor, live: tl.tensor, HALF: tl.constexpr, PADDED: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Both halves [m, P] of query rows at q_ptr [m]."""
    dim = tl.arange(0, PADDED)[None, :]
    mask = live[:, None] & (dim < HALF)
    return tl.load(q_ptr[:, None] + dim, mask=mask, other=0.0), tl.load(q_ptr[:, None] + dim + HALF, mask=mask, other=0.0)


@triton.jit
def as_operands(
    lo: tl.tensor, hi: tl.tensor, scale: tl.tensor, WIDTH: tl.constexpr, TYPE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Query rows as operands of TYPE for keys of WIDTH, their sums float32 [m], what shifted keys add to their products [m], and what their scores are multiplied
    by [m], in base 2.

    bfloat16 rows that meet quantised keys, as float16, are divided by a power of two each, so that float16 holds them.
    """
    factor = tl.zeros([lo.shape[0]], tl.float32) + scale * 1.4426950408889634
    if tl.float16 == TYPE and WIDTH != "16":
        lo, hi = lo.to(tl.float32), hi.to(tl.float32)
        unit = power_of_two(exponent_of(tl.maximum(tl.max(tl.abs(lo), 1), tl.max(tl.abs(hi), 1))))
        lo, hi, factor = lo * (1.0 / unit)[:, None], hi * (1.0 / unit)[:, None], factor * unit
    lo, hi = lo.to(TYPE), hi.to(TYPE)
    low_sum, high_sum = tl.sum(lo.to(tl.float32), 1), tl.sum(hi.to(tl.float32), 1)
    shift = tl.zeros_like(low_sum)
    if tl.float16 == TYPE and WIDTH == "8":
        shift = 1152.0 * (low_sum + high_sum)
    if tl.float16 == TYPE and WIDTH == "4":
        hi = (hi.to(tl.float32) * 0.0625).to(TYPE)
        shift = 1032.0 * low_sum + 72.0 * high_sum
    return lo, hi, low_sum + high_sum, shift, factor


@triton.jit
def _both_larger(a: tl.tensor, b: tl.tensor, other_a: tl.tensor, other_b: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    return tl.maximum(a, other_a), tl.maximum(b, other_b)


@triton.jit
def attend_tile(
    query: tl.tuple, state: tl.tuple, position: tl.tensor, head: tl.tensor, first: tl.tensor, oldest: tl.tensor, limit: tl.tensor, window: tl.tensor,
    block: tl.tensor, table_ptr: tl.tensor, key_ptr: tl.tensor, key_scales_ptr: tl.tensor, value_ptr: tl.tensor, value_scales_ptr: tl.tensor,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_TYPE: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr,
    HALF: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr, MASK: tl.constexpr, APART: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """One step of the online softmax (Milakov and Gimelshein, arXiv 1805.02867): m queries at `position` over the N keys from `first` on.

    `query` is what `as_operands` made. MASK says what may be hidden: "none" nothing, "edges" keys outside oldest..limit - 1 from all rows, "causal" also those
    that a row's position hides. A tile that is wholly hidden from a row changes nothing of it, so its bits do not depend on the other rows.
    `state`, which is also the result: largest score in base 2 [m] (-inf where all are hidden), sum of 2^(score - largest), sum of the weighted
    offsets [m], and both halves of the weighted sums, all three in units of 2^exponent. The exponent is that of the largest scale so far: weights times
    scales are at most 2 then, and float16 holds them whatever the scales are. APART, for few rows whose keys lie in several warps: sums over keys are
    kept apart, [m, N], for each place in a tile, and the exponent for each row, so that warps wait for each other once a tile and not five times.
    """
    q_lo, q_hi, q_sum, q_shift, factor = query
    largest, total, acc_offset, exponent, acc_lo, acc_hi = state
    place = first + tl.arange(0, N)
    visible = (place < limit) & (place >= oldest)
    if MASK == "none":
        visible = tl.full([N], True, tl.int1)
    row = cache_rows(table_ptr, block, first, visible, head, HEADS, SLOTS, N)
    lo, hi = numbers(key_ptr, row, visible, KEY_WIDTH, q_lo.dtype, True, HALF, PADDED)
    score = tl.zeros([q_lo.shape[0], N], tl.float32)
    if KEY_WIDTH == "8" or KEY_WIDTH == "4":
        score = score - q_shift[:, None]
    score = tl.dot(q_lo, tl.trans(lo), score, input_precision="tf32x3")  # float32 models keep float32's accuracy on tensor cores
    score = tl.dot(q_hi, tl.trans(hi), score, input_precision="tf32x3")
    if KEY_WIDTH != "16":
        key_scale, key_offset = scales(key_scales_ptr, row, visible, KEY_WIDTH, q_lo.dtype, APART)
        score = tl.fma(score, tl.broadcast_to(key_scale[None, :], score.shape), q_sum[:, None] * key_offset[None, :])
    if MASK == "edges":
        score = tl.where(visible[None, :], score, float("-inf"))
    if MASK == "causal":
        seen = visible[None, :] & (place[None, :] <= position[:, None])
        seen = seen & ((window <= 0) | (place[None, :] > position[:, None] - window))
        score = tl.where(seen, score, float("-inf"))
    if VALUE_WIDTH == "16":
        peak = tl.max(score, 1)
    else:
        value_scale, value_offset = scales(value_scales_ptr, row, visible, VALUE_WIDTH, VALUE_TYPE, APART)
        if APART:
            peak, scale_peak = tl.reduce((score, tl.broadcast_to(value_scale[None, :], score.shape)), 1, _both_larger)
        else:
            peak, scale_peak = tl.max(score, 1), tl.max(value_scale, 0)
    new = tl.maximum(largest, peak * factor)
    base, old = tl.where(new == float("-inf"), 0.0, new), largest
    if VALUE_WIDTH != "16":
        new_exponent = tl.maximum(exponent, exponent_of(scale_peak))
        base, old = base + new_exponent.to(tl.float32), old + exponent.to(tl.float32)
        exponent = new_exponent
    p = tl.exp2(tl.fma(score, tl.broadcast_to(factor[:, None], score.shape), -tl.broadcast_to(base[:, None], score.shape)))
    fade = tl.exp2(old - base)
    if APART:
        spread = tl.broadcast_to(fade[:, None], score.shape)
        total = tl.fma(total, spread, p)
        if VALUE_WIDTH != "16":
            acc_offset = tl.fma(acc_offset, spread, p * value_offset[None, :])
    else:
        total = total * fade + tl.sum(p, 1)
        if VALUE_WIDTH != "16":
            acc_offset = acc_offset * fade + tl.sum(p * value_offset[None, :], 1)
    lo, hi = numbers(value_ptr, row, visible, VALUE_WIDTH, VALUE_TYPE, False, HALF, PADDED)
    if VALUE_WIDTH != "16":
        p = p * value_scale[None, :]
    share, acc_lo, acc_hi = p.to(VALUE_TYPE), acc_lo * fade[:, None], acc_hi * fade[:, None]  # before both products, which then run one behind the other
    acc_lo = tl.dot(share, lo, acc_lo, input_precision="tf32x3")
    acc_hi = tl.dot(share, hi, acc_hi, input_precision="tf32x3")
    return new, total, acc_offset, exponent, acc_lo, acc_hi


@triton.jit
def attend(
    query: tl.tuple, state: tl.tuple, position: tl.tensor, head: tl.tensor, begin: tl.tensor, end: tl.tensor, oldest: tl.tensor, limit: tl.tensor,
    window: tl.tensor,
    table_ptr: tl.tensor, key_ptr: tl.tensor, key_scales_ptr: tl.tensor, value_ptr: tl.tensor, value_scales_ptr: tl.tensor,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_TYPE: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr,
    HALF: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr, MASK: tl.constexpr, APART: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """`attend_tile` over keys begin .. end - 1, in tiles from `begin` on."""
    block = block_of(table_ptr, begin, end, SLOTS)
    for first in range(begin, end, N):
        state = attend_tile(
            query, state, position, head, first, oldest, limit, window, block, table_ptr, key_ptr, key_scales_ptr, value_ptr, value_scales_ptr,
            KEY_WIDTH, VALUE_WIDTH, VALUE_TYPE, HEADS, SLOTS, HALF, PADDED, N, MASK, APART,
        )  # fmt: skip
        block = block_of(table_ptr, first + N, end, SLOTS)  # a tile ahead: or the pipeline would spend a stage on it
    return state


@triton.jit
def empty_state(M: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr, APART: tl.constexpr) -> tl.tuple:
    """Before the first key."""
    largest = tl.full([M], float("-inf"), tl.float32)
    if APART:
        exponent, sums = tl.full([M], SMALLEST, tl.int32), tl.zeros([M, N], tl.float32)
    else:
        exponent, sums = tl.full([], SMALLEST, tl.int32), tl.zeros([M], tl.float32)
    rows = tl.zeros([M, PADDED], tl.float32)
    return largest, sums, sums, exponent, rows, rows


@triton.jit
def weighted_sums(state: tl.tuple, VALUE_WIDTH: tl.constexpr, APART: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Largest score [m], sum of the weights [m], both halves [m, P] of the sum of weighted values."""
    largest, total, offset, exponent, lo, hi = state
    if APART:
        total, offset = tl.sum(total, 1), tl.sum(offset, 1)
    if VALUE_WIDTH != "16":
        unit = power_of_two(exponent)
        total, offset = total * unit, offset[:, None]
        if APART:
            unit = unit[:, None]
        lo, hi = (lo + offset) * unit, (hi + offset) * unit
    return largest, total, lo, hi


@triton.jit
def turned_sums(lo: tl.tensor, hi: tl.tensor, TYPE: tl.constexpr, HALF: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """float32 rows [m, D] times a Hadamard rotation. A 16-bit TYPE takes them as sums of two bfloat16, which is closer than its rounding of the result."""
    if tl.float32 == TYPE:
        new_lo, new_hi = turned(lo, hi, lo, TYPE, HALF, HALF)
    else:
        high_lo, high_hi = lo.to(tl.bfloat16), hi.to(tl.bfloat16)
        new_lo, new_hi = turned(high_lo, high_hi, lo, tl.bfloat16, HALF, HALF)
        rest_lo, rest_hi = turned(lo - high_lo.to(tl.float32), hi - high_hi.to(tl.float32), lo, tl.bfloat16, HALF, HALF)
        new_lo, new_hi = new_lo + rest_lo, new_hi + rest_hi
    return new_lo, new_hi


@triton.jit
def finish(
    total: tl.tensor, lo: tl.tensor, hi: tl.tensor, out_ptr: tl.tensor, live: tl.tensor, rotation_ptr: tl.tensor,
    ROTATED: tl.constexpr, TURNED_AS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr,
) -> None:  # fmt: skip
    """Divide by the sum of the weights, turn back, write to out_ptr [m]."""
    total = tl.where(total == 0.0, 1.0, total)[:, None]  # of rows that are no query
    lo, hi = lo / total, hi / total
    dim = tl.arange(0, PADDED)
    if ROTATED and HALF == PADDED:
        lo, hi = turned_sums(lo, hi, TURNED_AS, HALF)
    if ROTATED and HALF != PADDED:
        for first in tl.range(0, 2 * HALF, TURNED, num_stages=1):  # a few dims at a time: the whole matrix would take all registers
            to = first + tl.arange(0, TURNED)[None, :]
            mask = (dim < HALF)[:, None] & (to < 2 * HALF)
            corner = rotation_ptr + dim[:, None] * (2 * HALF) + to
            some = tl.dot(lo, tl.load(corner, mask=mask, other=0.0), input_precision="tf32x3")
            some = tl.dot(hi, tl.load(corner + HALF * (2 * HALF), mask=mask, other=0.0), some, input_precision="tf32x3")
            tl.store(out_ptr[:, None] + to, some.to(out_ptr.dtype.element_ty), mask=live[:, None] & (to < 2 * HALF))
    else:
        mask = live[:, None] & (dim < HALF)[None, :]
        tl.store(out_ptr[:, None] + dim[None, :], lo.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptr[:, None] + dim[None, :] + HALF, hi.to(out_ptr.dtype.element_ty), mask=mask)


class TileShape(NamedTuple):
    """Tile sizes, warps and pipeline stages of a launch, and the most registers of a thread, where the compiler would take more than are of use."""

    M: int
    N: int
    warps: int
    stages: int
    registers: int | None = None


def facts(q: Tensor, kv: KVLayer) -> dict[str, object]:
    """The compile-time facts that both kinds of rows share."""
    kv_heads, slots = kv.key.shape[1:3]
    head_dim = q.shape[2]
    return {
        "GROUP": q.shape[1] // kv_heads, "HEADS": kv_heads, "SLOTS": slots, "KEY_WIDTH": kv.key_width, "VALUE_WIDTH": kv.value_width,
        "KEY_TYPE": operand_type(q, kv.key_width), "VALUE_TYPE": operand_type(q, kv.value_width), "ROTATED": kv.rotation is not None, "TURNED_AS": product_type(q),
        "HALF": head_dim // 2, "PADDED": padded_half(head_dim),
    }  # fmt: skip


def operand_type(q: Tensor, width: str) -> tl.dtype:
    """What stored numbers are multiplied as: the activations' type, float16 for quantised ones, which it holds exactly; float32 for float32."""
    own = product_type(q)
    return own if width == "16" or own is tl.float32 else tl.float16
