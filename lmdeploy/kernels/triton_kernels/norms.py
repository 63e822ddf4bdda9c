"""`rms_norm`, `add_rms_norm` and `head_norm` in one launch each: a program reads its rows once, sums in float32 and writes once. The first two write
quarters too (`quarters.py`)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lmdeploy.kernels.triton_kernels.overlap import after_previous, overlaps
from lmdeploy.kernels.triton_kernels.quarters import TILE, store_quarters

Tensor = torch.Tensor
MAX_WIDTH = 1 << 16  # numbers of a row, which a program holds in registers


@triton.jit
def _rms_norm_kernel(
    x_ptr: tl.tensor, residual_ptr: tl.tensor, weight_ptr: tl.tensor, out_ptr: tl.tensor, eps: tl.tensor,
    x_stride: tl.tensor, residual_stride: tl.tensor, out_stride: tl.tensor, WIDTH: tl.constexpr, ADD: tl.constexpr, QUARTERS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One row: out = x / sqrt(mean(x^2) + eps) * weight, with ADD of residual += x, rounded, instead of x."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < WIDTH
    weight = tl.load(weight_ptr + place, mask=inside, other=0.0).to(tl.float32)
    after_previous(PDL)
    x = tl.load(x_ptr + row * x_stride + place, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        sum_ptr = residual_ptr + row * residual_stride + place
        summed = (tl.load(sum_ptr, mask=inside, other=0.0).to(tl.float32) + x).to(residual_ptr.dtype.element_ty)
        tl.store(sum_ptr, summed, mask=inside)
        x = summed.to(tl.float32)  # what is stored is what is normalised
    inverse = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / WIDTH + eps)
    result = (x * inverse * weight).to(out_ptr.dtype.element_ty)
    if QUARTERS:
        store_quarters(out_ptr, result, 0, row, tl.num_programs(0), WIDTH, BLOCK)
    else:
        tl.store(out_ptr + row * out_stride + place, result, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _head_norm_kernel(
    x_ptr: tl.tensor, weight_ptr: tl.tensor, rows: tl.tensor, eps: tl.tensor, x_stride: tl.tensor, head_stride: tl.tensor,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """BLOCK rows (token, head) in place."""
    after_previous(PDL)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, PADDED)[None, :]
    mask = (row < rows)[:, None] & (dim < WIDTH)
    row_ptr = x_ptr + ((row // HEADS).to(tl.int64) * x_stride + row % HEADS * head_stride)[:, None] + dim
    x = tl.load(row_ptr, mask=mask, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / WIDTH + eps)
    weight = tl.load(weight_ptr + dim, mask=dim < WIDTH, other=0.0).to(tl.float32)
    tl.store(row_ptr, (x * inverse[:, None] * weight).to(x_ptr.dtype.element_ty), mask=mask)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, quarters: bool) -> None:
    rows, width = x.shape
    assert not quarters or (width % TILE == 0 and out.is_contiguous())
    assert width <= MAX_WIDTH and x.stride(1) == out.stride(1) == 1, f"rows of {width} numbers, at most {MAX_WIDTH}"
    if rows == 0:
        return
    block = int(triton.next_power_of_2(width))
    total = x if residual is None else residual
    pdl = overlaps(x.device)
    _rms_norm_kernel[(rows,)](
        x, total, weight, out, eps, x.stride(0), total.stride(0), out.stride(0), WIDTH=width, ADD=residual is not None, QUARTERS=quarters,
        BLOCK=block, PDL=pdl, launch_pdl=pdl, num_warps=min(16, max(1, block // 512)), enable_fp_fusion=True,
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, *, quarters: bool = False) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight. x and out [T, M], weight [M]."""
    _launch(x, None, weight, eps, out, quarters)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, *, quarters: bool = False) -> None:
    """residual += x, rounded to its dtype; out = rms_norm(residual). x, residual and out [T, M]."""
    _launch(x, residual, weight, eps, out, quarters)


def head_norm(x: Tensor, weight: Tensor, eps: float) -> None:
    """RMSNorm of each head in place. x [T, H, D], rows may be strided; weight [D]."""
    tokens, heads, width = x.shape
    assert x.stride(2) == 1
    padded = int(triton.next_power_of_2(width))
    block = max(1, min(16, 2048 // padded))
    rows = tokens * heads
    if rows == 0:
        return
    pdl = overlaps(x.device)
    _head_norm_kernel[(triton.cdiv(rows, block),)](
        x, weight, rows, eps, x.stride(0), x.stride(1), HEADS=heads, WIDTH=width, PADDED=padded, BLOCK=block, PDL=pdl, launch_pdl=pdl,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
