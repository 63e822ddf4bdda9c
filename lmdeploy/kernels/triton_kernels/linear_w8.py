"""Products with int8 weights of up to MOST_ROWS rows in Triton, which are bound by reading the weight: the output head of a decode step, above all.

Four bytes at a time become 16-bit floats, exactly; tensor cores sum the products in float32, over the inputs that share a scale, and the scale multiplies the
sum. Up to FEW_ROWS rows a warp has tiles of its own and the sums of warps are added at the end. A row's bits do not depend on the rows beside it, nor on
their number within 1..8, 9..16, 17..32 or 33..64. Everything else is left to the general kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lmdeploy.kernels.triton_kernels import linear
from lmdeploy.kernels.triton_kernels.overlap import after_previous, overlaps

Tensor = torch.Tensor

#: Inputs that are multiplied together: a group, or the part of one that is a power of two; below the smaller one the general kernel serves.
TILE, SMALLEST_TILE = 128, 32
#: Rows up to which warps have tiles of their own, and up to which this is the fastest way.
FEW_ROWS, MOST_ROWS = 16, 64


@triton.jit
def _wide_bf16(numbers: tl.tensor) -> tl.tensor:
    """Seven bits above 128, less 128 or 256 by the sign: 0x43 and the bits are those numbers."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 l, h, p, q, r, s, f, minus;
        mov.b32 f, 0x43;
        and.b32 l, $2, 0x7f7f7f7f;
        and.b32 h, $2, 0x80808080;
        prmt.b32 p, l, f, 0x4140;
        prmt.b32 q, l, f, 0x4342;
        prmt.b32 r, h, f, 0x4140;
        prmt.b32 s, h, f, 0x4342;
        mov.b32 minus, 0xBF80BF80;
        fma.rn.bf16x2 $0, r, minus, p;
        fma.rn.bf16x2 $1, s, minus, q;
        }
        """,
        "=r,=r,r", [numbers], dtype=tl.bfloat16, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _wide_fp16(numbers: tl.tensor) -> tl.tensor:
    """The number plus 128 in the mantissa of 1024, less 1152."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 u, p, q, f, minus;
        mov.b32 f, 0x64;
        xor.b32 u, $2, 0x80808080;
        prmt.b32 p, u, f, 0x4140;
        prmt.b32 q, u, f, 0x4342;
        mov.b32 minus, 0xE480E480;
        add.rn.f16x2 $0, p, minus;
        add.rn.f16x2 $1, q, minus;
        }
        """,
        "=r,=r,r", [numbers], dtype=tl.float16, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _wide(numbers: tl.tensor, dtype: tl.constexpr, ASM: tl.constexpr) -> tl.tensor:
    """int8 as 16-bit floats; without ASM, for the interpreter."""
    if ASM:
        if dtype == tl.bfloat16:
            wide = _wide_bf16(numbers)
        else:
            wide = _wide_fp16(numbers)
    else:
        wide = numbers.to(dtype)
    return wide


@triton.jit
def _store(
    total: tl.tensor, out: tl.tensor, bias: tl.tensor, cols: tl.tensor, rows: tl.tensor, T: tl.tensor, N: tl.tensor, out_row: tl.tensor, HAS_BIAS: tl.constexpr
) -> None:
    """out[rows, cols] = total [BN, BM] + bias."""
    if HAS_BIAS:
        total += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[:, None]
    mask = (cols < N)[:, None] & (rows < T)[None, :]
    tl.store(out + rows[None, :].to(tl.int64) * out_row + cols[:, None], total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "steps"])
def _few_kernel(
    x: tl.tensor, qweight: tl.tensor, scales: tl.tensor, bias: tl.tensor, out: tl.tensor,
    T: tl.tensor, N: tl.tensor, K: tl.tensor, x_row: tl.tensor, out_row: tl.tensor, groups: tl.tensor, steps: tl.tensor, PER: tl.tensor,
    DEEP: tl.constexpr, ONE: tl.constexpr, HAS_BIAS: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """All rows and BN columns: a tile [W, BN, DEEP] a step, of which each warp has its own [BN, DEEP]."""
    after_previous(PDL)
    cols, rows = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BM)
    tile, inputs = tl.arange(0, W), tl.arange(0, DEEP)
    row = tl.minimum(cols, N - 1).to(tl.int64)
    at = qweight + row[None, :, None] * K + tile[:, None, None] * DEEP + inputs[None, None, :]
    x_at = x + rows[None, None, :] * x_row + tile[:, None, None] * DEEP + inputs[None, :, None]
    live = (rows < T)[None, None, :]
    scale_at = scales + row[None, :] * groups
    next_scale = tl.load(scale_at + (tile // PER)[:, None])
    scale = next_scale
    acc = tl.zeros((W, BN, BM), dtype=tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        wide = _wide(tl.load(at + step * (W * DEEP)), x.dtype.element_ty, ASM)
        part = tl.load(x_at + step * (W * DEEP), mask=live, other=0.0)
        if ONE:
            acc = tl.dot(wide, part, acc)
        else:
            scale = next_scale
            next_scale = tl.load(scale_at + ((tile + tl.minimum(step + 1, steps - 1) * W) // PER)[:, None])
            acc += tl.dot(wide, part) * scale[:, :, None]
    if ONE:
        acc *= scale[:, :, None]
    _store(tl.sum(acc, axis=0), out, bias, cols, rows, T, N, out_row, HAS_BIAS)


@triton.jit(do_not_specialize=["T", "steps"])
def _more_kernel(
    x: tl.tensor, qweight: tl.tensor, scales: tl.tensor, bias: tl.tensor, out: tl.tensor,
    T: tl.tensor, N: tl.tensor, K: tl.tensor, x_row: tl.tensor, out_row: tl.tensor, groups: tl.tensor, steps: tl.tensor, PER: tl.tensor,
    DEEP: tl.constexpr, ONE: tl.constexpr, HAS_BIAS: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """All rows and BN columns: a tile [BN, DEEP] a step."""
    after_previous(PDL)
    cols, rows, inputs = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BM), tl.arange(0, DEEP)
    row = tl.minimum(cols, N - 1).to(tl.int64)
    at = qweight + row[:, None] * K + inputs[None, :]
    x_at = x + tl.minimum(rows, T - 1)[:, None] * x_row + inputs[None, :]
    scale_at = scales + row * groups
    next_scale = tl.load(scale_at)
    scale = next_scale
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        wide = _wide(tl.load(at + step * DEEP), x.dtype.element_ty, ASM)
        part = tl.trans(tl.load(x_at + step * DEEP))
        if ONE:
            acc = tl.dot(wide, part, acc)
        else:
            scale = next_scale
            next_scale = tl.load(scale_at + tl.minimum(step + 1, steps - 1) // PER)
            acc += tl.dot(wide, part) * scale[:, None]
    if ONE:
        acc *= scale[:, None]
    _store(acc, out, bias, cols, rows, T, N, out_row, HAS_BIAS)


def _deep(x: Tensor, qweight: Tensor, scales: Tensor) -> int:
    """Inputs of a tile; 0 where the general kernel serves."""
    (rows, inner), groups = x.shape, scales.shape[1]
    group = inner // groups
    deep = min(group & -group, TILE)
    served = rows <= MOST_ROWS and qweight.dtype is torch.int8 and x.dtype is not torch.float32 and deep >= SMALLEST_TILE
    return deep if served and qweight.is_contiguous() and x.stride(1) == 1 else 0


def linear_w8(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x @ W.T + bias of an 8-bit weight; see `api.Kernels`."""
    (rows, inner), (outer, groups) = x.shape, scales.shape
    deep = _deep(x, qweight, scales)
    if not deep:
        linear.linear_w8(x, qweight, scales, bias, out)
    elif rows:
        tiles, pdl = inner // deep, overlaps(x.device)
        arguments = (x, qweight, scales, x if bias is None else bias, out, rows, outer, inner, x.stride(0), out.stride(0), groups)
        constants = {"DEEP": deep, "ONE": groups == 1, "HAS_BIAS": bias is not None, "ASM": x.is_cuda, "PDL": pdl, "launch_pdl": pdl}
        if rows <= FEW_ROWS:
            warps = 1 if tiles % 2 else 2
            few = (8, 32, 4) if rows <= 8 else (16, 64, 3)
            grid, shape = (triton.cdiv(outer, few[1]),), {"W": warps, "BM": few[0], "BN": few[1], "STAGES": few[2]}
            _few_kernel[grid](*arguments, tiles // warps, tiles // groups, **constants, **shape, num_warps=warps)
        else:
            _more_kernel[(triton.cdiv(outer, 64),)](
                *arguments, tiles, tiles // groups, **constants, BM=32 if rows <= 32 else 64, BN=64, STAGES=3, num_warps=4
            )  # fmt: skip
