"""`embed_norm`: where a step begins, in one launch instead of three: rows of the table, their RMSNorm, and zeros for what later products add up.

It is launched when all before has ended (`overlap.py` relies on that), and lets the first product's programs take their places at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lmdeploy.kernels.triton_kernels.norms import MAX_WIDTH
from lmdeploy.kernels.triton_kernels.overlap import after_previous, overlaps

Tensor = torch.Tensor


@triton.jit(do_not_specialize=["count"])
def _embed_norm_kernel(
    ids_ptr: tl.tensor, table_ptr: tl.tensor, weight_ptr: tl.tensor, residual_ptr: tl.tensor, out_ptr: tl.tensor, zeros_ptr: tl.tensor, count: tl.tensor,
    eps: tl.tensor, residual_stride: tl.tensor, out_stride: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One row: residual = table[id], out = residual / sqrt(mean(residual^2) + eps) * weight; and a share of `count` zeros."""
    after_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < WIDTH
    x = tl.load(table_ptr + tl.load(ids_ptr + row) * WIDTH + place, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + place, mask=inside, other=0.0).to(tl.float32)
    for first in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        tl.store(zeros_ptr + first + place, 0, mask=first + place < count)
    tl.store(residual_ptr + row * residual_stride + place, x, mask=inside)
    x = x.to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / WIDTH + eps)
    tl.store(out_ptr + row * out_stride + place, (x * inverse * weight).to(out_ptr.dtype.element_ty), mask=inside)


def embed_norm(ids: Tensor, table: Tensor, weight: Tensor, eps: float, residual: Tensor, out: Tensor, zeros: Tensor | None) -> None:
    """residual = table[ids]; out = rms_norm(residual) * weight; zeros = 0. ids int64 [T], table [V, M], weight [M], residual and out [T, M], zeros int64, contiguous."""
    (rows,), width = ids.shape, table.shape[1]
    assert table.is_contiguous() and residual.stride(1) == out.stride(1) == 1 and width <= MAX_WIDTH
    assert zeros is None or zeros.is_contiguous()
    if rows == 0:
        return
    block = int(triton.next_power_of_2(width))
    _embed_norm_kernel[(rows,)](
        ids, table, weight, residual, out, ids if zeros is None else zeros, 0 if zeros is None else zeros.numel(), eps, residual.stride(0), out.stride(0),
        WIDTH=width, BLOCK=block, PDL=overlaps(ids.device), num_warps=min(16, max(1, block // 512)), enable_fp_fusion=True,
    )  # fmt: skip
