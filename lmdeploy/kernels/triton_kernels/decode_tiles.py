"""What decode attention over quantised caches does with a tile of keys, in one warp, or in several at once with a tile each.

As in `fragments.py`, a tensor has a number for each thread of the program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lmdeploy.kernels.triton_kernels.cache_read import SMALLEST, exponent_of
from lmdeploy.kernels.triton_kernels.fragments import (
    HALF,
    add_values,
    all_ones,
    keys_again,
    keys_at,
    largest_of_keys,
    products,
    scales_again,
    scales_at,
    turned_weights,
    values_again,
    values_at,
    word_at,
)

GROUP_KEYS = tl.constexpr(16)
#: query heads of a KV head that tensor cores take at once
MEMBERS = tl.constexpr(8)


@triton.jit
def tile_at(first: tl.tensor, oldest: tl.tensor, last: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """The nearest tile of N keys some of which are there: what is beyond is read from there, and then left out."""
    return tl.maximum(tl.minimum(first, last // N * N), oldest // N * N)


@triton.jit
def block_at(table_ptr: tl.tensor, tile: tl.tensor, SLOTS: tl.constexpr) -> tl.tensor:
    """Number of the block that each thread's tile is in."""
    return word_at(table_ptr + tile // SLOTS)


@triton.jit
def row_at(block: tl.tensor, tile: tl.tensor, head: tl.tensor, HEADS: tl.constexpr, SLOTS: tl.constexpr) -> tl.tensor:
    """int64: number of the cache row of a tile's first key."""
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
        middle = tl.full(w0.shape, 7.5 if WIDTH == "4" else 127.5, tl.float32)
        more_0, more_1 = tl.fma(_lost(w0) + _lost(w2), middle, more_0), tl.fma(_lost(w1) + _lost(w3), middle, more_1)
    totals = (total_0 + (p0 + p2), total_1 + (p1 + p3), offset_0 + more_0, offset_1 + more_1)
    return totals, turned_weights(w0, w1, w2, w3)


@triton.jit
def _zeros(THREADS: tl.constexpr) -> tl.tuple:
    zero = tl.zeros([THREADS], tl.float32)
    return zero, zero, zero, zero, zero, zero, zero, zero


@triton.jit
def nothing(THREADS: tl.constexpr) -> tuple[tl.tuple, tl.tuple, tl.tuple]:
    """Before the first key: largest scores and the exponent, sums of weights and of weighted offsets, sums of values. All sums are in units of 2^exponent."""
    zero, low = tl.zeros([THREADS], tl.float32), tl.full([THREADS], float("-inf"), tl.float32)
    return (low, low, tl.full([THREADS], SMALLEST, tl.int32)), (zero, zero, zero, zero), (_zeros(THREADS), _zeros(THREADS), _zeros(THREADS), _zeros(THREADS))


@triton.jit
def _keys(places: tl.tuple, row: tl.tensor, WIDTH: tl.constexpr) -> tuple[tl.tuple, tl.tuple]:
    """Words and scales of the 16 keys from cache row `row` on."""
    return keys_at(places[0] + row * (HALF if WIDTH == "4" else 2 * HALF), WIDTH), scales_at(places[1] + row)


@triton.jit
def _values(places: tl.tuple, row: tl.tensor, WIDTH: tl.constexpr) -> tuple[tl.tuple, tl.tuple]:
    """The same of values."""
    return values_at(places[2] + row * (HALF if WIDTH == "4" else 2 * HALF), WIDTH), scales_at(places[3] + row)


@triton.jit
def take_tile(
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
        sums = add_values(sums, (fade[0], fade[1], tl.full(fade[0].shape, 1, tl.int32)), p, loaded[6], VALUE_WIDTH)
        v2, v2_scales = _values(places, row + GROUP_KEYS, VALUE_WIDTH)
        following = k, k_scales, v, v_scales, k2, k2_scales, v2, v2_scales
    else:
        following = k, k_scales, v, v_scales  # type: ignore[assignment]
    return level, totals, sums, following


@triton.jit
def first_tile(places: tl.tuple, row: tl.tensor, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, GROUPS: tl.constexpr) -> tl.tuple:
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


@triton.jit
def _group_again(
    k: tl.tuple, k_scales: tl.tuple, v: tl.tuple, v_scales: tl.tuple, places: tl.tuple, row: tl.tensor, again: tl.tensor,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple, tl.tuple, tl.tuple]:  # fmt: skip
    k = keys_again(k, places[0] + row * (HALF if KEY_WIDTH == "4" else 2 * HALF), again, KEY_WIDTH)
    v = values_again(v, places[2] + row * (HALF if VALUE_WIDTH == "4" else 2 * HALF), again, VALUE_WIDTH)
    return k, scales_again(k_scales, places[1] + row, again), v, scales_again(v_scales, places[3] + row, again)


@triton.jit
def tile_again(
    loaded: tl.tuple, places: tl.tuple, row: tl.tensor, again: tl.tensor, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, GROUPS: tl.constexpr
) -> tl.tuple:  # fmt: skip
    """`first_tile` once more for threads where `again` is not 0; the others keep what they have."""
    k, k_scales, v, v_scales = _group_again(loaded[0], loaded[1], loaded[2], loaded[3], places, row, again, KEY_WIDTH, VALUE_WIDTH)
    if GROUPS == 2:
        k2, k2_scales, v2, v2_scales = _group_again(loaded[4], loaded[5], loaded[6], loaded[7], places, row + GROUP_KEYS, again, KEY_WIDTH, VALUE_WIDTH)
        loaded = k, k_scales, v, v_scales, k2, k2_scales, v2, v2_scales
    else:
        loaded = k, k_scales, v, v_scales
    return loaded


@triton.jit
def places_of(
    key_ptr: tl.tensor, key_scales_ptr: tl.tensor, value_ptr: tl.tensor, value_scales_ptr: tl.tensor, g: tl.tensor, t: tl.tensor,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Where a thread's part of the cache's first tile would be."""
    return (
        key_ptr + (g * (HALF if KEY_WIDTH == "4" else 2 * HALF) + t * 16), key_scales_ptr + g,
        value_ptr + (2 * t * (HALF if VALUE_WIDTH == "4" else 2 * HALF) + g * 8), value_scales_ptr + g,
    )  # fmt: skip


@triton.jit
def with_totals(words: tl.tuple, factor_0: tl.tensor, factor_1: tl.tensor, WIDTH: tl.constexpr) -> tl.tuple:
    """Queries as `take_tile` wants them: words, what products are multiplied by, and what offsets are, which is the product with a key of ones: the bits of a sum by
    Triton would depend on how a program holds them."""
    UNIT: tl.constexpr = 256.0 if WIDTH == "fp8" else 16777216.0
    one = tl.full(factor_0.shape, 0x38383838 if WIDTH == "fp8" else (0x11111111 if WIDTH == "4" else 0x01010101), tl.int32)
    if WIDTH == "4":
        ones = one, one, one, one, one, one, one, one
    else:
        ones = one, one, one, one, one, one, one, one, one, one, one, one, one, one, one, one  # type: ignore[assignment]
    c = products(ones, words, WIDTH)
    return words, factor_0, factor_1, c[0] * UNIT * factor_0, c[1] * UNIT * factor_1
