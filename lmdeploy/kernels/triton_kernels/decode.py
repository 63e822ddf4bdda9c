"""Attention of sequences with one new token: their keys are cut into pieces, which programs all over the chip share.

A row's keys are cut at places that depend on their number alone, and the pieces are joined in one order, so a row's bits do not depend on the batch (a row alone may have
others). The grid depends on the number of rows and never on lengths, which are read on the device: one captured launch serves every context. The program that ends
last joins a row's pieces; a launch of its own for that would cost every layer more than most joins take.

The launch may also do the work of `rope_write_kv`: a program rotates the queries that it takes up, and the one that has a row's last piece stores the new
key and value before it reads them. Caches of 16 bits have a kernel of their own (`decode_plain.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lmdeploy.inputs import AttentionMeta
from lmdeploy.kernels.triton_kernels.cache_read import (
    TileShape,
    as_operands,
    attend_tile,
    block_of,
    cache_rows,
    empty_state,
    facts,
    finish,
    query_rows,
    weighted_sums,
)
from lmdeploy.kernels.triton_kernels.decode_pieces import join, keep_part, own_pieces
from lmdeploy.kernels.triton_kernels.decode_plain import plain_decode_kernel
from lmdeploy.kernels.triton_kernels.kv_write import cache_arguments, padded_half, roped_halves, store_row
from lmdeploy.kernels.triton_kernels.overlap import after_previous, overlaps
from lmdeploy.kernels.triton_kernels.rows import turned
from lmdeploy.kv_layer import KVLayer

Tensor = torch.Tensor
#: a row's keys are cut into at most PIECES pieces of at least PIECE keys each, a multiple of CUT
PIECES, PIECE, CUT = 16, 512, 128
#: PIECE and CUT of a row alone over a plain cache, with up to two query heads a KV head and with more: so many programs more find room, but a join takes as long as two tiles
#: of 64 keys, of 1.2 to 2 us each (H200, an answer of 128 + 256 tokens with 4-bit weights, tok/s in pieces of 64 and of 256: 1.8B, two heads, 1,638, 1,481; 7B, four, 644, 653)
ALONE = (64, 64), (256, 128)
#: programs of a launch, rounded down to so many for each row and KV head, and these at least: long rows among many are shared, too
PROGRAMS, SHARES = 2048, 4
#: of rows that fill the chip FULL programs at a time, a program takes so many pieces at least as times they fill it, up to WHOLE: it has begun with its row, and
#: programs for further pieces would begin last of all (H200, 256 rows of 14 to 1,427 keys, the longest first: 100 us with a program a piece, 81 with one a row)
FULL, WHOLE = 512, 3
FEW = 264  # rows times KV heads that the chip holds at once, two to a multiprocessor
#: tiles of 64 keys that programs of few rows ask for before the kernel before has ended (H200, us a layer of 32 heads in a chain with none, 3 and 4 tiles: 8 rows of
#: 256 keys 8.2, 7.7, 7.0, after 4-bit products 11.7, 8.6, 9.7; 16 of 300 13.1, 10.9, 15.4; one of 256 7.6, 8.1, 8.4, after 4-bit products 9.0, 7.4, 6.4)
EARLY_TILES = 3
JOINED = 2048  # numbers of either half of parts that a program joins at once: 16 registers a thread


@triton.jit
def _write_new(
    k_ptr: tl.tensor, v_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, center_ptr: tl.tensor, rotation_ptr: tl.tensor, place: tl.tensor, head: tl.tensor,
    table_ptr: tl.tensor, key_ptr: tl.tensor, key_scales_ptr: tl.tensor, value_ptr: tl.tensor, value_scales_ptr: tl.tensor,
    ROPE_HALF: tl.constexpr, CENTRED: tl.constexpr, ROTATED: tl.constexpr, TURNED_AS: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr,
) -> None:  # fmt: skip
    """Rotate the key at k_ptr, store it and the value at v_ptr as key `place` of the sequence: what `rope_write_kv` does, for one token and head."""
    DTYPE: tl.constexpr = k_ptr.dtype.element_ty
    ROWS: tl.constexpr = 16 if ROTATED else 1  # tensor cores multiply 16 at least: the same row 16 times, of which the first is stored
    number, dim = tl.arange(0, ROWS), tl.arange(0, PADDED)[None, :]
    mask, live = (dim < HALF) & (number >= 0)[:, None], number == 0
    row = cache_rows(table_ptr, block_of(table_ptr, place, place + 1, SLOTS), place, tl.full([1], True, tl.int1), head, HEADS, SLOTS, 1)
    row = tl.broadcast_to(row, (ROWS,))
    lo, hi = roped_halves(k_ptr + tl.zeros([ROWS, 1], tl.int32), cos_ptr, sin_ptr, mask, ROPE_HALF, HALF, PADDED)
    if CENTRED:
        center = tl.broadcast_to(center_ptr + dim, mask.shape)
        lo, hi = lo - tl.load(center, mask=mask, other=0.0), hi - tl.load(center + HALF, mask=mask, other=0.0)
    lo, hi = lo.to(DTYPE), hi.to(DTYPE)
    value = tl.broadcast_to(v_ptr + dim, mask.shape)
    v_lo, v_hi = tl.load(value, mask=mask, other=0.0), tl.load(value + HALF, mask=mask, other=0.0)
    if ROTATED:
        k_turned, v_turned = turned(lo, hi, rotation_ptr, TURNED_AS, HALF, PADDED), turned(v_lo, v_hi, rotation_ptr, TURNED_AS, HALF, PADDED)
        lo, hi, v_lo, v_hi = k_turned[0].to(DTYPE), k_turned[1].to(DTYPE), v_turned[0].to(DTYPE), v_turned[1].to(DTYPE)
    store_row(lo.to(tl.float32), hi.to(tl.float32), key_ptr, key_scales_ptr, row, live, KEY_WIDTH, HALF, PADDED)
    store_row(v_lo.to(tl.float32), v_hi.to(tl.float32), value_ptr, value_scales_ptr, row, live, VALUE_WIDTH, HALF, PADDED)


@triton.jit
def _new_queries(
    row_ptr: tl.tensor, live: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, factor_ptr: tl.tensor, rotation_ptr: tl.tensor,
    SCALED: tl.constexpr, ROPE_HALF: tl.constexpr, ROTATED: tl.constexpr, TURNED_AS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Both halves [m, P] of a token's query rows at row_ptr [m], rotated, scaled and rounded as `rope_write_kv` does."""
    DTYPE: tl.constexpr = row_ptr.dtype.element_ty
    mask = live[:, None] & (tl.arange(0, PADDED) < HALF)[None, :]
    lo, hi = roped_halves(row_ptr[:, None], cos_ptr, sin_ptr, mask, ROPE_HALF, HALF, PADDED)
    if SCALED:
        factor = tl.load(factor_ptr)
        lo, hi = lo * factor, hi * factor
    lo, hi = lo.to(DTYPE), hi.to(DTYPE)
    if ROTATED:
        new_lo, new_hi = turned(lo, hi, rotation_ptr, TURNED_AS, HALF, PADDED)
        lo, hi = new_lo.to(DTYPE), new_hi.to(DTYPE)
    return lo, hi


@triton.jit(do_not_specialize=["window", "rows", "shares", "least", "table_stride"])
def _decode_kernel(
    q_ptr: tl.tensor, out_ptr: tl.tensor, key_ptr: tl.tensor, key_scales_ptr: tl.tensor, value_ptr: tl.tensor, value_scales_ptr: tl.tensor,
    table_ptr: tl.tensor, kv_lens_ptr: tl.tensor, rotation_ptr: tl.tensor, counters_ptr: tl.tensor, sums_ptr: tl.tensor, parts_ptr: tl.tensor,
    k_ptr: tl.tensor, v_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, factor_ptr: tl.tensor, center_ptr: tl.tensor,
    scale: tl.tensor, window: tl.tensor, rows: tl.tensor, shares: tl.tensor, least: tl.tensor,
    q_stride: tl.tensor, q_head_stride: tl.tensor, k_stride: tl.tensor, k_head_stride: tl.tensor, v_stride: tl.tensor, v_head_stride: tl.tensor,
    angle_stride: tl.tensor, out_stride: tl.tensor, table_stride: tl.tensor,
    GROUP: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    KEY_TYPE: tl.constexpr, VALUE_TYPE: tl.constexpr, ROTATED: tl.constexpr, TURNED_AS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr,
    FUSED: tl.constexpr, ROPE_HALF: tl.constexpr, SCALED: tl.constexpr, CENTRED: tl.constexpr,
    PIECES: tl.constexpr, PIECE: tl.constexpr, CUT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Consecutive pieces of one row's keys, for M heads of one KV head: the pieces are shared out among `shares` programs, `least` each if there are
    so many, and many find none left.

    All pieces are one stream of tiles, so that the next piece is on its way when one ends. A row of one piece goes straight to `out`; of several, the
    program that ends last joins them.
    """
    after_previous(PDL)
    tiles: tl.constexpr = (GROUP + M - 1) // M
    place, sequence, share = tl.program_id(0), tl.program_id(1) % rows, tl.program_id(1) // rows
    head, first_member = place // tiles, place % tiles * M
    member = first_member + tl.arange(0, M)
    sequence64 = sequence.to(tl.int64)
    table_row = table_ptr + sequence64 * table_stride
    likely, early, kv_len, oldest, begin, size, count, piece, last_piece = own_pieces(
        table_row, kv_lens_ptr, sequence, share, shares, least, window, table_stride, SLOTS, PIECES, PIECE, CUT
    )
    if piece < last_piece:
        live, query_head = member < GROUP, head * GROUP + member
        row_ptr = q_ptr + sequence64 * q_stride + query_head * q_head_stride
        if FUSED:
            cos_row, sin_row = cos_ptr + sequence64 * angle_stride, sin_ptr + sequence64 * angle_stride
            lo, hi = _new_queries(row_ptr, live, cos_row, sin_row, factor_ptr + sequence, rotation_ptr, SCALED, ROPE_HALF, ROTATED, TURNED_AS, HALF, PADDED)
            if last_piece == count:
                _write_new(
                    k_ptr + sequence64 * k_stride + head * k_head_stride, v_ptr + sequence64 * v_stride + head * v_head_stride, cos_row, sin_row,
                    center_ptr + head * (2 * HALF), rotation_ptr, kv_len - 1, head, table_row,
                    key_ptr, key_scales_ptr, value_ptr, value_scales_ptr,
                    ROPE_HALF, CENTRED, ROTATED, TURNED_AS, HEADS, SLOTS, KEY_WIDTH, VALUE_WIDTH, HALF, PADDED,
                )  # fmt: skip
                tl.debug_barrier()  # what other threads of the program wrote is read below
        else:
            lo, hi = query_rows(row_ptr, live, HALF, PADDED)
        query, state = as_operands(lo, hi, scale, KEY_WIDTH, KEY_TYPE), empty_state(M, PADDED, N, True)
        row_out = out_ptr + sequence64 * out_stride + (head * GROUP + first_member) * (2 * HALF)
        first_part = (sequence64 * (HEADS * GROUP) + head * GROUP + first_member) * PIECES
        arrived = count - (last_piece - piece)  # what the counter holds if this program is the last
        end, done = tl.minimum(begin + last_piece * size, kv_len), begin + piece * size + size
        start = done - size
        block = tl.where(start == likely, early, block_of(table_row, start, tl.where(start == likely, start, end), SLOTS))
        for first in range(start, end, N):
            state = attend_tile(
                query, state, member, head, first, oldest, kv_len, window, block,
                table_row, key_ptr, key_scales_ptr, value_ptr, value_scales_ptr, KEY_WIDTH, VALUE_WIDTH, VALUE_TYPE, HEADS, SLOTS, HALF, PADDED, N, "edges", True,
            )  # fmt: skip
            block = block_of(table_row, first + N, end, SLOTS)
            if (first + N >= done) & (first + N < end):  # the last piece is kept below
                keep_part(state, sums_ptr + first_part * 2, parts_ptr + first_part * (2 * HALF), piece, live, VALUE_WIDTH, HALF, PADDED, PIECES, M)
                state = empty_state(M, PADDED, N, True)
                piece, done = piece + 1, done + size
        if count == 1:
            largest, total, sum_lo, sum_hi = weighted_sums(state, VALUE_WIDTH, True)
            finish(total, sum_lo, sum_hi, row_out + tl.arange(0, M) * (2 * HALF), live, rotation_ptr, ROTATED, TURNED_AS, HALF, PADDED)
        else:
            keep_part(state, sums_ptr + first_part * 2, parts_ptr + first_part * (2 * HALF), piece, live, VALUE_WIDTH, HALF, PADDED, PIECES, M)
            tl.debug_barrier()  # every thread's parts are written before this program counts as arrived
            counter_ptr = counters_ptr + sequence * (HEADS * tiles) + place
            if tl.atomic_add(counter_ptr, count - arrived, sem="acq_rel", scope="gpu") == arrived:
                tl.store(counter_ptr, 0)  # for the next layer
                join(
                    sums_ptr + first_part * 2, parts_ptr + first_part * (2 * HALF), count, row_out, rotation_ptr,
                    tl.minimum(GROUP - first_member, M), GROUP, ROTATED, TURNED_AS, HALF, PADDED, PIECES, M, ROWS, CHUNK,
                )  # fmt: skip


def _decode_shape(group: int, head_dim: int, dtype: torch.dtype, programs: int, early: bool) -> TileShape:
    """Few programs run as deep a pipeline as pays, or as holds what is asked for early; of many, as many as possible are to fit a multiprocessor. No bit depends on it."""
    wide = head_dim > 128 or dtype is torch.float32
    rows, keys = min(64, max(16, int(triton.next_power_of_2(group)))), 32 if wide else 64
    if early:
        return TileShape(rows, keys, 4, EARLY_TILES + 1)
    if programs <= FEW or wide or rows > 16:
        return TileShape(rows, keys, 4, 3)
    return TileShape(rows, keys, 4, 2, 128)


class Parts(NamedTuple):
    """Where the decode kernels of a step keep what is to be joined."""

    counters: Tensor  # int32 [rows, heads]: pieces that are done, 0 between launches
    sums: Tensor  # float32 [rows, heads, PIECES, 2]
    parts: Tensor  # float32 [rows, heads, PIECES, D]


def parts_of(q: Tensor, meta: AttentionMeta) -> Parts:
    """Made by the first layer of a step, found by the others."""
    rows, (heads, head_dim) = meta.num_decode, q.shape[1:]
    name = ("parts of decoding rows", heads, head_dim)
    found = meta.workspace.get(name)
    if not isinstance(found, Parts):
        counters = torch.zeros((rows, heads), dtype=torch.int32, device=q.device)
        sums, parts = (torch.empty((rows, heads, PIECES, width), dtype=torch.float32, device=q.device) for width in (2, head_dim))
        found = meta.workspace[name] = Parts(counters, sums, parts)
    return found


class Rope(NamedTuple):
    """What `rope_write_kv` takes beside the cache."""

    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    q_scale: Tensor | None


def decode(q: Tensor, kv: KVLayer, meta: AttentionMeta, scale: float, window: int, out: Tensor, rope: Rope | None = None) -> None:
    """The first `num_decode` sequences, which are as many rows of q. With `rope` q, k and v are not rotated yet, and the cache does not hold them."""
    rows, (heads, head_dim), kv_heads = meta.num_decode, q.shape[1:], kv.key.shape[1]
    group, padded = heads // kv_heads, padded_half(head_dim)
    plain, pdl = kv.plain and kv.rotation is None and kv.key_center is None, overlaps(q.device)
    narrow = head_dim <= 128 and group <= 16 and q.dtype is not torch.float32
    early = plain and narrow and rope is not None and rows * kv_heads <= FEW and (pdl or not q.is_cuda)
    shape, kept = _decode_shape(group, head_dim, q.dtype, rows * kv_heads, early), parts_of(q, meta)
    joined = min(shape.M, int(triton.next_power_of_2(group)))  # rows that the join holds
    new = rope or Rope(q, q, q, q, None)
    piece, cut = ALONE[group > 2] if early and rows == 1 else (PIECE, CUT)
    assert cut % shape.N == 0 == piece % cut, "a tile is of one piece"
    places = kv_heads * triton.cdiv(group, shape.M)
    shares = min(PIECES, max(SHARES, PROGRAMS // (rows * places)))
    least = max(1, min(WHOLE, rows * places // FULL))
    factor = new.q_scale if new.q_scale is not None else q
    strides = (
        q.stride(0), q.stride(1), new.k.stride(0), new.k.stride(1), new.v.stride(0), new.v.stride(1), new.cos.stride(0), out.stride(0), meta.block_table.stride(0),
    )  # fmt: skip
    constants = facts(q, kv) | {
        "FUSED": rope is not None, "ROPE_HALF": new.cos.shape[1] if rope is not None else 0, "SCALED": new.q_scale is not None,
        "PIECES": PIECES, "PIECE": piece, "CUT": cut, "M": shape.M, "N": shape.N, "ROWS": joined, "CHUNK": max(1, min(PIECES, JOINED // (joined * padded))),
        "num_warps": shape.warps, "num_stages": shape.stages, "maxnreg": shape.registers, "PDL": pdl, "launch_pdl": pdl, "enable_fp_fusion": False,
    }  # fmt: skip
    if plain:
        for name in ("KEY_WIDTH", "VALUE_WIDTH", "VALUE_TYPE", "ROTATED", "TURNED_AS"):
            constants.pop(name)
        plain_decode_kernel[(places, rows * shares)](
            q, out, kv.key, kv.value, meta.block_table, meta.kv_lens, *kept, new.k, new.v, new.cos, new.sin, factor,
            scale, window, rows, shares, least, *strides, EARLY=early, **constants,
        )  # fmt: skip
        return
    _decode_kernel[(places, rows * shares)](
        q, out, *cache_arguments(kv, q), meta.block_table, meta.kv_lens, kv.rotation if kv.rotation is not None else q, *kept,
        new.k, new.v, new.cos, new.sin, factor, kv.key_center if kv.key_center is not None else q,
        scale, window, rows, shares, least, *strides, CENTRED=kv.key_center is not None, **constants,
    )  # fmt: skip
