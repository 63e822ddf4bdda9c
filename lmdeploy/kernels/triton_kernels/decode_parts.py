"""A piece's keys in PARTS parts, a warp each, whose sums meet in shared memory and are merged in one order.

In assembly, for Triton has neither a place in shared memory that stays nor threads that pick what they read there.

A row of 128 dims, where a warp has one: thread l has dims 2 l and 2 l + 1 of either half.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lmdeploy.kernels.triton_kernels.cache_read import power_of_two
from lmdeploy.kernels.triton_kernels.fragments import FOUR_FLOATS, HALF, kinds

WARPS = 8
PARTS = tl.constexpr(WARPS)  # parts of a piece: warps of a program for few rows
ROW = 33 * 4  # bytes from one sum of a warp's threads to the next: neither those who write nor those who read meet in a bank


def _turning() -> str:
    """Sums and differences of a warp's 128 numbers (operands: a thread's of the lower half, of the upper), in the order of `turned_128`."""
    text = "{\n.reg .f32 x<4>, y<4>, s;\n.reg .b32 l, m;\n.reg .pred p;\nmov.u32 l, %laneid;\n"
    text += "".join(f"add.f32 x{i}, ${4 + i}, ${5 + i};\nsub.f32 x{i + 1}, ${4 + i}, ${5 + i};\n" for i in (0, 2))
    for lanes in (1, 2, 4, 8, 16):
        text += f"and.b32 m, l, {lanes};\nsetp.ne.s32 p, m, 0;\nselp.f32 s, 0fBF800000, 0f3F800000, p;\n"
        text += "".join(f"shfl.sync.bfly.b32 y{i}, x{i}, {lanes}, 31, -1;\n" for i in range(4))
        text += "".join(f"fma.rn.f32 x{i}, x{i}, s, y{i};\n" for i in range(4))
    text += "".join(f"add.f32 ${i}, x{i}, x{i + 2};\nsub.f32 ${i + 2}, x{i}, x{i + 2};\n" for i in (0, 1))
    return text + "}"


def _step(level: str, other: str, unit: str, fade: str, factor: str) -> str:
    """The larger of two largest scores to `level`; what the sums so far are multiplied by to `fade`, what the other part's are, which are in units, to `factor`."""
    text = f"max.f32 n, {level}, {other};\nsetp.eq.f32 p, n, 0fFF800000;\nselp.f32 b, 0f00000000, n, p;\n"
    text += f"sub.f32 {fade}, {level}, b;\nex2.approx.ftz.f32 {fade}, {fade};\nsub.f32 {factor}, {other}, b;\nex2.approx.ftz.f32 {factor}, {factor};\n"
    return text + f"mul.f32 {factor}, {factor}, {unit};\nmov.f32 {level}, n;\n"


def _member(place: int) -> str:
    """Of a thread, where in shared memory its member's numbers begin, and of `place` 0 those of its dims: sum 8 n + i (n: which two dims; i: query, half, the next dim)
    is in row 4 i + n, total i in row 32 + i."""
    if place >= 32:  # of thread 4 g + t all g are wanted
        text = f"and.b32 x, w, 1;\nmad.lo.u32 at, x, {ROW}, s;\nand.b32 x, l, 7;\nshl.b32 x, x, 2;\n"
    else:
        text = f"and.b32 x, w, 1;\nshl.b32 x, x, 2;\nand.b32 y, l, 3;\nadd.u32 x, x, y;\nmad.lo.u32 at, x, {ROW}, s;\nand.b32 x, l, 28;\n"
    return text + "shr.u32 y, w, 1;\nadd.u32 x, x, y;\nshl.b32 x, x, 2;\nadd.u32 at, at, x;\n"


def _merged(result: int, place: int) -> str:
    """The number at `place` of all parts, in their order."""
    text = f"mov.f32 ${result}, 0f00000000;\n"
    for i in range(WARPS):
        text += f"ld.shared.f32 v, [at + {(36 * i + place) * ROW}];\nmul.f32 ${result}, ${result}, fade{i};\nfma.rn.f32 ${result}, v, factor{i}, ${result};\n"
    return text


def _gathering() -> str:
    """PARTS warps' way. Results: of thread l of warp m the largest score of member m, its sum of weights, its weighted offset, and its weighted sums of the thread's
    dims. Operands: a thread's 32 sums and 4 totals, the largest scores of its two queries, and the unit of all."""
    scores = WARPS * 36 * ROW  # of each warp those of 8 members, with the unit
    text = f"{{\n.shared .align 16 .b8 gathered[{scores + WARPS * 64}];\n.reg .b32 w, l, s, at, x, y;\n.reg .pred p;\n"
    text += f".reg .f32 n, b, k<{2 * WARPS}>, fade<{WARPS}>, factor<{WARPS}>, v, z;\n"
    text += "mov.u32 l, %tid.x;\nshr.u32 w, l, 5;\nand.b32 l, l, 31;\nmov.u32 s, gathered;\nbar.sync 0;\n"  # what was there has been read
    text += f"mad.lo.u32 at, w, {36 * ROW}, s;\nshl.b32 x, l, 2;\nadd.u32 at, at, x;\n"
    text += "".join(f"st.shared.f32 [at + {(4 * i + n) * ROW}], ${7 + 8 * n + i};\n" for n in range(4) for i in range(8))
    text += "".join(f"st.shared.f32 [at + {(32 + i) * ROW}], ${39 + i};\n" for i in range(4))
    text += "setp.lt.u32 p, l, 4;\nshl.b32 x, w, 6;\nadd.u32 at, s, x;\nshl.b32 x, l, 4;\nadd.u32 at, at, x;\n"
    text += f"@p st.shared.v4.f32 [at + {scores}], {{$43, $45, $44, $45}};\nbar.sync 0;\nshl.b32 x, w, 3;\nadd.u32 at, s, x;\n"
    text += "".join(f"ld.shared.v2.f32 {{k{2 * i}, k{2 * i + 1}}}, [at + {scores + 64 * i}];\n" for i in range(WARPS))
    text += "mov.f32 $0, 0fFF800000;\n" + "".join(_step("$0", f"k{2 * i}", f"k{2 * i + 1}", f"fade{i}", f"factor{i}") for i in range(WARPS))
    text += _member(32)
    for result, place in ((1, 32), (2, 34)):
        text += _merged(result, place)
        text += "".join(f"shfl.sync.bfly.b32 z, ${result}, {lanes}, 31, -1;\nadd.f32 ${result}, ${result}, z;\n" for lanes in (1, 2, 4))
    text += _member(0)
    return text + "".join(_merged(3 + 2 * upper + following, 8 * upper + 16 * following) for upper in (0, 1) for following in (0, 1)) + "}"


TURN, GATHER = tl.constexpr(_turning()), tl.constexpr(_gathering())
OF_TURN, OF_GATHER = kinds(("=&f", 4), ("f", 4)), kinds(("=&f", 7), ("f", 39))
SEVEN_FLOATS = tl.constexpr((tl.float32,) * 7)


@triton.jit
def gathered(level: tl.tuple, totals: tl.tuple, sums: tl.tuple, WIDTH: tl.constexpr) -> tl.tuple:
    """For a program of PARTS warps, a part each: of a thread's member, which is its warp, the largest score, the sum of weights, the weighted sums of the thread's dims."""
    UNIT: tl.constexpr = 256.0 if WIDTH == "fp8" else 16777216.0
    UPPER: tl.constexpr = 1048576.0 if WIDTH == "4" else UNIT  # the high half of a byte
    a, b, c, d = sums
    f = tl.inline_asm_elementwise(
        GATHER, OF_GATHER,
        [a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7],
         c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7],
         totals[0], totals[1], totals[2], totals[3], level[0], level[1], power_of_two(level[2])],
        dtype=SEVEN_FLOATS, is_pure=False, pack=1,
    )  # fmt: skip
    return f[0], f[1], f[3] * UNIT + f[2], f[4] * UNIT + f[2], f[5] * UPPER + f[2], f[6] * UPPER + f[2]


@triton.jit
def turned_threads(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tuple:
    """`turned_128` where a warp has a row: of a thread's dims of the lower half (a, b) and of the upper."""
    f = tl.inline_asm_elementwise(TURN, OF_TURN, [a, b, c, d], dtype=FOUR_FLOATS, is_pure=True, pack=1)
    return f[0] * (128**-0.5), f[1] * (128**-0.5), f[2] * (128**-0.5), f[3] * (128**-0.5)


@triton.jit
def joined(
    sums_at: tl.tensor, at: tl.tensor, live: tl.tensor, count: tl.tensor, CHUNK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Sum of weights, and weighted sums of a thread's dims of the lower half and of the upper, of a row's pieces, CHUNK of them asked for at once.

    sums_at: where a thread's member has its first piece's largest score and sum of weights; at: where it has the sums of the thread's first dim. What other programs
    wrote a moment ago is read past the first-level cache.
    """
    none, zero = live.to(tl.int32) * 0, tl.zeros(at.shape, tl.float32)
    peak, total, a, b, c, d = tl.full(at.shape, float("-inf"), tl.float32), zero, zero, zero, zero, zero
    for first in tl.range(0, count, CHUNK, num_stages=1):
        largest = peak
        for i in tl.static_range(CHUNK):
            there = live & (first + i + none < count)
            largest = tl.maximum(largest, tl.load(sums_at + (first + i) * 2, mask=there, other=float("-inf"), cache_modifier=".cg"))
        level = tl.where(largest == float("-inf"), 0.0, largest)  # of rows that are no head
        fade = tl.exp2(peak - level)
        total, a, b, c, d = total * fade, a * fade, b * fade, c * fade, d * fade
        for i in tl.static_range(CHUNK):
            there, place = live & (first + i + none < count), at + (first + i) * (2 * HALF)
            share = tl.exp2(tl.load(sums_at + (first + i) * 2, mask=there, other=float("-inf"), cache_modifier=".cg") - level)
            total = tl.fma(share, tl.load(sums_at + (first + i) * 2 + 1, mask=there, other=0.0, cache_modifier=".cg"), total)
            a = tl.fma(share, tl.load(place, mask=there, other=0.0, cache_modifier=".cg"), a)
            b = tl.fma(share, tl.load(place + 1, mask=there, other=0.0, cache_modifier=".cg"), b)
            c = tl.fma(share, tl.load(place + HALF, mask=there, other=0.0, cache_modifier=".cg"), c)
            d = tl.fma(share, tl.load(place + HALF + 1, mask=there, other=0.0, cache_modifier=".cg"), d)
        peak = largest
    return total, a, b, c, d
