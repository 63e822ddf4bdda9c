"""A row's pieces in the kernels of decode attention: where they begin, how the sums of one are kept, how they are joined."""

from __future__ import annotations

import triton
import triton.language as tl

from lmdeploy.kernels.triton_kernels.cache_read import finish, weighted_sums


@triton.jit
def cut(
    kv_len: tl.tensor, window: tl.tensor, PIECES: tl.constexpr, PIECE: tl.constexpr, CUT: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Oldest key that a decode row sees, where its first piece begins, keys of a piece, number of pieces: of its length alone."""
    oldest = tl.where(window > 0, tl.maximum(kv_len - window, 0), 0)
    begin = oldest // CUT * CUT
    size = tl.maximum(PIECE, tl.cdiv(tl.cdiv(kv_len - begin, PIECES), CUT) * CUT)
    return oldest, begin, size, tl.cdiv(kv_len - begin, size)


@triton.jit
def own_pieces(
    table_row: tl.tensor, kv_lens_ptr: tl.tensor, sequence: tl.tensor, share: tl.tensor, shares: tl.tensor, least: tl.tensor, window: tl.tensor, table_stride: tl.tensor,
    SLOTS: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr, CUT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Of a row and one of its `shares` programs: where the program's keys begin, unless the row is long or windowed, and their block, which is looked up while the
    length is on its way; the length; the oldest key that is seen; where pieces begin, their size, their number; and the first of the program's own and the one
    behind its last, which is not above it where there are none."""
    likely = share * PIECE
    early = tl.load(table_row + tl.minimum(likely // SLOTS, table_stride - 1))
    kv_len = tl.load(kv_lens_ptr + sequence)
    oldest, begin, size, count = cut(kv_len, window, PIECES, PIECE, CUT)
    each = tl.maximum(tl.cdiv(count, shares), least)
    return likely, early, kv_len, oldest, begin, size, count, share * each, tl.minimum(share * each + each, count)


@triton.jit
def joined(
    sums_ptr: tl.tensor, parts_ptr: tl.tensor, count: tl.tensor, members: tl.tensor,
    HALF: tl.constexpr, PADDED: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Sums of the weights, and both halves of those of the values, of one row's pieces for `members` heads of at most ROWS, CHUNK at a time: the order of the sums
    depends on the number of pieces alone. sums_ptr, parts_ptr: of the first of the heads. What other programs wrote a moment ago is read past the first-level cache.
    """
    member, dim = tl.arange(0, ROWS), tl.arange(0, PADDED)
    lo, hi = tl.zeros([ROWS, PADDED], tl.float32), tl.zeros([ROWS, PADDED], tl.float32)
    total, largest = tl.zeros([ROWS], tl.float32), tl.full([ROWS], float("-inf"), tl.float32)
    for first in tl.range(0, count, CHUNK, num_stages=1):
        piece = first + tl.arange(0, CHUNK)
        part = member[None, :] * PIECES + piece[:, None]  # [c, r]
        there = (piece < count)[:, None] & (member < members)[None, :]
        peak = tl.load(sums_ptr + part * 2, mask=there, other=float("-inf"), cache_modifier=".cg")
        weight = tl.load(sums_ptr + part * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
        row_ptr = parts_ptr + part[:, :, None] * (2 * HALF) + dim[None, None, :]
        mask = there[:, :, None] & (dim < HALF)[None, None, :]
        part_lo = tl.load(row_ptr, mask=mask, other=0.0, cache_modifier=".cg")
        part_hi = tl.load(row_ptr + HALF, mask=mask, other=0.0, cache_modifier=".cg")
        new = tl.maximum(largest, tl.max(peak, 0))
        level = tl.where(new == float("-inf"), 0.0, new)  # of rows that are no head
        share, fade = tl.exp2(peak - level[None, :]), tl.exp2(largest - level)
        total = total * fade + tl.sum(share * weight, 0)
        lo = lo * fade[:, None] + tl.sum(share[:, :, None] * part_lo, 0)
        hi = hi * fade[:, None] + tl.sum(share[:, :, None] * part_hi, 0)
        largest = new
    return total, lo, hi


@triton.jit
def join(
    sums_ptr: tl.tensor, parts_ptr: tl.tensor, count: tl.tensor, out_ptr: tl.tensor, rotation_ptr: tl.tensor, members: tl.tensor,
    GROUP: tl.constexpr, ROTATED: tl.constexpr, TURNED_AS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, PIECES: tl.constexpr, M: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """Join the pieces of one row for `members` heads, the first of which has its result at out_ptr."""
    total, lo, hi = joined(sums_ptr, parts_ptr, count, members, HALF, PADDED, PIECES, ROWS, CHUNK)
    member = tl.arange(0, ROWS)
    if ROTATED and ROWS < M:  # as many rows as tensor cores multiply at least
        total = tl.reshape(tl.broadcast_to(total[None, :], (M // ROWS, ROWS)), (M,))
        lo = tl.reshape(tl.broadcast_to(lo[None, :, :], (M // ROWS, ROWS, PADDED)), (M, PADDED))
        hi = tl.reshape(tl.broadcast_to(hi[None, :, :], (M // ROWS, ROWS, PADDED)), (M, PADDED))
        member = tl.arange(0, M)
    finish(total, lo, hi, out_ptr + member * (2 * HALF), member < members, rotation_ptr, ROTATED, TURNED_AS, HALF, PADDED)


@triton.jit
def keep_part(
    state: tl.tuple, sums_ptr: tl.tensor, parts_ptr: tl.tensor, piece: tl.tensor, live: tl.tensor,
    VALUE_WIDTH: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, PIECES: tl.constexpr, M: tl.constexpr,
) -> None:  # fmt: skip
    """Write the sums of a piece for M heads, the first of which has its parts at sums_ptr and parts_ptr."""
    largest, total, lo, hi = weighted_sums(state, VALUE_WIDTH, True)
    part = tl.arange(0, M) * PIECES + piece
    tl.store(sums_ptr + part * 2, largest, mask=live)
    tl.store(sums_ptr + part * 2 + 1, total, mask=live)
    dim = tl.arange(0, PADDED)[None, :]
    mask = live[:, None] & (dim < HALF)
    tl.store(parts_ptr + part[:, None] * (2 * HALF) + dim, lo, mask=mask)
    tl.store(parts_ptr + part[:, None] * (2 * HALF) + dim + HALF, hi, mask=mask)
