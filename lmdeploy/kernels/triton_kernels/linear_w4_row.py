"""One row times a 4-bit weight, in float32 by all threads: for weights with long rows, where tensor cores would have few programs.

Weights go from memory to registers, as eight numbers a word: two at a time become 128 + number in bfloat16, whose bits are the upper half of a float32. Of the
number above, the one below stays in the lower half, where it weighs 1/65536: less than a four-thousandth of a step. The rest of what was added is taken from
the sum. The weights of the first chunk are read before the kernel before has ended (`overlap.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lmdeploy.kernels.api import After, Before
from lmdeploy.kernels.triton_kernels import deferred
from lmdeploy.kernels.triton_kernels.deferred import added, inverse, note_squares
from lmdeploy.kernels.triton_kernels.overlap import after_previous, overlaps

Tensor = torch.Tensor

#: Columns of the result that a program computes, and groups of 128 inputs that it reads at once.
COLUMNS, CHUNK = 16, 16
#: Programs that hide the latency of several chunks each.
ENOUGH = 256


@triton.jit
def _pair(words: tl.tensor, SHIFT: tl.constexpr, ASM: tl.constexpr) -> tl.tensor:
    """128 + number in both halves, of the numbers at bit SHIFT of both halves. As assembly, lest it be taken apart for each half."""
    if ASM:
        asm: tl.constexpr = "lop3.b32 $0, $1, 0x000F000F, 0x43004300, 0xEA;"
        pair = tl.inline_asm_elementwise(asm, "=r,r", [words >> SHIFT], dtype=tl.int32, is_pure=True, pack=1)
    else:
        pair = ((words >> SHIFT) & 0x000F000F) | 0x43004300
    return pair


@triton.jit
def _two(words: tl.tensor, FP16: tl.constexpr) -> tl.tensor:
    """Both inputs of words in float32."""
    if FP16:
        first = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        second = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        first = (words << 16).to(tl.float32, bitcast=True)
        second = (words & -0x10000).to(tl.float32, bitcast=True)
    return first, second


@triton.jit
def _sums(
    packed: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    G: tl.constexpr,
    R: tl.constexpr,
    FP16: tl.constexpr,
    ASM: tl.constexpr,
) -> tl.tensor:
    """[G, R, 4] of words [G, R, 16], scales and zeros [G, R] and x as int64 [G, 16]: inputs 0..3 of each word in `left`, 4..7 in `right`."""
    left, right = tl.broadcast_to(left[:, None, :], (G, R, 16)), tl.broadcast_to(right[:, None, :], (G, R, 16))
    x0, x1 = _two(left.to(tl.int32), FP16)
    x2, x3 = _two((left >> 32).to(tl.int32), FP16)
    x4, x5 = _two(right.to(tl.int32), FP16)
    x6, x7 = _two((right >> 32).to(tl.int32), FP16)
    total = tl.zeros((G, R, 16), dtype=tl.float32)
    for i in tl.static_range(4):
        pair = _pair(packed, 4 * i, ASM)
        low, high = (pair << 16).to(tl.float32, bitcast=True), pair.to(tl.float32, bitcast=True)
        if i == 0:
            below, above = x0, x4
        elif i == 1:
            below, above = x1, x5
        elif i == 2:
            below, above = x2, x6
        else:
            below, above = x3, x7
        total += low * below
        total += high * above  # apart: each is one instruction
    total = tl.sum(tl.reshape(total, (G, R, 4, 4)), 3)
    lower = tl.sum(tl.reshape(x0 + x1 + x2 + x3, (G, R, 4, 4)), 3)
    upper = tl.sum(tl.reshape(x4 + x5 + x6 + x7, (G, R, 4, 4)), 3)
    residue: tl.constexpr = 0.26171875  # 0x4300 / 65536, below every upper number
    return (total - (128.0 + zero.to(tl.float32))[:, :, None] * (lower + upper) - residue * upper) * scale.to(tl.float32)[:, :, None]


@triton.jit
def _row_kernel(
    x: tl.tensor, qweight: tl.tensor, scales: tl.tensor, zeros: tl.tensor, bias: tl.tensor, out: tl.tensor,
    before: tl.tensor, eps: tl.tensor, residual: tl.tensor, gain: tl.tensor, squares: tl.tensor,
    N: tl.tensor, words: tl.tensor, groups: tl.tensor, tiles: tl.tensor,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, PER: tl.constexpr, HAS_BIAS: tl.constexpr, ONCE: tl.constexpr,
    FP16: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
) -> None:  # fmt: skip
    """R numbers of the row. x: int64 words of 4 inputs; qweight: int32 words of 8. ONCE: a chunk of G tiles is all of K."""
    cols = tl.program_id(0) * R + tl.arange(0, R)
    row = tl.minimum(cols, N - 1).to(tl.int64)
    tile, word = tl.arange(0, G), tl.arange(0, 16)
    words_at = qweight + row[None, :, None] * words + tile[:, None, None] * 16 + word[None, None, :]
    x_at = x + tile[:, None] * 32 + word[None, :] * 2
    inside = (tile < tiles)[:, None]
    packed = tl.load(words_at, mask=inside[:, :, None], other=0)
    at = row[None, :] * groups + (tile // PER)[:, None]
    scale, zero = tl.load(scales + at, mask=inside, other=0.0), tl.load(zeros + at, mask=inside, other=0)
    after_previous(PDL)
    if BEFORE:
        factor = inverse(before, tl.arange(0, 1), 1, words * 8, eps)
    if AFTER:
        old, weighs = tl.load(residual + cols, mask=cols < N, other=0.0), tl.load(gain + cols, mask=cols < N, other=0.0).to(tl.float32)
    if ONCE:
        acc = _sums(packed, scale, zero, tl.load(x_at, mask=inside, other=0), tl.load(x_at + 1, mask=inside, other=0), G, R, FP16, ASM)
    else:
        acc = tl.zeros((G, R, 4), dtype=tl.float32)
        for first in tl.range(0, tiles, G, num_stages=1):
            more = (first + G + tile < tiles)[:, None]
            at = row[None, :] * groups + ((first + G + tile) // PER)[:, None]
            packed_next = tl.load(words_at + (first + G) * 16, mask=more[:, :, None], other=0)
            scale_next, zero_next = tl.load(scales + at, mask=more, other=0.0), tl.load(zeros + at, mask=more, other=0)
            now = (first + tile < tiles)[:, None]
            left, right = tl.load(x_at + first * 32, mask=now, other=0), tl.load(x_at + first * 32 + 1, mask=now, other=0)
            acc += _sums(packed, scale, zero, left, right, G, R, FP16, ASM)
            packed, scale, zero = packed_next, scale_next, zero_next
    total = tl.sum(tl.sum(acc, 2), 0)
    if BEFORE:
        total *= factor
    if HAS_BIAS:
        total += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)
    if AFTER:
        total = added(residual + cols, old, total, cols < N)
        note_squares(squares, tl.arange(0, 1), tl.sum((total * total)[None, :], 1), tl.arange(0, 1) == 0)
        total *= weighs
    tl.store(out + cols, total.to(out.dtype.element_ty), mask=cols < N)


def serves(x: Tensor, outer: int) -> bool:
    """Whether this is the fastest kernel for one row of whole groups of 128: long rows, and either one chunk each or programs enough."""
    inner = x.shape[1]
    aligned = x.stride(1) == 1 and x.storage_offset() % 4 == 0
    return x.shape[0] == 1 and aligned and inner >= outer and (inner <= CHUNK * 128 or outer >= ENOUGH * COLUMNS)


def multiply(
    x: Tensor, weight: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, out: Tensor, before: Before | None = None, after: After | None = None
) -> None:
    """out [1, N] = x [1, K] @ W.T + bias, groups being multiples of 128, with the norms around it (`deferred.py`)."""
    qweight, scales, zeros = weight
    inner, (outer, groups) = x.shape[1], scales.shape
    pdl = overlaps(x.device)
    norms, flags = deferred.arguments(out, before, after)
    _row_kernel[(triton.cdiv(outer, COLUMNS),)](
        x[0].view(torch.int64), qweight.view(torch.int32), scales, zeros, x if bias is None else bias, out, *norms, outer, inner // 8, groups, inner // 128,
        **flags, PER=inner // groups // 128, HAS_BIAS=bias is not None, ONCE=inner <= CHUNK * 128, FP16=x.dtype is torch.float16, ASM=x.is_cuda,
        PDL=pdl, launch_pdl=pdl, R=COLUMNS, G=CHUNK, num_warps=4,
    )  # fmt: skip
