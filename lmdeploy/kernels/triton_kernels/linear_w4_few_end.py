"""How a program of `linear_w4_few.py` ends: parts of sums that lie in shared memory are added, or shared with other programs, and what follows a product is done.

All of a program's sums are kept as two halves, of channels g and g + 8 of each tile: number o of a half is of tile o // 64 (of tiles, then of blocks of 8 rows),
channel o % 64 // 8, row o % 8. With SiLU a tile's halves are 8 channels of the gate and the 8 of up that they go with.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lmdeploy.kernels.triton_kernels import linear_w4_few_asm as asm

#: Squares are counted in these (`deferred.py`).
SQUARES = gl.constexpr(16777216.0)
_UNIT = gl.constexpr(asm.UNIT)
_READ, _OF_READ = (gl.constexpr(text) for text in asm.number_read())
# what later and earlier Tritons call it
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.constexpr_function
def part_size(G: int, NB: int) -> int:
    """Bytes of a warp's part of a tile's sums."""
    return 128 if G == 1 else NB * 512


@gluon.jit
def added(
    sums_at: gl.tensor,
    count: gl.tensor,
    GPW: gl.constexpr,
    SPAN: gl.constexpr,
    MEET: gl.constexpr,
    MOST: gl.constexpr,
    NB: gl.constexpr,
    G: gl.constexpr,
    W: gl.constexpr,
) -> gl.tuple:
    """Both halves: of each tile the parts that up to MEET warps have put down, in the warps' order. Warp w has GPW count steps of the line. The tile is number
    tile - (the one where the warp begins) of the first warp's parts, and the first one of the others', who begin in it."""
    E: gl.constexpr = gl.BlockedLayout([1], [32], [W], [0])
    o = gl.arange(0, MOST * NB * 64, layout=E)
    tile, steps = o // (64 * NB), count * GPW
    warp = tile * (W * GPW) // steps
    last = gl.where(tile < count, ((tile + 1) * (W * GPW) - 1) // steps, -1)
    PART: gl.constexpr = part_size(G, NB)
    place = sums_at + warp * (SPAN * PART) + o // 64 % NB * 512 + o % 64 // 8 * (PART // NB // 8)
    if G > 1:
        place += o % 8 // 2 * 16 + o % 2 * 4
    first = place + (tile - warp * steps // (W * GPW)) * PART
    lower, upper = gl.zeros([MOST * NB * 64], gl.float32, layout=E), gl.zeros([MOST * NB * 64], gl.float32, layout=E)
    for i in gl.static_range(MEET):
        at = first
        if i > 0:
            at = place + i * (SPAN * PART)
        live = (warp + i <= last).to(gl.int32)
        lower += gl.inline_asm_elementwise(_READ, _OF_READ, [at, live], dtype=gl.float32, is_pure=False, pack=1)
        upper += gl.inline_asm_elementwise(_READ, _OF_READ, [at + 8, live], dtype=gl.float32, is_pure=False, pack=1)
    return lower * _UNIT, upper * _UNIT


@gluon.jit
def places(
    first_tile: gl.tensor, count: gl.tensor, T: gl.tensor, N: gl.tensor, SILU: gl.constexpr, MOST: gl.constexpr, NB: gl.constexpr, W: gl.constexpr
) -> gl.tuple:
    """Of each number of a half its row, its channel, the upper half's channel, and whether there is one."""
    o = gl.arange(0, MOST * NB * 64, layout=gl.BlockedLayout([1], [32], [W], [0]))
    tile, row = o // (64 * NB), o // 64 % NB * 8 + o % 8
    if SILU:
        lower = (first_tile + tile) * 8 + o % 64 // 8
        upper = lower + N // 2
    else:
        lower = (first_tile + tile) * 16 + o % 64 // 8
        upper = lower + 8
    return row, lower, upper, (row < T) & (tile < count)


@gluon.jit
def shared_with_others(
    lower: gl.tensor, upper: gl.tensor, parts: gl.tensor, arrived: gl.tensor, place: gl.tuple, T: gl.tensor, N: gl.tensor, SPLITS: gl.constexpr
) -> gl.tuple:
    """Store a program's part of sums that SPLITS programs share, if any do. Whether it is the last one to do so, and then the sums, added in one order."""
    last = True
    if SPLITS > 1:
        row, col0, col1, live = place[0], place[1], place[2], place[3]
        mine = parts + (gl.program_id(1) * T + row) * N
        gl.store(mine + col0, lower, mask=live)
        gl.store(mine + col1, upper, mask=live)
        barrier()
        last = gl.atomic_add(arrived + gl.program_id(0), 1, sem="acq_rel") == SPLITS - 1
        if last:
            barrier()
            found: gl.tuple = ()
            for other in gl.static_range(SPLITS):  # all on their way before the first is added
                at = parts + (other * T + row) * N
                found = found + (gl.load(at + col0, mask=live, other=0.0, cache_modifier=".cg"),)
                found = found + (gl.load(at + col1, mask=live, other=0.0, cache_modifier=".cg"),)
            lower, upper = found[0], found[1]
            for other in gl.static_range(1, SPLITS):
                lower += found[2 * other]
                upper += found[2 * other + 1]
            gl.store(arrived + gl.program_id(0), 0)
    return last, lower, upper


@gluon.jit
def ask(gain: gl.tensor, first_tile: gl.tensor, N: gl.tensor, MOST: gl.constexpr, W: gl.constexpr) -> None:
    """Ask L2 for the norm's weights that a program needs at its end."""
    i = gl.arange(0, 32 * W, layout=gl.BlockedLayout([1], [32], [W], [0]))
    at = gain + gl.minimum(first_tile * 16 + i % (16 * MOST), N - 1)
    gl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def around(
    place: gl.tuple, bias: gl.tensor, before: gl.tensor, residual: gl.tensor, gain: gl.tensor, T: gl.tensor, N: gl.tensor,
    HAS_BIAS: gl.constexpr, BEFORE: gl.constexpr, AFTER: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """What `finish` needs of memory: squares of the rows before, and of both halves the bias, the residual, the norm's weights."""
    row, col0, col1, live = place[0], place[1], place[2], place[3]
    square, bias0, bias1, old0, old1, gain0, gain1 = 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if BEFORE:
        square = gl.load(before + row, mask=row < T, other=0)
    if HAS_BIAS:
        bias0, bias1 = gl.load(bias + col0, mask=live, other=0.0), gl.load(bias + col1, mask=live, other=0.0)
    if AFTER:
        at = residual + row * N
        old0, old1 = gl.load(at + col0, mask=live, other=0.0), gl.load(at + col1, mask=live, other=0.0)
        gain0, gain1 = gl.load(gain + col0, mask=live, other=0.0), gl.load(gain + col1, mask=live, other=0.0)
    return square, bias0, bias1, old0, old1, gain0, gain1


@gluon.jit
def finish(
    lower: gl.tensor, upper: gl.tensor, place: gl.tuple, given: gl.tuple, out: gl.tensor, eps: gl.tensor, residual: gl.tensor, squares: gl.tensor,
    T: gl.tensor, N: gl.tensor, out_row: gl.tensor, K: gl.constexpr,
    HAS_BIAS: gl.constexpr, BEFORE: gl.constexpr, AFTER: gl.constexpr, SILU: gl.constexpr, MOST: gl.constexpr, NB: gl.constexpr,
) -> None:  # fmt: skip
    """What follows the sums: the norm before, the bias, the residual and the norm after it, SiLU; see `deferred.py`."""
    row, col0, col1, live = place[0], place[1], place[2], place[3]
    square, bias0, bias1, old0, old1, gain0, gain1 = given
    kind: gl.constexpr = out.dtype.element_ty
    if BEFORE:
        factor = gl.rsqrt(square.to(gl.float32) / SQUARES / K + eps)
        lower, upper = lower * factor, upper * factor
    if HAS_BIAS:
        lower, upper = lower + bias0.to(gl.float32), upper + bias1.to(gl.float32)
    if AFTER:
        at = residual + row * N
        new0, new1 = (old0.to(gl.float32) + lower.to(kind).to(gl.float32)).to(kind), (old1.to(gl.float32) + upper.to(kind).to(gl.float32)).to(kind)
        gl.store(at + col0, new0, mask=live)
        gl.store(at + col1, new1, mask=live)
        lower, upper = gl.where(live, new0.to(gl.float32), 0.0), gl.where(live, new1.to(gl.float32), 0.0)
        _note_squares(squares, lower * lower + upper * upper, T, MOST, NB)
        lower, upper = lower * gain0.to(gl.float32), upper * gain1.to(gl.float32)
    to = out + row.to(gl.int64) * out_row
    if SILU:
        gl.store(to + col0, (lower / (1.0 + gl.exp(-lower)) * upper).to(kind), mask=live)
    else:
        gl.store(to + col0, lower.to(kind), mask=live)
        gl.store(to + col1, upper.to(kind), mask=live)


@gluon.jit
def _note_squares(squares: gl.tensor, square: gl.tensor, T: gl.tensor, MOST: gl.constexpr, NB: gl.constexpr) -> None:
    """Add a program's squares to those of the rows."""
    sums = gl.sum(gl.sum(gl.permute(gl.reshape(square, [MOST, NB, 8, 8]), (1, 3, 0, 2)), 3), 2)  # [NB, 8]
    S: gl.constexpr = sums.type.layout
    row = gl.expand_dims(gl.arange(0, NB, layout=gl.SliceLayout(1, S)), 1) * 8 + gl.expand_dims(gl.arange(0, 8, layout=gl.SliceLayout(0, S)), 0)
    gl.atomic_add(squares + row, (sums * SQUARES + 0.5).to(gl.int64), mask=row < T, sem="relaxed")
