"""`rope_write_kv` in one launch: rotate queries and keys, centre keys, turn them into the cache's rotation, quantise, scatter.

A program works on 16 rows, a row being one head of one token, all of q, of k or of v: rows are counted over tokens and heads, so that few heads
fill a program too. All arithmetic is float32 with one rounding to the activations' type where the reference rounds; nothing depends on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lmdeploy.kernels.triton_kernels.overlap import after_previous, overlaps
from lmdeploy.kernels.triton_kernels.rows import as_word, row_scales, to_fp8, to_levels, turned
from lmdeploy.kv_layer import KVLayer

Tensor = torch.Tensor
BLOCK = 16  # rows of a program, the least that tensor cores multiply


@triton.jit
def rotated_dims(x_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, dim: tl.tensor, inside: tl.tensor, ROPE_HALF: tl.constexpr) -> tl.tensor:
    """Half-split rotation of the given dims of rows. x_ptr [n, 1], cos_ptr and sin_ptr [n, 1], dim [1, P]; float32 [n, P].

    Each dim below 2 * ROPE_HALF reads its partner, ROPE_HALF dims away, from memory as well: the caller must not store before all have read.
    """
    x = tl.load(x_ptr + dim, mask=inside, other=0.0).to(tl.float32)
    turns, first = inside & (dim < 2 * ROPE_HALF), dim < ROPE_HALF
    partner = tl.load(x_ptr + tl.where(first, dim + ROPE_HALF, dim - ROPE_HALF), mask=turns, other=0.0).to(tl.float32)
    angle = tl.where(first, dim, dim - ROPE_HALF)
    cos = tl.load(cos_ptr + angle, mask=turns, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=turns, other=0.0)
    return tl.where(turns, tl.where(first, x * cos - partner * sin, x * cos + partner * sin), x)


@triton.jit
def roped_halves(
    x_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, mask: tl.tensor, ROPE_HALF: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Both halves float32 [n, P] of rows of one token, rotated. x_ptr [n, 1], mask [n, P], cos_ptr and sin_ptr of the token."""
    dim = tl.arange(0, PADDED)[None, :]
    if ROPE_HALF == HALF:  # the halves are each other's partners
        lo = tl.load(x_ptr + dim, mask=mask, other=0.0).to(tl.float32)
        hi = tl.load(x_ptr + dim + HALF, mask=mask, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + dim, mask=dim < HALF, other=1.0)
        sin = tl.load(sin_ptr + dim, mask=dim < HALF, other=0.0)
        new_lo, new_hi = lo * cos - hi * sin, hi * cos + lo * sin
    else:
        same = tl.zeros(x_ptr.shape, tl.int32)
        cos_row, sin_row = cos_ptr + same, sin_ptr + same
        new_lo = rotated_dims(x_ptr, cos_row, sin_row, dim, mask, ROPE_HALF)
        new_hi = rotated_dims(x_ptr, cos_row, sin_row, dim + HALF, mask, ROPE_HALF)
    return new_lo, new_hi


@triton.jit
def store_row(
    lo: tl.tensor, hi: tl.tensor, cache_ptr: tl.tensor, scales_ptr: tl.tensor, row: tl.tensor, live: tl.tensor,
    WIDTH: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr,
) -> None:  # fmt: skip
    """Rows in two halves [n, P] to rows `row` int64 [n] of a cache, in the numbers of its width."""
    dim = tl.arange(0, PADDED)
    inside = dim < HALF
    mask = live[:, None] & inside[None, :]
    row_ptr = cache_ptr + row[:, None] * (HALF if WIDTH == "4" else 2 * HALF) + dim[None, :]
    if WIDTH == "16":
        tl.store(row_ptr, lo.to(cache_ptr.dtype.element_ty), mask=mask)
        tl.store(row_ptr + HALF, hi.to(cache_ptr.dtype.element_ty), mask=mask)
    else:
        LEVELS: tl.constexpr = 255.0 if WIDTH == "8" else 15.0
        scale, offset = row_scales(lo, hi, inside, WIDTH, LEVELS)
        tl.store(scales_ptr + row, as_word(scale, offset), mask=live)
        if WIDTH == "fp8":
            spread = tl.broadcast_to(scale[:, None], lo.shape)
            lo_number, hi_number = to_fp8(tl.div_rn(lo, spread)), to_fp8(tl.div_rn(hi, spread))
        else:
            lo_number, hi_number = to_levels(lo, scale, offset, LEVELS), to_levels(hi, scale, offset, LEVELS)
        if WIDTH == "4":
            tl.store(row_ptr, (lo_number | (hi_number << 4)).to(tl.uint8), mask=mask)
        else:
            tl.store(row_ptr, lo_number.to(tl.uint8), mask=mask)
            tl.store(row_ptr + HALF, hi_number.to(tl.uint8), mask=mask)


@triton.jit
def _prepare(
    x_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, factor_ptr: tl.tensor, center_ptr: tl.tensor, rotation_ptr: tl.tensor,
    token: tl.tensor, head: tl.tensor, live: tl.tensor, x_stride: tl.tensor, x_head_stride: tl.tensor, angle_stride: tl.tensor,
    ROPE_HALF: tl.constexpr, SCALED: tl.constexpr, CENTRED: tl.constexpr, ROTATED: tl.constexpr, TURNED_AS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Rotate, centre and turn rows in place; their two halves [n, P] as stored, in float32."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    dim = tl.arange(0, PADDED)[None, :]
    mask = live[:, None] & (dim < HALF)
    row_ptr = x_ptr + (token.to(tl.int64) * x_stride + head * x_head_stride)[:, None]
    cos_row, sin_row = cos_ptr + (token * angle_stride)[:, None], sin_ptr + (token * angle_stride)[:, None]
    lo = rotated_dims(row_ptr, cos_row, sin_row, dim, mask, ROPE_HALF)
    hi = rotated_dims(row_ptr, cos_row, sin_row, dim + HALF, live[:, None] & (dim < HALF), ROPE_HALF)
    if SCALED:
        factor = tl.load(factor_ptr + token, mask=live, other=1.0)[:, None]
        lo, hi = lo * factor, hi * factor
    if CENTRED:
        center = center_ptr + (head * (2 * HALF))[:, None] + dim
        lo, hi = lo - tl.load(center, mask=mask, other=0.0), hi - tl.load(center + HALF, mask=mask, other=0.0)
    lo, hi = lo.to(DTYPE), hi.to(DTYPE)
    if ROTATED:
        new_lo, new_hi = turned(lo, hi, rotation_ptr, TURNED_AS, HALF, PADDED)
        lo, hi = new_lo.to(DTYPE), new_hi.to(DTYPE)
    if SCALED or CENTRED or ROTATED or ROPE_HALF > 0:
        tl.debug_barrier()  # every thread has read its partners before any row changes
        tl.store(row_ptr + dim, lo, mask=mask)
        tl.store(row_ptr + dim + HALF, hi, mask=mask)
    return lo.to(tl.float32), hi.to(tl.float32)


@triton.jit
def _cache_row(slots_ptr: tl.tensor, token: tl.tensor, head: tl.tensor, live: tl.tensor, HEADS: tl.constexpr, SLOTS: tl.constexpr) -> tl.tensor:
    """int64 [n]: number of the cache row of (token, head) in [blocks, HEADS, SLOTS]."""
    slot = tl.load(slots_ptr + token, mask=live, other=0)
    return (slot // SLOTS * HEADS + head) * SLOTS + slot % SLOTS


@triton.jit(do_not_specialize=["tokens"])
def _rope_write_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, factor_ptr: tl.tensor, center_ptr: tl.tensor,
    rotation_ptr: tl.tensor, slots_ptr: tl.tensor, key_ptr: tl.tensor, key_scales_ptr: tl.tensor, value_ptr: tl.tensor, value_scales_ptr: tl.tensor,
    tokens: tl.tensor, q_stride: tl.tensor, q_head_stride: tl.tensor, k_stride: tl.tensor, k_head_stride: tl.tensor, v_stride: tl.tensor,
    v_head_stride: tl.tensor, angle_stride: tl.tensor,
    QUERY_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SLOTS: tl.constexpr, ROPE_HALF: tl.constexpr, SCALED: tl.constexpr, CENTRED: tl.constexpr,
    ROTATED: tl.constexpr, TURNED_AS: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """The first programs take the rows of q, the next those of k, the last those of v."""
    after_previous(PDL)
    program = tl.program_id(0)
    query_tiles, kv_tiles = tl.cdiv(tokens * QUERY_HEADS, BLOCK), tl.cdiv(tokens * KV_HEADS, BLOCK)
    place = tl.arange(0, BLOCK)
    if program < query_tiles:
        row = program * BLOCK + place
        _prepare(
            q_ptr, cos_ptr, sin_ptr, factor_ptr, center_ptr, rotation_ptr, row // QUERY_HEADS, row % QUERY_HEADS, row < tokens * QUERY_HEADS,
            q_stride, q_head_stride, angle_stride, ROPE_HALF, SCALED, False, ROTATED, TURNED_AS, HALF, PADDED,
        )  # fmt: skip
    elif program < query_tiles + kv_tiles:
        row = (program - query_tiles) * BLOCK + place
        token, head, live = row // KV_HEADS, row % KV_HEADS, row < tokens * KV_HEADS
        lo, hi = _prepare(
            k_ptr, cos_ptr, sin_ptr, factor_ptr, center_ptr, rotation_ptr, token, head, live,
            k_stride, k_head_stride, angle_stride, ROPE_HALF, False, CENTRED, ROTATED, TURNED_AS, HALF, PADDED,
        )  # fmt: skip
        store_row(lo, hi, key_ptr, key_scales_ptr, _cache_row(slots_ptr, token, head, live, KV_HEADS, SLOTS), live, KEY_WIDTH, HALF, PADDED)
    else:
        row = (program - query_tiles - kv_tiles) * BLOCK + place
        token, head, live = row // KV_HEADS, row % KV_HEADS, row < tokens * KV_HEADS
        lo, hi = _prepare(
            v_ptr, cos_ptr, sin_ptr, factor_ptr, center_ptr, rotation_ptr, token, head, live,
            v_stride, v_head_stride, angle_stride, 0, False, False, ROTATED, TURNED_AS, HALF, PADDED,
        )  # fmt: skip
        store_row(lo, hi, value_ptr, value_scales_ptr, _cache_row(slots_ptr, token, head, live, KV_HEADS, SLOTS), live, VALUE_WIDTH, HALF, PADDED)


def as_bytes(numbers: Tensor) -> Tensor:
    """float8 numbers as bytes, which every chip can move; others as they are."""
    return numbers.view(torch.uint8) if numbers.dtype is torch.float8_e4m3fn else numbers


def cache_arguments(kv: KVLayer, unused: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, their scales, values, theirs, as kernels take them: each row's scale and offset are one int32. `unused` stands for scales that are not there."""
    key_scales, value_scales = (part.view(torch.int32) if part is not None else unused for part in (kv.key_scales, kv.value_scales))
    return as_bytes(kv.key), key_scales, as_bytes(kv.value), value_scales


def product_type(x: Tensor) -> tl.dtype:
    """The type of x in a kernel's products. Tensors of the CPU mean Triton's interpreter, whose products know no bfloat16."""
    if x.device.type == "cpu":
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[x.dtype]


def padded_half(head_dim: int) -> int:
    """Dims of half a row in a kernel: a power of two, at least the 16 that tensor cores multiply."""
    return max(16, int(triton.next_power_of_2(head_dim // 2)))


def rope_write_kv(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, q_scale: Tensor | None, kv: KVLayer, slot_mapping: Tensor) -> None:
    """Rotate q [T, H, D] and k [T, K, D] in place, scale the rows of q, write k and v to their slots of the cache; see `api.Kernels`."""
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    assert head_dim % 2 == 0 and q.stride(2) == k.stride(2) == v.stride(2) == 1, "rows of an even number of contiguous dims"
    assert cos.stride(0) == sin.stride(0) and cos.stride(1) == sin.stride(1) == 1
    assert kv.key.is_contiguous() and kv.value.is_contiguous() and (kv.key_center is None or kv.key_center.is_contiguous())
    if tokens == 0:
        return
    pdl = overlaps(q.device)
    unused = cos  # stands for a tensor that this variant never reads
    grid = (triton.cdiv(tokens * heads, BLOCK) + 2 * triton.cdiv(tokens * kv_heads, BLOCK),)
    _rope_write_kernel[grid](
        q, k, v, cos, sin, q_scale if q_scale is not None else unused, kv.key_center if kv.key_center is not None else unused,
        kv.rotation if kv.rotation is not None else unused, slot_mapping, *cache_arguments(kv, unused), tokens,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), cos.stride(0),
        QUERY_HEADS=heads, KV_HEADS=kv_heads, SLOTS=kv.key.shape[2], ROPE_HALF=cos.shape[1], SCALED=q_scale is not None, CENTRED=kv.key_center is not None,
        ROTATED=kv.rotation is not None, TURNED_AS=product_type(q), KEY_WIDTH=kv.key_width, VALUE_WIDTH=kv.value_width, HALF=head_dim // 2,
        PADDED=padded_half(head_dim), BLOCK=BLOCK, PDL=pdl, launch_pdl=pdl, num_warps=4 if head_dim <= 128 else 8, enable_fp_fusion=False,
    )  # fmt: skip
