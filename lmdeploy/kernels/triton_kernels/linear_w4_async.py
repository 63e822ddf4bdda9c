"""Products of 17 to 384 rows in 4 bits on Hopper, out^T = W x^T, in Gluon: tensor cores multiply a tile while the next ones come and registers are filled.

Triton waits for each of the four products of a tile (see `linear_w4_mid.py`, whose order of x and of numbers this is) before it unpacks the next numbers; here
all four are under way while the next tile is loaded from shared memory, and tiles come to shared memory STAGES - 1 ahead. Of a number its zero point is taken
exactly, as a 16-bit float, and the sum is kept in units of the present group's scale; so no weight is rounded.

Gluon is an experimental part of Triton: where it is missing, or does not compile this, the other kernels serve.
"""

# ruff: noqa: BLE001  # whatever an experimental compiler raises

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lmdeploy.kernels.triton_kernels.linear_w4_mid import BAND, rearranged
from lmdeploy.kernels.triton_kernels.linear_w4_sums import arrivals
from lmdeploy.log import get_logger

logger = get_logger(__name__)
Tensor = torch.Tensor
#: Inputs of a tile, of which each of the four products takes every fourth one.
TILE = 128
#: Rows up to which this is faster than a weight that is written out for cuBLAS.
MOST_ROWS = 384
#: Numbers up to which a weight is small, outputs from which it is wide and very wide.
SMALL, WIDE, WIDEST = 1 << 23, 16384, 24576
#: A group's scale that is zero is replaced by this: its sum is nothing beside any other, and the quotient of scales stays finite.
TINY = gl.constexpr(2.0**-40)
# what later and earlier Tritons call them
_copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def _number(packed: gl.tensor, minus: gl.tensor, MOVE: gl.constexpr, FP16: gl.constexpr) -> gl.tensor:
    """Two elements a turn: a number of each as 128 + number (bfloat16) or 1024 + number, plus `minus`."""
    fp16: gl.constexpr = "{ .reg .b32 a; " + MOVE + "; lop3.b32 a, a, 0x000F000F, 0x64006400, 0xEA; add.rn.f16x2 $0, a, $2; }"
    bf16: gl.constexpr = (
        "{ .reg .b32 a, one; " + MOVE + "; lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA; mov.b32 one, 0x3F803F80; fma.rn.bf16x2 $0, a, one, $2; }"
    )
    return gl.inline_asm_elementwise(fp16 if FP16 else bf16, "=r,r,r", [packed, minus], dtype=gl.float16 if FP16 else gl.bfloat16, is_pure=True, pack=2)


@gluon.jit
def _numbers(packed: gl.tensor, zero: gl.tensor, FP16: gl.constexpr) -> gl.tensor:
    """The four numbers of each element less the row's zero point, exactly. `minus` is -(128 + zero) or -(1024 + zero), put together from bits."""
    if FP16:
        bits = (zero.to(gl.int16) | -0x1C00).to(gl.float16, bitcast=True)
    else:
        bits = (zero.to(gl.int16) | -0x3D00).to(gl.bfloat16, bitcast=True)
    packed, minus = gl.broadcast(packed, gl.expand_dims(bits, 1))
    return (
        _number(packed, minus, "mov.b32 a, $1", FP16), _number(packed, minus, "shr.u32 a, $1, 4", FP16),
        _number(packed, minus, "shr.u32 a, $1, 8", FP16), _number(packed, minus, "shr.u32 a, $1, 12", FP16),
    )  # fmt: skip


@gluon.jit
def _ask(pointers: gl.tensor) -> gl.tensor:
    """Ask L2 for lines that will be read."""
    return gl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _fetch(
    w_smem: gl.tensor, x_smem: gl.tensor, slot: gl.tensor, w_at: gl.tensor, x_at: gl.tensor, step: gl.tensor, x_step: gl.tensor, live: gl.tensor
) -> None:
    """Begin to copy a tile of the weight and the four quarters of x to `slot` of shared memory."""
    _copy(w_smem.index(slot), w_at + step * 32, mask=live)
    _copy(x_smem.index(slot), x_at + step * x_step, mask=live)
    async_copy.commit_group()


@gluon.jit
def _leave(
    total: gl.tensor, out: gl.tensor, bias: gl.tensor, parts: gl.tensor, arrived: gl.tensor, col: gl.tensor, row: gl.tensor,
    T: gl.tensor, N: gl.tensor, out_row: gl.tensor, split: gl.tensor, splits: gl.tensor,
    HAS_BIAS: gl.constexpr, SPLIT: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, W: gl.constexpr,
) -> None:  # fmt: skip
    """out = total [BN, BM] + bias from (row, col) on. With SPLIT a program has a part of the sum: the last one to arrive adds all of them, in their order."""
    stored: gl.constexpr = gl.BlockedLayout([4, 1], [16, 2], [1, W], [0, 1])
    total = gl.convert_layout(total, stored)
    cols = col + gl.arange(0, BN, layout=gl.SliceLayout(1, stored))
    rows = row + gl.arange(0, BM, layout=gl.SliceLayout(0, stored))
    mask = gl.expand_dims(cols < N, 1) & gl.expand_dims(rows < T, 0)
    place = out + gl.expand_dims(rows.to(gl.int64) * out_row, 0) + gl.expand_dims(cols, 1)
    more = gl.zeros([BN], gl.float32, layout=gl.SliceLayout(1, stored))
    if HAS_BIAS:
        more += gl.load(bias + cols, mask=cols < N, other=0.0).to(gl.float32)
    here = True
    if SPLIT:
        part = parts + gl.expand_dims(rows * N, 0) + gl.expand_dims(cols, 1)
        gl.store(part + split * (T * N), total, mask=mask)
        _barrier()
        here = gl.atomic_add(arrived, 1, sem="acq_rel") == splits - 1
        if here:
            _barrier()
            total = gl.zeros([BN, BM], gl.float32, layout=stored)
            for other in range(splits):
                total += gl.load(part + other * (T * N), mask=mask, other=0.0, cache_modifier=".cg")
            gl.store(arrived, 0)
    if here:
        gl.store(place, (total + gl.expand_dims(more, 1)).to(out.dtype.element_ty), mask=mask)


@gluon.jit(do_not_specialize=["T", "steps", "splits"])
def _async_kernel(
    x: gl.tensor, qweight: gl.tensor, scales: gl.tensor, zeros: gl.tensor, bias: gl.tensor, out: gl.tensor, parts: gl.tensor, arrived: gl.tensor,
    T: gl.tensor, N: gl.tensor, pitch: gl.tensor, out_row: gl.tensor, groups: gl.tensor, splits: gl.tensor, steps: gl.tensor,
    PER: gl.constexpr, HAS_BIAS: gl.constexpr, SPLIT: gl.constexpr, FP16: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr, W: gl.constexpr,
) -> None:  # fmt: skip
    """BM rows and BN columns, a tile [BN, 32 elements] a step. x: in quarters."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[W, 1], instr_shape=[16, BM, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [W, 1], [1, 0])
    pid, split = gl.program_id(0), gl.program_id(1)
    down = gl.cdiv(T, BM)
    first = (pid // (BAND * down)) * BAND  # programs that run together share columns and rows in the L2 cache
    band = gl.minimum(BAND, gl.cdiv(N, BN) - first)
    local = pid % (BAND * down)
    col, row, tile = (first + local % band) * BN, (local // band) * BM, split * steps
    element = gl.arange(0, 32, layout=gl.SliceLayout(0, copied))
    w_row = gl.minimum(col + gl.arange(0, BN, layout=gl.SliceLayout(1, copied)), N - 1).to(gl.int64) * pitch + tile * 32
    w_at = qweight + gl.expand_dims(w_row, 1) + gl.expand_dims(element, 0)
    x_row = gl.arange(0, 4 * BM, layout=gl.SliceLayout(1, copied))
    x_row = (x_row // BM * T + gl.minimum(row + x_row % BM, T - 1)) * 32
    x_at = x + tile.to(gl.int64) * (128 * T) + gl.expand_dims(x_row, 1) + gl.expand_dims(element, 0)
    w_smem = gl.allocate_shared_memory(gl.int16, [STAGES, BN, 32], gl.SwizzledSharedLayout(8, 2, 4, [1, 0]))
    x_smem = gl.allocate_shared_memory(out.dtype.element_ty, [STAGES, 4 * BM, 32], gl.NVMMASharedLayout(64, 16, 2))
    _ask(qweight + w_row)
    _ask(qweight + w_row + 64)
    gdc_wait()
    zero_at = zeros + gl.minimum(col + gl.arange(0, BN, layout=gl.SliceLayout(1, operand)), N - 1).to(gl.int64) * groups
    scale_at = scales + gl.minimum(col + gl.arange(0, BN, layout=gl.SliceLayout(1, mma)), N - 1).to(gl.int64) * groups
    for stage in gl.static_range(STAGES - 1):
        _fetch(w_smem, x_smem, stage, w_at, x_at, stage, 128 * T, stage < steps)
    zero, scale = gl.load(zero_at + tile // PER), gl.load(scale_at + tile // PER)
    unit = gl.full([BN], 1.0, gl.float32, layout=gl.SliceLayout(1, mma))
    acc = gl.zeros([BN, BM], gl.float32, layout=mma)
    async_copy.wait_group(STAGES - 2)
    fence_async_shared()  # copies are seen by tensor cores, which read shared memory by another way
    _barrier()
    packed = w_smem.index(0).load(operand)
    zero_next = gl.load(zero_at + (tile + gl.minimum(1, steps - 1)) // PER)
    slot = 0
    for i in range(steps):
        scale_next = gl.load(scale_at + (tile + gl.minimum(i + 1, steps - 1)) // PER)
        wide = scale.to(gl.float32)
        wide = gl.where(wide == 0.0, TINY, wide)
        acc = acc * gl.expand_dims(unit / wide, 1)
        unit = wide
        q0, q1, q2, q3 = _numbers(packed, zero, FP16)
        acc = warpgroup_mma(q0, x_smem.index(slot).slice(0, BM, 0).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma(q1, x_smem.index(slot).slice(BM, BM, 0).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma(q2, x_smem.index(slot).slice(2 * BM, BM, 0).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma(q3, x_smem.index(slot).slice(3 * BM, BM, 0).permute((1, 0)), acc, is_async=True)
        following = slot + 1
        following = gl.where(following == STAGES, 0, following)
        free = gl.where(slot == 0, STAGES - 1, slot - 1)  # what the products before have read
        _fetch(w_smem, x_smem, free, w_at, x_at, i + STAGES - 1, 128 * T, i + STAGES - 1 < steps)
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        _barrier()
        packed = w_smem.index(following).load(operand)
        zero = zero_next
        zero_next = gl.load(zero_at + (tile + gl.minimum(i + 2, steps - 1)) // PER)
        acc, q0, q1, q2, q3 = warpgroup_mma_wait(0, deps=(acc, q0, q1, q2, q3))
        scale = scale_next
        slot = following
    gdc_launch_dependents()  # not before: shared memory has no room for the next kernel's programs
    _leave(acc * gl.expand_dims(unit, 1), out, bias, parts, arrived + pid, col, row, T, N, out_row, split, splits, HAS_BIAS, SPLIT, BM, BN, W)


class _Launch(NamedTuple):
    """Tile of the result, warps, stages, programs that share a sum."""

    rows: int
    columns: int
    warps: int
    stages: int
    splits: int


def _launch(rows: int, outer: int, inner: int) -> _Launch:
    """What was fastest on an H200 for the weights of a 1.8B and a 7B model; splits follow from the bucket of rows, not from their number."""
    tiles = inner // TILE
    if rows <= 32:
        return (
            _Launch(32, 128, 4, 3, _splits(triton.cdiv(outer, 128), tiles, 4))
            if inner > 3 * outer
            else _Launch(32, 64, 4, 4, _splits(triton.cdiv(outer, 64), tiles, 4))
        )
    if rows <= 64:
        return _Launch(64, 128, 4, 4, 1) if outer >= WIDEST else _Launch(64, 64, 4, 4, _splits(triton.cdiv(outer, 64), tiles, 4))
    if rows <= 128 and outer * inner <= SMALL:
        return _Launch(64, 64, 4, 4, 1)
    if rows <= 128:
        return _Launch(128, 64, 4, 3, _splits(triton.cdiv(outer, 64), tiles, 16))
    return _Launch(256, 128, 8, 3, 1) if outer >= WIDE else _Launch(128, 64, 4, 3, _splits(2 * triton.cdiv(outer, 64), tiles, 16))


def _splits(programs: int, tiles: int, least: int) -> int:
    """Programs that share a sum, so that there are hardly more than the chip runs at once, each with `least` tiles or more."""
    count = 1
    while count < 8 and programs * count * 2 <= 300 and tiles % (count * 2) == 0 and tiles // (count * 2) >= least:
        count *= 2
    return count


@cache
def _usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether it can be used: a chip with Hopper's instructions, and a Triton whose Gluon takes the kernel and multiplies right."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        x, qweight = torch.ones(64, TILE, dtype=dtype, device=device), torch.full((64, TILE // 2), 0x31, dtype=torch.uint8, device=device)
        scales, zeros = torch.ones(64, 1, dtype=torch.float16, device=device), torch.ones(64, 1, dtype=torch.uint8, device=device)
        out = torch.empty(64, 64, dtype=dtype, device=device)
        multiply(x, (qweight, scales, zeros), None, out)
        return bool((out == TILE).all())
    except Exception as e:
        logger.info("4-bit products of many rows by other kernels, as Gluon cannot be used here: %s: %s", type(e).__name__, str(e).splitlines()[:1])
        return False


def takes(weight: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, tile: int) -> bool:
    """Whether products of up to MOST_ROWS rows of that dtype are computed here."""
    return tile == TILE and weight[1].dtype is torch.float16 and _usable(weight[0].device, dtype)


def serves(x: Tensor, weight: tuple[Tensor, Tensor, Tensor], tile: int) -> bool:
    """Whether the product is computed here. The first answer waits for a compiler and the device, so it is asked for whatever the rows: no step that is captured
    is the first one."""
    return takes(weight, x.dtype, tile) and x.shape[0] <= MOST_ROWS


def multiply(x: Tensor, weight: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, out: Tensor, *, quarters: bool = False) -> None:
    """out = x @ W.T + bias, groups being multiples of TILE. `quarters`: x is in quarters (`quarters.py`) already."""
    (rows, inner), (outer, groups), launch = x.shape, weight[1].shape, _launch(x.shape[0], weight[1].shape[0], x.shape[1])
    across, down, tiles = triton.cdiv(outer, launch.columns), triton.cdiv(rows, launch.rows), inner // TILE
    parted = x if quarters else rearranged(x, TILE, rows)
    parts = torch.empty(launch.splits, rows, outer, dtype=torch.float32, device=x.device) if launch.splits > 1 else out
    _async_kernel[(across * down, launch.splits)](
        parted, weight[0].view(torch.int16), weight[1], weight[2], out if bias is None else bias, out, parts, arrivals(x.device), rows, outer, inner // 4,
        out.stride(0), groups, launch.splits, tiles // launch.splits, PER=tiles // groups, HAS_BIAS=bias is not None,
        SPLIT=launch.splits > 1, FP16=x.dtype is torch.float16, BM=launch.rows, BN=launch.columns, BAND=BAND, STAGES=launch.stages, W=launch.warps,
        num_warps=launch.warps, launch_pdl=True,
    )  # fmt: skip
