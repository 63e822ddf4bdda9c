"""`decode` over caches of 16 bits (and of float32 models) without a rotation: the new key is taken first, old ones are asked for before the kernel before has ended.

A row's sums begin with its new key, whose weight is 1, as part of its first piece: it comes from registers, is stored beside, and is never read back by the launch. So all
other keys were written by earlier steps, and few programs ask for their first tiles before they wait for q, k and v (`overlap.py` says why they may).
"""

from __future__ import annotations

import triton
import triton.language as tl

from lmdeploy.kernels.triton_kernels.cache_read import SMALLEST, as_operands, attend_tile, block_of, empty_state, finish, weighted_sums
from lmdeploy.kernels.triton_kernels.decode_pieces import join, keep_part, own_pieces
from lmdeploy.kernels.triton_kernels.kv_write import roped_halves
from lmdeploy.kernels.triton_kernels.overlap import wait_for_previous


@triton.jit
def _halves(ptr: tl.tensor, mask: tl.tensor, HALF: tl.constexpr, PADDED: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Both halves [n, P] of rows at ptr [n, 1]."""
    at = ptr + tl.arange(0, PADDED)[None, :]
    return tl.load(at, mask=mask, other=0.0), tl.load(at + HALF, mask=mask, other=0.0)


@triton.jit
def _rotated(
    ptr: tl.tensor, lo: tl.tensor, hi: tl.tensor, angles: tl.tuple, cos_ptr: tl.tensor, sin_ptr: tl.tensor, mask: tl.tensor,
    ROPE_HALF: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """`roped_halves`, with angles that are there already where the halves are each other's partners."""
    if ROPE_HALF == HALF:
        cos, sin = angles
        lo, hi = lo.to(tl.float32), hi.to(tl.float32)
        new_lo, new_hi = lo * cos - hi * sin, hi * cos + lo * sin
    else:
        new_lo, new_hi = roped_halves(ptr, cos_ptr, sin_ptr, mask, ROPE_HALF, HALF, PADDED)
    return new_lo, new_hi


@triton.jit
def _angles(
    angles_at: tl.tuple, factor_ptr: tl.tensor, WHOLE: tl.constexpr, SCALED: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr
) -> tuple[tl.tuple, tl.tensor]:  # fmt: skip
    """Cosines and sines of a token, if `_rotated` wants them, and what its queries are multiplied by."""
    angles, factor, dim = (1.0, 0.0), 1.0, tl.arange(0, PADDED)[None, :]
    if WHOLE:
        angles = tl.load(angles_at[0] + dim, mask=dim < HALF, other=1.0), tl.load(angles_at[1] + dim, mask=dim < HALF, other=0.0)
    if SCALED:
        factor = tl.load(factor_ptr)
    return angles, factor


@triton.jit
def _begun(
    at: tl.tuple, live: tl.tensor, angles: tl.tuple, angles_at: tl.tuple, factor: tl.tensor, scale: tl.tensor, first: tl.tensor, new_row: tl.tensor,
    FUSED: tl.constexpr, ROPE_HALF: tl.constexpr, SCALED: tl.constexpr, TYPE: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple]:  # fmt: skip
    """Queries as operands, and the state after the new key where that is the program's (`first`), which stores it; `at`: of q, k, v, keys and values.

    Without FUSED the cache holds the new key.
    """
    q_ptr, k_ptr, v_ptr, key_ptr, value_ptr = at
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    dim = tl.arange(0, PADDED)[None, :]
    new, mask = dim < HALF, live[:, None] & (dim < HALF)
    q_at, k_at, v_at = q_ptr[:, None], k_ptr + tl.zeros([1, 1], tl.int32), v_ptr + tl.zeros([1, 1], tl.int32)
    if not FUSED:
        k_at, v_at = key_ptr + new_row + tl.zeros([1, 1], tl.int32), value_ptr + new_row + tl.zeros([1, 1], tl.int32)
    lo, hi = _halves(q_at, mask, HALF, PADDED)
    k_lo, k_hi = _halves(k_at, new, HALF, PADDED)
    v_lo, v_hi = _halves(v_at, new, HALF, PADDED)
    sum_lo = tl.broadcast_to(tl.where(first, v_lo.to(tl.float32), 0.0), (M, PADDED))
    sum_hi = tl.broadcast_to(tl.where(first, v_hi.to(tl.float32), 0.0), (M, PADDED))
    if FUSED:
        lo, hi = _rotated(q_at, lo, hi, angles, angles_at[0], angles_at[1], mask, ROPE_HALF, HALF, PADDED)
        k_lo, k_hi = _rotated(k_at, k_lo, k_hi, angles, angles_at[0], angles_at[1], new, ROPE_HALF, HALF, PADDED)
        if SCALED:
            lo, hi = lo * factor, hi * factor
        lo, hi, k_lo, k_hi = lo.to(DTYPE), hi.to(DTYPE), k_lo.to(DTYPE), k_hi.to(DTYPE)
        stored = dim < tl.where(first, HALF, 0)
        tl.store(key_ptr + new_row + dim, k_lo, mask=stored)
        tl.store(key_ptr + new_row + HALF + dim, k_hi, mask=stored)
        tl.store(value_ptr + new_row + dim, v_lo, mask=stored)
        tl.store(value_ptr + new_row + HALF + dim, v_hi, mask=stored)
    query = as_operands(lo, hi, scale, "16", TYPE)
    score = tl.sum(query[0].to(tl.float32) * k_lo.to(tl.float32), 1) + tl.sum(query[1].to(tl.float32) * k_hi.to(tl.float32), 1)
    largest = tl.where(first, score * query[4], float("-inf"))
    total = tl.broadcast_to(tl.where(tl.arange(0, N) < tl.where(first, 1, 0), 1.0, 0.0)[None, :], (M, N))
    return query, (largest, total, tl.zeros([M, N], tl.float32), tl.full([M], SMALLEST, tl.int32), sum_lo, sum_hi)


@triton.jit
def _ended(
    state: tl.tuple, sums_ptr: tl.tensor, parts_ptr: tl.tensor, counter_ptr: tl.tensor, piece: tl.tensor, count: tl.tensor, own: tl.tensor, live: tl.tensor,
    members: tl.tensor, row_out: tl.tensor,
    GROUP: tl.constexpr, TYPE: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, PIECES: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """The result of a row of one piece; of several, the last of a program's `own` is kept, and the program that ends last joins them."""
    if count == 1:
        largest, total, sum_lo, sum_hi = weighted_sums(state, "16", True)
        finish(total, sum_lo, sum_hi, row_out + tl.arange(0, M) * (2 * HALF), live, row_out, False, TYPE, HALF, PADDED)
    else:
        keep_part(state, sums_ptr, parts_ptr, piece, live, "16", HALF, PADDED, PIECES, M)
        tl.debug_barrier()  # every thread's parts are written before this program counts as arrived
        if tl.atomic_add(counter_ptr, own, sem="acq_rel", scope="gpu") == count - own:
            tl.store(counter_ptr, 0)  # for the next layer
            join(sums_ptr, parts_ptr, count, row_out, row_out, members, GROUP, False, TYPE, HALF, PADDED, PIECES, M, ROWS, CHUNK)


@triton.jit(do_not_specialize=["window", "rows", "shares", "least", "table_stride"])
def plain_decode_kernel(
    q_ptr: tl.tensor, out_ptr: tl.tensor, key_ptr: tl.tensor, value_ptr: tl.tensor, table_ptr: tl.tensor, kv_lens_ptr: tl.tensor,
    counters_ptr: tl.tensor, sums_ptr: tl.tensor, parts_ptr: tl.tensor,
    k_ptr: tl.tensor, v_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, factor_ptr: tl.tensor,
    scale: tl.tensor, window: tl.tensor, rows: tl.tensor, shares: tl.tensor, least: tl.tensor,
    q_stride: tl.tensor, q_head_stride: tl.tensor, k_stride: tl.tensor, k_head_stride: tl.tensor, v_stride: tl.tensor, v_head_stride: tl.tensor,
    angle_stride: tl.tensor, out_stride: tl.tensor, table_stride: tl.tensor,
    GROUP: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr, KEY_TYPE: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr,
    FUSED: tl.constexpr, ROPE_HALF: tl.constexpr, SCALED: tl.constexpr,
    PIECES: tl.constexpr, PIECE: tl.constexpr, CUT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """As `_decode_kernel`. EARLY: the wait for the kernel before is in the loop's first turn, behind the loads of the tiles that the pipeline is deep; a program
    that finds no piece needs no wait (`overlap.py`)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if not EARLY:
            tl.extra.cuda.gdc_wait()
    tiles: tl.constexpr = (GROUP + M - 1) // M
    place, sequence, share = tl.program_id(0), tl.program_id(1) % rows, tl.program_id(1) // rows
    head, first_member = place // tiles, place % tiles * M
    member, sequence64 = first_member + tl.arange(0, M), sequence.to(tl.int64)
    table_row = table_ptr + sequence64 * table_stride
    likely, early, kv_len, oldest, begin, size, count, piece, last_piece = own_pieces(
        table_row, kv_lens_ptr, sequence, share, shares, least, window, table_stride, SLOTS, PIECES, PIECE, CUT
    )
    if piece < last_piece:
        own, limit = last_piece - piece, kv_len - 1  # old keys are those below the limit
        start = begin + piece * size
        done, end = start + size, tl.minimum(begin + last_piece * size, tl.maximum(limit, begin + (last_piece - 1) * size + 1))  # a tile at least of each piece
        block = tl.where(start == likely, early, block_of(table_row, start, tl.where(start == likely, start, end), SLOTS))
        new_row = ((tl.load(table_row + limit // SLOTS).to(tl.int64) * HEADS + head) * SLOTS + limit % SLOTS) * (2 * HALF)
        live = member < GROUP
        at = (
            q_ptr + sequence64 * q_stride + (head * GROUP + member) * q_head_stride, k_ptr + sequence64 * k_stride + head * k_head_stride,
            v_ptr + sequence64 * v_stride + head * v_head_stride, key_ptr, value_ptr,
        )  # fmt: skip
        angles_at = cos_ptr + sequence64 * angle_stride, sin_ptr + sequence64 * angle_stride
        angles, factor = _angles(angles_at, factor_ptr + sequence, FUSED and ROPE_HALF == HALF, SCALED, HALF, PADDED)
        first_part = (sequence64 * (HEADS * GROUP) + head * GROUP + first_member) * PIECES
        sums_ptr, parts_ptr = sums_ptr + first_part * 2, parts_ptr + first_part * (2 * HALF)
        if EARLY:
            nothing = tl.zeros([M, PADDED], KEY_TYPE)
            query, state = as_operands(nothing, nothing, scale, "16", KEY_TYPE), empty_state(M, PADDED, N, True)
        else:
            query, state = _begun(
                at, live, angles, angles_at, factor, scale, share == 0, new_row, FUSED, ROPE_HALF, SCALED, KEY_TYPE, HALF, PADDED, M, N
            )  # fmt: skip
        for first in range(start, end, N):
            if EARLY:  # noqa: SIM102 (a constant)
                if first == start:
                    if PDL:
                        wait_for_previous()
                    query, state = _begun(
                        at, live, angles, angles_at, factor, scale, share == 0, new_row, FUSED, ROPE_HALF, SCALED, KEY_TYPE, HALF, PADDED, M, N
                    )  # fmt: skip
            state = attend_tile(
                query, state, member, head, first, oldest, limit, window, block,
                table_row, key_ptr, key_ptr, value_ptr, key_ptr, "16", "16", KEY_TYPE, HEADS, SLOTS, HALF, PADDED, N, "edges", True,
            )  # fmt: skip
            block = block_of(table_row, first + N, end, SLOTS)
            if (first + N >= done) & (first + N < end):  # the last piece is kept below
                keep_part(state, sums_ptr, parts_ptr, piece, live, "16", HALF, PADDED, PIECES, M)
                state = empty_state(M, PADDED, N, True)
                piece, done = piece + 1, done + size
        _ended(
            state, sums_ptr, parts_ptr, counters_ptr + sequence * (HEADS * tiles) + place, piece, count, own, live, tl.minimum(GROUP - first_member, M),
            out_ptr + sequence64 * out_stride + (head * GROUP + first_member) * (2 * HALF), GROUP, KEY_TYPE, HALF, PADDED, PIECES, M, ROWS, CHUNK,
        )  # fmt: skip
