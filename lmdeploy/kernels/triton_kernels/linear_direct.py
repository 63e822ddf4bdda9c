"""Products of two to eight rows with small bfloat16 weights, which go from memory straight into the registers of tensor cores.

A tensor here has a number for each thread: [U, L], L threads of whole warps and U numbers of each. Thread 4 g + t of a warp loads 16 bytes of the weight's rows
g and g + 8, and of row g of x: which inputs these are does not matter, as long as both have the same. So fragments need no shuffles and no shared memory, and a
program is ready as soon as it starts. The warps of a program share the inputs of its 16 columns, U chunks of 64 bytes of each weight row at a time. Those of the
first step are on their way before the kernel before has ended (`overlap.py`). The norms around a product (`deferred.py`) are done at its end.
A row's bits do not depend on the rows beside it, nor on their number.
"""

# ruff: noqa: RET505  # Triton compiles one branch of a constexpr `if`, and all that stands behind it

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lmdeploy.kernels.api import After, Before
from lmdeploy.kernels.triton_kernels import deferred
from lmdeploy.kernels.triton_kernels.deferred import added, inverse, note_squares
from lmdeploy.kernels.triton_kernels.overlap import after_previous, overlaps

Tensor = torch.Tensor
#: Rows of x that tensor cores take at once.
MAX_ROWS = 8
#: Inputs of a chunk.
CHUNK = 32


@triton.jit
def _fetch(at: tl.tensor, below: tl.tensor, ASM: tl.constexpr) -> tl.tensor:
    """Four words at `at` and four `below` words further."""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            ld.global.L1::no_allocate.v4.u32 {$0, $1, $2, $3}, [$8];
            ld.global.L1::no_allocate.v4.u32 {$4, $5, $6, $7}, [$9];
            """,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,l,l", [at, at + below],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        low = at + below
        return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(low), tl.load(low + 1), tl.load(low + 2), tl.load(low + 3)


@triton.jit
def _fetch_live(at: tl.tensor, live: tl.tensor, ASM: tl.constexpr) -> tl.tensor:
    """Four words where live, else zeros."""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .pred p;
            setp.ne.s32 p, $5, 0;
            mov.u32 $0, 0;
            mov.u32 $1, 0;
            mov.u32 $2, 0;
            mov.u32 $3, 0;
            @p ld.global.v4.u32 {$0, $1, $2, $3}, [$4];
            }
            """,
            "=&r,=&r,=&r,=&r,l,r", [at, live], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        m = live != 0
        return tl.load(at, mask=m, other=0), tl.load(at + 1, mask=m, other=0), tl.load(at + 2, mask=m, other=0), tl.load(at + 3, mask=m, other=0)


@triton.jit
def _sums(weight: tl.tensor, x: tl.tensor, U: tl.constexpr, W: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """For the interpreter: of words of two bfloat16 each, the sums of thread 4 g + t over a warp's products of weight row g and rows 2t and 2t + 1 of x."""
    a, b = tl.reshape(weight, (U, W, 8, 1, 4)), tl.reshape(x, (U, W, 1, 8, 4))
    low = (a << 16).to(tl.float32, bitcast=True) * (b << 16).to(tl.float32, bitcast=True)
    high = (a & -65536).to(tl.float32, bitcast=True) * (b & -65536).to(tl.float32, bitcast=True)
    even, odd = tl.split(tl.reshape(tl.sum(low + high, 4), (U, W * 32, 2)))
    return even, odd


@triton.jit
def _slow(
    a: tl.tensor, b: tl.tensor, x: tl.tensor, c0: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor, U: tl.constexpr, W: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """Add a quarter of a chunk's products, for the interpreter."""
    d0, d1 = _sums(a, x, U, W)
    d2, d3 = _sums(b, x, U, W)
    return c0 + d0, c1 + d1, c2 + d2, c3 + d3


@triton.jit
def _step(
    a0: tl.tensor, a1: tl.tensor, a2: tl.tensor, a3: tl.tensor, b0: tl.tensor, b1: tl.tensor, b2: tl.tensor, b3: tl.tensor,
    x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor, c0: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor,
    ASM: tl.constexpr, U: tl.constexpr, W: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Add the products of a chunk: c0, c1 of weight rows g (a), c2, c3 of g + 8 (b), with rows 2t and 2t + 1 of x."""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .f32 t<4>;
            mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {t0, t1, t2, t3}, {$4, $8, $5, $9}, {$12, $13}, {$16, $17, $18, $19};
            mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$6, $10, $7, $11}, {$14, $15}, {t0, t1, t2, t3};
            }
            """,
            "=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f", [a0, a1, a2, a3, b0, b1, b2, b3, x0, x1, x2, x3, c0, c1, c2, c3],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        c0, c1, c2, c3 = _slow(a0, b0, x0, c0, c1, c2, c3, U, W)
        c0, c1, c2, c3 = _slow(a1, b1, x1, c0, c1, c2, c3, U, W)
        c0, c1, c2, c3 = _slow(a2, b2, x2, c0, c1, c2, c3, U, W)
        return _slow(a3, b3, x3, c0, c1, c2, c3, U, W)


@triton.jit(do_not_specialize=["T"])
def _direct_kernel(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, out: tl.tensor,
    before: tl.tensor, eps: tl.tensor, residual: tl.tensor, gain: tl.tensor, squares: tl.tensor,
    T: tl.tensor, N: tl.tensor, K: tl.tensor, x_row: tl.tensor,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, HAS_BIAS: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
    STEPS: tl.constexpr, U: tl.constexpr, W: tl.constexpr,
) -> None:  # fmt: skip
    """All rows and 16 columns of the weight. x and weight are words of two inputs; STEPS times U chunks for each warp."""
    L: tl.constexpr = W * 32
    thread = tl.arange(0, L)
    g, t = thread % 32 // 4, thread % 4
    chunk = tl.arange(0, U)[:, None] + (thread // 32)[None, :] * U
    at = weight + (tl.program_id(0) * 16 + g).to(tl.int64)[None, :] * (K // 2) + chunk * 16 + t[None, :] * 4
    below = 4 * K.to(tl.int64)
    a0, a1, a2, a3, b0, b1, b2, b3 = _fetch(at, below, ASM)
    after_previous(PDL)
    i, eight = tl.arange(0, 128), tl.arange(0, 8)
    cols, rows = tl.program_id(0) * 16 + i // 16 + i // 2 % 2 * 8, i // 4 % 4 * 2 + i % 2  # of number i of a warp's results
    place, live = rows * N + cols, rows < T
    if BEFORE:
        factor = inverse(before, eight, T, K, eps)
    if AFTER:
        old, weighs = tl.load(residual + place, mask=live, other=0.0), tl.load(gain + cols).to(tl.float32)
    x_at = x + g[None, :] * x_row + chunk * 16 + t[None, :] * 4
    there = tl.broadcast_to((g < T).to(tl.int32)[None, :], (U, L))
    c0, c1 = tl.zeros((U, L), tl.float32), tl.zeros((U, L), tl.float32)
    c2, c3 = tl.zeros((U, L), tl.float32), tl.zeros((U, L), tl.float32)
    for _ in range((STEPS - 1) // 2):  # two by two, so that no registers are copied
        d0, d1, d2, d3, e0, e1, e2, e3 = _fetch(at + U * W * 16, below, ASM)
        x0, x1, x2, x3 = _fetch_live(x_at, there, ASM)
        c0, c1, c2, c3 = _step(a0, a1, a2, a3, b0, b1, b2, b3, x0, x1, x2, x3, c0, c1, c2, c3, ASM, U, W)
        at += U * W * 32
        a0, a1, a2, a3, b0, b1, b2, b3 = _fetch(at, below, ASM)
        x0, x1, x2, x3 = _fetch_live(x_at + U * W * 16, there, ASM)
        c0, c1, c2, c3 = _step(d0, d1, d2, d3, e0, e1, e2, e3, x0, x1, x2, x3, c0, c1, c2, c3, ASM, U, W)
        x_at += U * W * 32
    if STEPS % 2 == 0:
        d0, d1, d2, d3, e0, e1, e2, e3 = _fetch(at + U * W * 16, below, ASM)
    x0, x1, x2, x3 = _fetch_live(x_at, there, ASM)
    c0, c1, c2, c3 = _step(a0, a1, a2, a3, b0, b1, b2, b3, x0, x1, x2, x3, c0, c1, c2, c3, ASM, U, W)
    if STEPS % 2 == 0:
        x0, x1, x2, x3 = _fetch_live(x_at + U * W * 16, there, ASM)
        c0, c1, c2, c3 = _step(d0, d1, d2, d3, e0, e1, e2, e3, x0, x1, x2, x3, c0, c1, c2, c3, ASM, U, W)
    both = tl.join(tl.join(tl.sum(c0, 0), tl.sum(c2, 0)), tl.join(tl.sum(c1, 0), tl.sum(c3, 0)))
    total = tl.sum(tl.reshape(both, (W, 128)), 0)
    mine = rows[:, None] == eight[None, :]
    if BEFORE:
        total *= tl.sum(tl.where(mine, factor[None, :], 0.0), 1)
    if HAS_BIAS:
        total += tl.load(bias + cols).to(tl.float32)
    if AFTER:
        total = added(residual + place, old, total, live)
        note_squares(squares, eight, tl.sum(tl.where(mine, (total * total)[:, None], 0.0), 0), eight < T)
        total *= weighs
    tl.store(out + place, total.to(out.dtype.element_ty), mask=live)


class _Shape(NamedTuple):
    """Warps, chunks of a step, steps."""

    W: int
    U: int
    steps: int


def _shape(outer: int, inner: int) -> _Shape | None:
    """What was faster on an H200 than products through shared memory: qkv and output of a 1.8B model, qkv of a 7B one."""
    if not (4096 < outer <= 8192 and inner <= 4096 or outer <= 4096 and inner <= 2048):
        return None
    chunks, warps, most = inner // CHUNK, 4 if outer > 4096 else 8, 8
    while chunks % warps:
        warps //= 2
    while chunks // warps % most:
        most //= 2
    return _Shape(warps, most, chunks // warps // most)


def serves(x: Tensor, weight: Tensor, out: Tensor) -> bool:
    """Whether the product is computed here: it is only where that is fastest."""
    (rows, inner), outer = x.shape, out.shape[1]
    fits = 1 < rows <= MAX_ROWS and x.dtype is weight.dtype is out.dtype is torch.bfloat16 and inner % CHUNK == outer % 16 == 0
    plain = x.stride(1) == 1 and x.stride(0) % 8 == 0 and weight.is_contiguous() and out.is_contiguous()
    return fits and plain and (x.data_ptr() | weight.data_ptr()) % 16 == 0 and _shape(outer, inner) is not None


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, before: Before | None = None, after: After | None = None) -> None:
    """out = x @ weight.T + bias where `serves` says so, with the norms around it."""
    (rows, inner), outer = x.shape, out.shape[1]
    shape, pdl = _shape(outer, inner), overlaps(x.device)
    assert shape is not None
    norms, flags = deferred.arguments(out, before, after)
    _direct_kernel[(outer // 16,)](
        x.view(torch.int32), weight.view(torch.int32), out if bias is None else bias, out, *norms, rows, outer, inner, x.stride(0) // 2,
        **flags, HAS_BIAS=bias is not None, ASM=x.is_cuda, PDL=pdl, launch_pdl=pdl, STEPS=shape.steps, U=shape.U, W=shape.W, num_warps=shape.W,
    )  # fmt: skip
