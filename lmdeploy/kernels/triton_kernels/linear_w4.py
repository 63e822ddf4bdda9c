"""Products with 4-bit weights in Triton.

Byte j of a row holds inputs 2j and 2j + 1 in its halves. Nothing is interleaved: a tile of bytes becomes one tile of the low numbers and one of the high
ones, and each is multiplied by the inputs that belong to it. Bytes become 16-bit floats by putting a number into the mantissa of 128 (bfloat16) or 1024
(float16), of which tensor cores make float32 sums of a tile; those and the zero point are taken off exactly, from the numbers or from the sum, and only the sum
is multiplied by the group's scale. So no weight is rounded.

Up to FEW_ROWS rows a call is bound by reading weights. `_once_kernel` (small weights) has all of a program's on their way to registers before the kernel
before has ended (`overlap.py`), `_few_kernel` streams them through shared memory, each warp its own groups; `linear_w4_row.py` takes one row where weight
rows are long. Above, `_many_kernel` multiplies larger tiles, of an x whose even and odd inputs are parted beforehand, and from MANY_ROWS on `linear_w4_mid.py`
does, as far as it pays. On Hopper `linear_w4_few.py` takes up to FEW_ROWS rows of larger weights, and above `linear_w4_async.py` all, for more rows still. For
even more weights are written out in 16 bits, a bounded number of weight rows at a time, for cuBLAS.

A row's bits do not depend on the rows beside it, nor on their number within 1 (long weight rows; on Hopper all large
weights), 1..8, 9..16, 17..32, 33..64, 65..128, 129..192, and 193..384 on Hopper; where a sum is split among programs, the last one adds the parts in one order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lmdeploy.kernels.api import After, Before
from lmdeploy.kernels.reference import linear as linear_dense
from lmdeploy.kernels.triton_kernels import deferred, linear, linear_w4_mid, linear_w4_row
from lmdeploy.kernels.triton_kernels.linear_w4_sums import arrivals, ask, count_splits, finish, surroundings, weight_rows
from lmdeploy.kernels.triton_kernels.overlap import after_previous, overlaps

try:
    from lmdeploy.kernels.triton_kernels import linear_w4_async, linear_w4_few
except ImportError:  # a Triton without Gluon
    linear_w4_async = linear_w4_few = None  # type: ignore[assignment]

Tensor = torch.Tensor

#: Inputs whose numbers are multiplied together: a group, or the part of one that is a power of two; below the smaller one the general kernel serves.
TILE, SMALLEST_TILE = 128, 32
#: Rows up to which memory, and up to which `_many_kernel` is the fastest way.
FEW_ROWS, MANY_ROWS = 16, 64
#: Numbers of a weight that are written out at once: 128 MiB.
MOST_NUMBERS = 1 << 26
#: Numbers of a weight that is worth wide tiles of 33 to 64 rows.
LARGE = 1 << 25
#: Inputs that a program of `_part_kernel` parts.
PART = 512


@triton.jit
def _numbers_bf16(packed: tl.tensor, offset: tl.tensor) -> tl.tensor:
    """Four bytes a turn: their low and their high numbers as 128 + q, plus the offset."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, b, c, d, one;
        prmt.b32 a, $4, 0, 0x4140;
        prmt.b32 b, $4, 0, 0x4342;
        shr.u32 c, a, 4;
        shr.u32 d, b, 4;
        lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 b, b, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 c, c, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 d, d, 0x000F000F, 0x43004300, 0xEA;
        mov.b32 one, 0x3F803F80;
        fma.rn.bf16x2 $0, a, one, $5;
        fma.rn.bf16x2 $1, b, one, $6;
        fma.rn.bf16x2 $2, c, one, $5;
        fma.rn.bf16x2 $3, d, one, $6;
        }
        """,
        "=r,=r,=r,=r,r,r,r", [packed, offset], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _numbers_fp16(packed: tl.tensor, offset: tl.tensor) -> tl.tensor:
    """The same as 1024 + q, plus the offset."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, b, c, d;
        prmt.b32 a, $4, 0, 0x4140;
        prmt.b32 b, $4, 0, 0x4342;
        shr.u32 c, a, 4;
        shr.u32 d, b, 4;
        lop3.b32 a, a, 0x000F000F, 0x64006400, 0xEA;
        lop3.b32 b, b, 0x000F000F, 0x64006400, 0xEA;
        lop3.b32 c, c, 0x000F000F, 0x64006400, 0xEA;
        lop3.b32 d, d, 0x000F000F, 0x64006400, 0xEA;
        add.rn.f16x2 $0, a, $5;
        add.rn.f16x2 $1, b, $6;
        add.rn.f16x2 $2, c, $5;
        add.rn.f16x2 $3, d, $6;
        }
        """,
        "=r,=r,=r,=r,r,r,r", [packed, offset], dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _raised_bf16(packed: tl.tensor) -> tl.tensor:
    """Four bytes a turn: their low and their high numbers as 128 + q."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, b, c, d;
        prmt.b32 a, $4, 0, 0x4140;
        prmt.b32 b, $4, 0, 0x4342;
        shr.u32 c, a, 4;
        shr.u32 d, b, 4;
        lop3.b32 $0, a, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 $1, b, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 $2, c, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 $3, d, 0x000F000F, 0x43004300, 0xEA;
        }
        """,
        "=r,=r,=r,=r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _ones_bf16(packed: tl.tensor) -> tl.tensor:
    """A one for every byte, laid out as the numbers are; it takes no instruction, for the assembler knows the register."""
    asm: tl.constexpr = "mov.b32 $0, 0x3F803F80; mov.b32 $1, 0x3F803F80;"
    return tl.inline_asm_elementwise(asm, "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4)


@triton.jit
def _parted_bf16(words: tl.tensor) -> tl.tensor:
    """(even, odd) inputs of words of two, four words a turn."""
    return tl.inline_asm_elementwise(
        """
        prmt.b32 $0, $4, $5, 0x5410;
        prmt.b32 $1, $6, $7, 0x5410;
        prmt.b32 $2, $4, $5, 0x7632;
        prmt.b32 $3, $6, $7, 0x7632;
        """,
        "=&r,=&r,=&r,=&r,r,r,r,r", [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _numbers(packed: tl.tensor, zero: tl.tensor, dtype: tl.constexpr, ASM: tl.constexpr) -> tl.tensor:
    """(low - zero, high - zero) of bytes, exactly. The offsets are -(128 + zero) and -(1024 + zero), put together from bits; without ASM, for the interpreter."""
    if ASM:
        if dtype == tl.bfloat16:
            low, high = _numbers_bf16(packed, (zero.to(tl.int16) | -0x3D00).to(tl.bfloat16, bitcast=True))
        else:
            low, high = _numbers_fp16(packed, (zero.to(tl.int16) | -0x1C00).to(tl.float16, bitcast=True))
    else:
        low = ((packed & 15).to(tl.int32) - zero.to(tl.int32)).to(dtype)
        high = ((packed >> 4).to(tl.int32) - zero.to(tl.int32)).to(dtype)
    return low, high


@triton.jit
def _parted(words: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """(even, odd) inputs of words of two."""
    return (words & 0xFFFF).to(tl.int16).to(dtype, bitcast=True), (words >> 16).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _few_products(packed: tl.tensor, words: tl.tensor, scale: tl.tensor, zero: tl.tensor, dtype: tl.constexpr, ASM: tl.constexpr) -> tl.tensor:
    """[G, BN, BM] of packed [G, BN, HALF] and words [G, HALF, BM]: the sums of a tile, scaled. In bfloat16 tensor cores sum x too, which costs less than
    128 + zero taken from each number: it is taken from the sum. (1024 would cost float16 too many bits.)"""
    if ASM and dtype == tl.bfloat16:
        even, odd = _parted_bf16(words)
        low, high = _raised_bf16(packed)
        ones = _ones_bf16(packed)
        part = tl.dot(high, odd, tl.dot(low, even))
        part -= tl.dot(ones, odd, tl.dot(ones, even)) * (128.0 + zero.to(tl.float32))[:, :, None]
    else:
        even, odd = _parted(words, dtype)
        low, high = _numbers(packed, zero[:, :, None], dtype, ASM)
        part = tl.dot(high, odd, tl.dot(low, even))
    return part * scale.to(tl.float32)[:, :, None]


@triton.jit(do_not_specialize=["T", "splits"])
def _once_kernel(
    words: tl.tensor, qweight: tl.tensor, scales: tl.tensor, zeros: tl.tensor, bias: tl.tensor, out: tl.tensor, parts: tl.tensor, arrived: tl.tensor,
    before: tl.tensor, eps: tl.tensor, residual: tl.tensor, gain: tl.tensor, squares: tl.tensor,
    T: tl.tensor, N: tl.tensor, pitch: tl.tensor, word_row: tl.tensor, out_row: tl.tensor, groups: tl.tensor, splits: tl.tensor,
    HALF: tl.constexpr, PER: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, SILU: tl.constexpr, TILES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
) -> None:  # fmt: skip
    """All rows, BN columns and TILES tiles of K, whose weights are all on their way to registers before the kernel before has ended."""
    block, split = tl.program_id(0), tl.program_id(1)
    cols = weight_rows(block, N, SILU, BN)
    rows, inputs = tl.arange(0, BM), tl.arange(0, HALF)
    tile = split * TILES + tl.arange(0, TILES)
    row = tl.minimum(cols, N - 1).to(tl.int64)
    packed = tl.load(qweight + row[None, :, None] * pitch + tile[:, None, None] * HALF + inputs[None, None, :])
    at = row[None, :] * groups + (tile // PER)[:, None]
    scale, zero = tl.load(scales + at), tl.load(zeros + at)
    after_previous(PDL)
    around = surroundings(before, eps, residual, gain, cols, rows, T, N, pitch * 2, BEFORE, AFTER)
    words_at = words + rows[None, None, :] * word_row + tile[:, None, None] * HALF + inputs[None, :, None]
    total = _few_products(packed, tl.load(words_at, mask=(rows < T)[None, None, :], other=0), scale, zero, out.dtype.element_ty, ASM)
    finish(
        tl.sum(total, axis=0), out, bias, parts, arrived + block, around, residual, squares, cols, rows, block, T, N, out_row, split, splits,
        HAS_BIAS, SPLIT, BEFORE, AFTER, SILU,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "steps", "splits"])
def _few_kernel(
    words: tl.tensor, qweight: tl.tensor, scales: tl.tensor, zeros: tl.tensor, bias: tl.tensor, out: tl.tensor, parts: tl.tensor, arrived: tl.tensor,
    before: tl.tensor, eps: tl.tensor, residual: tl.tensor, gain: tl.tensor, squares: tl.tensor,
    T: tl.tensor, N: tl.tensor, pitch: tl.tensor, word_row: tl.tensor, out_row: tl.tensor, groups: tl.tensor, splits: tl.tensor, steps: tl.tensor,
    HALF: tl.constexpr, PER: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, SILU: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """All rows and BN columns: a tile [W, BN, HALF bytes] a step, of which each warp has its own [BN, HALF]. L2 is asked for AHEAD lines of each weight
    row before the kernel before has ended."""
    block, split = tl.program_id(0), tl.program_id(1)
    cols = weight_rows(block, N, SILU, BN)
    rows, inputs = tl.arange(0, BM), tl.arange(0, HALF)
    tile = split * steps * W + tl.arange(0, W)
    row = tl.minimum(cols, N - 1).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        ask(qweight + row[:, None] * pitch + split * steps * (W * HALF) + tl.arange(0, AHEAD)[None, :] * 128)
        tl.extra.cuda.gdc_wait()
    around = surroundings(before, eps, residual, gain, cols, rows, T, N, pitch * 2, BEFORE, AFTER)
    bytes_at = qweight + row[None, :, None] * pitch + tile[:, None, None] * HALF + inputs[None, None, :]
    words_at = words + rows[None, None, :] * word_row + tile[:, None, None] * HALF + inputs[None, :, None]
    live = (rows < T)[None, None, :]
    group = row[None, :] * groups
    at = group + (tile // PER)[:, None]
    next_scale, next_zero = tl.load(scales + at), tl.load(zeros + at)
    acc = tl.zeros((W, BN, BM), dtype=tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        scale, zero = next_scale, next_zero
        packed = tl.load(bytes_at + step * (W * HALF))
        at = group + ((tile + tl.minimum(step + 1, steps - 1) * W) // PER)[:, None]
        next_scale, next_zero = tl.load(scales + at), tl.load(zeros + at)
        acc += _few_products(packed, tl.load(words_at + step * (W * HALF), mask=live, other=0), scale, zero, out.dtype.element_ty, ASM)
    finish(
        tl.sum(acc, axis=0), out, bias, parts, arrived + block, around, residual, squares, cols, rows, block, T, N, out_row, split, splits,
        HAS_BIAS, SPLIT, BEFORE, AFTER, SILU,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "steps", "splits"])
def _many_kernel(
    x: tl.tensor, qweight: tl.tensor, scales: tl.tensor, zeros: tl.tensor, bias: tl.tensor, out: tl.tensor, parts: tl.tensor, arrived: tl.tensor,
    T: tl.tensor, N: tl.tensor, pitch: tl.tensor, x_row: tl.tensor, out_row: tl.tensor, groups: tl.tensor, splits: tl.tensor, steps: tl.tensor,
    HALF: tl.constexpr, PER: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """BM rows and BN columns, a tile [BN, HALF bytes] a step. x: the even inputs of each tile, then its odd ones."""
    after_previous(PDL)
    pid, split = tl.program_id(0), tl.program_id(1)
    down = tl.cdiv(T, BM)
    first = (pid // (BAND * down)) * BAND  # programs that run together share columns and rows in the L2 cache
    band = tl.minimum(BAND, tl.cdiv(N, BN) - first)
    local = pid % (BAND * down)
    cols = (first + local % band) * BN + tl.arange(0, BN)
    rows = (local // band) * BM + tl.arange(0, BM)
    inputs = tl.arange(0, HALF)
    dtype: tl.constexpr = out.dtype.element_ty
    row = tl.minimum(cols, N - 1).to(tl.int64)
    tile = split * steps
    bytes_at = qweight + row[:, None] * pitch + tile * HALF + inputs[None, :]
    x_at = x + tl.minimum(rows, T - 1).to(tl.int64)[:, None] * x_row + tile * (2 * HALF) + inputs[None, :]
    at = row * groups + tile // PER
    next_scale, next_zero = tl.load(scales + at), tl.load(zeros + at)
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        scale, zero = next_scale, next_zero
        packed = tl.load(bytes_at + step * HALF)
        at = row * groups + (tile + tl.minimum(step + 1, steps - 1)) // PER
        next_scale, next_zero = tl.load(scales + at), tl.load(zeros + at)
        even, odd = tl.load(x_at + step * (2 * HALF)), tl.load(x_at + step * (2 * HALF) + HALF)
        low, high = _numbers(packed, zero[:, None], dtype, ASM)
        part = tl.dot(high, tl.trans(odd), tl.dot(low, tl.trans(even)))
        acc += part * scale.to(tl.float32)[:, None]
    around = surroundings(out, 0.0, out, out, cols, rows, T, N, N, False, False)
    finish(
        acc, out, bias, parts, arrived + pid, around, out, out, cols, rows, pid, T, N, out_row, split, splits, HAS_BIAS, SPLIT, False, False, False,
    )  # fmt: skip


@triton.jit
def _part_kernel(words: tl.tensor, out: tl.tensor, count: tl.tensor, word_row: tl.tensor, HALF: tl.constexpr, PDL: tl.constexpr, BT: tl.constexpr) -> None:
    """Rows of words of two inputs: the even inputs of each tile, then its odd ones."""
    after_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BT + tl.arange(0, BT)
    even, odd = _parted(tl.load(words + row * word_row + word, mask=word < count, other=0), out.dtype.element_ty)
    place = out + row * (2 * count) + (word // HALF) * (2 * HALF) + word % HALF
    tl.store(place, even, mask=word < count)
    tl.store(place + HALF, odd, mask=word < count)


@triton.jit
def _write_out_kernel(
    qweight: tl.tensor, scales: tl.tensor, zeros: tl.tensor, words: tl.tensor, tiles: tl.tensor, groups: tl.tensor,
    HALF: tl.constexpr, PER: tl.constexpr, FP16: tl.constexpr, BT: tl.constexpr,
) -> None:  # fmt: skip
    """A row of a weight in 16 bits, as words of two: (q - zero) * scale, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * BT + tl.arange(0, BT)
    inside = tile < tiles
    place = row * tiles * HALF + tile[:, None] * HALF + tl.arange(0, HALF)[None, :]
    packed = tl.load(qweight + place, mask=inside[:, None], other=0)
    at = row * groups + tile // PER
    scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)[:, None]
    zero = tl.load(zeros + at, mask=inside, other=0).to(tl.float32)[:, None]
    dtype: tl.constexpr = tl.float16 if FP16 else tl.bfloat16
    low = (((packed & 15).to(tl.float32) - zero) * scale).to(dtype).to(tl.int16, bitcast=True).to(tl.int32)
    high = (((packed >> 4).to(tl.float32) - zero) * scale).to(dtype).to(tl.int16, bitcast=True).to(tl.int32)
    tl.store(words + place, (low & 0xFFFF) | (high << 16), mask=inside[:, None])


class _Launch(NamedTuple):
    """Tile of the result, tiles of K together, warps, stages, programs that share a sum; whether it may begin before the kernel before has ended."""

    rows: int
    columns: int
    tiles: int
    warps: int
    stages: int
    splits: int
    overlaps: bool = True


class Inside(NamedTuple):
    """What a product does beside multiplying: SiLU of its first half times the second one, and the norms around it (`deferred.py`)."""

    silu: bool = False
    before: Before | None = None
    after: After | None = None


NOTHING = Inside()


def _share(wanted: int, tiles: int) -> int:
    """At most `wanted`, a power of two, so that the tiles of a row are shared out evenly."""
    while tiles % wanted:
        wanted //= 2
    return wanted


def _once(rows: int, outer: int, tiles: int) -> _Launch | None:
    """What was fastest on an H200 for the weights of a 1.8B and a 7B model: `_once_kernel` for the smaller ones."""
    height, columns, most = (8, 32, 384) if rows <= 8 else (16, 16, 256)
    depth = _share(16, tiles)
    splits = tiles // depth
    return _Launch(height, columns, depth, min(4, depth), 1, splits) if splits <= 8 and triton.cdiv(outer, columns) * splits <= most else None


def _few(rows: int, outer: int, tiles: int) -> _Launch:
    """`_few_kernel` for the others. The largest weights leave no room for the next kernel's programs: two warps a program, and one kernel after the other."""
    huge = outer >= 24576
    if rows <= 8:
        count = 4 if tiles >= 64 else 1
        launch = _Launch(8, 64, 2, 2, 3, count, overlaps=False) if huge else _Launch(8, 32, 4, 4, 3, count)
    else:
        count = count_splits(triton.cdiv(outer, 64), tiles, 264)
        launch = _Launch(16, 64, 2, 2, 3, count) if huge else _Launch(16, 64, 4, 4, 2, count)
    warps = _share(launch.warps, tiles)
    return launch._replace(tiles=warps, warps=warps, splits=_share(count, tiles // warps))


def _many(rows: int, outer: int, tiles: int, large: bool) -> _Launch:
    """`_many_kernel` by two heights."""
    height = 32 if rows <= 32 else 64
    columns, warps = (128, 8) if large and height == 64 else (64, 4)
    return _Launch(height, columns, 1, warps, 3, count_splits(triton.cdiv(outer, columns) * triton.cdiv(rows, height), tiles, 384))


def linear_w4(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x @ W.T + bias of a 4-bit weight; see `api.Kernels`."""
    rows, group = x.shape[0], x.shape[1] // scales.shape[1]
    tile = min(group & -group, TILE)
    if x.dtype is torch.float32 or x.dtype is not out.dtype or zeros.dtype is not torch.uint8 or tile < SMALLEST_TILE:
        linear.linear_w4(x, qweight, scales, zeros, bias, out)
    elif rows <= FEW_ROWS and linear_w4_few is not None and linear_w4_few.serves(x, (qweight, scales, zeros)):
        linear_w4_few.multiply(x, (qweight, scales, zeros), bias, out)
    elif tile == TILE and linear_w4_row.serves(x, scales.shape[0]):
        linear_w4_row.multiply(x, (qweight, scales, zeros), bias, out)
    elif rows > FEW_ROWS and linear_w4_async is not None and linear_w4_async.serves(x, (qweight, scales, zeros), tile):
        linear_w4_async.multiply(x, (qweight, scales, zeros), bias, out)
    elif 0 < rows <= MANY_ROWS:
        _in_registers(x, (qweight, scales, zeros), tile, bias, out)
    elif rows and linear_w4_mid.serves(rows, scales.shape[0], x.shape[1], tile):
        linear_w4_mid.multiply(x, (qweight, scales, zeros), tile, bias, out)
    elif rows:
        _written_out(x, (qweight, scales, zeros), tile, bias, out)


def _words(x: Tensor) -> Tensor:
    """Rows of words of two inputs each."""
    return (x if x.stride(0) % 2 == 0 and x.storage_offset() % 2 == 0 and x.stride(1) == 1 else x.contiguous()).view(torch.int32)


def _in_registers(x: Tensor, weight: tuple[Tensor, Tensor, Tensor], tile: int, bias: Tensor | None, out: Tensor, inside: Inside = NOTHING) -> None:
    """Weights become 16-bit floats in the programs that multiply them."""
    (rows, inner), (outer, groups), half = x.shape, weight[1].shape, tile // 2
    tiles, source, once = inner // tile, x, None
    if rows <= FEW_ROWS:
        once = _once(rows, outer, tiles)
        launch = once or _few(rows, outer, tiles)
        source = _words(x)
    else:
        launch = _many(rows, outer, tiles, outer * inner >= LARGE)
    pdl = launch.overlaps and overlaps(x.device)
    shared = {"HALF": half, "PDL": pdl, "launch_pdl": pdl}
    if rows > FEW_ROWS:
        words, source = _words(x), torch.empty(rows, inner, dtype=x.dtype, device=x.device)
        _part_kernel[(rows, triton.cdiv(inner // 2, PART))](words, source, inner // 2, words.stride(0), BT=PART, **shared)
    parts = torch.empty(launch.splits, rows, outer, dtype=torch.float32, device=x.device) if launch.splits > 1 else out
    norms, flags = deferred.arguments(out, inside.before, inside.after) if rows <= FEW_ROWS else ((), {})
    arguments = (
        source, *weight, out if bias is None else bias, out, parts, arrivals(x.device), *norms, rows, outer, inner // 2, source.stride(0), out.stride(0), groups,
        launch.splits,
    )  # fmt: skip
    shared |= {"PER": inner // groups // tile, "HAS_BIAS": bias is not None, "SPLIT": launch.splits > 1, "ASM": x.is_cuda, "num_warps": launch.warps}
    shared |= {"BM": launch.rows, "BN": launch.columns} | flags
    across, steps = triton.cdiv(outer, launch.columns), tiles // launch.tiles // launch.splits
    if once:
        _once_kernel[(across, launch.splits)](*arguments, TILES=launch.tiles, SILU=inside.silu, **shared)
    elif rows <= FEW_ROWS:
        ahead = min(4, triton.next_power_of_2(max(1, steps * launch.tiles * half // 128) + 1) // 2)
        _few_kernel[(across, launch.splits)](*arguments, steps, W=launch.tiles, AHEAD=ahead, STAGES=launch.stages, SILU=inside.silu, **shared)
    else:
        _many_kernel[(across * triton.cdiv(rows, launch.rows), launch.splits)](*arguments, steps, BAND=8, STAGES=launch.stages, **shared)


def rows_served(weight: tuple[Tensor, Tensor, Tensor]) -> int:
    """Up to how many rows `multiply` takes: above, more registers for what stands between tiles cost more than kernels of their own."""
    _ask_few(weight)
    return FEW_ROWS if weight[2].dtype is torch.uint8 and _tile(weight) >= SMALLEST_TILE else 0


def _ask_few(weight: tuple[Tensor, Tensor, Tensor]) -> None:
    """Find out whether `linear_w4_few.py` can be used, before a step is captured."""
    if linear_w4_few is not None:
        linear_w4_few.usable(weight[0].device)


def rows_in_quarters(weight: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> range:
    """For how many rows of that dtype `linear_w4` puts x in quarters (`quarters.py`), and `multiply_quarters` serves."""
    _ask_few(weight)
    if linear_w4_async is None or dtype is torch.float32 or weight[2].dtype is not torch.uint8 or not linear_w4_async.takes(weight, dtype, _tile(weight)):
        return range(0)
    return range(FEW_ROWS + 1, linear_w4_async.MOST_ROWS + 1)


def multiply_quarters(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`linear_w4` of x in quarters."""
    linear_w4_async.multiply(x, (qweight, scales, zeros), bias, out, quarters=True)


def _tile(weight: tuple[Tensor, Tensor, Tensor]) -> int:
    group = 2 * weight[0].shape[1] // weight[1].shape[1]
    return min(group & -group, TILE)


def multiply(x: Tensor, weight: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, out: Tensor, inside: Inside) -> None:
    """out = x @ W.T + bias of up to `rows_served` rows in bfloat16, with SiLU and norms inside."""
    tile = _tile(weight)
    if linear_w4_few is not None and linear_w4_few.serves(x, weight):
        linear_w4_few.multiply(x, weight, bias, out, inside.silu, inside.before, inside.after)
    elif tile == TILE and not inside.silu and linear_w4_row.serves(x, weight[1].shape[0]):
        linear_w4_row.multiply(x, weight, bias, out, inside.before, inside.after)
    else:
        _in_registers(x, weight, tile, bias, out, inside)


def _written_out(x: Tensor, weight: tuple[Tensor, Tensor, Tensor], tile: int, bias: Tensor | None, out: Tensor) -> None:
    """A dense product with rows of the weight that are written out, MOST_NUMBERS at a time."""
    (inner, (outer, groups)), tiles = (x.shape[1], weight[1].shape), x.shape[1] // tile
    step = min(outer, max(1, MOST_NUMBERS // inner))
    dense = torch.empty(step, inner, dtype=x.dtype, device=x.device)
    for start in range(0, outer, step):
        rows = slice(start, min(start + step, outer))
        count = rows.stop - start
        _write_out_kernel[(count, triton.cdiv(tiles, 16))](
            *(part[rows] for part in weight), dense.view(torch.int32), tiles, groups,
            HALF=tile // 2, PER=inner // groups // tile, FP16=x.dtype is torch.float16, BT=16,
        )  # fmt: skip
        linear_dense(x, dense[:count], None if bias is None else bias[rows], out[:, rows])
