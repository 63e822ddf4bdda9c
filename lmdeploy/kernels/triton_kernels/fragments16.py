"""Keys and values of a cache of 16 bits straight from memory in the registers from which tensor cores take them, as `fragments.py` does with quantised ones.

Of a group of 16 keys thread 4 g + t has
- keys g and g + 8: dims 32 c + 8 t .. 32 c + 8 t + 7, c = 0 .. 3, 16 bytes each. Queries have the same: query g.
- values of keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9: dims 8 g .. 8 g + 7 of either half, 16 bytes each.
Scores, weights and sums lie as in `fragments.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lmdeploy.kernels.triton_kernels.fragments import EIGHT_FLOATS, FOUR_FLOATS, TWO_INTS, kinds

WARPS = 8
#: of each row of 256 bytes, from the thread's first byte on
CHUNKS, HALVES = (0, 64, 128, 192), (0, 128)


def _rows(count: int, offsets: tuple[int, ...]) -> str:
    """16 bytes at each of the offsets from each of `count` pointers."""
    words, text = 4 * count * len(offsets), ""
    for i in range(count * len(offsets)):
        results = ", ".join(f"${4 * i + n}" for n in range(4))
        text += f"ld.global.L1::no_allocate.v4.u32 {{{results}}}, [${words + i // len(offsets)} + {offsets[i % len(offsets)]}];\n"
    return text


def _mma(kind: str) -> str:
    return f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"


def _products(kind: str) -> str:
    """Results: scores c0 .. c3. Operands: 16 words of key g, of key g + 8, 16 of query g: of each four 0, 2, 1, 3. Four chains of products, or each would wait for the
    one before."""
    text = "{\n.reg .f32 c<16>;\n" + "".join(f"mov.f32 c{i}, 0f00000000;\n" for i in range(16))
    for i in range(8):
        word = 4 * (i // 2) + i % 2
        c = "{" + ", ".join(f"c{4 * (i % 4) + n}" for n in range(4)) + "}"
        a = "{" + ", ".join(f"${4 + n}" for n in (word, 16 + word, word + 2, 18 + word)) + "}"
        text += f"{_mma(kind)} {c}, {a}, {{${36 + 2 * i}, ${37 + 2 * i}}}, {c};\n"
    for i in range(4):
        text += f"add.f32 c{i}, c{i}, c{4 + i};\nadd.f32 c{8 + i}, c{8 + i}, c{12 + i};\nadd.f32 ${i}, c{i}, c{8 + i};\n"
    return text + "}"


def _products_of_one(kind: str) -> str:
    """Results: two scores of key g. Operands: 16 words of key g, 16 of query g, both ordered as above. Four words lie as the operand where words 0 and 2 are of one key
    and 1 and 3 of another: so one product is right for the former alone, one for the latter, and neither takes a move."""
    text = "{\n.reg .f32 c<16>;\n" + "".join(f"mov.f32 c{i}, 0f00000000;\n" for i in range(16))
    for i in range(8):
        word = 4 * (i // 2)
        c = "{" + ", ".join(f"c{4 * (i % 4) + n}" for n in range(4)) + "}"
        a = "{" + ", ".join(f"${2 + word + n}" for n in (0, 2, 1, 3)) + "}"
        text += f"{_mma(kind)} {c}, {a}, {{${18 + 2 * i}, ${19 + 2 * i}}}, {c};\n"
    for i in range(2):  # chains 0 and 2 of words 0 and 2, chains 1 and 3 of words 1 and 3
        text += f"add.f32 c{i}, c{i}, c{6 + i};\nadd.f32 c{8 + i}, c{8 + i}, c{14 + i};\nadd.f32 ${i}, c{i}, c{8 + i};\n"
    return text + "}"


def _sums(kind: str) -> str:
    """Results: 8 sums, of the two dims of a word. Operands: what they were, what they fade by for either query, weights of keys 2 t and 2 t + 1, and 2 t + 8 and
    2 t + 9; then of each of the four keys a word of either half."""
    text = "{\n.reg .b32 a<4>;\n" + "".join(f"mul.f32 ${i}, ${8 + i}, ${16 + i % 2};\n" for i in range(8))
    for first, select in ((0, "0x5410"), (4, "0x7632")):
        for i, (one, other) in enumerate(((20, 22), (21, 23), (24, 26), (25, 27))):
            text += f"prmt.b32 a{i}, ${one}, ${other}, {select};\n"
        c = "{" + ", ".join(f"${first + n}" for n in range(4)) + "}"
        text += f"{_mma(kind)} {c}, {{a0, a1, a2, a3}}, {{$18, $19}}, {c};\n"
    return text + "}"


def _weights(kind: str) -> str:
    """Weights [key, query] of the result of a product, rounded, as operands [query, key] of the next one."""
    text = f"{{\n.reg .b32 x, y;\ncvt.rn.{kind}x2.f32 x, $3, $2;\ncvt.rn.{kind}x2.f32 y, $5, $4;\n"
    return text + "".join(f"movmatrix.sync.aligned.m8n8.trans.b16 ${i}, {'xy'[i]};\n" for i in (0, 1)) + "}"


def _largest() -> str:
    """Of two numbers over the threads that differ in g only."""
    text = "{\n.reg .f32 x<2>;\nmov.f32 $0, $2;\nmov.f32 $1, $3;\n"
    for lanes in (4, 8, 16):
        text += "".join(f"shfl.sync.bfly.b32 x{i}, ${i}, {lanes}, 31, -1;\n" for i in (0, 1)) + "".join(f"max.f32 ${i}, ${i}, x{i};\n" for i in (0, 1))
    return text + "}"


def _meeting(live: int) -> str:
    """Of a program whose warps have taken a part of a piece's keys each, for `live` pairs of queries. Results: of thread l of warp m the largest score of query m, its sum
    of weights, and its sums of dims 2 l and 2 l + 1 of the lower half, then of the upper. Operands: a thread's 32 sums, 2 sums of weights, 2 largest scores.

    A warp's row i has sum i of all its threads that have live queries, behind these are the scores. Those who read meet in twos in a bank at most."""
    row, name = 4 * (33 if live == 4 else 8 * live), f"met{live}"
    part = 34 * row
    scores = WARPS * part
    dump = scores + WARPS * 8 * live  # what threads without live queries write: a store on condition would be a branch
    text = f"{{\n.shared .align 16 .b8 {name}[{dump + part}];\n.reg .b32 w, l, s, at, x, y;\n.reg .pred p;\n.reg .f32 v, b, n, k<{WARPS}>;\n"
    text += f"mov.u32 l, %tid.x;\nshr.u32 w, l, 5;\nand.b32 l, l, 31;\nmov.u32 s, {name};\nbar.sync 0;\n"  # what was there has been read
    text += f"and.b32 x, l, 3;\nshr.u32 y, l, 2;\nsetp.lt.u32 p, x, {live};\nmad.lo.u32 x, y, {live}, x;\nshl.b32 x, x, 2;\nadd.u32 at, s, x;\n"
    text += f"mad.lo.u32 at, w, {part}, at;\nadd.u32 y, s, {dump};\nselp.b32 at, at, y, p;\n" + "".join(
        f"st.shared.f32 [at + {i * row}], ${6 + i};\n" for i in range(34)
    )
    text += f"setp.lt.u32 p, l, {live};\nmad.lo.u32 at, w, {8 * live}, s;\nmad.lo.u32 at, l, 8, at;\n@p st.shared.v2.f32 [at + {scores}], {{$40, $41}};\nbar.sync 0;\n"
    text += "".join(f"mov.f32 ${i}, 0f00000000;\n" for i in range(6)) + f"setp.lt.u32 p, w, {2 * live};\n@!p bra MET;\nshl.b32 x, w, 2;\nadd.u32 at, s, x;\n"
    text += "".join(f"ld.shared.f32 k{i}, [at + {scores + 8 * live * i}];\n" for i in range(WARPS)) + "mov.f32 n, k0;\n"
    text += "".join(f"max.f32 n, n, k{i};\n" for i in range(1, WARPS)) + "mov.f32 $0, n;\nsetp.eq.f32 p, n, 0fFF800000;\nselp.f32 b, 0f00000000, n, p;\n"
    text += "".join(f"sub.f32 k{i}, k{i}, b;\nex2.approx.ftz.f32 k{i}, k{i};\n" for i in range(WARPS))

    def merged(result: int, place: int) -> str:
        return "".join(f"ld.shared.f32 v, [at + {i * part + place * row}];\nfma.rn.f32 ${result}, v, k{i}, ${result};\n" for i in range(WARPS))

    # sum 8 n + i: of words n, i: query, half, the next dim; total i: of thread 4 g + t all g are wanted
    text += f"and.b32 x, w, 1;\nmad.lo.u32 at, x, {row}, s;\nshr.u32 y, w, 1;\nshl.b32 y, y, 2;\nadd.u32 at, at, y;\nand.b32 y, l, 7;\nmad.lo.u32 y, y, {4 * live}, at;\n"
    text += "and.b32 x, l, 3;\nshr.u32 w, l, 2;\n" + f"mad.lo.u32 x, x, {8 * row}, at;\nmad.lo.u32 x, w, {4 * live}, x;\nmov.u32 at, y;\n" + merged(1, 32)
    text += "".join(f"shfl.sync.bfly.b32 v, $1, {lanes}, 31, -1;\nadd.f32 $1, $1, v;\n" for lanes in (1, 2, 4)) + "mov.u32 at, x;\n"
    return text + "".join(merged(2 + i, place) for i, place in enumerate((0, 4, 2, 6))) + "MET:\nmov.u32 at, 0;\n}"


KEYS, VALUES = tl.constexpr(_rows(2, CHUNKS)), tl.constexpr(_rows(4, HALVES))
PRODUCTS_BF16, PRODUCTS_F16 = tl.constexpr(_products("bf16")), tl.constexpr(_products("f16"))
ONE_BF16, ONE_F16 = tl.constexpr(_products_of_one("bf16")), tl.constexpr(_products_of_one("f16"))
SUMS_BF16, SUMS_F16 = tl.constexpr(_sums("bf16")), tl.constexpr(_sums("f16"))
WEIGHTS_BF16, WEIGHTS_F16, LARGEST = tl.constexpr(_weights("bf16")), tl.constexpr(_weights("f16")), tl.constexpr(_largest())
PACKED_BF16, PACKED_F16 = (tl.constexpr(f"cvt.rn.{kind}x2.f32 $0, $2, $1;") for kind in ("bf16", "f16"))
#: four words where the second operand is not 0
STORE = tl.constexpr("{\n.reg .pred p;\nsetp.ne.s32 p, $2, 0;\n@p st.global.v4.u32 [$1], {$3, $4, $5, $6};\nmov.u32 $0, 0;\n}")
MEETING_1, MEETING_2, MEETING_4 = (tl.constexpr(_meeting(live)) for live in (1, 2, 4))
OF_KEYS, OF_VALUES = kinds(("=&r", 32), ("l", 2)), kinds(("=&r", 32), ("l", 4))
OF_ONE = kinds(("=&f", 2), ("r", 32))
OF_PRODUCTS, OF_SUMS = kinds(("=&f", 4), ("r", 48)), kinds(("=&f", 8), ("f", 10), ("r", 10))
OF_MEETING, SIX_FLOATS = kinds(("=&f", 6), ("f", 36)), tl.constexpr((tl.float32,) * 6)
WORDS, TWO_FLOATS = tl.constexpr((tl.int32,) * 32), tl.constexpr((tl.float32,) * 2)


@triton.jit
def keys_at(key: tl.tensor, other: tl.tensor) -> tl.tuple:
    """Words of keys g and g + 8; pointers: the first of each that the thread has."""
    return tl.inline_asm_elementwise(KEYS, OF_KEYS, [key, other], dtype=WORDS, is_pure=False, pack=1)


@triton.jit
def values_at(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tuple:
    """Words of values 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, of each 4 of the lower half and 4 of the upper."""
    return tl.inline_asm_elementwise(VALUES, OF_VALUES, [a, b, c, d], dtype=WORDS, is_pure=False, pack=1)


@triton.jit
def packed(lower: tl.tensor, upper: tl.tensor, TYPE: tl.constexpr) -> tl.tensor:
    """Two numbers, rounded, as a word."""
    ASM: tl.constexpr = PACKED_BF16 if tl.bfloat16 == TYPE else PACKED_F16
    return tl.inline_asm_elementwise(ASM, "=r,f,f", [lower, upper], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def store_words(pointer: tl.tensor, live: tl.tensor, a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> None:
    """Four words at each pointer where live."""
    tl.inline_asm_elementwise(STORE, "=r,l,r,r,r,r,r", [pointer, live.to(tl.int32), a, b, c, d], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def products(k: tl.tuple, q: tl.tuple, TYPE: tl.constexpr) -> tl.tuple:
    """Keys g and g + 8 times queries 2 t and 2 t + 1."""
    ASM: tl.constexpr = PRODUCTS_BF16 if tl.bfloat16 == TYPE else PRODUCTS_F16
    return tl.inline_asm_elementwise(
        ASM, OF_PRODUCTS,
        [k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7], k[8], k[9], k[10], k[11], k[12], k[13], k[14], k[15],
         k[16], k[17], k[18], k[19], k[20], k[21], k[22], k[23], k[24], k[25], k[26], k[27], k[28], k[29], k[30], k[31],
         q[0], q[1], q[2], q[3], q[4], q[5], q[6], q[7], q[8], q[9], q[10], q[11], q[12], q[13], q[14], q[15]],
        dtype=FOUR_FLOATS, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def products_of_one(k: tl.tuple, q: tl.tuple, TYPE: tl.constexpr) -> tl.tuple:
    """Keys g, whose words are ordered as those of queries, times queries 2 t and 2 t + 1."""
    ASM: tl.constexpr = ONE_BF16 if tl.bfloat16 == TYPE else ONE_F16
    return tl.inline_asm_elementwise(
        ASM, OF_ONE,
        [k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7], k[8], k[9], k[10], k[11], k[12], k[13], k[14], k[15],
         q[0], q[1], q[2], q[3], q[4], q[5], q[6], q[7], q[8], q[9], q[10], q[11], q[12], q[13], q[14], q[15]],
        dtype=TWO_FLOATS, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def turned_weights(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor, TYPE: tl.constexpr) -> tl.tuple:
    """Weights of keys g (a, b) and g + 8 (c, d) and queries 2 t and 2 t + 1, rounded, as the other operand of a product."""
    ASM: tl.constexpr = WEIGHTS_BF16 if tl.bfloat16 == TYPE else WEIGHTS_F16
    return tl.inline_asm_elementwise(ASM, "=&r,=&r,f,f,f,f", [a, b, c, d], dtype=TWO_INTS, is_pure=True, pack=1)


@triton.jit
def _added(s: tl.tuple, fade: tl.tuple, p: tl.tuple, v: tl.tuple, N: tl.constexpr, TYPE: tl.constexpr) -> tl.tuple:
    """8 sums with word N of the values."""
    ASM: tl.constexpr = SUMS_BF16 if tl.bfloat16 == TYPE else SUMS_F16
    return tl.inline_asm_elementwise(
        ASM, OF_SUMS,
        [s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], fade[0], fade[1], p[0], p[1],
         v[N], v[4 + N], v[8 + N], v[12 + N], v[16 + N], v[20 + N], v[24 + N], v[28 + N]],
        dtype=EIGHT_FLOATS, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def add_values(sums: tl.tuple, fade: tl.tuple, p: tl.tuple, v: tl.tuple, TYPE: tl.constexpr) -> tl.tuple:
    """Four times 8 sums, times `fade` of either query, plus weights `turned_weights` times values."""
    a, b, c, d = sums
    return _added(a, fade, p, v, 0, TYPE), _added(b, fade, p, v, 1, TYPE), _added(c, fade, p, v, 2, TYPE), _added(d, fade, p, v, 3, TYPE)


@triton.jit
def largest_of_keys(a: tl.tensor, b: tl.tensor) -> tl.tuple:
    """Each over the threads that have the same queries."""
    return tl.inline_asm_elementwise(LARGEST, "=&f,=&f,f,f", [a, b], dtype=TWO_FLOATS, is_pure=True, pack=1)


@triton.jit
def merged(level: tl.tuple, totals: tl.tuple, sums: tl.tuple, GROUP: tl.constexpr) -> tl.tuple:
    """For a program of WARPS warps, which have a part of a piece each, and GROUP queries: of a thread's query, which is its warp, the largest score, the sum of weights,
    and the sums of dims 2 l and 2 l + 1 of either half."""
    ASM: tl.constexpr = MEETING_1 if GROUP <= 2 else (MEETING_2 if GROUP <= 4 else MEETING_4)
    a, b, c, d = sums
    return tl.inline_asm_elementwise(
        ASM, OF_MEETING,
        [a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7],
         c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7], totals[0], totals[1], level[0], level[1]],
        dtype=SIX_FLOATS, is_pure=False, pack=1,
    )  # fmt: skip
