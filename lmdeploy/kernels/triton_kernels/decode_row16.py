"""`decode` for a row alone over a cache of 16 bits: keys and values go straight to tensor cores' registers (`fragments16.py`), and warps meet once a piece.

A row's old keys are cut into pieces by their number alone, a piece's keys into parts, one for each warp of a program. Sums of parts and of pieces are merged in one order
(`decode_parts.py`), so a row's bits depend neither on other rows nor on how programs share its pieces. The first warp of the first piece begins with the new key, whose
weight is 1: it comes from registers, is stored beside, and is never read back by the launch, so all other keys are of earlier steps, and each warp asks for its first
16 before the kernel before has ended (`overlap.py`).

Every warp rotates the queries for itself, in the registers where products want them, and the new key in the place of a query that is not there: so what is between the
wait and the first product goes through no barrier. Little shared memory (5 kB a query head) leaves room for programs of the next product, which ask for their weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lmdeploy.inputs import AttentionMeta
from lmdeploy.kernels.triton_kernels.decode import PIECES, Rope, parts_of
from lmdeploy.kernels.triton_kernels.decode_parts import PARTS
from lmdeploy.kernels.triton_kernels.decode_shared import THREADS, arrive, end_row, keep_piece
from lmdeploy.kernels.triton_kernels.decode_tiles import GROUP_KEYS, MEMBERS, block_at, row_at, tile_at
from lmdeploy.kernels.triton_kernels.fragments import HALF, sums_of_keys
from lmdeploy.kernels.triton_kernels.fragments16 import (
    add_values,
    keys_at,
    largest_of_keys,
    merged,
    packed,
    products,
    products_of_one,
    store_words,
    turned_weights,
    values_at,
)
from lmdeploy.kernels.triton_kernels.kv_write import rotated_dims
from lmdeploy.kernels.triton_kernels.overlap import overlaps
from lmdeploy.kv_layer import KVLayer

Tensor = torch.Tensor
#: a row's old keys are cut into at most PIECES pieces of at least PIECE keys, a multiple of CUT; as many programs share them as the chip holds at once (H200, us of a 7B's
#: step at 150, 256, 380, 1,000 and 4,000 keys: 3,726, 3,743, 3,746, 3,751, 3,886; 256 keys a piece 3,717, 3,754, 3,793, 3,806, 3,893; 512: 3,725, 3,760, 3,797, 3,887, 3,941)
PIECE, CUT, PROGRAMS = 128, 128, 132
#: of a thread at most: 128 would not hold what it needs (4 to 8 us more a layer), and 32 keys of a warp at once need 254 (0 to 2 us more)
REGISTERS = 168
CHUNK = 8  # pieces that a program joins at once


@triton.jit
def _cut(
    kv_len: tl.tensor, window: tl.tensor, shares: tl.tensor, share: tl.tensor, PIECES: tl.constexpr, PIECE: tl.constexpr, CUT: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The oldest key that a row sees, where its old keys are cut from and to, keys of a piece, the number of pieces, the first of the program's and the one behind its
    last. The new key alone is a piece, too; a row without one has none."""
    oldest = tl.where(window > 0, tl.maximum(kv_len - window, 0), 0)
    begin = oldest // CUT * CUT
    limit = tl.where(oldest < kv_len - 1, kv_len - 1, begin)
    size = tl.maximum(PIECE, tl.cdiv(tl.cdiv(limit - begin, PIECES), CUT) * CUT)
    count = tl.where(kv_len > 0, tl.maximum(tl.cdiv(limit - begin, size), 1), 0)
    each = tl.cdiv(count, shares)
    return oldest, begin, limit, size, count, share * each, tl.minimum(share * each + each, count)


@triton.jit
def _part_of(start: tl.tensor, size: tl.tensor, limit: tl.tensor) -> tl.tensor:
    """Keys of a warp, whole tiles, of the piece at `start`."""
    return tl.cdiv(tl.minimum(size, limit - start), GROUP_KEYS * PARTS) * GROUP_KEYS


@triton.jit
def _of_words(x: tl.tensor) -> tl.tuple:
    """16-bit numbers [n, 4] as two words for each thread."""
    even, odd = tl.split(tl.reshape(x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF, (THREADS, 2, 2)))
    return tl.split(even | (odd << 16))


@triton.jit
def _rounded(x: tl.tensor, TYPE: tl.constexpr) -> tl.tuple:
    """float32 [n, 4] likewise. Two numbers a conversion: one at a time takes eight times as long."""
    even, odd = tl.split(tl.reshape(x, (THREADS, 2, 2)))
    return tl.split(packed(even, odd, TYPE))


@triton.jit
def _of_numbers(x: tl.tensor) -> tl.tuple:
    """[n, 4] as four numbers for each thread."""
    even, odd = tl.split(tl.reshape(x, (THREADS, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _angles(cos_ptr: tl.tensor, sin_ptr: tl.tensor, HERE: tl.constexpr) -> tl.tuple:
    """Cosines and sines of a thread's dims of the lower half, if they are wanted; they may be read early."""
    if HERE:
        dim = (tl.arange(0, THREADS) % 4 * 8)[:, None] + tl.arange(0, 4)[None, :]
        c, s = cos_ptr + dim, sin_ptr + dim
        found = tl.load(c), tl.load(c + 4), tl.load(c + 32), tl.load(c + 36), tl.load(s), tl.load(s + 4), tl.load(s + 32), tl.load(s + 36)
    else:
        found = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    return found


@triton.jit
def _dims(row: tl.tensor) -> tl.tuple:
    """A thread's dims of a row, four at a time: of the lower half, of the upper."""
    at = row[:, None] + (tl.arange(0, THREADS) % 4 * 8)[:, None] + tl.arange(0, 4)[None, :]
    return (
        tl.load(at), tl.load(at + 4), tl.load(at + 32), tl.load(at + 36),
        tl.load(at + HALF), tl.load(at + HALF + 4), tl.load(at + HALF + 32), tl.load(at + HALF + 36),
    )  # fmt: skip


@triton.jit
def _turned(
    lo: tl.tensor, hi: tl.tensor, cos: tl.tensor, sin: tl.tensor, row: tl.tensor, first: tl.constexpr, cos_ptr: tl.tensor, sin_ptr: tl.tensor, factor: tl.tensor,
    ROPE_HALF: tl.constexpr, SCALED: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple]:  # fmt: skip
    """Words of rows [n, 4] from the thread's dim `first` on, and of the upper half, rotated, scaled and rounded as `rope_write_kv` does."""
    if ROPE_HALF == HALF:  # the halves are each other's partners
        x, y = lo.to(tl.float32), hi.to(tl.float32)
        new_lo, new_hi = x * cos - y * sin, y * cos + x * sin
    else:
        same, dim = tl.zeros([THREADS, 1], tl.int32), (tl.arange(0, THREADS) % 4 * 8 + first)[:, None] + tl.arange(0, 4)[None, :]
        new_lo = rotated_dims(row[:, None], cos_ptr + same, sin_ptr + same, dim, dim >= 0, ROPE_HALF)
        new_hi = rotated_dims(row[:, None], cos_ptr + same, sin_ptr + same, dim + HALF, dim >= 0, ROPE_HALF)
    if SCALED:
        new_lo, new_hi = new_lo * factor[:, None], new_hi * factor[:, None]
    return _rounded(new_lo, row.dtype.element_ty), _rounded(new_hi, row.dtype.element_ty)


@triton.jit
def _words_of(
    x: tl.tuple, row: tl.tensor, angles: tl.tuple, angles_at: tl.tuple, factor: tl.tensor, key_ptr: tl.tensor, stored: tl.tensor,
    FUSED: tl.constexpr, ROPE_HALF: tl.constexpr, SCALED: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """The 16 words of what `_dims` read of a row; where `stored`, they are written to key_ptr."""
    if FUSED:
        a, e = _turned(x[0], x[4], angles[0], angles[4], row, 0, angles_at[0], angles_at[1], factor, ROPE_HALF, SCALED)
        b, f = _turned(x[1], x[5], angles[1], angles[5], row, 4, angles_at[0], angles_at[1], factor, ROPE_HALF, SCALED)
        c, g = _turned(x[2], x[6], angles[2], angles[6], row, 32, angles_at[0], angles_at[1], factor, ROPE_HALF, SCALED)
        d, h = _turned(x[3], x[7], angles[3], angles[7], row, 36, angles_at[0], angles_at[1], factor, ROPE_HALF, SCALED)
        at = key_ptr + tl.arange(0, THREADS) % 4 * 8
        store_words(at, stored, a[0], a[1], b[0], b[1])
        store_words(at + 32, stored, c[0], c[1], d[0], d[1])
        store_words(at + HALF, stored, e[0], e[1], f[0], f[1])
        store_words(at + HALF + 32, stored, g[0], g[1], h[0], h[1])
    else:
        a, b, c, d, e, f, g, h = (
            _of_words(x[0]),
            _of_words(x[1]),
            _of_words(x[2]),
            _of_words(x[3]),
            _of_words(x[4]),
            _of_words(x[5]),
            _of_words(x[6]),
            _of_words(x[7]),
        )
    return a[0], b[0], a[1], b[1], c[0], d[0], c[1], d[1], e[0], f[0], e[1], f[1], g[0], h[0], g[1], h[1]


@triton.jit
def _value(row: tl.tensor) -> tl.tuple:
    """A thread's dims of the new value, four at a time."""
    at = row + (tl.arange(0, THREADS) % 32 // 4 * 8)[:, None] + tl.arange(0, 4)[None, :]
    return tl.load(at), tl.load(at + 4), tl.load(at + HALF), tl.load(at + HALF + 4)


@triton.jit
def _as_sums(x: tl.tuple, value_ptr: tl.tensor, mine: tl.tensor, FUSED: tl.constexpr) -> tl.tuple:
    """What `_value` read as sums of weight 1 where `mine`, which stores it at value_ptr."""
    a, b, c, d = x
    thread = tl.arange(0, THREADS)
    if FUSED:
        dim = (thread % 32 // 4 * 8)[:, None] + tl.arange(0, 4)[None, :]
        at, mask = value_ptr + dim, tl.broadcast_to((mine & (thread % 4 == 0))[:, None], dim.shape)
        tl.store(at, a, mask=mask)
        tl.store(at + 4, b, mask=mask)
        tl.store(at + HALF, c, mask=mask)
        tl.store(at + HALF + 4, d, mask=mask)
    own = mine[:, None]
    x, y = _of_numbers(tl.where(own, a.to(tl.float32), 0.0)), _of_numbers(tl.where(own, b.to(tl.float32), 0.0))
    u, v = _of_numbers(tl.where(own, c.to(tl.float32), 0.0)), _of_numbers(tl.where(own, d.to(tl.float32), 0.0))
    return (
        (x[0], x[0], u[0], u[0], x[1], x[1], u[1], u[1]), (x[2], x[2], u[2], u[2], x[3], x[3], u[3], u[3]),
        (y[0], y[0], v[0], v[0], y[1], y[1], v[1], v[1]), (y[2], y[2], v[2], v[2], y[3], y[3], v[3], v[3]),
    )  # fmt: skip


@triton.jit
def _begun(
    at: tl.tuple, new: tl.tuple, angles: tl.tuple, angles_at: tl.tuple, factor_ptr: tl.tensor, factor: tl.tensor, first: tl.tensor,
    GROUP: tl.constexpr, FUSED: tl.constexpr, ROPE_HALF: tl.constexpr, SCALED: tl.constexpr, TYPE: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple]:  # fmt: skip
    """Queries, and the state with the new key where that is the program's (`first`), which stores it. at: of queries, their stride, the key, the value; new: where the
    cache has these. All is asked for at once."""
    q_ptr, q_stride, k_ptr, v_ptr = at
    thread = tl.arange(0, THREADS)
    g, mine = thread % 32 // 4, thread < tl.where(first, 32, 0)
    last = g == MEMBERS - 1  # where the row is the key in any case
    key_row = k_ptr + 0 * g
    row = tl.multiple_of(tl.where(g < GROUP, q_ptr + g * q_stride, key_row), 8)  # as all rows of heads are; the compiler does not see through the choice
    scales = tl.full([THREADS], 1.0, tl.float32)
    read, value = _dims(row), _value(v_ptr)
    if SCALED:
        scales = tl.where(g < GROUP, tl.load(factor_ptr), scales)
    if GROUP < MEMBERS:
        query = _words_of(read, row, angles, angles_at, scales, new[0], mine & last, FUSED, ROPE_HALF, SCALED)
        key = query
    else:
        query = _words_of(read, row, angles, angles_at, scales, new[0], mine & (g > MEMBERS), FUSED, ROPE_HALF, SCALED)
        key = _words_of(_dims(key_row), key_row, angles, angles_at, scales, new[0], mine & last, FUSED, ROPE_HALF, False)
    sums = _as_sums(value, new[1], mine, FUSED)
    c, zero = products_of_one(key, query, TYPE), tl.zeros([THREADS], tl.float32)
    score_0, score_1, _, _ = sums_of_keys(tl.where(last, c[0], 0.0), tl.where(last, c[1], 0.0), zero, zero)
    weight = tl.where(mine & (g == 0), 1.0, 0.0)
    level = tl.where(mine, score_0 * factor, float("-inf")), tl.where(mine, score_1 * factor, float("-inf"))
    return query, (level, (weight, weight), sums)


@triton.jit
def _nothing() -> tl.tuple:
    """The state before the first key of a part: largest scores in base 2 of queries 2 t and 2 t + 1, sums of weights (of the thread's own keys), sums of values."""
    zero, low = tl.zeros([THREADS], tl.float32), tl.full([THREADS], float("-inf"), tl.float32)
    eight = zero, zero, zero, zero, zero, zero, zero, zero
    return (low, low), (zero, zero), (eight, eight, eight, eight)


@triton.jit
def _spread(row: tl.tensor, tile: tl.tensor, place: tl.tensor, oldest: tl.tensor, limit: tl.tensor) -> tl.tensor:
    """Offset of the cache row of a tile's key at `place`; of a hidden one that of the nearest that is seen, for what is stored beyond may be NaN."""
    key = tl.maximum(tl.minimum(tile + place, limit - 1), tl.maximum(oldest, tile))
    return (row + (key - tile)) * (2 * HALF)


@triton.jit
def _keys(cache: tl.tuple, row: tl.tensor, tile: tl.tensor, oldest: tl.tensor, limit: tl.tensor) -> tl.tuple:
    """Words of the 16 keys of a tile; `row`: of its first key."""
    g, t = tl.arange(0, THREADS) % 32 // 4, tl.arange(0, THREADS) % 4
    at = cache[0] + t * 8
    return keys_at(at + _spread(row, tile, g, oldest, limit), at + _spread(row, tile, g + 8, oldest, limit))


@triton.jit
def _values(cache: tl.tuple, row: tl.tensor, tile: tl.tensor, oldest: tl.tensor, limit: tl.tensor) -> tl.tuple:
    """Likewise of values."""
    g, t = tl.arange(0, THREADS) % 32 // 4, tl.arange(0, THREADS) % 4
    at, key = cache[1] + g * 8, 2 * t
    return values_at(
        at + _spread(row, tile, key, oldest, limit), at + _spread(row, tile, key + 1, oldest, limit),
        at + _spread(row, tile, key + 8, oldest, limit), at + _spread(row, tile, key + 9, oldest, limit),
    )  # fmt: skip


@triton.jit
def _scores(k: tl.tuple, query: tl.tuple, factor: tl.tensor, first: tl.tensor, oldest: tl.tensor, limit: tl.tensor, TYPE: tl.constexpr) -> tl.tuple:
    """In base 2, of keys g and g + 8 from `first` on and queries 2 t and 2 t + 1; -inf where a key is hidden."""
    c, a = products(k, query, TYPE), first + tl.arange(0, THREADS) % 32 // 4
    seen_a, seen_b = (a < limit) & (a >= oldest), (a + 8 < limit) & (a + 8 >= oldest)
    return (
        tl.where(seen_a, c[0] * factor, float("-inf")), tl.where(seen_a, c[1] * factor, float("-inf")),
        tl.where(seen_b, c[2] * factor, float("-inf")), tl.where(seen_b, c[3] * factor, float("-inf")),
    )  # fmt: skip


@triton.jit
def _weigh(totals: tl.tuple, x: tl.tuple, base: tl.tuple, TYPE: tl.constexpr) -> tuple[tl.tuple, tl.tuple]:
    """Add the weights of 16 keys; these as operands."""
    p0, p1, p2, p3 = tl.exp2(x[0] - base[0]), tl.exp2(x[1] - base[1]), tl.exp2(x[2] - base[0]), tl.exp2(x[3] - base[1])
    return (totals[0] + (p0 + p2), totals[1] + (p1 + p3)), turned_weights(p0, p1, p2, p3, TYPE)


@triton.jit
def _take_tile(
    state: tl.tuple, loaded: tl.tuple, query: tl.tuple, factor: tl.tensor, first: tl.tensor, cache: tl.tuple, row: tl.tensor, tile: tl.tensor,
    oldest: tl.tensor, limit: tl.tensor, TYPE: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple]:  # fmt: skip
    """A step of the online softmax: the tile of 16 keys from `first` on, which is loaded. Keys of the next one, at `tile`, are asked for as soon as these are used up,
    values likewise."""
    level, totals, sums = state
    x = _scores(loaded[0], query, factor, first, oldest, limit, TYPE)
    k = _keys(cache, row, tile, oldest, limit)
    peak_0, peak_1 = largest_of_keys(tl.maximum(x[0], x[2]), tl.maximum(x[1], x[3]))
    new_0, new_1 = tl.maximum(level[0], peak_0), tl.maximum(level[1], peak_1)
    base_0, base_1 = tl.where(new_0 == float("-inf"), 0.0, new_0), tl.where(new_1 == float("-inf"), 0.0, new_1)
    fade_0, fade_1 = tl.exp2(level[0] - base_0), tl.exp2(level[1] - base_1)
    totals, p = _weigh((totals[0] * fade_0, totals[1] * fade_1), x, (base_0, base_1), TYPE)
    sums = add_values(sums, (fade_0, fade_1), p, loaded[1], TYPE)
    return ((new_0, new_1), totals, sums), (k, _values(cache, row, tile, oldest, limit))


@triton.jit
def _take_part(
    state: tl.tuple, loaded: tl.tuple, query: tl.tuple, factor: tl.tensor, cache: tl.tuple, table_row: tl.tensor, head: tl.tensor, start: tl.tensor, size: tl.tensor,
    oldest: tl.tensor, limit: tl.tensor, HEADS: tl.constexpr, SLOTS: tl.constexpr, TYPE: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple]:  # fmt: skip
    """Each warp's part of the piece from `start` on, whose first tile is loaded; the next piece's is asked for behind the last."""
    warp = tl.arange(0, THREADS) // 32
    part = _part_of(start, size, limit)
    first, following = start + warp * part, start + size + warp * _part_of(start + size, size, limit)
    for done in range(0, part, GROUP_KEYS):
        behind = first + (done + GROUP_KEYS)
        tile = tile_at(tl.where(behind < first + part, behind, following), oldest, limit - 1, GROUP_KEYS)
        row = row_at(block_at(table_row, tile, SLOTS), tile, head, HEADS, SLOTS)
        state, loaded = _take_tile(state, loaded, query, factor, first + done, cache, row, tile, oldest, limit, TYPE)
    return state, loaded


@triton.jit(do_not_specialize=["window", "rows", "shares", "table_stride"])
def row_decode_kernel(
    q_ptr: tl.tensor, out_ptr: tl.tensor, key_ptr: tl.tensor, value_ptr: tl.tensor, table_ptr: tl.tensor, kv_lens_ptr: tl.tensor,
    counters_ptr: tl.tensor, sums_ptr: tl.tensor, parts_ptr: tl.tensor,
    k_ptr: tl.tensor, v_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, factor_ptr: tl.tensor,
    scale: tl.tensor, window: tl.tensor, rows: tl.tensor, shares: tl.tensor,
    q_stride: tl.tensor, q_head_stride: tl.tensor, k_stride: tl.tensor, k_head_stride: tl.tensor, v_stride: tl.tensor, v_head_stride: tl.tensor,
    angle_stride: tl.tensor, out_stride: tl.tensor, table_stride: tl.tensor,
    GROUP: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr, FUSED: tl.constexpr, ROPE_HALF: tl.constexpr, SCALED: tl.constexpr,
    PIECES: tl.constexpr, PIECE: tl.constexpr, CUT: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Consecutive pieces of one row's keys, for the heads of one KV head: the pieces are shared out among `shares` programs, and many find none left. Without FUSED the
    cache's newest key is the kernel before's."""
    TYPE: tl.constexpr = key_ptr.dtype.element_ty
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if not FUSED:
            tl.extra.cuda.gdc_wait()
    head, sequence, share = tl.program_id(0), tl.program_id(1) % rows, tl.program_id(1) // rows
    sequence64, thread = sequence.to(tl.int64), tl.arange(0, THREADS)
    table_row, kv_len, cache = table_ptr + sequence64 * table_stride, tl.load(kv_lens_ptr + sequence), (key_ptr, value_ptr)
    oldest, begin, limit, size, count, piece, last_piece = _cut(kv_len, window, shares, share, PIECES, PIECE, CUT)
    if piece < last_piece:
        start = begin + piece * size
        tile = tile_at(start + thread // 32 * _part_of(start, size, limit), oldest, limit - 1, GROUP_KEYS)
        row = row_at(block_at(table_row, tile, SLOTS), tile, head, HEADS, SLOTS)
        loaded = _keys(cache, row, tile, oldest, limit), _values(cache, row, tile, oldest, limit)
        newest = kv_len - 1
        new = ((tl.load(table_row + newest // SLOTS).to(tl.int64) * HEADS + head) * SLOTS + newest % SLOTS) * (2 * HALF)
        angles_at = cos_ptr + sequence64 * angle_stride, sin_ptr + sequence64 * angle_stride
        angles = _angles(angles_at[0], angles_at[1], FUSED and ROPE_HALF == HALF)
        if PDL and FUSED:
            tl.extra.cuda.gdc_wait()
        k_at, v_at = k_ptr + sequence64 * k_stride + head * k_head_stride, v_ptr + sequence64 * v_stride + head * v_head_stride
        if not FUSED:
            k_at, v_at = key_ptr + new, value_ptr + new
        at = q_ptr + sequence64 * q_stride + head * GROUP * q_head_stride, q_head_stride, k_at, v_at
        factor = scale * 1.4426950408889634
        query, state = _begun(
            at, (key_ptr + new, value_ptr + new), angles, angles_at, factor_ptr + sequence, factor, share == 0, GROUP, FUSED, ROPE_HALF, SCALED, TYPE
        )  # fmt: skip
        first_part = (sequence64 * HEADS + head) * GROUP * PIECES
        sums_ptr, parts_ptr = sums_ptr + first_part * 2, parts_ptr + first_part * (2 * HALF)
        row_out = out_ptr + sequence64 * out_stride + head * GROUP * (2 * HALF)
        zero = tl.zeros([THREADS], tl.float32)
        found = zero, zero, zero, zero, zero, zero
        for current in range(piece, last_piece):
            state, loaded = _take_part(
                state, loaded, query, factor, cache, table_row, head, begin + current * size, size, oldest, limit, HEADS, SLOTS, TYPE
            )  # fmt: skip
            level, totals, sums = state
            found = merged(level, totals, sums, GROUP)
            keep_piece(found, sums_ptr, parts_ptr, current, thread, tl.where(count > 1, GROUP, 0), PIECES)
            state = _nothing()
        if count > 1:
            arrive(counters_ptr + sequence * HEADS + head, count, last_piece - piece, sums_ptr, parts_ptr, thread, GROUP, row_out, False, PIECES, CHUNK)
        else:
            end_row(found, row_out, thread, GROUP, False)


def serves(q: Tensor, kv: KVLayer, meta: AttentionMeta) -> bool:
    """Whether a layer's decoding is computed here: a row alone of more than two query heads a KV head (fewer were not measured), between products of 16-bit weights.

    Their programs begin when they find room beside attention (H200, us of a 7B's step at 150, 256, 380, 1,000 and 16,000 keys: 3,726, 3,743, 3,746, 3,751, 4,248; by
    `decode` in pieces of 64 keys 3,830, 3,840, 3,854, 3,977, 4,770, of 512 4,018, 4,045, 4,117, 4,276, 4,790). Between 4-bit ones it is later than `decode` with little
    to read (1.8B at 150 keys 713 for 641), eight rows are 1 % slower.
    """
    plain = kv.plain and kv.rotation is None and kv.key_center is None
    fits = q.shape[2] == 2 * HALF.value and 2 * kv.key.shape[1] < q.shape[1] <= MEMBERS.value * kv.key.shape[1] and kv.key.shape[2] % GROUP_KEYS.value == 0
    return plain and fits and q.is_cuda and q.dtype is not torch.float32 and meta.num_decode == 1 and meta.whole_weights


def decode(q: Tensor, kv: KVLayer, meta: AttentionMeta, scale: float, window: int, out: Tensor, rope: Rope | None = None) -> None:
    """As `decode.decode`."""
    rows, heads, (kv_heads, slots) = meta.num_decode, q.shape[1], kv.key.shape[1:3]
    new, pdl = rope or Rope(q, q, q, q, None), overlaps(q.device)
    assert all(x.data_ptr() % 16 == 0 == x.stride(1) % 8 for x in (q, new.k)), "rows of heads are read eight bytes at a time"
    shares = min(PIECES, max(1, PROGRAMS // (rows * kv_heads)))
    row_decode_kernel[(kv_heads, rows * shares)](
        q, out, kv.key, kv.value, meta.block_table, meta.kv_lens, *parts_of(q, meta),
        new.k, new.v, new.cos, new.sin, new.q_scale if new.q_scale is not None else q,
        scale, window, rows, shares, q.stride(0), q.stride(1), new.k.stride(0), new.k.stride(1), new.v.stride(0), new.v.stride(1), new.cos.stride(0),
        out.stride(0), meta.block_table.stride(0),
        GROUP=heads // kv_heads, HEADS=kv_heads, SLOTS=slots, FUSED=rope is not None, ROPE_HALF=new.cos.shape[1] if rope is not None else 0,
        SCALED=new.q_scale is not None, PIECES=PIECES, PIECE=PIECE, CUT=CUT, CHUNK=CHUNK, PDL=pdl, launch_pdl=pdl,
        num_warps=PARTS.value, maxnreg=REGISTERS, enable_fp_fusion=False,
    )  # fmt: skip
