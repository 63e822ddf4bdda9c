"""How a tile of `linear_w4_few.py` ends: sums over warps and over programs that share a sum, then what stands behind a product.

A warp's totals are 16 channels by 8 rows a block. They are kept as two halves, of channels g and of channels g + 8 of each block: number o of a half is of block
o // 64 (of channels, then of rows), channel o % 64 // 8, row o % 8. With SiLU the halves are a gate's channels and the ones of up that they go with.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lmdeploy.kernels.triton_kernels.deferred import UNIT as SQUARES

# what later and earlier Tritons call it
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def _parted(total: gl.tensor, W: gl.constexpr) -> gl.tuple:
    """Both halves of a block, [W, 64]."""
    lower, upper = gl.split(gl.permute(gl.reshape(total, [W, 8, 4, 2, 2]), (0, 1, 2, 4, 3)))
    return gl.reshape(lower, [W, 64]), gl.reshape(upper, [W, 64])


@gluon.jit
def _beside(a: gl.tensor, b: gl.tensor, W: gl.constexpr) -> gl.tensor:
    """[W, n] and [W, n] one after the other."""
    return gl.reshape(gl.permute(gl.join(a, b), (0, 2, 1)), [W, 2 * a.shape[1]])


@gluon.jit
def halves(totals: gl.tuple, COUNT: gl.constexpr, W: gl.constexpr) -> gl.tuple:
    """Both halves of one, two or four blocks."""
    a0, a1 = _parted(totals[0], W)
    if COUNT >= 2:
        b0, b1 = _parted(totals[1], W)
        a0, a1 = _beside(a0, b0, W), _beside(a1, b1, W)
    if COUNT == 4:
        c0, c1 = halves((totals[2], totals[3]), 2, W)
        a0, a1 = _beside(a0, c0, W), _beside(a1, c1, W)
    return a0, a1


@gluon.jit
def inverse(
    before: gl.tensor, eps: gl.tensor, T: gl.tensor, K: gl.constexpr, BEFORE: gl.constexpr, C: gl.constexpr, NB: gl.constexpr, R: gl.constexpr
) -> gl.tensor:
    """1 / rms of the row of each number of a half, 1 where no norm stands before."""
    factor = gl.full([C * NB * 64], 1.0, gl.float32, layout=gl.SliceLayout(0, R))
    if BEFORE:
        row = _rows(C, NB, R)
        factor = gl.rsqrt(gl.load(before + row, mask=row < T, other=0).to(gl.float32) / SQUARES / K + eps)
    return factor


@gluon.jit
def _rows(C: gl.constexpr, NB: gl.constexpr, R: gl.constexpr) -> gl.tensor:
    """The row of each number of a half."""
    o = gl.arange(0, C * NB * 64, layout=gl.SliceLayout(0, R))
    return o // 64 % NB * 8 + o % 8


@gluon.jit
def _columns(tile: gl.tensor, N: gl.tensor, SILU: gl.constexpr, C: gl.constexpr, NB: gl.constexpr, R: gl.constexpr) -> gl.tuple:
    """The channel of each number of the halves."""
    o = gl.arange(0, C * NB * 64, layout=gl.SliceLayout(0, R))
    if SILU:
        lower = tile * (8 * C) + o // (64 * NB) * 8 + o % 64 // 8
        upper = lower + N // 2
    else:
        lower = tile * (16 * C) + o // (64 * NB) * 16 + o % 64 // 8
        upper = lower + 8
    return lower, upper


@gluon.jit
def over_warps(lower: gl.tensor, upper: gl.tensor, UNIT: gl.constexpr, R: gl.constexpr) -> gl.tuple:
    """Sums over the warps in one order, of halves in shared memory."""
    return gl.sum(lower.load(R), 0) * UNIT, gl.sum(upper.load(R), 0) * UNIT


@gluon.jit
def store_part(
    sums: gl.tuple, parts: gl.tensor, tile: gl.tensor, split: gl.tensor, T: gl.tensor, N: gl.tensor,
    SILU: gl.constexpr, C: gl.constexpr, NB: gl.constexpr, R: gl.constexpr,
) -> None:  # fmt: skip
    """A program's part of sums that several share."""
    row, columns = _rows(C, NB, R), _columns(tile, N, SILU, C, NB, R)
    at = parts + (split * T + row) * N
    gl.store(at + columns[0], sums[0], mask=row < T)
    gl.store(at + columns[1], sums[1], mask=row < T)


@gluon.jit
def residual_of(
    residual: gl.tensor, tile: gl.tensor, T: gl.tensor, N: gl.tensor, SILU: gl.constexpr, C: gl.constexpr, NB: gl.constexpr, R: gl.constexpr
) -> gl.tuple:
    """What is in the residual, of both halves."""
    row, columns = _rows(C, NB, R), _columns(tile, N, SILU, C, NB, R)
    at = residual + row * N
    lower, upper = gl.load(at + columns[0], mask=row < T, other=0.0), gl.load(at + columns[1], mask=row < T, other=0.0)
    return lower.to(gl.float32), upper.to(gl.float32)


@gluon.jit
def finish(
    sums: gl.tuple, old: gl.tuple, factor: gl.tensor, out: gl.tensor, bias: gl.tensor, residual: gl.tensor, gain: gl.tensor, squares: gl.tensor,
    tile: gl.tensor, T: gl.tensor, N: gl.tensor, out_row: gl.tensor,
    HAS_BIAS: gl.constexpr, BEFORE: gl.constexpr, AFTER: gl.constexpr, SILU: gl.constexpr, C: gl.constexpr, NB: gl.constexpr, R: gl.constexpr,
) -> None:  # fmt: skip
    """What follows the sums: the norm before, the bias, the residual and the norm after it, SiLU; see `deferred.py`."""
    row, columns = _rows(C, NB, R), _columns(tile, N, SILU, C, NB, R)
    lower, upper, live = sums[0], sums[1], row < T
    kind: gl.constexpr = out.dtype.element_ty
    if BEFORE:
        lower, upper = lower * factor, upper * factor
    if HAS_BIAS:
        lower += gl.load(bias + columns[0]).to(gl.float32)
        upper += gl.load(bias + columns[1]).to(gl.float32)
    if AFTER:
        new0, new1 = (old[0] + lower.to(kind).to(gl.float32)).to(kind), (old[1] + upper.to(kind).to(gl.float32)).to(kind)
        gl.store(residual + row * N + columns[0], new0, mask=live)
        gl.store(residual + row * N + columns[1], new1, mask=live)
        lower, upper = gl.where(live, new0.to(gl.float32), 0.0), gl.where(live, new1.to(gl.float32), 0.0)
        _note_squares(squares, lower * lower + upper * upper, T, C, NB)
        lower *= gl.load(gain + columns[0]).to(gl.float32)
        upper *= gl.load(gain + columns[1]).to(gl.float32)
    place = out + row.to(gl.int64) * out_row
    if SILU:
        gl.store(place + columns[0], (lower / (1.0 + gl.exp(-lower)) * upper).to(kind), mask=live)
    else:
        gl.store(place + columns[0], lower.to(kind), mask=live)
        gl.store(place + columns[1], upper.to(kind), mask=live)


@gluon.jit
def _note_squares(squares: gl.tensor, square: gl.tensor, T: gl.tensor, C: gl.constexpr, NB: gl.constexpr) -> None:
    """Add a tile's squares to those of the rows."""
    sums = gl.sum(gl.sum(gl.permute(gl.reshape(square, [C, NB, 8, 8]), (0, 2, 1, 3)), 0), 0)  # [NB, 8]
    S: gl.constexpr = sums.type.layout
    row = gl.expand_dims(gl.arange(0, NB, layout=gl.SliceLayout(1, S)), 1) * 8 + gl.expand_dims(gl.arange(0, 8, layout=gl.SliceLayout(0, S)), 0)
    gl.atomic_add(squares + row, (sums * SQUARES + 0.5).to(gl.int64), mask=row < T, sem="relaxed")


@gluon.jit
def gather(
    parts: gl.tensor, arrived: gl.tensor, factor: gl.tensor, out: gl.tensor, bias: gl.tensor, residual: gl.tensor, gain: gl.tensor, squares: gl.tensor,
    count: gl.tensor, T: gl.tensor, N: gl.tensor, out_row: gl.tensor,
    HAS_BIAS: gl.constexpr, SPLITS: gl.constexpr, BEFORE: gl.constexpr, AFTER: gl.constexpr, SILU: gl.constexpr,
    C: gl.constexpr, NB: gl.constexpr, W: gl.constexpr, R: gl.constexpr,
) -> None:  # fmt: skip
    """After all tiles of a program: those whose parts all of the SPLITS programs have stored are added up, in one order, and finished."""
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [W], [0])
    program, programs, index = gl.program_id(0), gl.num_programs(0), gl.arange(0, 32 * W, layout=flat)
    barrier()
    before = gl.atomic_add(arrived + program + index * programs, gl.full([32 * W], 1, gl.int32, layout=flat), mask=index < count, sem="acq_rel")
    before = gl.where(index < count, before, 0)
    barrier()
    row = _rows(C, NB, R)
    for turn in range(count):
        tile = program + turn * programs
        if gl.max(gl.where(index == turn, before, 0), 0) == SPLITS - 1:
            columns = _columns(tile, N, SILU, C, NB, R)
            found: gl.tuple = ()
            for other in gl.static_range(SPLITS):  # all on their way before the first is added
                at = parts + (other * T + row) * N
                found = found + (gl.load(at + columns[0], mask=row < T, other=0.0, cache_modifier=".cg"),)
                found = found + (gl.load(at + columns[1], mask=row < T, other=0.0, cache_modifier=".cg"),)
            old = (found[0], found[1])
            if AFTER:
                old = residual_of(residual, tile, T, N, SILU, C, NB, R)
            lower, upper = found[0], found[1]
            for other in gl.static_range(1, SPLITS):
                lower += found[2 * other]
                upper += found[2 * other + 1]
            gl.store(arrived + tile, 0)
            finish((lower, upper), old, factor, out, bias, residual, gain, squares, tile, T, N, out_row, HAS_BIAS, BEFORE, AFTER, SILU, C, NB, R)
