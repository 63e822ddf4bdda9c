"""`decode` over quantised caches of heads of 128 dims: a program is one warp, and no byte goes through shared memory (`fragments.py`).

What a byte of such a cache costs is instructions, not bandwidth: in a program that goes through shared memory each number is written there, read, converted,
written and read again. Here a word of a key or value is four to eight operands after as many operations on bits. A program takes consecutive pieces of a row's
keys, 16 keys at a time, and stores each piece's sums; the program that ends last joins a row's pieces. As in `decode`, where pieces begin depends on a row's
length alone, and so do its bits. Few rows have a kernel and bits of their own (`decode_shared.py`): their pieces are taken by several warps each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lmdeploy.inputs import AttentionMeta
from lmdeploy.kernels.triton_kernels import decode_shared
from lmdeploy.kernels.triton_kernels.cache_read import block_of, cache_rows, exponent_of, power_of_two, query_rows
from lmdeploy.kernels.triton_kernels.decode import PIECES, Rope, parts_of
from lmdeploy.kernels.triton_kernels.decode_parts import PARTS
from lmdeploy.kernels.triton_kernels.decode_pieces import cut, joined
from lmdeploy.kernels.triton_kernels.decode_tiles import (
    GROUP_KEYS,
    MEMBERS,
    block_at,
    first_tile,
    nothing,
    places_of,
    row_at,
    take_tile,
    tile_at,
    with_totals,
)
from lmdeploy.kernels.triton_kernels.fragments import HALF, store_sums, sums_of_keys
from lmdeploy.kernels.triton_kernels.kv_write import cache_arguments, roped_halves, store_row
from lmdeploy.kernels.triton_kernels.overlap import after_previous, overlaps
from lmdeploy.kernels.triton_kernels.rows import turned_128
from lmdeploy.kv_layer import KVLayer

Tensor = torch.Tensor
#: keys of a piece at least, multiples of CUT (of few rows: of PIECE), and programs of a launch, as in `decode`; a program here is a quarter of one there
PIECE, CUT, PROGRAMS, SHARES = 256, 128, 8192, 4
#: up to FEW rows times KV heads are taken by programs of PARTS warps (`decode_shared.py`); SHARED of these the chip holds at once, or twice as many of fewer registers
FEW, SHARED = 256, 132
REGISTERS = 128  # of a thread over 8-bit caches: a third more programs on the chip (H200, 64 rows of 16,384 keys: 576 us for 593); fewer bits gain nothing
JOINED = 16  # rows of parts that a program joins at once: 64 registers a thread


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
    """Rows [8, 64] as `take_tile` wants them."""
    lo, hi = lo.to(tl.float32), hi.to(tl.float32)
    unit = power_of_two(exponent_of(tl.maximum(tl.max(tl.abs(lo), 1), tl.max(tl.abs(hi), 1))))  # float16 holds them then
    lo, hi = (lo * (1.0 / unit)[:, None]).to(tl.float16), (hi * (1.0 / unit)[:, None]).to(tl.float16)
    factor = unit * (scale * 1.4426950408889634)
    if WIDTH == "4":
        hi = (hi.to(tl.float32) * 0.0625).to(tl.float16)
    a, b = _words(lo), _words(hi)
    q = (a[0], a[1], b[0], b[1], a[2], a[3], b[2], b[3], a[4], a[5], b[4], b[5], a[6], a[7], b[6], b[7])
    return with_totals(q, _picked(factor, 2 * t), _picked(factor, 2 * t + 1), WIDTH)


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
        tile, next_tile = tile_at(start, oldest, last, N), tile_at(start + N, oldest, last, N)
        block, next_block = block_at(table_row, tile + 0 * thread, SLOTS), block_at(table_row, next_tile + 0 * thread, SLOTS)
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
        places = places_of(key_ptr, key_scales_ptr, value_ptr, value_scales_ptr, g, t, KEY_WIDTH, VALUE_WIDTH)
        loaded = first_tile(places, row_at(block, tile, head, HEADS, SLOTS), KEY_WIDTH, VALUE_WIDTH, GROUPS)
        query = _as_query(lo, hi, scale, t, KEY_WIDTH)
        level, totals, sums = nothing(32)
        first_part = (sequence64 * (HEADS * GROUP) + head * GROUP + first_member) * PIECES
        sums_ptr, parts_ptr = sums_ptr + first_part * 2, parts_ptr + first_part * (2 * HALF)
        for first in range(start, end, N):
            row = row_at(next_block, next_tile, head, HEADS, SLOTS)
            next_tile = tile_at(first + 2 * N, oldest, last, N)
            next_block = block_at(table_row, next_tile + 0 * thread, SLOTS)
            level, totals, sums, loaded = take_tile(
                level, totals, sums, loaded, query, places, row, first, g, oldest, last, KEY_WIDTH, VALUE_WIDTH, GROUPS, ROTATED
            )  # fmt: skip
            if (first + N >= done) & (first + N < end):  # the last piece is kept below
                _keep(level, totals, sums, g, t, members, sums_ptr, parts_ptr, piece, PIECES, VALUE_WIDTH)
                level, totals, sums = nothing(32)
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
    places, joined_rows = kv_heads * triton.cdiv(group, MEMBERS.value), min(MEMBERS.value, int(triton.next_power_of_2(group)))
    few, width = rows * places <= FEW, {"KEY_WIDTH": kv.key_width, "VALUE_WIDTH": kv.value_width}
    shares = min(PIECES, max(1, SHARED // (rows * places))) if few else min(PIECES, max(SHARES, PROGRAMS // (rows * places)))
    launch = (
        {"num_warps": PARTS.value, "maxnreg": None if rows * places <= SHARED else REGISTERS}
        if few
        else {"num_warps": 1, "maxnreg": REGISTERS if kv.key_width == kv.value_width == "8" else None}
    )
    kernel = decode_shared.shared_decode_kernel if few else _direct_decode_kernel
    kernel[(places, rows * shares)](
        q, out, *cache_arguments(kv, q), meta.block_table, meta.kv_lens, *kept,
        new.k, new.v, new.cos, new.sin, new.q_scale if new.q_scale is not None else q, kv.key_center if kv.key_center is not None else q,
        scale, window, rows, shares, q.stride(0), q.stride(1), new.k.stride(0), new.k.stride(1), new.v.stride(0), new.v.stride(1), new.cos.stride(0),
        out.stride(0), meta.block_table.stride(0), **width,
        GROUP=group, HEADS=kv_heads, SLOTS=slots, ROTATED=kv.rotation is not None,
        FUSED=rope is not None, ROPE_HALF=new.cos.shape[1] if rope is not None else 0, SCALED=new.q_scale is not None, CENTRED=kv.key_center is not None,
        PIECES=PIECES, PIECE=PIECE, CUT=PIECE if few else CUT, ROWS=joined_rows, CHUNK=JOINED // joined_rows, GROUPS=groups_of(kv), PDL=pdl, launch_pdl=pdl, enable_fp_fusion=False,
        **launch,
    )  # fmt: skip
