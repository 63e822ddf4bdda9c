"""Products of 65 to 128 rows, and of more with large weights, in 4 bits, out^T = W x^T.

A tile of a weight goes from shared memory to the registers from which tensor cores take it, and becomes 16-bit floats there. For that, an element of two
bytes has four numbers, and number i of all elements of a tile makes a product of its own, with the inputs of those numbers: x is rearranged once, into the
four quarters of each tile. A number becomes a float by its bits alone, as OFFSET + number. What that adds to a tile's sum, (OFFSET + zero) times the sum of
the tile's inputs, is taken from it before the products, exactly as far as float32 goes; so no weight is rounded.

The sum is kept in units of the present group's scale: with a new group it is multiplied by the quotient of both, so that tensor cores add to it directly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lmdeploy.kernels.triton_kernels.linear_w4_sums import arrivals, ask, count_splits, finish, surroundings
from lmdeploy.kernels.triton_kernels.overlap import after_previous, overlaps

Tensor = torch.Tensor
#: Inputs of a tile at least, of which a quarter is as deep as tensor cores are.
SMALLEST_TILE = 64
#: Tiles of a row of x that a program of `_part_kernel` rearranges.
TILES = 8
#: Lines of each weight row that L2 is asked for ahead of time. (What lies behind a weight's end may be asked for too: nothing is read.)
AHEAD = 2
#: Rows that one tile of the result holds, rows up to which several pay where a weight has at least LARGE numbers.
TILE_ROWS, MOST_ROWS, LARGE = 128, 192, 1 << 25
#: Columns of tiles that are computed together for all rows.
BAND = 8
#: A group's scale that is zero is replaced by this: its sum is nothing beside any other, and the quotient of scales stays finite.
TINY = tl.constexpr(2.0**-40)


@triton.jit
def _raised_bf16(packed: tl.tensor, MOVE: tl.constexpr) -> tl.tensor:
    """Two elements a turn: a number of each as 128 + number, which is 128 with the number in its lowest bits."""
    asm: tl.constexpr = "{ .reg .b32 a; " + MOVE + "; lop3.b32 $0, a, 0x000F000F, 0x43004300, 0xEA; }"
    return tl.inline_asm_elementwise(asm, "=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def _raised_fp16(packed: tl.tensor, MOVE: tl.constexpr) -> tl.tensor:
    """The same as 64 + number, from bit 4 on."""
    asm: tl.constexpr = "{ .reg .b32 a; " + MOVE + "; lop3.b32 $0, a, 0x00F000F0, 0x54005400, 0xEA; }"
    return tl.inline_asm_elementwise(asm, "=r,r", [packed], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _quarter(packed: tl.tensor, NUMBER: tl.constexpr, BF16_MOVE: tl.constexpr, FP16_MOVE: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr) -> tl.tensor:
    """Number NUMBER of each element of two bytes, raised; without ASM, for the interpreter."""
    if not ASM:
        numbers = (((packed >> (4 * NUMBER)) & 15) + (128 if dtype == tl.bfloat16 else 64)).to(dtype)
    elif dtype == tl.bfloat16:
        numbers = _raised_bf16(packed, BF16_MOVE)
    else:
        numbers = _raised_fp16(packed, FP16_MOVE)
    return numbers


@triton.jit
def _scales_at(pointers: tl.tensor, ASM: tl.constexpr) -> tl.tensor:
    """Scales in float32. Triton would load them in another order and exchange them between threads, with a barrier in every step; not what assembly loads."""
    if ASM:
        scale = tl.inline_asm_elementwise("ld.global.nc.b16 $0, [$1];", "=h,l", [pointers], dtype=tl.float16, is_pure=True, pack=1)
    else:
        scale = tl.load(pointers)
    return scale.to(tl.float32)


@triton.jit
def _zeros_at(pointers: tl.tensor, ASM: tl.constexpr) -> tl.tensor:
    """Zero points in float32, loaded likewise."""
    if ASM:
        zero = tl.inline_asm_elementwise("ld.global.nc.u8 $0, [$1];", "=r,l", [pointers], dtype=tl.int32, is_pure=True, pack=1)
    else:
        zero = tl.load(pointers)
    return zero.to(tl.float32)


@triton.jit(do_not_specialize=["T", "steps", "splits"])
def _mid_kernel(
    x: tl.tensor, sums: tl.tensor, qweight: tl.tensor, scales: tl.tensor, zeros: tl.tensor, bias: tl.tensor, out: tl.tensor, parts: tl.tensor, arrived: tl.tensor,
    T: tl.tensor, N: tl.tensor, pitch: tl.tensor, padded: tl.tensor, out_row: tl.tensor, groups: tl.tensor, splits: tl.tensor, steps: tl.tensor,
    QUARTER: tl.constexpr, PER: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr, AHEAD: tl.constexpr, DEEP: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """BM rows and BN columns, a tile of QUARTER elements of each weight row a step. x and sums: what `_part_kernel` made, of `padded` rows. L2 is asked
    for the first lines of each weight row before the kernel before has ended, and then for what lies DEEP tiles ahead."""
    pid, split = tl.program_id(0), tl.program_id(1)
    down = tl.cdiv(T, BM)
    first = (pid // (BAND * down)) * BAND  # programs that run together share columns and rows in the L2 cache
    band = tl.minimum(BAND, tl.cdiv(N, BN) - first)
    local = pid % (BAND * down)
    cols, rows, elements = (first + local % band) * BN + tl.arange(0, BN), (local // band) * BM + tl.arange(0, BM), tl.arange(0, QUARTER)
    dtype: tl.constexpr = out.dtype.element_ty
    offset: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 64.0
    row = tl.minimum(cols, N - 1).to(tl.int64)
    tile = split * steps
    packed_at = qweight + row[:, None] * pitch + tile * QUARTER + elements[None, :]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        ask(qweight + row[:, None] * pitch + tile * QUARTER + tl.arange(0, AHEAD)[None, :] * 64)
        tl.extra.cuda.gdc_wait()
    x_at = x + (tile.to(tl.int64) * 4 * padded + rows[:, None]) * QUARTER + elements[None, :]
    sums_at = sums + tile * padded + rows
    at = row * groups
    next_scale, next_zero = _scales_at(scales + at + tile // PER, ASM), _zeros_at(zeros + at + tile // PER, ASM)
    next_sum = tl.load(sums_at)
    unit, acc = tl.full((BN,), 1.0, dtype=tl.float32), tl.zeros((BN, BM), dtype=tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        following = tl.minimum(step + 1, steps - 1)
        scale, zero, total = tl.where(next_scale == 0.0, TINY, next_scale), next_zero, next_sum
        packed = tl.load(packed_at + step * QUARTER)
        if DEEP:
            ask(qweight + row * pitch + (tile + tl.minimum(step + DEEP, steps - 1)) * QUARTER)
        next_at = at + (tile + following) // PER
        next_scale, next_zero, next_sum = _scales_at(scales + next_at, ASM), _zeros_at(zeros + next_at, ASM), tl.load(sums_at + following * padded)
        acc = acc * (unit / scale)[:, None] - (offset + zero)[:, None] * total[None, :]
        unit = scale
        quarter, apart = x_at + step * (4 * QUARTER) * padded, QUARTER * padded
        x0, x1, x2, x3 = tl.load(quarter), tl.load(quarter + apart), tl.load(quarter + 2 * apart), tl.load(quarter + 3 * apart)
        acc = tl.dot(_quarter(packed, 0, "mov.b32 a, $1", "shl.b32 a, $1, 4", dtype, ASM), tl.trans(x0), acc)
        acc = tl.dot(_quarter(packed, 1, "shr.u32 a, $1, 4", "mov.b32 a, $1", dtype, ASM), tl.trans(x1), acc)
        acc = tl.dot(_quarter(packed, 2, "shr.u32 a, $1, 8", "shr.u32 a, $1, 4", dtype, ASM), tl.trans(x2), acc)
        acc = tl.dot(_quarter(packed, 3, "shr.u32 a, $1, 12", "shr.u32 a, $1, 8", dtype, ASM), tl.trans(x3), acc)
    around = surroundings(out, 0.0, out, out, cols, rows, T, N, N, False, False)
    finish(
        acc * unit[:, None], out, bias, parts, arrived + pid, around, out, out, cols, rows, pid, T, N, out_row, split, splits,
        HAS_BIAS, SPLIT, False, False, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tiles"])
def _part_kernel(
    x: tl.tensor, out: tl.tensor, sums: tl.tensor, tiles: tl.tensor, x_row: tl.tensor, padded: tl.tensor,
    QUARTER: tl.constexpr, SUMS: tl.constexpr, PDL: tl.constexpr, BT: tl.constexpr,
) -> None:  # fmt: skip
    """BT tiles of a row of x, as words of four inputs: out [tile, quarter, row], a quarter being every fourth input, and with SUMS those of each tile's inputs."""
    after_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    tile, word = tl.program_id(1) * BT + tl.arange(0, BT), tl.arange(0, QUARTER)
    inside = tile < tiles
    words = tl.load(x + row * x_row + tile[:, None] * QUARTER + word[None, :], mask=inside[:, None], other=0)
    place = out + (tile[:, None] * 4 * padded + row) * QUARTER + word[None, :]
    total = tl.zeros((BT, QUARTER), dtype=tl.float32)
    for i in tl.static_range(4):
        part = (words >> (16 * i)).to(tl.int16).to(out.dtype.element_ty, bitcast=True)
        tl.store(place + i * padded * QUARTER, part, mask=inside[:, None])
        total += part.to(tl.float32)
    if SUMS:
        tl.store(sums + tile * padded + row, tl.sum(total, 1), mask=inside)


class _Launch(NamedTuple):
    """Tile of the result, stages, programs that share a sum, tiles that L2 is asked for ahead of their turn."""

    rows: int
    columns: int
    stages: int
    splits: int
    deep: int = 0


def serves(rows: int, outer: int, inner: int, tile: int) -> bool:
    """Whether this is faster than weights that are written out for cuBLAS, for 65 rows and more."""
    return tile >= SMALLEST_TILE and (rows <= TILE_ROWS or (rows <= MOST_ROWS and outer * inner >= LARGE))


def _launch(rows: int, outer: int, tiles: int) -> _Launch:
    """What was fastest on an H200 for the weights of a 1.8B and a 7B model."""
    if rows > TILE_ROWS:
        return _Launch(64, 128, 3, count_splits(triton.cdiv(outer, 128) * triton.cdiv(rows, 64), tiles, 384))
    if outer >= 24576:
        return _Launch(128, 128, 2, 1)
    return _Launch(128, 64, 3, count_splits(triton.cdiv(outer, 64), tiles, 256), deep=8)


def _words(x: Tensor) -> Tensor:
    """Rows of words of four inputs each."""
    return (x if x.stride(0) % 4 == 0 and x.storage_offset() % 4 == 0 and x.stride(1) == 1 else x.contiguous()).view(torch.int64)


def rearranged(x: Tensor, tile: int, padded: int, sums: Tensor | None = None) -> Tensor:
    """x [tile of inputs, quarter, row, every fourth input], with room for `padded` rows; into `sums` float32 [tile, row], if wanted, those of each tile's inputs."""
    (rows, inner), words, pdl = x.shape, _words(x), overlaps(x.device)
    tiles, parted = inner // tile, torch.empty(padded, inner, dtype=x.dtype, device=x.device)
    _part_kernel[(rows, triton.cdiv(tiles, TILES))](
        words, parted, parted if sums is None else sums, tiles, words.stride(0), padded,
        QUARTER=tile // 4, SUMS=sums is not None, BT=TILES, PDL=pdl, launch_pdl=pdl, num_warps=4,
    )  # fmt: skip
    return parted


def multiply(x: Tensor, weight: tuple[Tensor, Tensor, Tensor], tile: int, bias: Tensor | None, out: Tensor) -> None:
    """out = x @ W.T + bias, by tiles of `tile` inputs that share a scale."""
    (rows, inner), (outer, groups), tiles, quarter = x.shape, weight[1].shape, x.shape[1] // tile, tile // 4
    launch, pdl = _launch(rows, outer, tiles), overlaps(x.device)
    across, down, steps = triton.cdiv(outer, launch.columns), triton.cdiv(rows, launch.rows), tiles // launch.splits
    padded = down * launch.rows
    sums = torch.empty(tiles, padded, dtype=torch.float32, device=x.device)
    parted = rearranged(x, tile, padded, sums)
    parts = torch.empty(launch.splits, rows, outer, dtype=torch.float32, device=x.device) if launch.splits > 1 else out
    _mid_kernel[(across * down, launch.splits)](
        parted, sums, weight[0].view(torch.int16), weight[1], weight[2], out if bias is None else bias, out, parts, arrivals(x.device), rows, outer, inner // 4,
        padded, out.stride(0), groups, launch.splits, steps, QUARTER=quarter, PER=tiles // groups, HAS_BIAS=bias is not None, SPLIT=launch.splits > 1,
        ASM=x.is_cuda, BM=launch.rows, BN=launch.columns, BAND=BAND, AHEAD=AHEAD, DEEP=launch.deep if pdl else 0, STAGES=launch.stages,
        PDL=pdl, launch_pdl=pdl, num_warps=4,
    )  # fmt: skip
