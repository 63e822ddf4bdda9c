"""`decode` over quantised caches of heads of 128 dims: a program is one warp, and no byte goes through shared memory (`fragments.py`).

What a byte of such a cache costs is instructions, not bandwidth: in a program that goes through shared memory each number is written there, read, converted,
written and read again. Here a word of a key or value is four to eight operands after as many operations on bits. A program takes consecutive pieces of a row's
keys, 16 keys at a time, and stores each piece's sums; the program that ends last joins a row's pieces. As in `decode`, where pieces begin depends on a row's
length alone, and so do its bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lmdeploy.inputs import AttentionMeta
from lmdeploy.kernels.triton_kernels.cache_read import SMALLEST, block_of, cache_rows, exponent_of, power_of_two, query_rows
from lmdeploy.kernels.triton_kernels.decode import PIECES, Rope, parts_of
from lmdeploy.kernels.triton_kernels.decode_pieces import cut, joined
from lmdeploy.kernels.triton_kernels.fragments import (
    HALF,
    add_values,
    all_ones,
    keys_at,
    largest_of_keys,
    products,
    scales_at,
    store_sums,
    sums_of_keys,
    turned_weights,
    values_at,
    word_at,
)
from lmdeploy.kernels.triton_kernels.kv_write import cache_arguments, roped_halves, store_row
from lmdeploy.kernels.triton_kernels.overlap import after_previous, overlaps
from lmdeploy.kernels.triton_kernels.rows import turned_128
from lmdeploy.kv_layer import KVLayer

Tensor = torch.Tensor
GROUP_KEYS = tl.constexpr(16)
#: keys of a piece at least, multiples of CUT, and programs of a launch, as in `decode`; a program here is a quarter of one there
PIECE, CUT, PROGRAMS, SHARES = 256, 128, 8192, 4
REGISTERS = 128  # of a thread over 8-bit caches: a third more programs on the chip (H200, 64 rows of 16,384 keys: 576 us for 593); fewer bits gain nothing
JOINED = 16  # rows of parts that a program joins at once: 64 registers a thread
#: query heads of a KV head that tensor cores take at once
MEMBERS = tl.constexpr(8)


@triton.jit
def _tile_at(first: tl.tensor, oldest: tl.tensor, last: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """The nearest tile of N keys some of which are there: what is beyond is read from there, and then left out."""
    return tl.maximum(tl.minimum(first, last // N * N), oldest // N * N)


@triton.jit
def _block_at(table_ptr: tl.tensor, tile: tl.tensor, SLOTS: tl.constexpr) -> tl.tensor:
    """[32]: number of the block that a tile is in."""
    return word_at(table_ptr + tile // SLOTS + tl.zeros([32], tl.int32))


@triton.jit
def _row_at(block: tl.tensor, tile: tl.tensor, head: tl.tensor, HEADS: tl.constexpr, SLOTS: tl.constexpr) -> tl.tensor:
    """int64 [32]: number of the cache row of a tile's first key."""
    return (block.to(tl.int64) * HEADS + head) * SLOTS + tile % SLOTS


@triton.jit
def _scale(word: tl.tensor) -> tl.tensor:
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def _offset(word: tl.tensor) -> tl.tensor:
    return (word & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _scores(
    k: tl.tuple, scales: tl.tuple, query: tl.tuple, first: tl.tensor, g: tl.tensor, oldest: tl.tensor, last: tl.tensor, WIDTH: tl.constexpr
) -> tl.tuple:  # fmt: skip
    """In base 2, of keys g and g + 8 and queries 2 t and 2 t + 1; -inf where a key is hidden."""
    q, factor_0, factor_1, sum_0, sum_1 = query
    UNIT: tl.constexpr = 256.0 if WIDTH == "fp8" else 16777216.0
    c = products(k, q, WIDTH)
    scale_a, scale_b, offset_a, offset_b = _scale(scales[0]) * UNIT, _scale(scales[1]) * UNIT, _offset(scales[0]), _offset(scales[1])
    a, b = first + g, first + g + 8
    seen_a, seen_b = (a <= last) & (a >= oldest), (b <= last) & (b >= oldest)
    return (
        tl.where(seen_a, tl.fma(c[0] * scale_a, factor_0, offset_a * sum_0), float("-inf")),
        tl.where(seen_a, tl.fma(c[1] * scale_a, factor_1, offset_a * sum_1), float("-inf")),
        tl.where(seen_b, tl.fma(c[2] * scale_b, factor_0, offset_b * sum_0), float("-inf")),
        tl.where(seen_b, tl.fma(c[3] * scale_b, factor_1, offset_b * sum_1), float("-inf")),
    )


@triton.jit
def _seen_scales(scales: tl.tuple, first: tl.tensor, g: tl.tensor, oldest: tl.tensor, last: tl.tensor) -> tl.tuple:
    """0 for hidden ones, which may be anything: their weights are 0."""
    a, b = first + g, first + g + 8
    return tl.where((a <= last) & (a >= oldest), scales[0], 0), tl.where((b <= last) & (b >= oldest), scales[1], 0)


@triton.jit
def _peaks(x: tl.tuple, scales: tl.tuple) -> tl.tuple:
    """Of a thread's scores, for either query, and of its values' scales."""
    return tl.maximum(x[0], x[2]), tl.maximum(x[1], x[3]), tl.maximum(_scale(scales[0]), _scale(scales[1]))


@triton.jit
def _advance(level: tl.tuple, peaks: tl.tuple) -> tuple[tl.tuple, tl.tuple, tl.tuple]:
    """The online softmax's step as in `attend_tile`, once the peaks are known: the new level, what exponents are taken less of, what all sums so far fade by."""
    largest_0, largest_1, exponent = level
    peak_0, peak_1, peak_scale = largest_of_keys(peaks[0], peaks[1], peaks[2])
    new_0, new_1, new_exponent = tl.maximum(largest_0, peak_0), tl.maximum(largest_1, peak_1), tl.maximum(exponent, exponent_of(peak_scale))
    base_0 = tl.where(new_0 == float("-inf"), 0.0, new_0) + new_exponent.to(tl.float32)
    base_1 = tl.where(new_1 == float("-inf"), 0.0, new_1) + new_exponent.to(tl.float32)
    fade_0, fade_1 = tl.exp2(largest_0 + exponent.to(tl.float32) - base_0), tl.exp2(largest_1 + exponent.to(tl.float32) - base_1)
    return (new_0, new_1, new_exponent), (base_0, base_1), (fade_0, fade_1, all_ones(fade_0, fade_1))


@triton.jit
def _lost(weight: tl.tensor) -> tl.tensor:
    """What a weight loses as a float16."""
    return weight - weight.to(tl.float16).to(tl.float32)


@triton.jit
def _weigh(totals: tl.tuple, x: tl.tuple, scales: tl.tuple, base: tl.tuple, ROTATED: tl.constexpr, WIDTH: tl.constexpr) -> tuple[tl.tuple, tl.tuple]:
    """Add the weights, and weighted offsets, of 16 keys; their weights times scales, for their values.

    What these lose as float16 is lost of all dims alike, for numbers of 8 and 4 bits are never negative, and a rotation gathers what all dims have in one. So there
    it is given back, times the middle number, with the offsets: what is left to lose is in proportion to how far numbers are from the middle, either way.
    """
    total_0, total_1, offset_0, offset_1 = totals
    scale_a, scale_b, middle_a, middle_b = _scale(scales[0]), _scale(scales[1]), _offset(scales[0]), _offset(scales[1])
    p0, p1, p2, p3 = tl.exp2(x[0] - base[0]), tl.exp2(x[1] - base[1]), tl.exp2(x[2] - base[0]), tl.exp2(x[3] - base[1])
    w0, w1, w2, w3 = p0 * scale_a, p1 * scale_a, p2 * scale_b, p3 * scale_b
    more_0, more_1 = p0 * middle_a + p2 * middle_b, p1 * middle_a + p3 * middle_b
    if ROTATED and WIDTH != "fp8":
        middle = tl.full([32], 7.5 if WIDTH == "4" else 127.5, tl.float32)
        more_0, more_1 = tl.fma(_lost(w0) + _lost(w2), middle, more_0), tl.fma(_lost(w1) + _lost(w3), middle, more_1)
    totals = (total_0 + (p0 + p2), total_1 + (p1 + p3), offset_0 + more_0, offset_1 + more_1)
    return totals, turned_weights(w0, w1, w2, w3)


@triton.jit
def _zeros() -> tl.tuple:
    zero = tl.zeros([32], tl.float32)
    return zero, zero, zero, zero, zero, zero, zero, zero


@triton.jit
def _nothing() -> tuple[tl.tuple, tl.tuple, tl.tuple]:
    """Before the first key: largest scores and the exponent, sums of weights and of weighted offsets, sums of values. All sums are in units of 2^exponent."""
    zero, low = tl.zeros([32], tl.float32), tl.full([32], float("-inf"), tl.float32)
    return (low, low, tl.full([32], SMALLEST, tl.int32)), (zero, zero, zero, zero), (_zeros(), _zeros(), _zeros(), _zeros())


@triton.jit
def _keep(
    level: tl.tuple, totals: tl.tuple, sums: tl.tuple, g: tl.tensor, t: tl.tensor, members: tl.tensor, sums_ptr: tl.tensor, parts_ptr: tl.tensor, piece: tl.tensor,
    PIECES: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """Store a piece's sums for `members` heads, the first of which has its parts at sums_ptr and parts_ptr."""
    largest_0, largest_1, exponent = level
    UNIT: tl.constexpr = 256.0 if WIDTH == "fp8" else 16777216.0
    UPPER_UNIT: tl.constexpr = 1048576.0 if WIDTH == "4" else UNIT  # the high half of a byte
    unit = power_of_two(exponent)
    total_0, total_1, offset_0, offset_1 = sums_of_keys(totals[0] * unit, totals[1] * unit, totals[2] * unit, totals[3] * unit)
    part_0, part_1, live_0, live_1 = 2 * t * PIECES + piece, (2 * t + 1) * PIECES + piece, 2 * t < members, 2 * t + 1 < members
    tl.store(sums_ptr + part_0 * 2, largest_0, mask=live_0 & (g == 0))
    tl.store(sums_ptr + part_0 * 2 + 1, total_0, mask=live_0 & (g == 0))
    tl.store(sums_ptr + part_1 * 2, largest_1, mask=live_1 & (g == 0))
    tl.store(sums_ptr + part_1 * 2 + 1, total_1, mask=live_1 & (g == 0))
    at_0, at_1 = parts_ptr + part_0 * (2 * HALF) + g * 8, parts_ptr + part_1 * (2 * HALF) + g * 8
    store_sums(at_0, live_0, sums, unit * UNIT, offset_0, False, False)
    store_sums(at_1, live_1, sums, unit * UNIT, offset_1, False, True)
    store_sums(at_0 + HALF, live_0, sums, unit * UPPER_UNIT, offset_0, True, False)
    store_sums(at_1 + HALF, live_1, sums, unit * UPPER_UNIT, offset_1, True, True)


@triton.jit
def _join(
    sums_ptr: tl.tensor, parts_ptr: tl.tensor, count: tl.tensor, members: tl.tensor, out_ptr: tl.tensor,
    ROTATED: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """Join the pieces of one row for `members` heads, divide by the sum of the weights, turn back, write to out_ptr."""
    total, lo, hi = joined(sums_ptr, parts_ptr, count, members, HALF, HALF, PIECES, ROWS, CHUNK)
    member, dim = tl.arange(0, ROWS), tl.arange(0, HALF)
    total = tl.where(total == 0.0, 1.0, total)[:, None]
    lo, hi = lo / total, hi / total
    if ROTATED:
        lo, hi = turned_128(lo, hi, ROWS)
    at, live = out_ptr + member[:, None] * (2 * HALF) + dim[None, :], (member < members)[:, None]
    tl.store(at, lo.to(out_ptr.dtype.element_ty), mask=live)
    tl.store(at + HALF, hi.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _arrive(
    counter_ptr: tl.tensor, count: tl.tensor, own: tl.tensor, sums_ptr: tl.tensor, parts_ptr: tl.tensor, members: tl.tensor, out_ptr: tl.tensor,
    ROTATED: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """`own` of a row's `count` pieces are kept; the program that keeps the last ones joins them all."""
    complete = count == 1
    if count > 1:
        complete = tl.atomic_add(counter_ptr, own, sem="acq_rel", scope="gpu") == count - own
        if complete:
            tl.store(counter_ptr, 0)  # for the next layer
    if complete:
        _join(sums_ptr, parts_ptr, count, members, out_ptr, ROTATED, PIECES, ROWS, CHUNK)


@triton.jit
def _write_new(
    k_ptr: tl.tensor, v_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, center_ptr: tl.tensor, place: tl.tensor, head: tl.tensor, table_ptr: tl.tensor,
    key_ptr: tl.tensor, key_scales_ptr: tl.tensor, value_ptr: tl.tensor, value_scales_ptr: tl.tensor,
    ROPE_HALF: tl.constexpr, CENTRED: tl.constexpr, ROTATED: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """Rotate the key at k_ptr, store it and the value at v_ptr as key `place` of the sequence: what `rope_write_kv` does, for one token and head."""
    DTYPE: tl.constexpr = k_ptr.dtype.element_ty
    dim, live = tl.arange(0, HALF)[None, :], tl.full([1], True, tl.int1)
    row = cache_rows(table_ptr, block_of(table_ptr, place, place + 1, SLOTS), place, live, head, HEADS, SLOTS, 1)
    lo, hi = roped_halves(k_ptr + tl.zeros([1, 1], tl.int32), cos_ptr, sin_ptr, dim < HALF, ROPE_HALF, HALF, HALF)
    if CENTRED:
        lo, hi = lo - tl.load(center_ptr + dim), hi - tl.load(center_ptr + HALF + dim)
    lo, hi = lo.to(DTYPE), hi.to(DTYPE)
    v_lo, v_hi = tl.load(v_ptr + dim), tl.load(v_ptr + HALF + dim)
    if ROTATED:
        k_turned, v_turned = turned_128(lo, hi, 1), turned_128(v_lo, v_hi, 1)
        lo, hi, v_lo, v_hi = k_turned[0].to(DTYPE), k_turned[1].to(DTYPE), v_turned[0].to(DTYPE), v_turned[1].to(DTYPE)
    store_row(lo.to(tl.float32), hi.to(tl.float32), key_ptr, key_scales_ptr, row, live, KEY_WIDTH, HALF, HALF)
    store_row(v_lo.to(tl.float32), v_hi.to(tl.float32), value_ptr, value_scales_ptr, row, live, VALUE_WIDTH, HALF, HALF)


@triton.jit
def _words(x: tl.tensor) -> tl.tuple:
    """float16 [8, 64] as eight [32]: of word w of the dims of thread 4 g + t the numbers 0 and 2, and 1 and 3, of query g."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    low, high = tl.split(tl.permute(tl.reshape(bits, (8, 4, 4, 2, 2)), (0, 1, 2, 4, 3)))
    even, odd = tl.split(tl.reshape((low & 0xFFFF) | (high << 16), (32, 4, 2)))
    even_02, even_13 = tl.split(tl.reshape(even, (32, 2, 2)))
    odd_02, odd_13 = tl.split(tl.reshape(odd, (32, 2, 2)))
    a0, a2 = tl.split(even_02)
    a1, a3 = tl.split(even_13)
    b0, b2 = tl.split(odd_02)
    b1, b3 = tl.split(odd_13)
    return a0, b0, a1, b1, a2, b2, a3, b3


@triton.jit
def _picked(x: tl.tensor, query: tl.tensor) -> tl.tensor:
    """float32 [8] at `query` [32]."""
    return tl.sum(tl.where(query[:, None] == tl.arange(0, MEMBERS)[None, :], x[None, :], 0.0), 1)


@triton.jit
def _as_query(lo: tl.tensor, hi: tl.tensor, scale: tl.tensor, t: tl.tensor, WIDTH: tl.constexpr) -> tl.tuple:
    """Rows [8, 64] as `_scores` wants them: words, and of queries 2 t and 2 t + 1 what products are multiplied by, and offsets."""
    lo, hi = lo.to(tl.float32), hi.to(tl.float32)
    unit = power_of_two(exponent_of(tl.maximum(tl.max(tl.abs(lo), 1), tl.max(tl.abs(hi), 1))))  # float16 holds them then
    lo, hi = (lo * (1.0 / unit)[:, None]).to(tl.float16), (hi * (1.0 / unit)[:, None]).to(tl.float16)
    factor = unit * (scale * 1.4426950408889634)
    total = (tl.sum(lo.to(tl.float32), 1) + tl.sum(hi.to(tl.float32), 1)) * factor
    if WIDTH == "4":
        hi = (hi.to(tl.float32) * 0.0625).to(tl.float16)
    a, b = _words(lo), _words(hi)
    q = (a[0], a[1], b[0], b[1], a[2], a[3], b[2], b[3], a[4], a[5], b[4], b[5], a[6], a[7], b[6], b[7])
    return q, _picked(factor, 2 * t), _picked(factor, 2 * t + 1), _picked(total, 2 * t), _picked(total, 2 * t + 1)


@triton.jit
def _new_queries(
    row_ptr: tl.tensor, live: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, factor_ptr: tl.tensor,
    SCALED: tl.constexpr, ROPE_HALF: tl.constexpr, ROTATED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Both halves [8, 64] of a token's query rows at row_ptr [8], rotated, scaled, turned and rounded as `rope_write_kv` does."""
    DTYPE: tl.constexpr = row_ptr.dtype.element_ty
    mask = tl.broadcast_to(live[:, None], (MEMBERS, HALF))
    lo, hi = roped_halves(row_ptr[:, None], cos_ptr, sin_ptr, mask, ROPE_HALF, HALF, HALF)
    if SCALED:
        factor = tl.load(factor_ptr)
        lo, hi = lo * factor, hi * factor
    lo, hi = lo.to(DTYPE), hi.to(DTYPE)
    if ROTATED:
        turned = turned_128(lo, hi, MEMBERS)
        lo, hi = turned[0].to(DTYPE), turned[1].to(DTYPE)
    return lo, hi


@triton.jit
def _keys(places: tl.tuple, row: tl.tensor, WIDTH: tl.constexpr) -> tuple[tl.tuple, tl.tuple]:
    """Words and scales of the 16 keys from cache row `row` on."""
    return keys_at(places[0] + row * (HALF if WIDTH == "4" else 2 * HALF), WIDTH), scales_at(places[1] + row)


@triton.jit
def _values(places: tl.tuple, row: tl.tensor, WIDTH: tl.constexpr) -> tuple[tl.tuple, tl.tuple]:
    """The same of values."""
    return values_at(places[2] + row * (HALF if WIDTH == "4" else 2 * HALF), WIDTH), scales_at(places[3] + row)


@triton.jit
def _tile(
    level: tl.tuple, totals: tl.tuple, sums: tl.tuple, loaded: tl.tuple, query: tl.tuple, places: tl.tuple, row: tl.tensor,
    first: tl.tensor, g: tl.tensor, oldest: tl.tensor, last: tl.tensor, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, GROUPS: tl.constexpr, ROTATED: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple, tl.tuple, tl.tuple]:  # fmt: skip
    """A tile of GROUPS (1 or 2) groups of 16 keys, which is loaded. Keys of the next one, from `row` on, are asked for as soon as these are used up, values likewise."""
    x = _scores(loaded[0], loaded[1], query, first, g, oldest, last, KEY_WIDTH)
    k, k_scales = _keys(places, row, KEY_WIDTH)
    scales = _seen_scales(loaded[3], first, g, oldest, last)
    peaks = _peaks(x, scales)
    if GROUPS == 2:
        y = _scores(loaded[4], loaded[5], query, first, g + GROUP_KEYS, oldest, last, KEY_WIDTH)
        k2, k2_scales = _keys(places, row + GROUP_KEYS, KEY_WIDTH)
        scales2 = _seen_scales(loaded[7], first, g + GROUP_KEYS, oldest, last)
        more = _peaks(y, scales2)
        peaks = tl.maximum(peaks[0], more[0]), tl.maximum(peaks[1], more[1]), tl.maximum(peaks[2], more[2])
    level, base, fade = _advance(level, peaks)
    totals = totals[0] * fade[0], totals[1] * fade[1], totals[2] * fade[0], totals[3] * fade[1]
    totals, p = _weigh(totals, x, scales, base, ROTATED, VALUE_WIDTH)
    sums = add_values(sums, fade, p, loaded[2], VALUE_WIDTH)
    v, v_scales = _values(places, row, VALUE_WIDTH)
    if GROUPS == 2:
        totals, p = _weigh(totals, y, scales2, base, ROTATED, VALUE_WIDTH)
        sums = add_values(sums, (fade[0], fade[1], tl.full([32], 1, tl.int32)), p, loaded[6], VALUE_WIDTH)
        v2, v2_scales = _values(places, row + GROUP_KEYS, VALUE_WIDTH)
        following = k, k_scales, v, v_scales, k2, k2_scales, v2, v2_scales
    else:
        following = k, k_scales, v, v_scales  # type: ignore[assignment]
    return level, totals, sums, following


@triton.jit
def _first_tile(places: tl.tuple, row: tl.tensor, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, GROUPS: tl.constexpr) -> tl.tuple:
    """What `_tile` wants to be loaded."""
    k, k_scales = _keys(places, row, KEY_WIDTH)
    v, v_scales = _values(places, row, VALUE_WIDTH)
    if GROUPS == 2:
        k2, k2_scales = _keys(places, row + GROUP_KEYS, KEY_WIDTH)
        v2, v2_scales = _values(places, row + GROUP_KEYS, VALUE_WIDTH)
        loaded = k, k_scales, v, v_scales, k2, k2_scales, v2, v2_scales
    else:
        loaded = k, k_scales, v, v_scales  # type: ignore[assignment]
    return loaded


@triton.jit(do_not_specialize=["window", "rows", "shares", "table_stride"])
def _direct_decode_kernel(
    q_ptr: tl.tensor, out_ptr: tl.tensor, key_ptr: tl.tensor, key_scales_ptr: tl.tensor, value_ptr: tl.tensor, value_scales_ptr: tl.tensor,
    table_ptr: tl.tensor, kv_lens_ptr: tl.tensor, counters_ptr: tl.tensor, sums_ptr: tl.tensor, parts_ptr: tl.tensor,
    k_ptr: tl.tensor, v_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, factor_ptr: tl.tensor, center_ptr: tl.tensor,
    scale: tl.tensor, window: tl.tensor, rows: tl.tensor, shares: tl.tensor,
    q_stride: tl.tensor, q_head_stride: tl.tensor, k_stride: tl.tensor, k_head_stride: tl.tensor, v_stride: tl.tensor, v_head_stride: tl.tensor,
    angle_stride: tl.tensor, out_stride: tl.tensor, table_stride: tl.tensor,
    GROUP: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, ROTATED: tl.constexpr,
    FUSED: tl.constexpr, ROPE_HALF: tl.constexpr, SCALED: tl.constexpr, CENTRED: tl.constexpr,
    PIECES: tl.constexpr, PIECE: tl.constexpr, CUT: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, GROUPS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Consecutive pieces of one row's keys, for 8 heads of one KV head: the pieces are shared out among `shares` programs, and many find none left."""
    after_previous(PDL)
    TILES: tl.constexpr = (GROUP + MEMBERS - 1) // MEMBERS
    place, sequence, share = tl.program_id(0), tl.program_id(1) % rows, tl.program_id(1) // rows
    head, first_member = place // TILES, place % TILES * MEMBERS
    members = tl.minimum(GROUP - first_member, MEMBERS)
    N: tl.constexpr = GROUPS * GROUP_KEYS
    sequence64 = sequence.to(tl.int64)
    table_row = table_ptr + sequence64 * table_stride
    kv_len = tl.load(kv_lens_ptr + sequence)
    oldest, begin, size, count = cut(kv_len, window, PIECES, PIECE, CUT)
    each = tl.cdiv(count, shares)
    piece, last_piece = share * each, tl.minimum(share * each + each, count)
    if piece < last_piece:
        end, done = tl.minimum(begin + last_piece * size, kv_len), begin + piece * size + size
        start, last = done - size, kv_len - 1
        thread = tl.arange(0, 32)
        g, t = thread // 4, thread % 4
        tile, next_tile = _tile_at(start, oldest, last, N), _tile_at(start + N, oldest, last, N)
        block, next_block = _block_at(table_row, tile, SLOTS), _block_at(table_row, next_tile, SLOTS)
        member = tl.arange(0, MEMBERS)
        live, query_head = member < members, head * GROUP + first_member + member
        row_ptr = q_ptr + sequence64 * q_stride + query_head * q_head_stride
        if FUSED:
            cos_row, sin_row = cos_ptr + sequence64 * angle_stride, sin_ptr + sequence64 * angle_stride
            lo, hi = _new_queries(row_ptr, live, cos_row, sin_row, factor_ptr + sequence, SCALED, ROPE_HALF, ROTATED)
            if last_piece == count:
                _write_new(
                    k_ptr + sequence64 * k_stride + head * k_head_stride, v_ptr + sequence64 * v_stride + head * v_head_stride, cos_row, sin_row,
                    center_ptr + head * (2 * HALF), last, head, table_row, key_ptr, key_scales_ptr, value_ptr, value_scales_ptr,
                    ROPE_HALF, CENTRED, ROTATED, HEADS, SLOTS, KEY_WIDTH, VALUE_WIDTH,
                )  # fmt: skip
                tl.debug_barrier()  # what other threads wrote is read below
        else:
            lo, hi = query_rows(row_ptr, live, HALF, HALF)
        places = (
            key_ptr + (g * (HALF if KEY_WIDTH == "4" else 2 * HALF) + t * 16), key_scales_ptr + g,
            value_ptr + (2 * t * (HALF if VALUE_WIDTH == "4" else 2 * HALF) + g * 8), value_scales_ptr + g,
        )  # fmt: skip
        loaded = _first_tile(places, _row_at(block, tile, head, HEADS, SLOTS), KEY_WIDTH, VALUE_WIDTH, GROUPS)
        query = _as_query(lo, hi, scale, t, KEY_WIDTH)
        level, totals, sums = _nothing()
        first_part = (sequence64 * (HEADS * GROUP) + head * GROUP + first_member) * PIECES
        sums_ptr, parts_ptr = sums_ptr + first_part * 2, parts_ptr + first_part * (2 * HALF)
        for first in range(start, end, N):
            row = _row_at(next_block, next_tile, head, HEADS, SLOTS)
            next_tile = _tile_at(first + 2 * N, oldest, last, N)
            next_block = _block_at(table_row, next_tile, SLOTS)
            level, totals, sums, loaded = _tile(
                level, totals, sums, loaded, query, places, row, first, g, oldest, last, KEY_WIDTH, VALUE_WIDTH, GROUPS, ROTATED
            )  # fmt: skip
            if (first + N >= done) & (first + N < end):  # the last piece is kept below
                _keep(level, totals, sums, g, t, members, sums_ptr, parts_ptr, piece, PIECES, VALUE_WIDTH)
                level, totals, sums = _nothing()
                piece, done = piece + 1, done + size
        _keep(level, totals, sums, g, t, members, sums_ptr, parts_ptr, piece, PIECES, VALUE_WIDTH)
        tl.debug_barrier()  # every thread's parts are written before this program counts as arrived
        row_out = out_ptr + sequence64 * out_stride + (head * GROUP + first_member) * (2 * HALF)
        own = last_piece - share * each
        _arrive(counters_ptr + sequence * (HEADS * TILES) + place, count, own, sums_ptr, parts_ptr, members, row_out, ROTATED, PIECES, ROWS, CHUNK)


def serves(q: Tensor, kv: KVLayer) -> bool:
    """Whether a layer's decoding is computed here."""
    quantised = kv.key_width != "16" != kv.value_width
    return quantised and q.is_cuda and q.shape[2] == 2 * HALF.value and q.dtype is not torch.float32 and kv.key.shape[2] % GROUP_KEYS.value == 0


def groups_of(kv: KVLayer) -> int:
    """Groups of a tile, which is in one block: registers hold two of 4-bit keys and values, a third less instructions a key."""
    return 2 if kv.key_width == kv.value_width == "4" and kv.key.shape[2] % (2 * GROUP_KEYS.value) == 0 else 1


def decode(q: Tensor, kv: KVLayer, meta: AttentionMeta, scale: float, window: int, out: Tensor, rope: Rope | None = None) -> None:
    """As `decode.decode`."""
    rows, heads, (kv_heads, slots) = meta.num_decode, q.shape[1], kv.key.shape[1:3]
    group, kept, new, pdl = heads // kv_heads, parts_of(q, meta), rope or Rope(q, q, q, q, None), overlaps(q.device)
    places, joined = kv_heads * triton.cdiv(group, MEMBERS.value), min(MEMBERS.value, int(triton.next_power_of_2(group)))
    shares = min(PIECES, max(SHARES, PROGRAMS // (rows * places)))
    _direct_decode_kernel[(places, rows * shares)](
        q, out, *cache_arguments(kv, q), meta.block_table, meta.kv_lens, *kept,
        new.k, new.v, new.cos, new.sin, new.q_scale if new.q_scale is not None else q, kv.key_center if kv.key_center is not None else q,
        scale, window, rows, shares, q.stride(0), q.stride(1), new.k.stride(0), new.k.stride(1), new.v.stride(0), new.v.stride(1), new.cos.stride(0),
        out.stride(0), meta.block_table.stride(0),
        GROUP=group, HEADS=kv_heads, SLOTS=slots, KEY_WIDTH=kv.key_width, VALUE_WIDTH=kv.value_width, ROTATED=kv.rotation is not None,
        FUSED=rope is not None, ROPE_HALF=new.cos.shape[1] if rope is not None else 0, SCALED=new.q_scale is not None, CENTRED=kv.key_center is not None,
        PIECES=PIECES, PIECE=PIECE, CUT=CUT, ROWS=joined, CHUNK=JOINED // joined, GROUPS=groups_of(kv), PDL=pdl, launch_pdl=pdl, num_warps=1,
        maxnreg=REGISTERS if kv.key_width == kv.value_width == "8" else None, enable_fp_fusion=False,
    )  # fmt: skip
