"""Products with quantised weights in Triton: 4-bit groups, 8-bit numbers (int8, float8_e4m3fn), and 8-bit numbers times 8-bit activations.

Weights are dequantised tile by tile in registers; nothing of them is ever written out. Definitions are in `api.Kernels`. A program computes a [BM, BN] tile of
the result and walks all of K in one order, so a row's bits do not depend on which program or how many rows it shares the call with, as long as BM is the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor
#: Adding and subtracting it rounds a float32 below 2^22 to the nearest even integer.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def round_e4m3(x: tl.tensor) -> tl.tensor:
    """float32 within +-448 rounded to nearest even among the numbers of float8_e4m3fn, so that the cast that follows is exact: the interpreter's own is not."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, normal)  # below 2^-6 steps are 2^-9


@triton.jit
def _number_of(
    k: tl.tensor, start: tl.tensor, scales: tl.tensor, cols: tl.tensor, inside: tl.tensor, groups: tl.tensor, GROUP: tl.constexpr, WHOLE: tl.constexpr
) -> tl.tensor:
    """What belongs to columns `k` of rows `cols`, one number a group: [BN, 1] where the tile lies in one group, else [BN, BK]."""
    at = scales + cols[:, None] * groups
    if WHOLE:
        number = tl.load(at + start // GROUP, mask=inside[:, None], other=0.0)
    else:
        number = tl.load(at + (k // GROUP)[None, :], mask=inside[:, None] & (k < groups * GROUP)[None, :], other=0.0)
    return number.to(tl.float32)


@triton.jit
def _store(
    acc: tl.tensor, bias: tl.tensor, out: tl.tensor, rows: tl.tensor, cols: tl.tensor, T: tl.tensor, N: tl.tensor, out_row: tl.tensor, HAS_BIAS: tl.constexpr
) -> None:
    """out[rows, cols] = acc + bias, rounded once."""
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + rows[:, None].to(tl.int64) * out_row + cols[None, :], acc.to(out.dtype.element_ty), mask=(rows < T)[:, None] & (cols < N)[None, :])


@triton.jit(do_not_specialize=["T"])
def _w4_kernel(
    x: tl.tensor, qweight: tl.tensor, scales: tl.tensor, zeros: tl.tensor, bias: tl.tensor, out: tl.tensor,
    T: tl.tensor, N: tl.tensor, K: tl.tensor, x_row: tl.tensor, out_row: tl.tensor, groups: tl.tensor,
    GROUP: tl.constexpr, WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
) -> None:  # fmt: skip
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    cols = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    inside = cols < N
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        half = start // 2 + tl.arange(0, BK // 2)
        packed = tl.load(qweight + cols[:, None] * (K // 2) + half[None, :], mask=inside[:, None] & (half < K // 2)[None, :], other=0)
        numbers = tl.interleave(packed & 15, packed >> 4).to(tl.float32)  # [BN, BK]
        zero = _number_of(k, start, zeros, cols, inside, groups, GROUP, WHOLE)
        scale = _number_of(k, start, scales, cols, inside, groups, GROUP, WHOLE)
        weight = ((numbers - zero) * scale).to(x.dtype.element_ty)
        part = tl.load(x + rows[:, None].to(tl.int64) * x_row + k[None, :], mask=(rows < T)[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(part, tl.trans(weight), acc, input_precision="ieee")
    _store(acc, bias, out, rows, cols, T, N, out_row, HAS_BIAS)


@triton.jit(do_not_specialize=["T"])
def _w8_kernel(
    x: tl.tensor, qweight: tl.tensor, scales: tl.tensor, bias: tl.tensor, out: tl.tensor,
    T: tl.tensor, N: tl.tensor, K: tl.tensor, x_row: tl.tensor, out_row: tl.tensor, groups: tl.tensor,
    GROUP: tl.constexpr, WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr, FP8: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
) -> None:  # fmt: skip
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    cols = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    inside = cols < N
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        numbers = tl.load(qweight + cols[:, None] * K + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0)
        if FP8:
            numbers = numbers.to(tl.float8e4nv, bitcast=True)
        scale = _number_of(k, start, scales, cols, inside, groups, GROUP, WHOLE)
        weight = (numbers.to(tl.float32) * scale).to(x.dtype.element_ty)
        part = tl.load(x + rows[:, None].to(tl.int64) * x_row + k[None, :], mask=(rows < T)[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(part, tl.trans(weight), acc, input_precision="ieee")
    _store(acc, bias, out, rows, cols, T, N, out_row, HAS_BIAS)


@triton.jit
def _quantise_kernel(x: tl.tensor, numbers: tl.tensor, steps: tl.tensor, K: tl.tensor, x_row: tl.tensor, FP8: tl.constexpr, BK: tl.constexpr) -> None:
    """One row: its largest magnitude, then its numbers. NaN becomes the scale, so that the row of the result is NaN and no other."""
    row = tl.program_id(0).to(tl.int64)
    most = tl.zeros((BK,), dtype=tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        value = tl.abs(tl.load(x + row * x_row + k, mask=k < K, other=0.0).to(tl.float32))
        most = tl.where((value > most) | (value != value), value, most)
    bad = tl.sum((most != most).to(tl.int32), axis=0) > 0
    top = tl.max(tl.where(most != most, 0.0, most), axis=0)
    limit: tl.constexpr = 448.0 if FP8 else 127.0
    scale = tl.where(top == 0.0, 1.0, tl.div_rn(top, limit))
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        value = tl.div_rn(tl.load(x + row * x_row + k, mask=k < K, other=0.0).to(tl.float32), scale)
        value = tl.where(bad | (value != value), 0.0, value)
        if FP8:
            tl.store(numbers + row * K + k, round_e4m3(value).to(tl.float8e4nv).to(tl.uint8, bitcast=True), mask=k < K)
        else:
            tl.store(numbers + row * K + k, ((value + ROUND) - ROUND).to(tl.int8), mask=k < K)
    tl.store(steps + row, tl.where(bad, float("nan"), scale))


@triton.jit(do_not_specialize=["T"])
def _w8a8_kernel(
    numbers: tl.tensor, steps: tl.tensor, qweight: tl.tensor, scales: tl.tensor, bias: tl.tensor, out: tl.tensor,
    T: tl.tensor, N: tl.tensor, K: tl.tensor, out_row: tl.tensor,
    HAS_BIAS: tl.constexpr, FP8: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
) -> None:  # fmt: skip
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    cols = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    acc = tl.zeros((BM, BN), dtype=tl.float32 if FP8 else tl.int32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(numbers + rows[:, None].to(tl.int64) * K + k[None, :], mask=(rows < T)[:, None] & (k < K)[None, :], other=0)
        right = tl.load(qweight + cols[:, None] * K + k[None, :], mask=(cols < N)[:, None] & (k < K)[None, :], other=0)
        if FP8:  # every float8_e4m3fn is a float16, so the products are exact
            left = left.to(tl.float8e4nv, bitcast=True).to(tl.float16)
            right = right.to(tl.float8e4nv, bitcast=True).to(tl.float16)
            acc = tl.dot(left, tl.trans(right), acc)
        else:
            acc = tl.dot(left, tl.trans(right), acc, out_dtype=tl.int32)
    step = tl.load(steps + rows, mask=rows < T, other=0.0)
    scale = tl.load(scales + cols, mask=cols < N, other=0.0)
    _store(acc.to(tl.float32) * step[:, None] * scale[None, :], bias, out, rows, cols, T, N, out_row, HAS_BIAS)


def _tile(rows: int, outer: int, dtype: torch.dtype) -> tuple[int, int]:
    """(BM, BN): enough rows for the call, and at few rows narrow tiles, so that all of the chip reads weights. float32 takes twice the shared memory."""
    height = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 or dtype is torch.float32 else 128
    return height, 32 if height <= 32 and outer < 16384 else 64 if height <= 64 else 128


def _depth(group: int) -> tuple[int, bool]:
    """(BK, whether a tile lies in one group)."""
    power = group & -group
    return (min(power, 128), True) if power >= 32 else (64, False)


def linear_w4(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x @ W.T + bias of a 4-bit weight; see `api.Kernels`."""
    (rows, inner), (outer, groups) = x.shape, scales.shape
    if not rows:
        return
    (height, width), (depth, whole) = _tile(rows, outer, x.dtype), _depth(inner // groups)
    grid = (triton.cdiv(outer, width), triton.cdiv(rows, height))
    _w4_kernel[grid](
        x, qweight, scales, zeros, x if bias is None else bias, out, rows, outer, inner, x.stride(0), out.stride(0), groups,
        GROUP=inner // groups, WHOLE=whole, HAS_BIAS=bias is not None, BM=height, BN=width, BK=depth, num_warps=4, num_stages=3,
    )  # fmt: skip


def linear_w8(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x @ W.T + bias of an 8-bit weight; see `api.Kernels`."""
    (rows, inner), (outer, groups) = x.shape, scales.shape
    if not rows:
        return
    fp8 = qweight.dtype is torch.float8_e4m3fn
    (height, width), (depth, whole) = _tile(rows, outer, x.dtype), _depth(inner // groups)
    if groups == 1:
        depth, whole = 64, True  # one scale a row: any tile lies in the one group
    grid = (triton.cdiv(outer, width), triton.cdiv(rows, height))
    _w8_kernel[grid](
        x, qweight.view(torch.uint8) if fp8 else qweight, scales, x if bias is None else bias, out, rows, outer, inner, x.stride(0), out.stride(0), groups,
        GROUP=inner // groups, WHOLE=whole, HAS_BIAS=bias is not None, FP8=fp8, BM=height, BN=width, BK=depth, num_warps=4, num_stages=3,
    )  # fmt: skip


def linear_w8a8(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = (xq @ qweight.T) * sx * scales + bias; see `api.Kernels`."""
    (rows, inner), outer = x.shape, qweight.shape[0]
    if not rows:
        return
    fp8 = qweight.dtype is torch.float8_e4m3fn
    kind = torch.uint8 if fp8 else torch.int8
    numbers = torch.empty(rows, inner, dtype=kind, device=x.device)
    steps = torch.empty(rows, dtype=torch.float32, device=x.device)
    _quantise_kernel[(rows,)](x, numbers, steps, inner, x.stride(0), FP8=fp8, BK=min(1024, triton.next_power_of_2(inner)))
    height, width = _tile(rows, outer, x.dtype)
    grid = (triton.cdiv(outer, width), triton.cdiv(rows, height))
    _w8a8_kernel[grid](
        numbers, steps, qweight.view(kind), scales, x if bias is None else bias, out, rows, outer, inner, out.stride(0),
        HAS_BIAS=bias is not None, FP8=fp8, BM=height, BN=width, BK=64, num_warps=4, num_stages=3,
    )  # fmt: skip
