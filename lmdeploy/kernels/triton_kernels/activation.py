"""`silu_mul` in one launch: both halves of a row read once, their product written once, in quarters (`quarters.py`) where that is asked for."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lmdeploy.kernels.triton_kernels.overlap import after_previous, overlaps
from lmdeploy.kernels.triton_kernels.quarters import TILE, store_quarters

Tensor = torch.Tensor
BLOCK = 1024


@triton.jit
def _silu_mul_kernel(
    both_ptr: tl.tensor, out_ptr: tl.tensor, both_stride: tl.tensor, out_stride: tl.tensor, width: tl.tensor, QUARTERS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """BLOCK numbers of one row: out = g / (1 + e^-g) * up in float32."""
    after_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    gate = tl.load(both_ptr + row * both_stride + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both_ptr + row * both_stride + width + place, mask=inside, other=0.0).to(tl.float32)
    result = (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty)
    if QUARTERS:
        store_quarters(out_ptr, result, tl.program_id(1) * BLOCK, row, tl.num_programs(0), width, BLOCK)
    else:
        tl.store(out_ptr + row * out_stride + place, result, mask=inside)


def silu_mul(gate_up: Tensor, out: Tensor, *, quarters: bool = False) -> None:
    """out = silu(gate_up[:, :F]) * gate_up[:, F:]. gate_up [T, 2F], out [T, F]."""
    rows, width = out.shape
    assert gate_up.stride(1) == out.stride(1) == 1
    assert not quarters or (width % TILE == 0 and out.is_contiguous())
    if rows and width:
        grid, pdl = (rows, triton.cdiv(width, BLOCK)), overlaps(out.device)
        _silu_mul_kernel[grid](
            gate_up, out, gate_up.stride(0), out.stride(0), width, QUARTERS=quarters, BLOCK=BLOCK, PDL=pdl, launch_pdl=pdl, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
