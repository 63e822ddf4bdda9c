"""How a product of `linear_w4_few.py` is launched: by how many warps and programs, and what of their shared memory is for what."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

#: Inputs of a group, of which a warp takes one a step.
TILE = 128
#: Multiprocessors that launches are made for, bytes of shared memory of each. Numbers of a weight below which other kernels serve.
CHIP, ROOM = 132, 228 << 10
SMALL = 1 << 22
#: Tiles of a program of 1 to 8 rows, whose sums threads hold at its end.
MOST_TILES = 32


class Launch(NamedTuple):
    """Warps, programs that share a sum, steps of the ring, programs for each part of the sums, groups of a step."""

    warps: int
    splits: int
    stages: int
    programs: int
    groups: int = 1


#: (rows, outer, inner) of a 1.8B and a 7B model: what was fastest on an H200 in a chain of their products and attention, for which there is to be room, too.
FASTEST = {
    (1, 2048, 2048): (4, 1, 2, 128, 4), (1, 16384, 2048): (8, 1, 4, 264, 2), (1, 2048, 8192): (8, 1, 3, 128, 2), (1, 4096, 2048): (8, 1, 2, 128, 2),
    (8, 2048, 2048): (4, 1, 4, 128, 1), (8, 16384, 2048): (8, 1, 4, 132, 2), (8, 2048, 8192): (8, 1, 3, 128, 2), (8, 4096, 2048): (8, 1, 3, 128, 2),
    (16, 2048, 2048): (8, 1, 2, 128, 2), (16, 16384, 2048): (8, 1, 4, 132, 2), (16, 2048, 8192): (8, 2, 3, 64, 2), (16, 4096, 2048): (8, 1, 3, 128, 2),
    (1, 4096, 4096): (4, 1, 3, 256, 4), (1, 28672, 4096): (8, 1, 5, 264, 2), (1, 4096, 14336): (8, 1, 4, 256, 2), (1, 6144, 4096): (4, 1, 3, 384, 4),
    (8, 4096, 4096): (8, 1, 4, 128, 2), (8, 28672, 4096): (16, 1, 3, 132, 2), (8, 4096, 14336): (8, 7, 3, 37, 2), (8, 6144, 4096): (8, 1, 2, 192, 2),
    (16, 4096, 4096): (8, 1, 4, 128, 2), (16, 28672, 4096): (8, 1, 5, 132, 1), (16, 4096, 14336): (8, 7, 3, 37, 1), (16, 6144, 4096): (8, 1, 3, 128, 2),
}  # fmt: skip


class Room(NamedTuple):
    """Where shared memory has the parts of sums, x, its sums, scales and zero points, how far those of two channels are apart, and the size of all."""

    SUMS: int
    X: int
    XSUMS: int
    SCALES: int
    S_APART: int
    ZEROS: int
    Z_APART: int
    SIZE: int


def _apart(size: int) -> int:
    """An odd multiple of 16 bytes, so that eight channels lie in banks of their own."""
    return 16 * (-(-size // 16) | 1)


def _room(launch: Launch, groups: int, tiles: int, span: int, rows: int) -> Room:
    """For `groups` groups of x and up to `tiles` tiles, of whose sums a warp has up to `span` parts."""
    blocks, height = (1, 1 if rows == 1 else 8) if rows <= 8 else (2, 8)
    sums = launch.stages * launch.warps * launch.groups * 1024
    x = sums + launch.warps * span * (128 if rows == 1 else blocks * 512)
    x_sums = x + groups * blocks * height * 256
    scales = x_sums + -(-groups // 8) * 32 * (1 if rows == 1 else 8 * blocks)
    zeros = scales + 16 * tiles * _apart(2 * groups)
    return Room(sums, x, x_sums, scales, _apart(2 * groups), zeros, _apart(groups), -(-(zeros + 16 * tiles * _apart(groups)) // 1024) * 1024)


def _touched(count: int, whole: int, parts: int) -> int:
    """How many of `count` pieces of a line of count x whole steps each of its `parts` parts touches at most."""
    part = count * whole // parts
    return max(((i + 1) * part - 1) // whole - i * part // whole + 1 for i in range(parts))


@cache
def constants(launch: Launch, rows: int, outer: int, inner: int) -> dict[str, int]:
    """What the kernel is compiled for, beside what stands around a product."""
    groups, tiles = inner // TILE // launch.splits, outer // 16
    counts = {tiles // launch.programs, -(-tiles // launch.programs)}
    most, each = max(counts), groups // launch.warps
    span = max(_touched(count, groups, launch.warps) for count in counts)  # tiles of a warp
    meet = max(_touched(launch.warps, count * each, count) for count in counts)  # warps of a tile
    return {
        "PITCH": inner // 8, "G": 1 if rows == 1 else 8, "NB": 1 if rows <= 8 else 2, "SPLITS": launch.splits, "GPW": each, "U": launch.groups,
        "MOST": 1 << (most - 1).bit_length(), "SPAN": span, "MEET": meet, "STAGES": launch.stages, "W": launch.warps, **_room(launch, groups, most, span, rows)._asdict(),
    }  # fmt: skip


def size(launch: Launch, rows: int, outer: int, inner: int) -> int:
    """Bytes of shared memory that a program needs."""
    return constants(launch, rows, outer, inner)["SIZE"] + 128 * launch.warps


def _fitting(launch: Launch, rows: int, outer: int, inner: int, room: int) -> Launch | None:
    """With so many steps of the ring, down to 2, as there is room for."""
    while size(launch, rows, outer, inner) > room and launch.stages > 2:
        launch = launch._replace(stages=launch.stages - 1)
    return launch if size(launch, rows, outer, inner) <= room else None


@cache
def launch_of(rows: int, outer: int, inner: int) -> Launch | None:
    """The fastest, or for other models one that is like it: for one row two programs a multiprocessor, for more, of which x takes much room, one."""
    height, groups, tiles = (rows > 1) * 8 + (rows > 8) * 8 or 1, inner // TILE, outer // 16
    if found := FASTEST.get((height, outer, inner)):
        return Launch(*found)
    if outer * inner < SMALL or outer % 16 or groups % 8:
        return None
    most = {1: groups, 8: 64, 16: 32}[height]  # groups of x that a program has room for
    splits = next((n for n in range(1, groups // 8 + 1) if groups % (8 * n) == 0 and groups // n <= most), 0)
    if not splits:
        return None
    together, turns = (2, 1) if height == 1 else (1, 1)  # programs on a multiprocessor, and one after the other
    while -(-tiles * splits // (turns * together * CHIP)) > MOST_TILES // (2 if height == 16 else 1):
        turns += 1
    each = -(-tiles * splits // (turns * together * CHIP))
    launch = Launch(8, splits, 4, -(-tiles // each), 2 if groups // splits % 16 == 0 else 1)
    return _fitting(launch, height, outer, inner, ROOM // together - 1024)
