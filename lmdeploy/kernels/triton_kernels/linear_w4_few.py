"""Products of 1 to 16 rows in 4 bits on Hopper, in Gluon: weights come by a ring of shared memory that every thread fills for itself, and keep coming.

A program has some tiles of 16 channels. Their groups of 128 inputs, a tile's after the other's, are a line of steps, of which each warp takes an equal part: it
multiplies its 16 channels by all rows, a group a step, and puts the sums down where a tile or its part ends. So warps meet but once, at the end, where a tile's
few parts are added (`linear_w4_few_end.py`). A thread waits only for the words that it copied itself, STAGES - 1 steps ago, the first of which are on their way
before the kernel before has ended (`overlap.py`). Then x comes to shared memory, in the order of the numbers (`linear_w4_few_asm.py`), with its sums, from which
the zero points are taken.

Where K is long, programs share sums: they store their parts, and the last one to end adds them, in one order. A row's bits do not depend on the rows beside it,
nor on their number within 2..8 and 9..16.

Gluon is an experimental part of Triton: where it is missing, or does not compile this, the other kernels serve.
"""

# ruff: noqa: BLE001  # whatever an experimental compiler raises

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lmdeploy.kernels.api import After, Before
from lmdeploy.kernels.triton_kernels import deferred
from lmdeploy.kernels.triton_kernels import linear_w4_few_asm as asm
from lmdeploy.kernels.triton_kernels.linear_w4_few_end import added, around, ask, barrier, finish, part_size, places, shared_with_others
from lmdeploy.kernels.triton_kernels.linear_w4_few_plan import TILE, Launch, constants, launch_of
from lmdeploy.kernels.triton_kernels.linear_w4_sums import arrivals
from lmdeploy.log import get_logger

logger = get_logger(__name__)
Tensor = torch.Tensor
MOST_ROWS = 16
(_PRODUCT_1, _OF_PRODUCT_1), (_PRODUCT_2, _OF_PRODUCT_2) = (tuple(map(gl.constexpr, asm.product(blocks))) for blocks in (1, 2))
(_STORE_1, _OF_STORE_1), (_STORE_2, _OF_STORE_2) = (tuple(map(gl.constexpr, asm.totals_stored(blocks))) for blocks in (1, 2))
(_COPY_4, _OF_PART), (_COPY_8, _), (_COPY_16, _) = (tuple(map(gl.constexpr, asm.copied(size))) for size in (4, 8, 16))
(_SUMS, _OF_SUMS), (_ORDERED, _OF_ORDERED), (_COPY, _OF_COPY), (_TAKE, _OF_TAKE), (_SCALES, _OF_SCALES) = (
    tuple(map(gl.constexpr, text)) for text in (asm.sums(), asm.ordered(), asm.words_copied(), asm.words_taken(), asm.scales_read())
)
(_PLACE, _OF_PLACE), (_PUT_SUMS, _OF_PUT_SUMS), (_TAKE_SUMS, _OF_TAKE_SUMS), (_TAKE_SUM, _OF_TAKE_SUM) = (
    tuple(map(gl.constexpr, text)) for text in (asm.x_stored(), asm.sums_stored(), asm.sums_read(), asm.sum_read())
)


@gluon.constexpr_function
def _sliced(layout: Any, d: int, rank: int) -> Any:
    """The layout of a vector along one of `rank` dimensions."""
    for i in range(rank - 1, -1, -1):
        if i != d:
            layout = gl.SliceLayout(i, layout)
    return layout


@gluon.constexpr_function
def _chunk(size: int, row: int) -> int:
    """Bytes that are copied at once, of `size` bytes a channel in rows of `row` bytes."""
    return 16 if size % 16 == 0 and row % 16 == 0 else 8 if size % 8 == 0 and row % 8 == 0 else 4


@gluon.constexpr_function
def _power(n: int) -> int:
    """The power of two from n on."""
    return 1 << (n - 1).bit_length()


@gluon.constexpr_function
def _wait_text(n: int) -> str:
    """A thread's copies but the last n groups of them have come, and so have its warp's."""
    return "cp.async.wait_group " + str(n) + "; bar.warp.sync -1; mov.u32 $0, 0;"


@gluon.jit
def _along(n: gl.constexpr, d: gl.constexpr, rank: gl.constexpr, L: gl.constexpr) -> gl.tensor:
    """0 .. n - 1 along dimension d."""
    place: gl.constexpr = _sliced(L, d, rank)
    index = gl.arange(0, n, layout=place)
    for i in gl.static_range(rank):
        if i != d:
            index = gl.expand_dims(index, i)
    return index


@gluon.jit
def _each(value: gl.tensor, W: gl.constexpr, L: gl.constexpr) -> gl.tensor:
    """[W, 8, 4, 4] of what a thread's four words share."""
    return gl.broadcast(value, gl.zeros([W, 8, 4, 4], gl.int32, layout=L))[0]


@gluon.jit
def _put(
    to: gl.tensor, w_at: gl.tuple, at: gl.tensor, live: gl.tensor, PITCH: gl.constexpr, SILU: gl.constexpr, U: gl.constexpr, W: gl.constexpr, L: gl.constexpr
) -> None:  # fmt: skip
    """Begin to copy a thread's own words of a step, of channels g and g + 8."""
    size = _each(gl.full([W, 8, 4, 1], 16, gl.int32, layout=L) * live.to(gl.int32), W, L)
    first = w_at[0] + at
    second = first + 8 * PITCH
    if SILU:
        second = w_at[1] + at
    for u in gl.static_range(U):
        a, b = _each(to + u * (W * 1024), W, L), _each(to + (u * (W * 1024) + W * 512), W, L)
        gl.inline_asm_elementwise(_COPY, _OF_COPY, [a, first + u * 16, size], dtype=gl.int32, is_pure=False, pack=4)
        gl.inline_asm_elementwise(_COPY, _OF_COPY, [b, second + u * 16, size], dtype=gl.int32, is_pure=False, pack=4)


@gluon.jit
def _end_group(scalar: gl.tensor) -> None:
    """End a group of copies."""
    gl.inline_asm_elementwise("cp.async.commit_group; mov.u32 $0, 0;", "=r,r", [scalar], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _wait(scalar: gl.tensor, N: gl.constexpr) -> None:
    """Wait for all groups of copies but N."""
    gl.inline_asm_elementwise(_wait_text(N), "=r,r", [scalar], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _following(k: gl.tensor, STEPS: gl.constexpr) -> gl.tuple:
    """The step after k of a line, and whether a tile ends between."""
    ends = k == STEPS - 1
    return gl.where(ends, 0, k + 1), ends


@gluon.jit
def _further(k: gl.tensor, at: gl.tensor, STEPS: gl.constexpr, U: gl.constexpr, TILE_WORDS: gl.constexpr) -> gl.tuple:
    """The step after k, and where its words are, those of step k being at `at`."""
    following, ends = _following(k, STEPS)
    return following, at + gl.where(ends, TILE_WORDS - (STEPS - 1) * (16 * U), 16 * U)


@gluon.jit
def _put_part(
    to: gl.tensor, source: gl.tensor, first: gl.tensor, channels: gl.tensor, count: gl.tensor, N: gl.tensor,
    APART: gl.constexpr, SIZE: gl.constexpr, ROW: gl.constexpr, SILU: gl.constexpr, MOST: gl.constexpr, W: gl.constexpr,
) -> None:  # fmt: skip
    """Begin to copy SIZE bytes of each channel of `count` tiles, from byte `first` on of rows of ROW bytes, to places that are APART."""
    CHUNK: gl.constexpr = _chunk(SIZE, ROW)
    PLACES: gl.constexpr = _power(SIZE // CHUNK)
    ALL: gl.constexpr = 16 * MOST * PLACES if 16 * MOST * PLACES > 32 * W else 32 * W
    i = gl.arange(0, ALL, layout=gl.BlockedLayout([1], [32], [W], [0]))
    channel, chunk = i // PLACES, i % PLACES
    row = channel
    if SILU:
        row = channel // 16 * 8 + channel % 8 + channel // 8 % 2 * (N // 2)
    live = ((channel < 16 * count) & (chunk < SIZE // CHUNK)).to(gl.int32)
    at = source + ((row + channels).to(gl.int64) * ROW + (chunk * CHUNK + first))
    text: gl.constexpr = _COPY_16 if CHUNK == 16 else _COPY_8 if CHUNK == 8 else _COPY_4
    gl.inline_asm_elementwise(text, _OF_PART, [to + channel * APART + chunk * CHUNK, at, live], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _x_of(at: gl.tensor, W: gl.constexpr, L: gl.constexpr) -> gl.tuple:
    """The four words that a thread has of a group's products: piece i is 16 bytes at place i ^ t ^ g % 2 of its four, so that neither those who write a row nor
    those who read a piece meet in a bank."""
    return (
        gl.inline_asm_elementwise(_TAKE, _OF_TAKE, [_each(at, W, L)], dtype=gl.int32, is_pure=False, pack=4),
        gl.inline_asm_elementwise(_TAKE, _OF_TAKE, [_each(at ^ 16, W, L)], dtype=gl.int32, is_pure=False, pack=4),
        gl.inline_asm_elementwise(_TAKE, _OF_TAKE, [_each(at ^ 32, W, L)], dtype=gl.int32, is_pure=False, pack=4),
        gl.inline_asm_elementwise(_TAKE, _OF_TAKE, [_each(at ^ 48, W, L)], dtype=gl.int32, is_pure=False, pack=4),
    )


@gluon.jit
def _stage_x(x: gl.tensor, x_smem: gl.tensor, x_row: gl.tensor, T: gl.tensor, GPW: gl.constexpr, NB: gl.constexpr, G: gl.constexpr, W: gl.constexpr) -> None:
    """Bring x into the order of the numbers; all of it is on its way before the first of it is used."""
    X: gl.constexpr = gl.BlockedLayout([1, 1, 1, 1, 4], [1, 2, 4, 4, 1], [W, 1, 1, 1, 1], [4, 3, 2, 1, 0])
    warp, row, t, i = _along(W, 0, 5, X), _along(G, 1, 5, X), _along(4, 2, 5, X), _along(4, 3, 5, X)
    x_at = x + (row.to(gl.int64) * x_row + (warp * 64 + t * 16 + i * 4 + _along(4, 4, 5, X)))
    zero = gl.zeros([W, G, 4, 4, 4], gl.int32, layout=X)
    to = zero + (x_smem + warp * (NB * G * 256) + row * 256 + t * 64 + (i ^ t ^ row % 2) * 16)
    found: gl.tuple = ()
    for j in gl.static_range(NB * GPW):
        found = found + (gl.load(x_at + (j % NB * 8 * x_row + j // NB * W * 64), mask=row + zero + j % NB * 8 < T, other=0),)
    for j in gl.static_range(NB * GPW):
        ordered = gl.inline_asm_elementwise(_ORDERED, _OF_ORDERED, [found[j]], dtype=gl.int32, is_pure=True, pack=4)
        place = to + (j % NB * (G * 256) + j // NB * (W * NB * G * 256))
        gl.inline_asm_elementwise(_PLACE, _OF_PLACE, [place, ordered], dtype=gl.int32, is_pure=False, pack=4)


@gluon.jit
def _stage_sums(
    x_smem: gl.tensor, sums: gl.tensor, g: gl.tensor, t: gl.tensor, GPW: gl.constexpr, NB: gl.constexpr, G: gl.constexpr, W: gl.constexpr, L: gl.constexpr
) -> None:
    """Sums of x over the groups, of which each warp takes every W-th; of one row eight at a time, as if they were rows."""
    TIMES: gl.constexpr = (GPW + 7) // 8 if G == 1 else NB * GPW
    warp = _along(W, 0, 4, L)
    for j in gl.static_range(TIMES):
        if G == 1:
            first = warp + j * W  # of groups by eights
            live = first * 8 < W * GPW
            at, to = gl.where(live, first, 0) * 2048 + g * 256 + t * 80, first * 32
        else:
            live, to = warp < W, (warp + j // NB * W) * (NB * 32) + j % NB * 32
            at = to * (G * 8) + g * 256 + t * 64 + (t ^ g % 2) * 16
        x = _x_of(x_smem + at, W, L)
        found = gl.inline_asm_elementwise(_SUMS, _OF_SUMS, [x[0], x[1], x[2], x[3]], dtype=gl.float32, is_pure=True, pack=4)
        puts = ((g == 0) & live).to(gl.int32)
        gl.inline_asm_elementwise(_PUT_SUMS, _OF_PUT_SUMS, [_each(sums + to + t * 8, W, L), _each(puts, W, L), found], dtype=gl.int32, is_pure=False, pack=4)


@gluon.jit
def _sums_of(at: gl.tensor, G: gl.constexpr, W: gl.constexpr, L: gl.constexpr) -> gl.tensor:
    """The sums that a thread has of a group's products."""
    if G == 1:
        found = gl.inline_asm_elementwise(_TAKE_SUM, _OF_TAKE_SUM, [_each(at, W, L)], dtype=gl.float32, is_pure=False, pack=4)
    else:
        found = gl.inline_asm_elementwise(_TAKE_SUMS, _OF_TAKE_SUMS, [_each(at, W, L)], dtype=gl.float32, is_pure=False, pack=4)
    return found


@gluon.jit
def _step(
    words: gl.tensor, x_at: gl.tensor, sums_at: gl.tensor, s_at: gl.tensor, z_at: gl.tensor, totals: gl.tuple,
    S_APART: gl.constexpr, Z_APART: gl.constexpr, NB: gl.constexpr, G: gl.constexpr, W: gl.constexpr, L: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """Totals with a group more."""
    a = gl.inline_asm_elementwise(_TAKE, _OF_TAKE, [_each(words, W, L)], dtype=gl.int32, is_pure=False, pack=4)
    b = gl.inline_asm_elementwise(_TAKE, _OF_TAKE, [_each(words + W * 512, W, L)], dtype=gl.int32, is_pure=False, pack=4)
    where = [_each(s_at, W, L), _each(s_at + 8 * S_APART, W, L), _each(z_at, W, L), _each(z_at + 8 * Z_APART, W, L)]
    scale = gl.inline_asm_elementwise(_SCALES, _OF_SCALES, where, dtype=gl.float32, is_pure=False, pack=4)
    x = _x_of(x_at, W, L)
    sums = _sums_of(sums_at, G, W, L)
    if NB == 1:
        operands = [a, b, x[0], x[1], x[2], x[3], sums, scale, totals[0]]
        new = (gl.inline_asm_elementwise(_PRODUCT_1, _OF_PRODUCT_1, operands, dtype=gl.float32, is_pure=True, pack=4),)
    else:
        y = _x_of(x_at + G * 256, W, L)
        more = _sums_of(sums_at + 32, G, W, L)
        operands = [a, b, x[0], x[1], x[2], x[3], y[0], y[1], y[2], y[3], sums, more, scale, totals[0], totals[1]]
        new = gl.inline_asm_elementwise(_PRODUCT_2, _OF_PRODUCT_2, operands, dtype=(gl.float32, gl.float32), is_pure=True, pack=4)
    return new


@gluon.jit
def _put_down(to: gl.tensor, ends: gl.tensor, totals: gl.tuple, NB: gl.constexpr, W: gl.constexpr, L: gl.constexpr) -> gl.tuple:
    """Store totals where a tile ends, and begin from zero there."""
    flag = _each(ends.to(gl.int32), W, L)
    if NB == 1:
        new = (gl.inline_asm_elementwise(_STORE_1, _OF_STORE_1, [_each(to, W, L), flag, totals[0]], dtype=gl.float32, is_pure=False, pack=4),)
    else:
        operands = [_each(to, W, L), flag, totals[0], totals[1]]
        new = gl.inline_asm_elementwise(_STORE_2, _OF_STORE_2, operands, dtype=(gl.float32, gl.float32), is_pure=False, pack=4)
    return new


@gluon.jit
def _base(of: gl.tensor) -> gl.tensor:
    """The address of shared memory, in the shape of `of`."""
    return gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r,r", [of], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _begun(
    ring: gl.tensor, w_at: gl.tuple, at: gl.tensor, k: gl.tensor, steps: gl.tensor, scales: gl.tensor, zeros: gl.tensor, s_smem: gl.tensor, z_smem: gl.tensor,
    split: gl.tensor, channels: gl.tensor, count: gl.tensor, N: gl.tensor, S_APART: gl.constexpr, Z_APART: gl.constexpr,
    PITCH: gl.constexpr, SILU: gl.constexpr, STAGES: gl.constexpr, STEPS: gl.constexpr, U: gl.constexpr, MOST: gl.constexpr, W: gl.constexpr, L: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """Begin to copy the first STAGES - 1 steps of each warp, and all scales with the first; the step after them, and where its words are."""
    GROUPS: gl.constexpr = STEPS * U
    for stage in gl.static_range(STAGES - 1):
        _put(ring + stage * (W * U * 1024), w_at, at, stage < steps, PITCH, SILU, U, W, L)
        if stage == 0:
            _put_part(s_smem, scales.to(gl.int64), split * (2 * GROUPS), channels, count, N, S_APART, 2 * GROUPS, PITCH // 8, SILU, MOST, W)
            _put_part(z_smem, zeros.to(gl.int64), split * GROUPS, channels, count, N, Z_APART, GROUPS, PITCH // 16, SILU, MOST, W)
        _end_group(split)
        k, at = _further(k, at, STEPS, U, (8 if SILU else 16) * PITCH)
    return k, at


@gluon.jit
def _x_shared(
    x: gl.tensor, smem: gl.tensor, X: gl.constexpr, XSUMS: gl.constexpr, x_row: gl.tensor, T: gl.tensor, g: gl.tensor, t: gl.tensor,
    GPW: gl.constexpr, NB: gl.constexpr, G: gl.constexpr, W: gl.constexpr, L: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """Bring x and its sums to shared memory; where a thread's are, of a line's first group."""
    _stage_x(x, _base(T) + X, x_row, T, GPW, NB, G, W)
    barrier()
    _stage_sums(smem + X, smem + XSUMS, g, t, GPW, NB, G, W, L)
    return smem + (X + g % G * 256 + t * 64 + (t ^ g % G % 2) * 16), smem + (XSUMS + t * (G // 8 * 8))


@gluon.jit
def _line(
    ring: gl.tensor, w_at: gl.tuple, at: gl.tensor, put_k: gl.tensor, k: gl.tensor, steps: gl.tensor, x_at: gl.tuple, s_at: gl.tensor, z_at: gl.tensor,
    down: gl.tensor, puts: gl.tensor, S_APART: gl.constexpr, Z_APART: gl.constexpr, PITCH: gl.constexpr, SILU: gl.constexpr,
    STAGES: gl.constexpr, STEPS: gl.constexpr, U: gl.constexpr, NB: gl.constexpr, G: gl.constexpr, W: gl.constexpr, L: gl.constexpr,
) -> None:  # fmt: skip
    """A warp's part of the line: products, and sums put down from `down` on by the threads of which `puts` is true."""
    STAGE: gl.constexpr = W * U * 1024
    PART: gl.constexpr = part_size(G, NB)
    SUM: gl.constexpr = 32 if G > 1 else 4
    totals, slot = (gl.zeros([W, 8, 4, 4], gl.float32, layout=L),) * NB, 0
    for step in range(steps):
        _put(ring + gl.where(slot == 0, STAGES - 1, slot - 1) * STAGE, w_at, at, step + (STAGES - 1) < steps, PITCH, SILU, U, W, L)
        _end_group(steps)
        put_k, at = _further(put_k, at, STEPS, U, (8 if SILU else 16) * PITCH)
        for u in gl.static_range(U):
            words, x_here, sums_here = ring + slot * STAGE + u * (W * 1024), x_at[0] + (k * U + u) * (NB * G * 256), x_at[1] + (k * U + u) * (NB * SUM)
            totals = _step(words, x_here, sums_here, s_at + (k * U + u) * 2, z_at + (k * U + u), totals, S_APART, Z_APART, NB, G, W, L)
        k, ends = _following(k, STEPS)
        totals = _put_down(down, ends & puts, totals, NB, W, L)
        down += gl.where(ends, PART, 0)
        s_at += gl.where(ends, 16 * S_APART, 0)
        z_at += gl.where(ends, 16 * Z_APART, 0)
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
        _wait(steps, STAGES - 2)
    _put_down(down, (k > 0) & puts, totals, NB, W, L)


@gluon.jit(do_not_specialize=["T", "tiles"])
def _few_kernel(
    x: gl.tensor, qweight: gl.tensor, scales: gl.tensor, zeros: gl.tensor, bias: gl.tensor, out: gl.tensor, parts: gl.tensor, arrived: gl.tensor,
    before: gl.tensor, eps: gl.tensor, residual: gl.tensor, gain: gl.tensor, squares: gl.tensor,
    T: gl.tensor, N: gl.tensor, x_row: gl.tensor, out_row: gl.tensor, tiles: gl.tensor,
    PITCH: gl.constexpr, HAS_BIAS: gl.constexpr, BEFORE: gl.constexpr, AFTER: gl.constexpr, SILU: gl.constexpr, G: gl.constexpr, NB: gl.constexpr,
    SPLITS: gl.constexpr, GPW: gl.constexpr, U: gl.constexpr, MOST: gl.constexpr, SPAN: gl.constexpr, MEET: gl.constexpr, STAGES: gl.constexpr, W: gl.constexpr,
    SUMS: gl.constexpr, X: gl.constexpr, XSUMS: gl.constexpr, SCALES: gl.constexpr, S_APART: gl.constexpr, ZEROS: gl.constexpr, Z_APART: gl.constexpr,
    SIZE: gl.constexpr,
) -> None:  # fmt: skip
    """NB blocks of G rows, U groups a step. x, qweight: words of 32 bits, PITCH of them a channel. Warps have GPW groups of each tile, in the mean, parts of up to
    SPAN tiles, of which up to MEET warps have parts; the last two lines: see `Room`."""
    L: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [1, 8, 4, 1], [W, 1, 1, 1], [3, 2, 1, 0])
    STEPS: gl.constexpr = W * GPW // U
    CHANNELS: gl.constexpr = 8 if SILU else 16
    # the largest of all, and so at the beginning. Triton knows nothing of what is in it, and so puts no barriers around; the other one makes it declare its memory
    whole = gl.allocate_shared_memory(gl.int32, [SIZE // 1024, 256], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    known = gl.allocate_shared_memory(gl.int32, [32 * W], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    known.store(gl.arange(0, 32 * W, layout=gl.BlockedLayout([1], [32], [W], [0])))
    program, programs, split = gl.program_id(0), gl.num_programs(0), gl.program_id(1)
    first_tile = program * tiles // programs
    count = (program + 1) * tiles // programs - first_tile
    steps = count * (GPW // U)
    warp, g, t = _along(W, 0, 4, L), _along(8, 1, 4, L), _along(4, 2, 4, L)
    base, smem = _base(program), _base(warp + g + t)
    begin = warp * steps + g * 0 + t * 0  # of a warp's part of the line
    k, tile = begin % STEPS, begin // STEPS
    gate = qweight + (g.to(gl.int64) * PITCH + (split * (W * GPW * 16) + t * 4 + _along(4, 3, 4, L)))
    w_at, ring = (gate, gate + (N // 2).to(gl.int64) * PITCH), smem + (warp * 512 + g * 64 + t * 16)
    put_k, at = _begun(
        ring, w_at, (first_tile + tile).to(gl.int64) * (CHANNELS * PITCH) + k * (16 * U), k, steps, scales, zeros, base + SCALES, base + ZEROS,
        split, first_tile * CHANNELS, count, N, S_APART, Z_APART, PITCH, SILU, STAGES, STEPS, U, MOST, W, L,
    )  # fmt: skip
    if AFTER:
        ask(gain, first_tile, N, MOST, W)
    gdc_launch_dependents()
    gdc_wait()
    x_at = _x_shared(x + split * (W * GPW * 64), smem, X, XSUMS, x_row, T, g, t, GPW, NB, G, W, L)
    _wait(base, STAGES - 2)
    barrier()
    s_at, z_at = smem + (SCALES + g * S_APART) + tile * (16 * S_APART), smem + (ZEROS + g * Z_APART) + tile * (16 * Z_APART)
    # of one row a thread has the same sums twice, and so has every thread of a quad: one of them puts them down
    down, puts = smem + (SUMS + warp * (SPAN * part_size(G, NB)) + g * (part_size(G, NB) // NB // 8)), t < G // 8 * 3 + 1
    if G > 1:
        down += t * 16
    _line(ring, w_at, at, put_k, k, steps, x_at, s_at, z_at, down, puts, S_APART, Z_APART, PITCH, SILU, STAGES, STEPS, U, NB, G, W, L)
    place = places(first_tile, count, T, N, SILU, MOST, NB, W)
    given = around(place, bias, before, residual, gain, T, N, HAS_BIAS, BEFORE, AFTER)  # on their way while warps meet
    barrier()
    lower, upper = added(base + SUMS, count, GPW, SPAN, MEET, MOST, NB, G, W)
    last, lower, upper = shared_with_others(lower, upper, parts, arrived, place, T, N, SPLITS)
    if last:
        finish(lower, upper, place, given, out, eps, residual, squares, T, N, out_row, PITCH * 8, HAS_BIAS, BEFORE, AFTER, SILU, MOST, NB)
    whole._keep_alive()


@cache
def usable(device: torch.device) -> bool:
    """Whether it can be used: a chip with Hopper's instructions, and a Triton whose Gluon takes the kernel and multiplies right."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        outer, inner = 128, 1024
        x, qweight = torch.ones(1, inner, dtype=torch.bfloat16, device=device), torch.full((outer, inner // 2), 0x31, dtype=torch.uint8, device=device)
        scales = torch.ones(outer, inner // TILE, dtype=torch.float16, device=device)
        out = torch.empty(1, outer, dtype=x.dtype, device=device)
        _start(Launch(8, 1, 3, 4), x, (qweight, scales, scales.to(torch.uint8)), None, out, False, None, None)
        return bool((out == inner).all())
    except Exception as e:
        logger.info("4-bit products of few rows by other kernels, as Gluon cannot be used here: %s: %s", type(e).__name__, str(e).splitlines()[:1])
        return False


def serves(x: Tensor, weight: tuple[Tensor, Tensor, Tensor]) -> bool:
    """Whether the product is computed here. The first answer waits for a compiler and the device (`usable`)."""
    if x.dtype is not torch.bfloat16 or not usable(x.device):
        return False
    (rows, inner), (outer, groups) = x.shape, weight[1].shape
    if not 0 < rows <= MOST_ROWS or groups * TILE != inner or weight[1].dtype is not torch.float16 or weight[2].dtype is not torch.uint8:
        return False
    return launch_of(rows, outer, inner) is not None and all(part.is_contiguous() and part.data_ptr() % 16 == 0 for part in weight)


def multiply(
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    out: Tensor,
    silu: bool = False,
    before: Before | None = None,
    after: After | None = None,
) -> None:
    """out = x @ W.T + bias, with SiLU and the norms around it (`deferred.py`)."""
    launch = launch_of(x.shape[0], weight[1].shape[0], x.shape[1])
    assert launch is not None
    _start(launch, x, weight, bias, out, silu, before, after)


def _start(
    launch: Launch, x: Tensor, weight: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, out: Tensor, silu: bool, before: Before | None, after: After | None
) -> None:
    (rows, inner), outer = x.shape, weight[1].shape[0]
    words = (x if x.stride(0) % 2 == 0 and x.storage_offset() % 2 == 0 and x.stride(1) == 1 else x.contiguous()).view(torch.int32)
    parts = torch.empty(launch.splits, rows, outer, dtype=torch.float32, device=x.device) if launch.splits > 1 else out
    norms, flags = deferred.arguments(out, before, after)
    _few_kernel[(launch.programs, launch.splits)](
        words, weight[0].view(torch.int32), weight[1], weight[2], out if bias is None else bias, out, parts, arrivals(x.device), *norms,
        rows, outer, words.stride(0), out.stride(0), outer // 16, HAS_BIAS=bias is not None, SILU=silu, **flags, **constants(launch, rows, outer, inner),
        num_warps=launch.warps, launch_pdl=True,
    )  # fmt: skip
