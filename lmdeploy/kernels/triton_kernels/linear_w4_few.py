"""Products of 1 to 16 rows in 4 bits on Hopper, in Gluon: weights come by a ring of shared memory that every thread fills for itself, and keep coming.

A program has 16 C channels at a time (a tile), then the next ones, and so on; its W warps take every W-th group of 128 inputs, so that x is read once a program.
It stays in shared memory in the order of the numbers (`linear_w4_few_asm.py`). A thread waits only for the words that it copied itself, STAGES - 1 steps ago, of
which the first are on their way before the kernel before has ended (`overlap.py`); warps meet at the end of a tile alone, where their sums are added in one
order. There a tile's scales and zero points, which came with the words of its first step, change hands too.

Where K is long, programs share sums: they store their parts, and the last one to end adds them, in one order.

Gluon is an experimental part of Triton: where it is missing, or does not compile this, the other kernels serve.
"""

# ruff: noqa: BLE001  # whatever an experimental compiler raises

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lmdeploy.kernels.api import After, Before
from lmdeploy.kernels.triton_kernels import deferred
from lmdeploy.kernels.triton_kernels import linear_w4_few_asm as asm
from lmdeploy.kernels.triton_kernels.linear_w4_few_end import barrier, finish, gather, halves, inverse, over_warps, residual_of, store_part
from lmdeploy.kernels.triton_kernels.linear_w4_sums import arrivals
from lmdeploy.log import get_logger

logger = get_logger(__name__)
Tensor = torch.Tensor
#: Inputs of a group, of which a warp takes one a step.
TILE = 128
MOST_ROWS = 16
#: Multiprocessors that launches are made for, bytes of shared memory of each.
CHIP, ROOM = 132, 228 << 10
#: Numbers of a weight up to which other kernels are faster, and from which this is for 9 to 16 rows.
SMALL, LARGE = 1 << 22, 24 << 20
UNIT = gl.constexpr(asm.UNIT)
(_PRODUCT_1, _OF_PRODUCT_1), (_PRODUCT_2, _OF_PRODUCT_2) = (tuple(map(gl.constexpr, asm.product(blocks))) for blocks in (1, 2))
(_SUMS, _OF_SUMS), (_ORDERED, _OF_ORDERED) = (tuple(map(gl.constexpr, made)) for made in (asm.sums(), asm.ordered()))
(_COPY, _OF_COPY), (_TAKE, _OF_TAKE), (_READ, _OF_READ) = (
    tuple(map(gl.constexpr, made)) for made in (asm.words_copied(), asm.words_taken(), asm.scales_read())
)
(_COPY_4, _OF_PART), (_COPY_8, _), (_COPY_16, _) = (tuple(map(gl.constexpr, asm.copied(size))) for size in (4, 8, 16))


@gluon.constexpr_function
def _sliced(layout: Any, d: int, rank: int) -> Any:
    """The layout of a vector along one of `rank` dimensions."""
    for i in range(rank - 1, -1, -1):
        if i != d:
            layout = gl.SliceLayout(i, layout)
    return layout


@gluon.constexpr_function
def _x_layout(W: int, G: int) -> Any:
    """[warp, row, t, word, 4]: 16 bytes (t, word) of a row lie at place 4 t + (word ^ t ^ row % 2), so that neither those who write a row nor those who read a
    word meet in a bank."""
    bases = [[0, 0, 0, 0, 1], [0, 0, 0, 0, 2], [0, 0, 0, 1, 0], [0, 0, 0, 2, 0], [0, 0, 1, 1, 0], [0, 0, 2, 2, 0]]
    bases += [[0, 1 << i, 0, int(i == 0), 0] for i in range(G.bit_length() - 1)] + [[1 << i, 0, 0, 0, 0] for i in range(W.bit_length() - 1)]
    return gl.SharedLinearLayout(bases)


@gluon.constexpr_function
def _chunk(size: int, row: int) -> int:
    """Bytes that are copied at once, of `size` bytes a channel in rows of `row` bytes."""
    return 16 if size % 16 == 0 and row % 16 == 0 else 8 if size % 8 == 0 and row % 8 == 0 else 4


@gluon.constexpr_function
def _apart(size: int) -> int:
    """Bytes from a channel's scales to the next channel's: an odd multiple of 16, so that eight channels lie in banks of their own."""
    return 16 * (-(-size // 16) | 1)


@gluon.constexpr_function
def _power(n: int) -> int:
    """The power of two from n on."""
    return 1 << (n - 1).bit_length()


@gluon.constexpr_function
def _wait_text(n: int) -> str:
    """A thread's copies but the last n groups of them have come, and so have its warp's."""
    return "cp.async.wait_group " + str(n) + "; bar.warp.sync -1; mov.u32 $0, 0;"


@gluon.constexpr_function
def _scales_size(C: int, GROUPS: int) -> int:
    """Bytes of a tile's scales and zero points in shared memory."""
    return 16 * C * (16 * (-(-2 * GROUPS // 16) | 1) + 16 * (-(-GROUPS // 16) | 1))


@gluon.constexpr_function
def _slots(STAGES: int, STEPS: int) -> int:
    """Tiles whose steps are in the ring or begin in it while it is read."""
    return (STEPS + STAGES - 2) // STEPS + 1


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
def _spread(value: gl.tensor, W: gl.constexpr, L: gl.constexpr) -> gl.tensor:
    """[W, 8, 4, 4] of what a thread's four words share."""
    return gl.broadcast(value, gl.zeros([W, 8, 4, 4], gl.int32, layout=L))[0]


@gluon.jit
def _put(ring: gl.tensor, w_at: gl.tuple, live: gl.tensor, PITCH: gl.constexpr, SILU: gl.constexpr, C: gl.constexpr, W: gl.constexpr, L: gl.constexpr) -> None:
    """Begin to copy a thread's own words of a step."""
    size = _spread(gl.full([W, 8, 4, 1], 16, gl.int32, layout=L) * live.to(gl.int32), W, L)
    for j in gl.static_range(2 * C):
        if SILU:
            source = w_at[j % 2] + j // 2 * (8 * PITCH)
        else:
            source = w_at[0] + j * (8 * PITCH)
        gl.inline_asm_elementwise(_COPY, _OF_COPY, [_spread(ring + j * (W * 512), W, L), source, size], dtype=gl.int32, is_pure=False, pack=4)


@gluon.jit
def _put_part(
    to: gl.tensor, source: gl.tensor, first: gl.tensor, channels: gl.tensor, N: gl.tensor, live: gl.tensor,
    SIZE: gl.constexpr, ROW: gl.constexpr, SILU: gl.constexpr, BN: gl.constexpr, W: gl.constexpr,
) -> None:  # fmt: skip
    """Begin to copy SIZE bytes of each channel of a tile, from byte `first` on of rows of ROW bytes."""
    CHUNK: gl.constexpr = _chunk(SIZE, ROW)
    PLACES: gl.constexpr = _power(SIZE // CHUNK)
    ALL: gl.constexpr = BN * PLACES if BN * PLACES > 32 * W else 32 * W
    i = gl.arange(0, ALL, layout=gl.BlockedLayout([1], [32], [W], [0]))
    channel, chunk = i // PLACES, i % PLACES
    row = channel
    if SILU:
        row = channel // 16 * 8 + channel % 8 + channel // 8 % 2 * (N // 2)
    lives = ((channel < BN) & (chunk < SIZE // CHUNK) & live).to(gl.int32)
    at = source + ((row + channels).to(gl.int64) * ROW + (chunk * CHUNK + first))
    text: gl.constexpr = _COPY_16 if CHUNK == 16 else _COPY_8 if CHUNK == 8 else _COPY_4
    gl.inline_asm_elementwise(text, _OF_PART, [to + channel * _apart(SIZE) + chunk * CHUNK, at, lives], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _put_scales(
    to: gl.tensor, scales: gl.tensor, zeros: gl.tensor, tile: gl.tensor, tiles: gl.tensor, split: gl.tensor, N: gl.tensor,
    PITCH: gl.constexpr, GROUPS: gl.constexpr, SILU: gl.constexpr, C: gl.constexpr, W: gl.constexpr,
) -> None:  # fmt: skip
    """Begin to copy scales and zero points of GROUPS groups of a tile's channels."""
    BN: gl.constexpr = 16 * C
    channels, live = tile * (BN // 2 if SILU else BN), tile < tiles
    _put_part(to, scales.to(gl.int64), split * (2 * GROUPS), channels, N, live, 2 * GROUPS, PITCH // 8, SILU, BN, W)
    _put_part(to + BN * _apart(2 * GROUPS), zeros.to(gl.int64), split * GROUPS, channels, N, live, GROUPS, PITCH // 16, SILU, BN, W)


@gluon.jit
def _put_step(
    ring: gl.tensor, first_scales: gl.tensor, cursor: gl.tuple, w_at: gl.tuple, scales: gl.tensor, zeros: gl.tensor,
    live: gl.tensor, tiles: gl.tensor, split: gl.tensor, N: gl.tensor, k: gl.constexpr,
    PITCH: gl.constexpr, SILU: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, C: gl.constexpr, W: gl.constexpr, L: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """Begin to copy step k of a tile to `ring`, and the tile's scales with the first one. The cursor says where: (words from the beginning, tile, slot of scales),
    and what is returned where the next step is."""
    at, tile, slot, programs = cursor[0], cursor[1], cursor[2], gl.num_programs(0)
    _put(ring, (w_at[0] + at, w_at[1] + at), live, PITCH, SILU, C, W, L)
    if k == 0:
        _put_scales(first_scales + slot * _scales_size(C, STEPS * W), scales, zeros, tile, tiles, split, N, PITCH, STEPS * W, SILU, C, W)
        slot = gl.where(slot == _slots(STAGES, STEPS) - 1, 0, slot + 1)
    gl.inline_asm_elementwise("cp.async.commit_group; mov.u32 $0, 0;", "=r,r", [tile], dtype=gl.int32, is_pure=False, pack=1)
    if k == STEPS - 1:
        at += programs.to(gl.int64) * ((8 if SILU else 16) * C * PITCH) - (STEPS - 1) * W * 16
        tile += programs
    else:
        at += W * 16
    return at, tile, slot


@gluon.jit
def _wait(start: gl.tensor, N: gl.constexpr) -> None:
    """Wait for all groups of copies but N."""
    gl.inline_asm_elementwise(_wait_text(N), "=r,r", [start], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _x_staged(x: gl.tensor, x_smem: gl.tuple, x_row: gl.tensor, T: gl.tensor, STEPS: gl.constexpr, NB: gl.constexpr, W: gl.constexpr, G: gl.constexpr) -> None:
    """Bring x into the order of the numbers; all of it is on its way before the first of it is used."""
    X: gl.constexpr = gl.BlockedLayout([1, 1, 1, 1, 4], [1, 2, 4, 4, 1], [W, 1, 1, 1, 1], [4, 3, 2, 1, 0])
    row = _along(G, 1, 5, X)
    x_at = x + (row.to(gl.int64) * x_row + (_along(W, 0, 5, X) * 64 + _along(4, 2, 5, X) * 16 + _along(4, 3, 5, X) * 4 + _along(4, 4, 5, X)))
    place = row + gl.zeros([W, G, 4, 4, 4], gl.int32, layout=X)
    found: gl.tuple = ()
    for j in gl.static_range(NB * STEPS):
        found = found + (gl.load(x_at + (j % NB * 8 * x_row + j // NB * W * 64), mask=place + j % NB * 8 < T, other=0),)
    for j in gl.static_range(NB * STEPS):
        x_smem[j].store(gl.inline_asm_elementwise(_ORDERED, _OF_ORDERED, [found[j]], dtype=gl.int32, is_pure=True, pack=4))


@gluon.jit
def _x_of(x_smem: gl.tuple, j: gl.constexpr, G: gl.constexpr, W: gl.constexpr, L: gl.constexpr) -> gl.tuple:
    """The four words a thread has of a group's products."""
    F: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4, 4], [1, 8, 4, 1, 1], [W, 1, 1, 1, 1], [4, 3, 2, 1, 0])
    even, odd = gl.split(gl.reshape(gl.permute(x_smem[j].load(F), (0, 1, 2, 4, 3)), [W, G, 4, 4, 2, 2]))
    w0, w2 = gl.split(even)
    w1, w3 = gl.split(odd)
    return (
        _spread(gl.convert_layout(w0, L, assert_trivial=True), W, L), _spread(gl.convert_layout(w1, L, assert_trivial=True), W, L),
        _spread(gl.convert_layout(w2, L, assert_trivial=True), W, L), _spread(gl.convert_layout(w3, L, assert_trivial=True), W, L),
    )  # fmt: skip


@gluon.jit
def _sums_of(x_smem: gl.tuple, COUNT: gl.constexpr, G: gl.constexpr, W: gl.constexpr, L: gl.constexpr) -> gl.tuple:
    """Sums of x over a thread's groups, by steps and blocks of rows, as the products want them."""
    found: gl.tuple = ()
    for j in gl.static_range(COUNT):
        x = _x_of(x_smem, j, G, W, L)
        found = found + (gl.inline_asm_elementwise(_SUMS, _OF_SUMS, [x[0], x[1], x[2], x[3]], dtype=gl.float32, is_pure=True, pack=4),)
    return found


@gluon.jit
def _step(
    ring: gl.tensor, s_at: gl.tensor, z_at: gl.tensor, x_smem: gl.tuple, sums: gl.tuple, totals: gl.tuple, k: gl.constexpr,
    GROUPS: gl.constexpr, C: gl.constexpr, NB: gl.constexpr, G: gl.constexpr, W: gl.constexpr, L: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """Totals with a step more, whose words are at `ring`."""
    S: gl.constexpr = _apart(2 * GROUPS)
    Z: gl.constexpr = _apart(GROUPS)
    x0 = _x_of(x_smem, NB * k, G, W, L)
    x1 = _x_of(x_smem, NB * k + NB - 1, G, W, L)
    new: gl.tuple = ()
    for c in gl.static_range(C):
        at = ring + 2 * c * (W * 512)
        a = gl.inline_asm_elementwise(_TAKE, _OF_TAKE, [_spread(at, W, L)], dtype=gl.int32, is_pure=False, pack=4)
        b = gl.inline_asm_elementwise(_TAKE, _OF_TAKE, [_spread(at + W * 512, W, L)], dtype=gl.int32, is_pure=False, pack=4)
        s, z = s_at + (16 * c * S + 2 * k * W), z_at + (16 * c * Z + k * W)
        places = [_spread(s, W, L), _spread(s + 8 * S, W, L), _spread(z, W, L), _spread(z + 8 * Z, W, L)]
        scale = gl.inline_asm_elementwise(_READ, _OF_READ, places, dtype=gl.float32, is_pure=False, pack=4)
        if NB == 1:
            operands = [a, b, x0[0], x0[1], x0[2], x0[3], sums[k], scale, totals[c]]
            new = new + (gl.inline_asm_elementwise(_PRODUCT_1, _OF_PRODUCT_1, operands, dtype=gl.float32, is_pure=True, pack=4),)
        else:
            operands = [a, b, x0[0], x0[1], x0[2], x0[3], x1[0], x1[1], x1[2], x1[3], sums[2 * k], sums[2 * k + 1], scale, totals[2 * c], totals[2 * c + 1]]
            new = new + gl.inline_asm_elementwise(_PRODUCT_2, _OF_PRODUCT_2, operands, dtype=(gl.float32, gl.float32), is_pure=True, pack=4)
    return new


@gluon.jit
def _shared(STAGES: gl.constexpr, GROUPS: gl.constexpr, STEPS: gl.constexpr, G: gl.constexpr, C: gl.constexpr, NB: gl.constexpr, W: gl.constexpr) -> gl.tuple:
    """Shared memory: the ring of words with the scales of the tiles in it, x, and both halves of a tile's sums. Triton knows nothing of what is in the ring, and
    so puts no barriers around. It is the largest of all, and so lies at the beginning."""
    SIZE: gl.constexpr = STAGES * C * W * 1024 + _slots(STAGES, STEPS) * _scales_size(C, GROUPS)
    ring = gl.allocate_shared_memory(gl.int32, [(SIZE + 1023) // 1024, 256], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    x: gl.tuple = ()
    for _ in gl.static_range(NB * STEPS):
        x = x + (gl.allocate_shared_memory(gl.int32, [W, G, 4, 4, 4], _x_layout(W, G)),)
    lower = gl.allocate_shared_memory(gl.float32, [W, C * NB * 64], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    upper = gl.allocate_shared_memory(gl.float32, [W, C * NB * 64], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    return ring, x, lower, upper


@gluon.jit(do_not_specialize=["T", "tiles"])
def _few_kernel(
    x: gl.tensor, qweight: gl.tensor, scales: gl.tensor, zeros: gl.tensor, bias: gl.tensor, out: gl.tensor, parts: gl.tensor, arrived: gl.tensor,
    before: gl.tensor, eps: gl.tensor, residual: gl.tensor, gain: gl.tensor, squares: gl.tensor,
    T: gl.tensor, N: gl.tensor, x_row: gl.tensor, out_row: gl.tensor, tiles: gl.tensor,
    PITCH: gl.constexpr, HAS_BIAS: gl.constexpr, BEFORE: gl.constexpr, AFTER: gl.constexpr, SILU: gl.constexpr, ONE: gl.constexpr,
    SPLITS: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, C: gl.constexpr, NB: gl.constexpr, W: gl.constexpr,
) -> None:  # fmt: skip
    """NB blocks of 8 rows (ONE: of which there is one row), 16 C channels at a time. x, qweight: words of 32 bits, PITCH of them a channel."""
    L: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [1, 8, 4, 1], [W, 1, 1, 1], [3, 2, 1, 0])
    R: gl.constexpr = gl.BlockedLayout([W, 1], [1, 32], [1, W], [0, 1])
    G: gl.constexpr = 1 if ONE else 8
    GROUPS: gl.constexpr = STEPS * W
    STAGE: gl.constexpr = C * W * 1024
    whole, x_smem, half0, half1 = _shared(STAGES, GROUPS, STEPS, G, C, NB, W)
    program, programs, split = gl.program_id(0), gl.num_programs(0), gl.program_id(1)
    count = (tiles - program + programs - 1) // programs
    warp, g, t = _along(W, 0, 4, L), _along(8, 1, 4, L), _along(4, 2, 4, L)
    at_smem = gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r,r", [warp + g + t], dtype=gl.int32, is_pure=False, pack=1)
    first_scales = gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r,r", [program], dtype=gl.int32, is_pure=False, pack=1) + STAGES * STAGE
    ring = at_smem + (warp * 512 + g * 64 + t * 16)
    s_at = at_smem + (STAGES * STAGE + g * _apart(2 * GROUPS) + warp * 2)
    z_at = at_smem + (STAGES * STAGE + 16 * C * _apart(2 * GROUPS) + g * _apart(GROUPS) + warp)
    gate = qweight + (g.to(gl.int64) * PITCH + (split * (GROUPS * 16) + warp * 16 + t * 4 + _along(4, 3, 4, L)))
    w_at = (gate, gate + (N // 2).to(gl.int64) * PITCH)
    cursor = (program.to(gl.int64) * ((8 if SILU else 16) * C * PITCH), program, program * 0)
    for stage in gl.static_range(STAGES - 1):
        live = stage < count * STEPS
        cursor = _put_step(
            ring + stage * STAGE, first_scales, cursor, w_at, scales, zeros, live, tiles, split, N, stage % STEPS, PITCH, SILU, STEPS, STAGES, C, W, L
        )
    gdc_launch_dependents()
    gdc_wait()
    _x_staged(x + split * (GROUPS * 64), x_smem, x_row, T, STEPS, NB, W, G)
    factor = inverse(before, eps, T, PITCH * 8, BEFORE, C, NB, R)
    _wait(program, STAGES - 2)
    barrier()
    sums = _sums_of(x_smem, NB * STEPS, G, W, L)
    slot, used = 0, 0
    for turn in range(count):
        tile, old = program + turn * programs, (factor, factor)
        if AFTER and SPLITS == 1:
            old = residual_of(residual, tile, T, N, SILU, C, NB, R)
        totals = (gl.zeros([W, 8, 4, 4], gl.float32, layout=L),) * (C * NB)
        for k in gl.static_range(STEPS):
            live = turn * STEPS + (k + STAGES - 1) < count * STEPS
            to = ring + gl.where(slot == 0, STAGES - 1, slot - 1) * STAGE
            cursor = _put_step(
                to, first_scales, cursor, w_at, scales, zeros, live, tiles, split, N, (k + STAGES - 1) % STEPS, PITCH, SILU, STEPS, STAGES, C, W, L
            )
            s, z = s_at + used * _scales_size(C, GROUPS), z_at + used * _scales_size(C, GROUPS)
            totals = _step(ring + slot * STAGE, s, z, x_smem, sums, totals, k, GROUPS, C, NB, G, W, L)
            slot = gl.where(slot == STAGES - 1, 0, slot + 1)
            _wait(program, STAGES - 2)  # for the next step's words; the last time before the barrier, for the next tile's scales
        used = gl.where(used == _slots(STAGES, STEPS) - 1, 0, used + 1)
        lower, upper = halves(totals, C * NB, W)
        half0.store(lower)
        half1.store(upper)
        barrier()
        total = over_warps(half0, half1, UNIT, R)
        if SPLITS > 1:
            store_part(total, parts, tile, split, T, N, SILU, C, NB, R)
        else:
            finish(total, old, factor, out, bias, residual, gain, squares, tile, T, N, out_row, HAS_BIAS, BEFORE, AFTER, SILU, C, NB, R)
    if SPLITS > 1:
        gather(
            parts, arrived, factor, out, bias, residual, gain, squares, count, T, N, out_row, HAS_BIAS, SPLITS, BEFORE, AFTER, SILU, C, NB, W, R
        )  # fmt: skip
    whole._keep_alive()


class _Launch(NamedTuple):
    """Warps, 16s of channels a tile, programs that share a sum, steps of the ring, programs for each part of the sums."""

    warps: int
    channels: int
    splits: int
    stages: int
    programs: int


def _size(launch: _Launch, rows: int, inner: int) -> int:
    """Bytes of shared memory that a program needs, but for a few."""
    steps = inner // TILE // launch.warps // launch.splits
    groups, slots, blocks = steps * launch.warps, (steps + launch.stages - 2) // steps + 1, 1 if rows <= 8 else 2
    scales = 16 * launch.channels * (16 * (-(-2 * groups // 16) | 1) + 16 * (-(-groups // 16) | 1))
    ring = -(-(launch.stages * launch.warps * launch.channels * 1024 + slots * scales) // 1024) * 1024
    return ring + groups * (256 if rows == 1 else 2048 * blocks) + 512 * launch.warps * launch.channels * blocks


def _fitting(launch: _Launch, rows: int, inner: int, room: int) -> _Launch | None:
    """With so many steps of the ring, down to 3, as there is room for."""
    while _size(launch, rows, inner) > room and launch.stages > 3:
        launch = launch._replace(stages=launch.stages - 1)
    return launch if _size(launch, rows, inner) <= room else None


@cache
def _launch(rows: int, outer: int, inner: int) -> _Launch | None:
    """What was fastest on an H200, between the other products of a 1.8B and a 7B model; None where another kernel was. Warps and splits, and so a row's bits, are
    the same for 1 to 8 rows."""
    groups, size = inner // TILE, outer * inner
    if size <= SMALL or (rows > 8 and (size < LARGE or inner > outer)):
        return None
    short = groups <= 16 and outer > 32 * CHIP
    warps, splits = (4, 1) if short else (8, 1 if groups <= 64 else 2)
    shares_x = 1 < rows <= 8 and inner >= 4096 and 16 * CHIP < outer <= 32 * CHIP  # x is as large as the weights, and wider tiles are enough for the chip
    channels = 2 if short or shares_x else 1
    if groups % (warps * splits) or groups > 8 * warps * splits or outer % (32 * channels):
        return None
    steps, tiles = groups // warps // splits, outer // (16 * channels)
    for together in (2, 1):  # programs on a multiprocessor
        turns = -(-tiles // (together * CHIP // splits))
        stages = min(9 if rows == 1 else 5 if together == 2 else 8, turns * steps + 1)
        launch = _Launch(warps, channels, splits, max(stages, 3), -(-tiles // turns))
        if found := _fitting(launch, rows, inner, ROOM // together - 1024):
            return found
    return None


def _constants(launch: _Launch, rows: int, inner: int) -> dict[str, int | bool]:
    """What the kernel is compiled for, beside what stands around a product."""
    steps = inner // TILE // launch.warps // launch.splits
    return {
        "PITCH": inner // 8, "ONE": rows == 1, "SPLITS": launch.splits, "STEPS": steps, "STAGES": launch.stages, "C": launch.channels,
        "NB": 1 if rows <= 8 else 2, "W": launch.warps,
    }  # fmt: skip


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
        _start(_Launch(8, 1, 1, 3, 4), x, (qweight, scales, scales.to(torch.uint8)), None, out, False, None, None)
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
    return _launch(rows, outer, inner) is not None and all(part.is_contiguous() and part.data_ptr() % 16 == 0 for part in weight)


def multiply(
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    out: Tensor,
    silu: bool = False,
    before: Before | None = None,
    after: After | None = None,
) -> None:
    """out = x @ W.T + bias, with SiLU and the norms around it (`deferred.py`). x: rows of whole words."""
    launch = _launch(x.shape[0], weight[1].shape[0], x.shape[1])
    assert launch is not None
    _start(launch, x, weight, bias, out, silu, before, after)


def _start(
    launch: _Launch, x: Tensor, weight: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, out: Tensor, silu: bool, before: Before | None, after: After | None
) -> None:
    (rows, inner), outer = x.shape, weight[1].shape[0]
    words = (x if x.stride(0) % 2 == 0 and x.storage_offset() % 2 == 0 and x.stride(1) == 1 else x.contiguous()).view(torch.int32)
    tiles = outer // (16 * launch.channels)
    parts = torch.empty(launch.splits, rows, outer, dtype=torch.float32, device=x.device) if launch.splits > 1 else out
    norms, flags = deferred.arguments(out, before, after)
    around = {"HAS_BIAS": bias is not None, "SILU": silu, **flags}
    _few_kernel[(launch.programs, launch.splits)](
        words, weight[0].view(torch.int32), weight[1], weight[2], out if bias is None else bias, out, parts, arrivals(x.device), *norms,
        rows, outer, words.stride(0), out.stride(0), tiles, **around, **_constants(launch, rows, inner), num_warps=launch.warps, launch_pdl=True,
    )  # fmt: skip
