"""`decode_direct` for few rows: a program has a warp for each part of a piece. They begin to read before the kernel before has ended, and meet once a piece.

A row's bits are not those of `decode_direct`, whose programs of one warp sum a piece's keys one after the other, as products of few rows and of many have their own. All
keys but the new one are of earlier steps, and may be read early (`overlap.py`); a warp whose first tile holds the new one reads that tile once more when the program has stored it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lmdeploy.kernels.triton_kernels.cache_read import exponent_of, power_of_two, query_rows
from lmdeploy.kernels.triton_kernels.decode_parts import PARTS, gathered, joined, turned_threads
from lmdeploy.kernels.triton_kernels.decode_pieces import cut
from lmdeploy.kernels.triton_kernels.decode_tiles import (
    GROUP_KEYS,
    MEMBERS,
    block_at,
    first_tile,
    nothing,
    places_of,
    row_at,
    take_tile,
    tile_again,
    tile_at,
    with_totals,
)
from lmdeploy.kernels.triton_kernels.fragments import HALF
from lmdeploy.kernels.triton_kernels.kv_write import roped_halves
from lmdeploy.kernels.triton_kernels.rows import as_word, row_scales, to_fp8, to_levels

THREADS = tl.constexpr(32 * PARTS.value)
#: a word of two float16 (lower and upper half) each of two dims -> the lower ones, the upper ones
PAIRS = tl.constexpr("prmt.b32 $0, $2, $3, 0x5410;\nprmt.b32 $1, $2, $3, 0x7632;")
TWO_WORDS = tl.constexpr((tl.int32, tl.int32))


@triton.jit
def _turned_rows(lo: tl.tensor, hi: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """`turned` of [8, 64] by exchanges within warps."""
    a, b = tl.split(tl.reshape(lo.to(tl.float32), (THREADS, 2)))
    c, d = tl.split(tl.reshape(hi.to(tl.float32), (THREADS, 2)))
    a, b, c, d = turned_threads(a, b, c, d)
    return tl.reshape(tl.join(a, b), (MEMBERS, HALF)), tl.reshape(tl.join(c, d), (MEMBERS, HALF))


@triton.jit
def _new_rows(
    q_at: tl.tensor, k_at: tl.tensor, v_at: tl.tensor, live: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, factor_ptr: tl.tensor, center_ptr: tl.tensor,
    ROPE_HALF: tl.constexpr, SCALED: tl.constexpr, CENTRED: tl.constexpr, ROTATED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Both halves [8, 64] of a token's query rows, and of its key (row 0) and value (row 1), rotated, scaled, centred, turned and rounded as `rope_write_kv` does."""
    DTYPE: tl.constexpr = q_at.dtype.element_ty
    row, dim = tl.arange(0, MEMBERS)[:, None], tl.arange(0, HALF)[None, :]
    same, every = tl.zeros([MEMBERS, 1], tl.int32), (row >= 0) & (dim >= 0)
    key, value = every & (row == 0), every & (row == 1)
    lo, hi = roped_halves(q_at[:, None], cos_ptr, sin_ptr, every & live[:, None], ROPE_HALF, HALF, HALF)
    k_lo, k_hi = roped_halves(k_at + same, cos_ptr, sin_ptr, key, ROPE_HALF, HALF, HALF)
    v_lo, v_hi = tl.load(v_at + same + dim, mask=value, other=0.0), tl.load(v_at + same + dim + HALF, mask=value, other=0.0)
    if SCALED:
        factor = tl.load(factor_ptr)
        lo, hi = lo * factor, hi * factor
    if CENTRED:
        k_lo, k_hi = k_lo - tl.load(center_ptr + dim), k_hi - tl.load(center_ptr + HALF + dim)
    lo, hi = lo.to(DTYPE), hi.to(DTYPE)
    x_lo, x_hi = tl.where(key, k_lo.to(DTYPE), v_lo), tl.where(key, k_hi.to(DTYPE), v_hi)
    if ROTATED:
        q_turned, x_turned = _turned_rows(lo, hi), _turned_rows(x_lo, x_hi)
        lo, hi, x_lo, x_hi = q_turned[0].to(DTYPE), q_turned[1].to(DTYPE), x_turned[0].to(DTYPE), x_turned[1].to(DTYPE)
    return lo, hi, x_lo, x_hi


@triton.jit
def _quantised(lo: tl.tensor, hi: tl.tensor, WIDTH: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Of rows [8, 64]: the word of scale and offset [8], and numbers of the lower half with those of the upper one 8 bits higher."""
    LEVELS: tl.constexpr = 255.0 if WIDTH == "8" else 15.0
    lo, hi = lo.to(tl.float32), hi.to(tl.float32)
    scale, offset = row_scales(lo, hi, tl.arange(0, HALF) < HALF, WIDTH, LEVELS)
    if WIDTH == "fp8":
        spread = tl.broadcast_to(scale[:, None], lo.shape)
        lo_number, hi_number = to_fp8(tl.div_rn(lo, spread)), to_fp8(tl.div_rn(hi, spread))
    else:
        lo_number, hi_number = to_levels(lo, scale, offset, LEVELS), to_levels(hi, scale, offset, LEVELS)
    return as_word(scale, offset), lo_number | (hi_number << 8)


@triton.jit
def _put(
    numbers: tl.tensor, word: tl.tensor, cache_ptr: tl.tensor, scales_ptr: tl.tensor, cache_row: tl.tensor, ROW: tl.constexpr, WIDTH: tl.constexpr
) -> None:
    """Row ROW of what `_quantised` made to row `cache_row` of a cache."""
    row, dim = tl.arange(0, MEMBERS), tl.arange(0, HALF)[None, :]
    mask = (row == ROW)[:, None] & (dim >= 0)
    at = cache_ptr + cache_row * (HALF if WIDTH == "4" else 2 * HALF) + tl.zeros([MEMBERS, 1], tl.int32) + dim
    tl.store(scales_ptr + cache_row + row * 0, word, mask=row == ROW)
    if WIDTH == "4":
        tl.store(at, ((numbers & 15) | (numbers >> 4)).to(tl.uint8), mask=mask)
    else:
        tl.store(at, (numbers & 255).to(tl.uint8), mask=mask)
        tl.store(at + HALF, (numbers >> 8).to(tl.uint8), mask=mask)


@triton.jit
def _for_threads(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """[8] of queries -> of queries 2 t and 2 t + 1 of each thread."""
    even, odd = tl.split(tl.reshape(tl.broadcast_to(x[None, :], (PARTS * 8, 8)), (THREADS, 2)))
    return even, odd


@triton.jit
def _paired(a: tl.tensor, b: tl.tensor) -> tl.tuple:
    return tl.inline_asm_elementwise(PAIRS, "=&r,=&r,r,r", [a, b], dtype=TWO_WORDS, is_pure=True, pack=1)


@triton.jit
def _query_words(lo: tl.tensor, hi: tl.tensor, WIDTH: tl.constexpr) -> tl.tuple:
    """What `products` takes: of each four dims of a thread's 16 the lower halves' 0 and 2, 1 and 3, the same of the upper halves."""
    if WIDTH == "4":
        hi = (hi.to(tl.float32) * 0.0625).to(tl.float16)
    word = (lo.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (hi.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    word = tl.reshape(tl.broadcast_to(tl.reshape(word, (32, 16))[None, :, :], (PARTS, 32, 16)), (THREADS, 2, 2, 2, 2))
    even, odd = tl.split(word)  # dims 0, 2, .. of a thread's 16, dims 1, 3, ..
    w0, w2 = tl.split(even)  # dims 0, 4, 8, 12; dims 2, 6, 10, 14
    w1, w3 = tl.split(odd)
    w0, w4 = tl.split(tl.permute(w0, (0, 2, 1)))  # words 0 and 1; words 2 and 3 behind
    w1, w5 = tl.split(tl.permute(w1, (0, 2, 1)))
    w2, w6 = tl.split(tl.permute(w2, (0, 2, 1)))
    w3, w7 = tl.split(tl.permute(w3, (0, 2, 1)))
    a0, b0 = tl.split(w0)
    a1, b1 = tl.split(w1)
    a2, b2 = tl.split(w2)
    a3, b3 = tl.split(w3)
    c0, d0 = tl.split(w4)
    c1, d1 = tl.split(w5)
    c2, d2 = tl.split(w6)
    c3, d3 = tl.split(w7)
    p, q, r, s = _paired(a0, a2), _paired(a1, a3), _paired(b0, b2), _paired(b1, b3)
    t, u, v, w = _paired(c0, c2), _paired(c1, c3), _paired(d0, d2), _paired(d1, d3)
    return p[0], q[0], p[1], q[1], r[0], s[0], r[1], s[1], t[0], u[0], t[1], u[1], v[0], w[0], v[1], w[1]


@triton.jit
def _as_query(lo: tl.tensor, hi: tl.tensor, scale: tl.tensor, WIDTH: tl.constexpr) -> tl.tuple:
    """Rows [8, 64] as `take_tile` wants them."""
    lo, hi = lo.to(tl.float32), hi.to(tl.float32)
    unit = power_of_two(exponent_of(tl.max(tl.maximum(tl.abs(lo), tl.abs(hi)), 1)))  # float16 holds them then
    lo, hi = (lo * (1.0 / unit)[:, None]).to(tl.float16), (hi * (1.0 / unit)[:, None]).to(tl.float16)
    factor_0, factor_1 = _for_threads(unit * (scale * 1.4426950408889634))
    return with_totals(_query_words(lo, hi, WIDTH), factor_0, factor_1, WIDTH)


@triton.jit
def keep_piece(
    state: tl.tuple, sums_ptr: tl.tensor, parts_ptr: tl.tensor, piece: tl.tensor, thread: tl.tensor, members: tl.tensor, PIECES: tl.constexpr
) -> None:
    """Store a piece's sums for `members` heads, the first of which has its parts at sums_ptr and parts_ptr."""
    peak, total, a, b, c, d = state
    member, lane = thread // 32, thread % 32
    part, live = member * PIECES + piece, member < members
    tl.store(sums_ptr + part * 2, peak, mask=live & (lane == 0))
    tl.store(sums_ptr + part * 2 + 1, total, mask=live & (lane == 0))
    at = parts_ptr + part * (2 * HALF) + 2 * lane
    tl.store(at, a, mask=live)
    tl.store(at + 1, b, mask=live)
    tl.store(at + HALF, c, mask=live)
    tl.store(at + HALF + 1, d, mask=live)


@triton.jit
def end_row(
    state: tl.tuple, out_ptr: tl.tensor, thread: tl.tensor, members: tl.tensor, ROTATED: tl.constexpr
) -> None:  # fmt: skip
    """Divide by the sum of the weights, turn back, write the first `members` rows to out_ptr."""
    _, total, a, b, c, d = state
    member, lane = thread // 32, thread % 32
    total = tl.where(total == 0.0, 1.0, total)
    a, b, c, d = a / total, b / total, c / total, d / total
    if ROTATED:
        a, b, c, d = turned_threads(a, b, c, d)
    TYPE: tl.constexpr = out_ptr.dtype.element_ty
    at, live = out_ptr + member * (2 * HALF) + 2 * lane, member < members
    tl.store(at, a.to(TYPE), mask=live)
    tl.store(at + 1, b.to(TYPE), mask=live)
    tl.store(at + HALF, c.to(TYPE), mask=live)
    tl.store(at + HALF + 1, d.to(TYPE), mask=live)


@triton.jit
def arrive(
    counter_ptr: tl.tensor, count: tl.tensor, own: tl.tensor, sums_ptr: tl.tensor, parts_ptr: tl.tensor, thread: tl.tensor, members: tl.tensor, out_ptr: tl.tensor,
    ROTATED: tl.constexpr, PIECES: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """`own` of a row's `count` pieces are kept; the program that keeps the last ones joins them all."""
    tl.debug_barrier()  # every thread's parts are written before this program counts as arrived
    if tl.atomic_add(counter_ptr, own, sem="acq_rel", scope="gpu") == count - own:
        tl.store(counter_ptr, 0)  # for the next layer
        member = thread // 32
        at, live = parts_ptr + member * (PIECES * 2 * HALF) + thread % 32 * 2, member < members
        total, a, b, c, d = joined(sums_ptr + member * (PIECES * 2), at, live, count, CHUNK)
        end_row((total, total, a, b, c, d), out_ptr, thread, members, ROTATED)


@triton.jit
def _store_new(
    lo: tl.tensor, hi: tl.tensor, key_ptr: tl.tensor, key_scales_ptr: tl.tensor, value_ptr: tl.tensor, value_scales_ptr: tl.tensor, cache_row: tl.tensor,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """Key and value of `_new_rows` to row `cache_row` of the cache, where all threads can read them then."""
    words, numbers = _quantised(lo, hi, KEY_WIDTH)
    _put(numbers, words, key_ptr, key_scales_ptr, cache_row, 0, KEY_WIDTH)
    if VALUE_WIDTH != KEY_WIDTH:
        words, numbers = _quantised(lo, hi, VALUE_WIDTH)
    _put(numbers, words, value_ptr, value_scales_ptr, cache_row, 1, VALUE_WIDTH)
    tl.debug_barrier()


@triton.jit
def _after(first: tl.tensor, start: tl.tensor, size: tl.tensor, part: tl.tensor, OWN: tl.constexpr) -> tl.tensor:
    """Where a warp's tile behind the one at `first` begins: in its part of the piece at `start`, or of the next piece."""
    return tl.where((first + OWN - start) % part == 0, first + OWN - part + size, first + OWN)


@triton.jit
def _no_sums() -> tl.tuple:
    zero = tl.zeros([THREADS], tl.float32)
    return zero, zero, zero, zero, zero, zero


@triton.jit
def _take_part(
    loaded: tl.tuple, following: tl.tuple, query: tl.tuple, places: tl.tuple, start: tl.tensor, size: tl.tensor, kv_len: tl.tensor, oldest: tl.tensor,
    head: tl.tensor, table_row: tl.tensor,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr, GROUPS: tl.constexpr, ROTATED: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple, tl.tuple, tl.tuple, tl.tuple]:  # fmt: skip
    """Each warp's part of the `size` keys from `start` on, whose first tile is loaded; `following`: where the tile behind that begins, and its block."""
    OWN: tl.constexpr = GROUPS * GROUP_KEYS
    thread, last, part = tl.arange(0, THREADS), kv_len - 1, size // PARTS
    next_tile, next_block = following
    level, totals, sums = nothing(THREADS)
    for done in range(0, tl.minimum(part, kv_len - start), OWN):
        first = start + thread // 32 * part + done
        row = row_at(next_block, next_tile, head, HEADS, SLOTS)
        next_tile = tile_at(_after(_after(first, start, size, part, OWN), start, size, part, OWN), oldest, last, OWN)
        next_block = block_at(table_row, next_tile, SLOTS)
        level, totals, sums, loaded = take_tile(
            level, totals, sums, loaded, query, places, row, first, thread % 32 // 4, oldest, last, KEY_WIDTH, VALUE_WIDTH, GROUPS, ROTATED
        )  # fmt: skip
    return level, totals, sums, loaded, (next_tile, next_block)


@triton.jit(do_not_specialize=["window", "rows", "shares", "table_stride"])
def shared_decode_kernel(
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
    """As `_direct_decode_kernel`. Without FUSED the cache's newest key is the kernel before's."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if not FUSED:
            tl.extra.cuda.gdc_wait()
    TILES: tl.constexpr = (GROUP + MEMBERS - 1) // MEMBERS
    OWN: tl.constexpr = GROUPS * GROUP_KEYS
    place, sequence, share = tl.program_id(0), tl.program_id(1) % rows, tl.program_id(1) // rows
    head, first_member = place // TILES, place % TILES * MEMBERS
    members, sequence64 = tl.minimum(GROUP - first_member, MEMBERS), sequence.to(tl.int64)
    table_row = table_ptr + sequence64 * table_stride
    kv_len = tl.load(kv_lens_ptr + sequence)
    oldest, begin, size, count = cut(kv_len, window, PIECES, PIECE, CUT)
    each = tl.cdiv(count, shares)
    piece, last_piece = share * each, tl.minimum(share * each + each, count)
    if piece < last_piece:
        last, part, start, thread = kv_len - 1, size // PARTS, begin + piece * size, tl.arange(0, THREADS)
        warp, g, t = thread // 32, thread % 32 // 4, thread % 4
        places = places_of(key_ptr, key_scales_ptr, value_ptr, value_scales_ptr, g, t, KEY_WIDTH, VALUE_WIDTH)
        first = start + warp * part
        tile, next_tile = tile_at(first, oldest, last, OWN), tile_at(_after(first, start, size, part, OWN), oldest, last, OWN)
        block, following = block_at(table_row, tile, SLOTS), (next_tile, block_at(table_row, next_tile, SLOTS))
        first_row = row_at(block, tile, head, HEADS, SLOTS)
        loaded = first_tile(places, first_row, KEY_WIDTH, VALUE_WIDTH, GROUPS)
        new_block = tl.load(table_row + last // SLOTS)
        if PDL and FUSED:
            tl.extra.cuda.gdc_wait()
        member, live = tl.arange(0, MEMBERS), tl.arange(0, MEMBERS) < members
        q_at = q_ptr + sequence64 * q_stride + (head * GROUP + first_member + member) * q_head_stride
        if FUSED:
            q_lo, q_hi, x_lo, x_hi = _new_rows(
                q_at, k_ptr + sequence64 * k_stride + head * k_head_stride, v_ptr + sequence64 * v_stride + head * v_head_stride, live,
                cos_ptr + sequence64 * angle_stride, sin_ptr + sequence64 * angle_stride, factor_ptr + sequence, center_ptr + head * (2 * HALF),
                ROPE_HALF, SCALED, CENTRED, ROTATED,
            )  # fmt: skip
            if last_piece == count:
                new_row = (new_block.to(tl.int64) * HEADS + head) * SLOTS + last % SLOTS
                _store_new(x_lo, x_hi, key_ptr, key_scales_ptr, value_ptr, value_scales_ptr, new_row, KEY_WIDTH, VALUE_WIDTH)
                again = (last >= tile) & (last < tile + OWN)
                loaded = tile_again(loaded, places, first_row, again.to(tl.int32), KEY_WIDTH, VALUE_WIDTH, GROUPS)
        else:
            q_lo, q_hi = query_rows(q_at, live, HALF, HALF)
        query = _as_query(q_lo, q_hi, scale, KEY_WIDTH)
        first_part = (sequence64 * (HEADS * GROUP) + head * GROUP + first_member) * PIECES
        sums_ptr, parts_ptr = sums_ptr + first_part * 2, parts_ptr + first_part * (2 * HALF)
        row_out = out_ptr + sequence64 * out_stride + (head * GROUP + first_member) * (2 * HALF)
        state = _no_sums()
        for current in range(piece, last_piece):
            level, totals, sums, loaded, following = _take_part(
                loaded, following, query, places, begin + current * size, size, kv_len, oldest, head, table_row,
                KEY_WIDTH, VALUE_WIDTH, HEADS, SLOTS, GROUPS, ROTATED,
            )  # fmt: skip
            state = gathered(level, totals, sums, VALUE_WIDTH)
            keep_piece(state, sums_ptr, parts_ptr, current, thread, tl.where(count > 1, members, 0), PIECES)
        if count > 1:
            counter_ptr = counters_ptr + sequence * (HEADS * TILES) + place
            arrive(counter_ptr, count, last_piece - piece, sums_ptr, parts_ptr, thread, members, row_out, ROTATED, PIECES, CHUNK)
        else:
            end_row(state, row_out, thread, members, ROTATED)
