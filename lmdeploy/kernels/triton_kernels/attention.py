"""`attention` over the paged cache: decode rows by split-KV over the chip, the others in tiles of query tokens.

Query heads that share a KV head are rows of one tile, so a key is read once for all of them. A sequence's keys are split at fixed places, so
a row's bits depend neither on the batch nor on how a prompt was cut into chunks (a step of one token alone takes the other kernel, whose bits differ).
Grid sizes come from the host's copies of the lengths; the device is never waited for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmdeploy.inputs import AttentionMeta
from lmdeploy.kernels.triton_kernels.cache_read import attend
from lmdeploy.kernels.triton_kernels.kv_write import as_bytes, padded_half
from lmdeploy.kv_layer import KVLayer

Tensor = torch.Tensor
SPLIT = 256  # keys of a decode program
#: prompts of a step that cuDNN computes, one call each, and the fewest tokens that are worth one
MOST_PROMPTS, SHORTEST_PROMPT = 8, 512
CHUNK = 16  # splits that the last step of decoding adds up at once
TURNED = tl.constexpr(32)  # dims of a result that are turned back at once
#: p times a row's scale may be too small for float16; this much larger it fits, and the largest stays in reach.
FLOAT16_GAIN = {"16": 1.0, "8": 64.0, "4": 4.0, "fp8": 256.0}


@triton.jit
def _query(q_ptr: tl.tensor, live: tl.tensor, DTYPE: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Both halves [m, P] of query rows at q_ptr [m], and their sums float32 [m]."""
    dim = tl.arange(0, PADDED)[None, :]
    mask = live[:, None] & (dim < HALF)
    lo = tl.load(q_ptr[:, None] + dim, mask=mask, other=0.0)
    hi = tl.load(q_ptr[:, None] + dim + HALF, mask=mask, other=0.0)
    return lo.to(DTYPE), hi.to(DTYPE), tl.sum(lo.to(tl.float32), 1) + tl.sum(hi.to(tl.float32), 1)


@triton.jit
def _finish(
    total: tl.tensor, lo: tl.tensor, hi: tl.tensor, out_ptr: tl.tensor, live: tl.tensor, rotation_ptr: tl.tensor,
    ROTATED: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr,
) -> None:  # fmt: skip
    """Divide by the sum of the weights, turn back, write to out_ptr [m]."""
    total = tl.where(total == 0.0, 1.0, total)[:, None]  # of rows that are no query
    lo, hi = lo / total, hi / total
    dim = tl.arange(0, PADDED)
    if ROTATED:
        for first in tl.range(0, 2 * HALF, TURNED, num_stages=1):  # a few dims at a time: the whole matrix would take all registers
            to = first + tl.arange(0, TURNED)[None, :]
            mask = (dim < HALF)[:, None] & (to < 2 * HALF)
            corner = rotation_ptr + dim[:, None] * (2 * HALF) + to
            turned = tl.dot(lo, tl.load(corner, mask=mask, other=0.0), input_precision="tf32x3")
            turned = tl.dot(hi, tl.load(corner + HALF * (2 * HALF), mask=mask, other=0.0), turned, input_precision="tf32x3")
            tl.store(out_ptr[:, None] + to, turned.to(out_ptr.dtype.element_ty), mask=live[:, None] & (to < 2 * HALF))
    else:
        mask = live[:, None] & (dim < HALF)[None, :]
        tl.store(out_ptr[:, None] + dim[None, :], lo.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptr[:, None] + dim[None, :] + HALF, hi.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["window", "first_sequence"])
def _extend_kernel(
    q_ptr: tl.tensor, out_ptr: tl.tensor, key_ptr: tl.tensor, key_scales_ptr: tl.tensor, value_ptr: tl.tensor, value_scales_ptr: tl.tensor,
    table_ptr: tl.tensor, query_start_ptr: tl.tensor, kv_lens_ptr: tl.tensor, rotation_ptr: tl.tensor, scale: tl.tensor, window: tl.tensor,
    first_sequence: tl.tensor, q_stride: tl.tensor, q_head_stride: tl.tensor, out_stride: tl.tensor, table_stride: tl.tensor,
    GROUP: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, GAIN: tl.constexpr,
    ROTATED: tl.constexpr, DTYPE: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of M rows (query token, member of the group) of one sequence and KV head."""
    sequence, head = first_sequence + tl.program_id(2), tl.program_id(1)
    start = tl.load(query_start_ptr + sequence)
    count = tl.load(query_start_ptr + sequence + 1) - start
    tile = tl.cdiv(count * GROUP, M) - 1 - tl.program_id(0)  # those with the most keys begin first
    if tile >= 0:
        row = tile * M + tl.arange(0, M)
        token, live = row // GROUP, row < count * GROUP
        query_head = head * GROUP + row % GROUP
        kv_len = tl.load(kv_lens_ptr + sequence)
        position = kv_len - count + token
        row64 = (start + token).to(tl.int64)
        q_lo, q_hi, q_sum = _query(q_ptr + row64 * q_stride + query_head * q_head_stride, live, DTYPE, HALF, PADDED)
        end = tl.minimum(kv_len - count + (tile * M + M - 1) // GROUP + 1, kv_len)
        oldest = tl.where(window > 0, tl.maximum(kv_len - count + tile * M // GROUP - window + 1, 0), 0)
        largest, total, lo, hi = attend(
            q_lo, q_hi, q_sum, position, head, oldest // N * N, end, oldest, table_ptr + sequence.to(tl.int64) * table_stride,
            key_ptr, key_scales_ptr, value_ptr, value_scales_ptr, scale, window, KEY_WIDTH, VALUE_WIDTH, GAIN, HEADS, SLOTS, HALF, PADDED, M, N,
        )  # fmt: skip
        _finish(total, lo, hi, out_ptr + row64 * out_stride + query_head * (2 * HALF), live, rotation_ptr, ROTATED, HALF, PADDED)


@triton.jit(do_not_specialize=["window", "num_splits"])
def _decode_kernel(
    q_ptr: tl.tensor, out_ptr: tl.tensor, key_ptr: tl.tensor, key_scales_ptr: tl.tensor, value_ptr: tl.tensor, value_scales_ptr: tl.tensor,
    table_ptr: tl.tensor, kv_lens_ptr: tl.tensor, sums_ptr: tl.tensor, parts_ptr: tl.tensor, scale: tl.tensor,
    window: tl.tensor, num_splits: tl.tensor, q_stride: tl.tensor, q_head_stride: tl.tensor, out_stride: tl.tensor, table_stride: tl.tensor,
    GROUP: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, GAIN: tl.constexpr,
    ROTATED: tl.constexpr, DTYPE: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr,
) -> None:  # fmt: skip
    """One split of the keys of one sequence, for M heads of one KV head: straight to `out` where it is the only split and nothing is to be turned back."""
    sequence = tl.program_id(0)
    tiles: tl.constexpr = (GROUP + M - 1) // M
    head, member = tl.program_id(1) // tiles, tl.program_id(1) % tiles * M + tl.arange(0, M)
    kv_len = tl.load(kv_lens_ptr + sequence)
    oldest = tl.where(window > 0, tl.maximum(kv_len - window, 0), 0)
    first_split = oldest // SPLIT
    begin = (first_split + tl.program_id(2)) * SPLIT
    if begin < kv_len:
        live, query_head = member < GROUP, head * GROUP + member
        sequence64 = sequence.to(tl.int64)
        q_lo, q_hi, q_sum = _query(q_ptr + sequence64 * q_stride + query_head * q_head_stride, live, DTYPE, HALF, PADDED)
        position = tl.zeros([M], tl.int32) + (kv_len - 1)
        largest, total, lo, hi = attend(
            q_lo, q_hi, q_sum, position, head, begin, tl.minimum(begin + SPLIT, kv_len), oldest, table_ptr + sequence64 * table_stride,
            key_ptr, key_scales_ptr, value_ptr, value_scales_ptr, scale, window, KEY_WIDTH, VALUE_WIDTH, GAIN, HEADS, SLOTS, HALF, PADDED, M, N,
        )  # fmt: skip
        only = (first_split + 1) * SPLIT >= kv_len
        if ROTATED:  # turning back costs registers that this kernel wants for keys; the join does it
            only = False
        if only:
            _finish(total, lo, hi, out_ptr + sequence64 * out_stride + query_head * (2 * HALF), live, q_ptr, False, HALF, PADDED)
        else:
            part = (sequence64 * (HEADS * GROUP) + query_head) * num_splits + tl.program_id(2)
            tl.store(sums_ptr + part * 2, largest, mask=live)
            tl.store(sums_ptr + part * 2 + 1, total, mask=live)
            dim = tl.arange(0, PADDED)[None, :]
            mask = live[:, None] & (dim < HALF)
            tl.store(parts_ptr + part[:, None] * (2 * HALF) + dim, lo, mask=mask)
            tl.store(parts_ptr + part[:, None] * (2 * HALF) + dim + HALF, hi, mask=mask)


@triton.jit
def _turned_row(lo: tl.tensor, hi: tl.tensor, rotation_ptr: tl.tensor, HALF: tl.constexpr, PADDED: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """One row [P] and [P] times the rotation [D, D]."""
    dim = tl.arange(0, PADDED)
    inside = (dim < HALF)[:, None] & (dim < HALF)[None, :]
    corner = rotation_ptr + dim[:, None] * (2 * HALF) + dim[None, :]
    below = corner + HALF * (2 * HALF)
    new_lo = tl.sum(lo[:, None] * tl.load(corner, mask=inside, other=0.0) + hi[:, None] * tl.load(below, mask=inside, other=0.0), 0)
    new_hi = tl.sum(lo[:, None] * tl.load(corner + HALF, mask=inside, other=0.0) + hi[:, None] * tl.load(below + HALF, mask=inside, other=0.0), 0)
    return new_lo, new_hi


@triton.jit(do_not_specialize=["window", "num_splits"])
def _join_kernel(
    out_ptr: tl.tensor, kv_lens_ptr: tl.tensor, rotation_ptr: tl.tensor, sums_ptr: tl.tensor, parts_ptr: tl.tensor, window: tl.tensor,
    num_splits: tl.tensor, out_stride: tl.tensor, QUERY_HEADS: tl.constexpr, ROTATED: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr,
    SPLIT: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """Join the splits of one sequence and head, CHUNK at a time: the order of the sums depends on the number of this sequence's splits alone."""
    sequence, query_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kv_len = tl.load(kv_lens_ptr + sequence)
    oldest = tl.where(window > 0, tl.maximum(kv_len - window, 0), 0)
    count = tl.cdiv(kv_len, SPLIT) - oldest // SPLIT
    if ROTATED or count > 1:
        dim = tl.arange(0, PADDED)
        first_part = (sequence * QUERY_HEADS + query_head) * num_splits
        lo, hi = tl.zeros([PADDED], tl.float32), tl.zeros([PADDED], tl.float32)
        total, largest = 0.0, float("-inf")
        for first in range(0, count, CHUNK):
            split = first + tl.arange(0, CHUNK)
            there = split < count
            part = first_part + split
            peak = tl.load(sums_ptr + part * 2, mask=there, other=float("-inf"))
            new = tl.maximum(largest, tl.max(peak, 0))
            share, fade = tl.exp2(peak - new), tl.exp2(largest - new)
            total = total * fade + tl.sum(share * tl.load(sums_ptr + part * 2 + 1, mask=there, other=0.0), 0)
            mask = there[:, None] & (dim < HALF)[None, :]
            row_ptr = parts_ptr + part[:, None] * (2 * HALF) + dim[None, :]
            lo = lo * fade + tl.sum(share[:, None] * tl.load(row_ptr, mask=mask, other=0.0), 0)
            hi = hi * fade + tl.sum(share[:, None] * tl.load(row_ptr + HALF, mask=mask, other=0.0), 0)
            largest = new
        lo, hi = lo / total, hi / total
        if ROTATED:
            lo, hi = _turned_row(lo, hi, rotation_ptr, HALF, PADDED)
        row_out = out_ptr + sequence * out_stride + query_head * (2 * HALF) + dim
        tl.store(row_out, lo.to(out_ptr.dtype.element_ty), mask=dim < HALF)
        tl.store(row_out + HALF, hi.to(out_ptr.dtype.element_ty), mask=dim < HALF)


class _Shape(NamedTuple):
    """Tile sizes, warps and pipeline stages of a launch."""

    M: int
    N: int
    warps: int
    stages: int


def _extend_shape(head_dim: int, dtype: torch.dtype) -> _Shape:
    """Fits the registers and the 227 KB of shared memory of Hopper, and the 163 KB of Ampere."""
    wide = head_dim > 128
    if dtype is torch.float32:
        return _Shape(32, 16 if wide else 32, 8 if wide else 4, 1)
    return _Shape(64, 32 if wide else 64, 8 if wide else 4, 2)


def _decode_shape(group: int, head_dim: int, dtype: torch.dtype) -> _Shape:
    wide = head_dim > 128 or dtype is torch.float32
    return _Shape(min(64, max(16, int(triton.next_power_of_2(group)))), 32 if wide else 64, 4, 2)


def _common(q: Tensor, kv: KVLayer) -> dict[str, object]:
    """The compile-time facts that both kinds of rows share."""
    kv_heads, slots = kv.key.shape[1:3]
    head_dim = q.shape[2]
    return {
        "GROUP": q.shape[1] // kv_heads, "HEADS": kv_heads, "SLOTS": slots, "KEY_WIDTH": kv.key_width, "VALUE_WIDTH": kv.value_width,
        "GAIN": FLOAT16_GAIN[kv.value_width] if q.dtype is torch.float16 else 1.0, "ROTATED": kv.rotation is not None,
        "DTYPE": _dot_dtype(q), "HALF": head_dim // 2, "PADDED": padded_half(head_dim),
    }  # fmt: skip


def _dot_dtype(q: Tensor) -> tl.dtype:
    """Type of the products' operands. Tensors of the CPU mean Triton's interpreter, whose products know no bfloat16."""
    if q.device.type == "cpu":
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[q.dtype]


def _cache_arguments(q: Tensor, kv: KVLayer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, their scales, values, theirs; q stands for a tensor that is never read."""
    return (
        as_bytes(kv.key), kv.key_scales if kv.key_scales is not None else q, as_bytes(kv.value), kv.value_scales if kv.value_scales is not None else q
    )  # fmt: skip


def _extend(q: Tensor, kv: KVLayer, meta: AttentionMeta, scale: float, window: int, out: Tensor) -> None:
    """All sequences after the first `num_decode`."""
    shape, common = _extend_shape(q.shape[2], q.dtype), _common(q, kv)
    kv_heads = kv.key.shape[1]
    rows = max(meta.query_lens[meta.num_decode :]) * (q.shape[1] // kv_heads)
    grid = (triton.cdiv(rows, shape.M), kv_heads, len(meta.query_lens) - meta.num_decode)
    _extend_kernel[grid](
        q, out, *_cache_arguments(q, kv), meta.block_table, meta.query_start, meta.kv_lens, kv.rotation if kv.rotation is not None else q,
        scale, window, meta.num_decode, q.stride(0), q.stride(1), out.stride(0), meta.block_table.stride(0),
        **common, M=shape.M, N=shape.N, num_warps=shape.warps, num_stages=shape.stages, enable_fp_fusion=True,
    )  # fmt: skip


def _decode(q: Tensor, kv: KVLayer, meta: AttentionMeta, scale: float, window: int, out: Tensor) -> None:
    """The first `num_decode` sequences, which are as many rows of q."""
    rows, (heads, head_dim), kv_heads = meta.num_decode, q.shape[1:], kv.key.shape[1]
    shape, common = _decode_shape(heads // kv_heads, head_dim, q.dtype), _common(q, kv)
    splits = triton.cdiv(max(meta.kv_lens_host[:rows]), SPLIT)
    if window > 0:
        splits = min(splits, triton.cdiv(window - 1, SPLIT) + 1)
    one = splits == 1 and kv.rotation is None  # no sequence has parts to join
    sums = q if one else torch.empty((rows, heads, splits, 2), dtype=torch.float32, device=q.device)
    parts = q if one else torch.empty((rows, heads, splits, head_dim), dtype=torch.float32, device=q.device)
    grid = (rows, kv_heads * triton.cdiv(heads // kv_heads, shape.M), splits)
    _decode_kernel[grid](
        q, out, *_cache_arguments(q, kv), meta.block_table, meta.kv_lens, sums, parts, scale, window, splits,
        q.stride(0), q.stride(1), out.stride(0), meta.block_table.stride(0),
        **common, M=shape.M, N=shape.N, SPLIT=SPLIT, num_warps=shape.warps, num_stages=shape.stages, enable_fp_fusion=True,
    )  # fmt: skip
    if not one:
        _join_kernel[(rows, heads)](
            out, meta.kv_lens, kv.rotation if kv.rotation is not None else q, sums, parts, window, splits, out.stride(0), QUERY_HEADS=heads, ROTATED=kv.rotation is not None,
            HALF=head_dim // 2, PADDED=padded_half(head_dim), SPLIT=SPLIT, CHUNK=CHUNK, num_warps=4 if head_dim <= 128 else 8, enable_fp_fusion=True,
        )  # fmt: skip


def _suits_cudnn(q: Tensor, kv: KVLayer, meta: AttentionMeta, window: int) -> bool:
    """Whether all that is not decoding are a few long prompts without history, whose keys need not come from the cache."""
    lens, keys = meta.query_lens[meta.num_decode :], meta.kv_lens_host[meta.num_decode :]
    simple = kv.plain and window <= 0 and q.dtype is not torch.float32 and q.shape[2] in (64, 128) and q.is_cuda
    return simple and len(lens) <= MOST_PROMPTS and lens == keys and min(lens) >= SHORTEST_PROMPT and torch.backends.cudnn.is_available()


def _whole_prompts(q: Tensor, k: Tensor, v: Tensor, meta: AttentionMeta, scale: float, out: Tensor) -> None:
    """cuDNN's attention for each prompt: about twice the rate of the tiles here (benchmark/RESULTS.md)."""
    start = meta.num_decode
    for count in meta.query_lens[meta.num_decode :]:
        rows = slice(start, start + count)
        heads = [part[rows].transpose(0, 1).unsqueeze(0) for part in (q, k, v)]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            found = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        out[rows].view(count, q.shape[1], q.shape[2]).copy_(found.squeeze(0).transpose(0, 1))
        start += count


def attention(q: Tensor, k: Tensor, v: Tensor, kv: KVLayer, meta: AttentionMeta, scale: float, window: int, out: Tensor) -> None:
    """Causal attention of the new tokens of each sequence over its cached keys; see `api.Kernels`. q [T, H, D], out [T, H * D]."""
    assert q.shape[2] % 2 == 0 and q.stride(2) == 1 and out.stride(1) == 1 and meta.block_table.stride(1) == 1
    assert kv.key.is_contiguous() and kv.value.is_contiguous()
    if meta.num_decode:
        _decode(q, kv, meta, scale, window, out)
    if len(meta.query_lens) > meta.num_decode:
        if _suits_cudnn(q, kv, meta, window):
            _whole_prompts(q, k, v, meta, scale, out)
        else:
            _extend(q, kv, meta, scale, window, out)
