"""Attention of prompts and their chunks over the paged cache, in tiles of query tokens.

Query heads that share a KV head are rows of one tile, so a key is read once for all of them. The grid comes of the numbers of tokens and sequences; how
many of them are whose is read on the device, so a captured launch serves every step that it has room for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lmdeploy.inputs import AttentionMeta
from lmdeploy.kernels.triton_kernels.cache_read import TileShape, as_operands, attend, empty_state, facts, finish, query_rows, weighted_sums
from lmdeploy.kernels.triton_kernels.kv_write import cache_arguments
from lmdeploy.kernels.triton_kernels.overlap import after_previous, overlaps
from lmdeploy.kv_layer import KVLayer

Tensor = torch.Tensor
#: sequences among which a program finds its own; a kernel for each power of two would be compiled while requests wait
USUAL = 512


@triton.jit(do_not_specialize=["window", "first_sequence", "sequences", "table_stride"])
def _extend_kernel(
    q_ptr: tl.tensor, out_ptr: tl.tensor, key_ptr: tl.tensor, key_scales_ptr: tl.tensor, value_ptr: tl.tensor, value_scales_ptr: tl.tensor,
    table_ptr: tl.tensor, query_start_ptr: tl.tensor, kv_lens_ptr: tl.tensor, rotation_ptr: tl.tensor, scale: tl.tensor, window: tl.tensor,
    first_sequence: tl.tensor, sequences: tl.tensor, q_stride: tl.tensor, q_head_stride: tl.tensor, out_stride: tl.tensor, table_stride: tl.tensor,
    GROUP: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    KEY_TYPE: tl.constexpr, VALUE_TYPE: tl.constexpr, ROTATED: tl.constexpr, TURNED_AS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr,
    MOST: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of M rows (query token, member of the group) of one sequence and KV head.

    Sequence i of those here has the tiles from (rows before it) // M + i on, which leaves room for a broken tile of each before it: a program finds
    its sequence without sums over all of them, and a few programs find nothing to do.
    """
    after_previous(PDL)
    program, head = tl.program_id(1), tl.program_id(0)
    one = tl.arange(0, MOST)
    before = tl.load(query_start_ptr + first_sequence + one, mask=one < sequences, other=0) - tl.load(query_start_ptr + first_sequence)
    begun = (one < sequences) & (before * GROUP // M + one <= program)
    number = tl.sum(begun.to(tl.int32), 0) - 1
    sequence = first_sequence + number
    start = tl.load(query_start_ptr + sequence)
    count = tl.load(query_start_ptr + sequence + 1) - start
    first_tile = (start - tl.load(query_start_ptr + first_sequence)) * GROUP // M + number
    tile = tl.cdiv(count * GROUP, M) - 1 - (program - first_tile)  # those with the most keys begin first
    if tile >= 0:
        row = tile * M + tl.arange(0, M)
        token, live = row // GROUP, row < count * GROUP
        query_head = head * GROUP + row % GROUP
        kv_len = tl.load(kv_lens_ptr + sequence)
        history = kv_len - count
        position = history + token
        row64 = (start + token).to(tl.int64)
        lo, hi = query_rows(q_ptr + row64 * q_stride + query_head * q_head_stride, live, HALF, PADDED)
        query = as_operands(lo, hi, scale, KEY_WIDTH, KEY_TYPE)
        end = tl.minimum(history + (tile * M + M - 1) // GROUP + 1, kv_len)
        oldest = tl.where(window > 0, tl.maximum(history + tile * M // GROUP - window + 1, 0), 0)
        begin = oldest // N * N
        masked = tl.where(window > 0, begin, (history + tile * M // GROUP + 1) // N * N)  # before it all rows see all keys
        table_row = table_ptr + sequence.to(tl.int64) * table_stride
        state = attend(
            query, empty_state(M, PADDED, N, False), position, head, begin, masked, oldest, end, window,
            table_row, key_ptr, key_scales_ptr, value_ptr, value_scales_ptr, KEY_WIDTH, VALUE_WIDTH, VALUE_TYPE, HEADS, SLOTS, HALF, PADDED, N, "none", False,
        )  # fmt: skip
        state = attend(
            query, state, position, head, masked, end, oldest, end, window,
            table_row, key_ptr, key_scales_ptr, value_ptr, value_scales_ptr, KEY_WIDTH, VALUE_WIDTH, VALUE_TYPE, HEADS, SLOTS, HALF, PADDED, N, "causal", False,
        )  # fmt: skip
        largest, total, sum_lo, sum_hi = weighted_sums(state, VALUE_WIDTH, False)
        finish(total, sum_lo, sum_hi, out_ptr + row64 * out_stride + query_head * (2 * HALF), live, rotation_ptr, ROTATED, TURNED_AS, HALF, PADDED)


def _extend_shape(q: Tensor, kv: KVLayer) -> TileShape:
    """Fits the registers and the 227 KB of shared memory of Hopper, and the 163 KB of Ampere. Twice the rows halve the work of unpacking keys and values."""
    wide = q.shape[2] > 128
    if q.dtype is torch.float32:
        return TileShape(32, 16 if wide else 32, 8 if wide else 4, 1)
    if kv.plain or wide:
        return TileShape(64, 32 if wide else 64, 8 if wide else 4, 2)
    return TileShape(128, 64, 8, 3)


def extend(q: Tensor, kv: KVLayer, meta: AttentionMeta, scale: float, window: int, out: Tensor) -> None:
    """All sequences after the first `num_decode`; tokens that belong to none are left alone."""
    shape, common, pdl = _extend_shape(q, kv), facts(q, kv), overlaps(q.device)
    kv_heads, sequences = kv.key.shape[1], meta.kv_lens.shape[0] - meta.num_decode
    rows = (q.shape[0] - meta.num_decode) * (q.shape[1] // kv_heads)
    _extend_kernel[(kv_heads, rows // shape.M + sequences)](
        q, out, *cache_arguments(kv, q), meta.block_table, meta.query_start, meta.kv_lens, kv.rotation if kv.rotation is not None else q,
        scale, window, meta.num_decode, sequences, q.stride(0), q.stride(1), out.stride(0), meta.block_table.stride(0),
        **common, MOST=max(USUAL, int(triton.next_power_of_2(sequences))), M=shape.M, N=shape.N, num_warps=shape.warps, num_stages=shape.stages,
        maxnreg=shape.registers, PDL=pdl, launch_pdl=pdl, enable_fp_fusion=True,
    )  # fmt: skip
