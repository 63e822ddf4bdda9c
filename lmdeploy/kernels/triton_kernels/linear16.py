"""`linear` and `linear_silu` of 16-bit weights for up to MAX_ROWS rows, which are bound by reading the weight; cuBLAS computes the rest.

What a library cannot do: weights are no other kernel's result, so a program reads the first of its own before the kernel before has ended (`overlap.py`), and
memory stays busy from product to product. One row is multiplied in float32 by all threads; more rows on tensor cores, with the weight as the tall operand, so
that few rows waste little. Tile sizes and the order of sums follow from the weight's shape and the bucket of rows (1, 16, 32, 64): so do a row's bits.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lmdeploy.kernels.api import After, Before
from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.kernels.triton_kernels import deferred
from lmdeploy.kernels.triton_kernels.activation import silu_mul
from lmdeploy.kernels.triton_kernels.deferred import added, inverse, note_squares
from lmdeploy.kernels.triton_kernels.overlap import after_previous, overlaps

Tensor = torch.Tensor
MAX_ROWS = 64
#: shared memory of a program at most, with which chips before Hopper and small ones could not serve
SHARED_BYTES = 200 << 10
#: columns of the result that a program computes for several rows; programs that may wait for each other's parts of one call
COLUMNS, MOST_TILES = 64, 64
#: numbers of each weight row that several rows' programs ask L2 for ahead of time
AHEAD = tl.constexpr(256)
#: longest weight rows that a program of one row holds whole
WHOLE_ROWS = 4096


@triton.jit
def row_dot(tile: tl.tensor, x: tl.tensor, BN: tl.constexpr, BK: tl.constexpr) -> tl.tensor:
    """[BN, BK] times [BK], summed as far as a thread can alone: [BN, BK / 8]."""
    return tl.sum(tl.reshape(tile.to(tl.float32) * x[None, :], (BN, BK // 8, 8)), 2)


@triton.jit
def _left(residual: tl.tensor, gain: tl.tensor, cols: tl.tensor, N: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """What is added to the only row, and the weights of the norm after it."""
    return tl.load(residual + cols, mask=cols < N, other=0.0), tl.load(gain + cols, mask=cols < N, other=0.0).to(tl.float32)


@triton.jit
def _row_kernel(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, out: tl.tensor,
    before: tl.tensor, eps: tl.tensor, residual: tl.tensor, gain: tl.tensor, squares: tl.tensor, N: tl.tensor, K: tl.tensor,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr, PDL: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
) -> None:  # fmt: skip
    """BN numbers of the only row. The first tile, WHOLE: all weights, is in registers before the kernel before has ended, and each further one is a step ahead."""
    cols, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    inside = (k < K)[None, :]
    at = weight + tl.where(cols < N, cols, 0).to(tl.int64)[:, None] * K + k[None, :]
    tile = tl.load(at, mask=inside, other=0.0)
    if SILU:
        at_up = at + N.to(tl.int64) * K
        up = tl.load(at_up, mask=inside, other=0.0)
    after_previous(PDL)
    if BEFORE:
        factor = inverse(before, tl.arange(0, 1), 1, K, eps)
    if AFTER and WHOLE:
        old, weighs = _left(residual, gain, cols, N)
    if WHOLE:
        part = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        total = tl.sum(tile.to(tl.float32) * part, 1)
        if SILU:
            total_up = tl.sum(up.to(tl.float32) * part, 1)
    else:
        acc, acc_up = tl.zeros((BN, BK // 8), dtype=tl.float32), tl.zeros((BN, BK // 8), dtype=tl.float32)
        for start in tl.range(0, K, BK, num_stages=1):
            more = (start + BK + k < K)[None, :]
            tile_next = tl.load(at + (start + BK), mask=more, other=0.0)
            part = tl.load(x + start + k, mask=start + k < K, other=0.0).to(tl.float32)
            acc += row_dot(tile, part, BN, BK)
            tile = tile_next
            if SILU:
                up_next = tl.load(at_up + (start + BK), mask=more, other=0.0)
                acc_up += row_dot(up, part, BN, BK)
                up = up_next
        total = tl.sum(acc, 1)
        if SILU:
            total_up = tl.sum(acc_up, 1)
    if AFTER and not WHOLE:  # not before the loop, where registers decide how many programs run
        old, weighs = _left(residual, gain, cols, N)
    if BEFORE:
        total *= factor
        if SILU:
            total_up *= factor
    if HAS_BIAS:
        total += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)
        if SILU:
            total_up += tl.load(bias + N + cols, mask=cols < N, other=0.0).to(tl.float32)
    if SILU:
        total = total / (1.0 + tl.exp(-total)) * total_up
    if AFTER:
        total = added(residual + cols, old, total, cols < N)
        note_squares(squares, tl.arange(0, 1), tl.sum((total * total)[None, :], 1), tl.arange(0, 1) == 0)
        total *= weighs
    tl.store(out + cols, total.to(out.dtype.element_ty), mask=cols < N)


@triton.jit
def _ask(base: tl.tensor, row_bytes: tl.tensor, rows: tl.tensor, size: tl.tensor) -> None:
    """Thread t < `rows` of the program asks L2 for `size` bytes from base + t * row_bytes, all multiples of 16."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred p; .reg .u32 t; .reg .u64 a;
        mov.u32 t, %tid.x;
        setp.lt.u32 p, t, $3;
        setp.gt.and.u32 p, $4, 0, p;
        mad.wide.u32 a, t, $2, $1;
        @p cp.async.bulk.prefetch.L2.global [a], $4;
        mov.u32 $0, 0;
        }""",
        "=r,l,r,r,r",
        [base.to(tl.int64), row_bytes, rows, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _joined(
    acc: tl.tensor, parts: tl.tensor, arrivals: tl.tensor, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Note this program's part of the tile's sum. Of the tile's programs the last has the sum of all parts, always in the same order, and True."""
    tile, split = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, BM)[None, :] * BN + tl.arange(0, BN)[:, None]
    mine = parts + tile * (SPLIT * BM * BN)
    tl.store(mine + split * (BM * BN) + place, acc)
    tl.debug_barrier()  # all threads have stored before one of them says so
    last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
    if last:
        acc = tl.zeros((BN, BM), dtype=tl.float32)
        for part in tl.static_range(SPLIT):
            acc += tl.load(mine + part * (BM * BN) + place, cache_modifier=".cg")
        tl.store(arrivals + tile, 0)  # for the next call
    return acc, last


@triton.jit(do_not_specialize=["T"])
def _rows_kernel(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, out: tl.tensor, parts: tl.tensor, arrivals: tl.tensor,
    before: tl.tensor, eps: tl.tensor, residual: tl.tensor, gain: tl.tensor, squares: tl.tensor,
    T: tl.tensor, N: tl.tensor, K: tl.tensor, x_row: tl.tensor, out_row: tl.tensor, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
) -> None:  # fmt: skip
    """BN columns of all rows (program 0) and one part of K (program 1); sums [BN, BM] are the result turned."""
    tile = tl.program_id(0)
    span = tl.cdiv(tl.cdiv(K, BK), SPLIT) * BK
    first = tl.program_id(1) * span
    end = tl.minimum(first + span, K)
    if PDL:
        begin, count, size = weight + tile.to(tl.int64) * BN * K + first, tl.minimum(BN, N - tile * BN), tl.maximum(tl.minimum(end - first, AHEAD), 0) * 2
        tl.extra.cuda.gdc_launch_dependents()
        _ask(begin, K * 2, count, size)
        if SILU:
            _ask(begin + N.to(tl.int64) * K, K * 2, count, size)
        tl.extra.cuda.gdc_wait()
    cols, rows, k = tile * BN + tl.arange(0, BN), tl.arange(0, BM), tl.arange(0, BK)
    at = weight + tl.where(cols < N, cols, 0).to(tl.int64)[:, None] * K + k[None, :]
    at_x = x + rows[None, :] * x_row + k[:, None]
    mask = (cols < N)[:, None] & (rows < T)[None, :]
    if BEFORE:
        factor = inverse(before, rows, T, K, eps)
    if AFTER:
        residual += rows[None, :] * N + cols[:, None]
        old, weighs = tl.load(residual, mask=mask, other=0.0), tl.load(gain + cols, mask=cols < N, other=0.0).to(tl.float32)
    acc, up = tl.zeros((BN, BM), dtype=tl.float32), tl.zeros((BN, BM), dtype=tl.float32)
    for start in range(first, end, BK):
        inside = start + k < end
        part = tl.load(at_x + start, mask=(rows < T)[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(tl.load(at + start, mask=inside[None, :], other=0.0), part, acc)
        if SILU:
            up = tl.dot(tl.load(at + N.to(tl.int64) * K + start, mask=inside[None, :], other=0.0), part, up)
    here = True
    if SPLIT > 1:
        acc, here = _joined(acc, parts, arrivals, SPLIT, BM, BN)
    if here:
        if BEFORE:
            acc *= factor[None, :]
            if SILU:
                up *= factor[None, :]
        if HAS_BIAS:
            acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[:, None]
            if SILU:
                up += tl.load(bias + N + cols, mask=cols < N, other=0.0).to(tl.float32)[:, None]
        if SILU:
            acc = acc / (1.0 + tl.exp(-acc)) * up
        if AFTER:
            acc = added(residual, old, acc, mask)
            note_squares(squares, rows, tl.sum(acc * acc, 0), rows < T)
            acc *= weighs[:, None]
        tl.store(out + rows[None, :] * out_row + cols[:, None], acc.to(out.dtype.element_ty), mask=mask)


class _Shape(NamedTuple):
    """Rows and depth of a tile, parts of K, pipeline stages."""

    BM: int
    BK: int
    split: int
    stages: int


def _shape(rows: int, outer: int, inner: int, silu: bool) -> _Shape:
    """What was fastest on an H200 for the weights of a 1.8B and a 7B model: about two programs a multiprocessor, one with 64 rows."""
    height = 16 if rows <= 16 else 32 if rows <= 32 else 64
    tiles = triton.cdiv(outer, COLUMNS)
    split = 1 if silu or tiles > MOST_TILES else 2 if height == 64 and tiles > MOST_TILES // 2 else 4
    while split > 1 and inner < split * 256:
        split //= 2
    return _Shape(height, 128, split, 3 if height == 64 and tiles > 2 * MOST_TILES and not silu else 4)


@cache
def _arrivals(device: torch.device) -> Tensor:
    """Counters of the programs that have noted their parts, zero between calls: calls on one device follow each other on one stream."""
    return torch.zeros(MOST_TILES, dtype=torch.int32, device=device)


@cache
def _chip_serves(device: torch.device) -> bool:
    """Triton's interpreter (tensors of the CPU), or a chip with Hopper's launches and shared memory: on others cuBLAS is as fast."""
    return device.type == "cpu" or (
        overlaps(device) and triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"] >= SHARED_BYTES
    )


def serves(x: Tensor, weight: Tensor, out: Tensor) -> bool:
    """Whether the kernels here compute the product."""
    (rows, inner), dtype = x.shape, x.dtype
    if rows > MAX_ROWS or inner % 8 or dtype not in (torch.bfloat16, torch.float16) or not (weight.dtype is out.dtype is dtype):
        return False
    plain = x.stride(1) == 1 and x.stride(0) % 8 == 0 and weight.is_contiguous() and out.stride(1) == 1
    return plain and (x.data_ptr() | weight.data_ptr()) % 16 == 0 and _chip_serves(x.device)


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, silu: bool, before: Before | None = None, after: After | None = None) -> None:
    """The product of up to MAX_ROWS rows that `serves` allows."""
    (rows, inner), outer = x.shape, out.shape[1]
    norms, flags = deferred.arguments(x, before, after)
    pdl, some_bias = overlaps(x.device), x if bias is None else bias
    common = {"SILU": silu, "HAS_BIAS": bias is not None, "PDL": pdl, "launch_pdl": pdl, "num_warps": 4, "enable_fp_fusion": True} | flags
    if rows == 1:
        whole = inner <= WHOLE_ROWS
        depth = int(triton.next_power_of_2(inner)) if whole else 1024
        width = 2 if silu and depth > WHOLE_ROWS // 2 else 4
        _row_kernel[(triton.cdiv(outer, width),)](x, weight, some_bias, out, *norms, outer, inner, WHOLE=whole, BN=width, BK=max(8, depth), **common)
        return
    shape = _shape(rows, outer, inner, silu)
    tiles = triton.cdiv(outer, COLUMNS)
    parts, arrivals = x, x  # never used
    if shape.split > 1:
        parts = torch.empty(tiles * shape.split * shape.BM * COLUMNS, dtype=torch.float32, device=x.device)
        arrivals = _arrivals(x.device)
    _rows_kernel[(tiles, shape.split)](
        x, weight, some_bias, out, parts, arrivals, *norms, rows, outer, inner, x.stride(0), out.stride(0),
        SPLIT=shape.split, BM=shape.BM, BN=COLUMNS, BK=shape.BK, num_stages=shape.stages, **common,
    )  # fmt: skip


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x @ weight.T + bias. Neither weight nor bias may be the work of kernels just before: they are read ahead of time."""
    if x.shape[0] and serves(x, weight, out):
        launch(x, weight, bias, out, silu=False)
    else:
        REFERENCE.linear(x, weight, bias, out)


def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> bool:
    """residual += x @ weight.T, for rows that are cuBLAS's: it adds what is there before its one rounding. False, and nothing done, for the others."""
    if x.dtype is torch.float32 or x.shape[0] == 0 or serves(x, weight, residual):
        return False
    torch.addmm(residual, x, weight.t(), out=residual)
    return True


def linear_silu(x: Tensor, weight: Tensor, bias: Tensor | None, both: Tensor, out: Tensor) -> None:
    """out = silu(gate) * up of x @ weight.T + bias = [gate | up]; as `linear` of the weight. `both` is room for the product where cuBLAS computes it."""
    if x.shape[0] and serves(x, weight, out):
        launch(x, weight, bias, out, silu=True)
    else:
        REFERENCE.linear(x, weight, bias, both)
        silu_mul(both, out)
