"""Keys and values of a quantised cache straight from memory in the registers from which tensor cores take them: no shared memory, and no conversion but a few
operations on bits.

A tensor here has a number for each thread of a warp, [32]. Thread 4 g + t of it has, of a group of 16 keys,
- keys g and g + 8: dims 16 t .. 16 t + 15 of either half. Which dims a product's inputs are does not matter, as long as keys and queries have the same.
- values of keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9: dims 8 g .. 8 g + 7 of either half.
- scores and weights (mma's result) of keys g and g + 8 and queries 2 t and 2 t + 1.
- sums (mma's result) of queries 2 t and 2 t + 1: those dims 8 g .. 8 g + 7 of either half.

A number n of 8 or 4 bits becomes a float16 by being one: the bits of n are those of n * 2^-24, a subnormal number, which tensor cores multiply exactly. Of 4 bits
the high half of a byte is 16 times as large. A float8 is moved to float16's bits, where it stands for a 256th. So `units` says what sums are to be multiplied by.
"""

from __future__ import annotations

import triton
import triton.language as tl

MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#: dims of half a row
HALF = tl.constexpr(64)


def _loads(width: int, *offsets: int) -> str:
    """Loads of `width` words from a pointer, the only operand, and offsets in bytes."""
    text = ""
    for i, offset in enumerate(offsets):
        words = ", ".join(f"${i * width + n}" for n in range(width))
        kind, target = (f".L1::no_allocate.v{width}", f"{{{words}}}") if width > 1 else ("", words)
        text += f"ld.global{kind}.u32 {target}, [${len(offsets) * width} + {offset}];\n"
    return text


def _again(loads: str, words: int) -> str:
    """The same loads, of which a thread keeps the words that it has (the first operands) where the last operand is 0."""
    text = "{\n.reg .pred p;\n" + "".join(f"mov.b32 ${i}, ${words + i};\n" for i in range(words)) + f"setp.ne.s32 p, ${2 * words + 1}, 0;\n"
    return text + "".join(f"@p {line}\n" for line in loads.replace(f"[${words} ", f"[${2 * words} ").splitlines()) + "}"


def _two_and_two(width: str, source: str, first: str, second: str) -> str:
    """Bytes 0 and 2, and 1 and 3, of a word as halves."""
    if width == "8":
        return f"and.b32 {first}, {source}, 0x00FF00FF;\nprmt.b32 {second}, {source}, 0, 0x4341;\n"
    text = f"shl.b32 u, {source}, 8;\n"
    for word, target in (("u", first), (source, second)):
        text += f"shr.u32 v, {word}, 1;\nand.b32 w, {word}, 0x80008000;\nlop3.b32 {target}, v, 0x3F803F80, w, 0xEA;\n"
    return text


def _nibbles(a: str, b: str, lower: list[str], higher: list[str]) -> str:
    """Of words a and b: low halves of bytes 0 and 2 of each, then of bytes 1 and 3, and the high halves likewise."""
    text = f"shr.u32 u, {a}, 8;\nshr.u32 v, {b}, 8;\n"
    for mask, targets in (("0x000F000F", lower), ("0x00F000F0", higher)):
        for source, target in zip((a, b, "u", "v"), targets, strict=True):
            text += f"and.b32 {target}, {source}, {mask};\n"
    return text


def _products(width: str) -> str:
    """Results: scores c0..c3. Operands: words of key g, then of key g + 8 (wider than 4 bits: the lower half's four, then the upper half's), then 16 of q: for
    each word of half a row bytes 0 and 2, 1 and 3 of the lower half, the same of the upper half."""
    words = 4 if width == "4" else 8
    a, b, q = 4, 4 + words, 4 + 2 * words
    text = "{\n.reg .b32 x<8>, u, v, w;\n.reg .f32 c<4>, d<4>;\n" + "".join(f"mov.f32 {n}{i}, 0f00000000;\n" for n in "cd" for i in range(4))
    for i in range(4):
        if width == "4":
            text += _nibbles(f"${a + i}", f"${b + i}", ["x0", "x1", "x2", "x3"], ["x4", "x5", "x6", "x7"])
        else:
            for source, first, second in ((a + i, "x0", "x2"), (b + i, "x1", "x3"), (a + 4 + i, "x4", "x6"), (b + 4 + i, "x5", "x7")):
                text += _two_and_two(width, f"${source}", first, second)
        text += f"{MMA} {{c0, c1, c2, c3}}, {{x0, x1, x2, x3}}, {{${q + 4 * i}, ${q + 4 * i + 1}}}, {{c0, c1, c2, c3}};\n"
        text += f"{MMA} {{d0, d1, d2, d3}}, {{x4, x5, x6, x7}}, {{${q + 4 * i + 2}, ${q + 4 * i + 3}}}, {{d0, d1, d2, d3}};\n"
    return text + "".join(f"add.f32 ${i}, c{i}, d{i};\n" for i in range(4)) + "}"


def _sums(width: str, *, upper: bool) -> str:
    """Results: 8 sums, of bytes 0 and 1 (`upper`: 2 and 3) of a word: of each two of the lower half, two of the upper. Operands: what they were, what they
    fade by for either query, whether that is 1 for all, weights of keys 2 t and 2 t + 1, and 2 t + 8 and 2 t + 9; then a word of each of the four keys (wider than
    4 bits: one of either half)."""
    select, k = "0x7632" if upper else "0x5410", 21
    text = "{\n.reg .pred p;\n.reg .b32 x<4>, a<8>, u, v, w;\n" + "".join(f"mov.f32 ${i}, ${8 + i};\n" for i in range(8))
    text += "setp.ne.s32 p, $18, 0;\n@p bra SAME;\n" + "".join(f"mul.f32 ${i}, ${i}, ${16 + i % 2};\n" for i in range(8)) + "SAME:\n"
    if width == "4":
        text += f"prmt.b32 x0, ${k}, ${k + 1}, {select};\nprmt.b32 x1, ${k + 2}, ${k + 3}, {select};\n"
        text += _nibbles("x0", "x1", ["a0", "a2", "a4", "a6"], ["a1", "a3", "a5", "a7"])
    else:
        for i, (one, other) in enumerate(((k, k + 2), (k + 1, k + 3), (k + 4, k + 6), (k + 5, k + 7))):
            text += f"prmt.b32 x{i}, ${one}, ${other}, {select};\n" + _two_and_two(width, f"x{i}", f"a{i}", f"a{i + 4}")
    text += f"{MMA} {{$0, $1, $2, $3}}, {{a0, a1, a2, a3}}, {{$19, $20}}, {{$0, $1, $2, $3}};\n"
    return text + f"{MMA} {{$4, $5, $6, $7}}, {{a4, a5, a6, a7}}, {{$19, $20}}, {{$4, $5, $6, $7}};\n}}"


def _reduced(count: int, how: str) -> str:
    """Over the threads that differ in g only."""
    text = f"{{\n.reg .f32 x<{count}>;\n" + "".join(f"mov.f32 ${i}, ${count + i};\n" for i in range(count))
    for lanes in (4, 8, 16):
        text += "".join(f"shfl.sync.bfly.b32 x{i}, ${i}, {lanes}, 31, -1;\n" for i in range(count))
        text += "".join(f"{how}.f32 ${i}, ${i}, x{i};\n" for i in range(count))
    return text + "}"


def kinds(*parts: tuple[str, int]) -> tl.constexpr:
    """Constraints of operands."""
    return tl.constexpr(",".join(kind for kind, count in parts for _ in range(count)))


# rows of 4 bits are 64 bytes apart, others 128; scales 4
KEYS_4, KEYS_8 = tl.constexpr(_loads(4, 0, 8 * 64)), tl.constexpr(_loads(4, 0, 64, 8 * 128, 8 * 128 + 64))
VALUES_4 = tl.constexpr(_loads(2, *(row * 64 for row in (0, 1, 8, 9))))
VALUES_8 = tl.constexpr(_loads(2, *(row * 128 + half for row in (0, 1, 8, 9) for half in (0, 64))))
WORD, SCALES = tl.constexpr(_loads(1, 0)), tl.constexpr(_loads(1, 0, 8 * 4))
KEYS_4_AGAIN, KEYS_8_AGAIN = tl.constexpr(_again(KEYS_4.value, 8)), tl.constexpr(_again(KEYS_8.value, 16))
VALUES_4_AGAIN, VALUES_8_AGAIN = tl.constexpr(_again(VALUES_4.value, 8)), tl.constexpr(_again(VALUES_8.value, 16))
SCALES_AGAIN = tl.constexpr(_again(SCALES.value, 2))
PRODUCTS_4, PRODUCTS_8, PRODUCTS_FP8 = (tl.constexpr(_products(width)) for width in ("4", "8", "fp8"))
LOWER_4, LOWER_8, LOWER_FP8 = (tl.constexpr(_sums(width, upper=False)) for width in ("4", "8", "fp8"))
UPPER_4, UPPER_8, UPPER_FP8 = (tl.constexpr(_sums(width, upper=True)) for width in ("4", "8", "fp8"))
LARGEST, SUMS = tl.constexpr(_reduced(3, "max")), tl.constexpr(_reduced(4, "add"))
#: whether both are 1 for the whole warp
ALL_ONES = tl.constexpr("""{
.reg .pred p;
setp.eq.f32 p, $1, 0f3F800000;
setp.eq.and.f32 p, $2, 0f3F800000, p;
vote.sync.all.pred p, p, -1;
selp.b32 $0, 1, 0, p;
}""")
#: weights [key, query] of the result of a product as operands [query, key] of the next one
TURNED_WEIGHTS = tl.constexpr("""{
.reg .b32 x, y;
cvt.rn.f16x2.f32 x, $3, $2;
cvt.rn.f16x2.f32 y, $5, $4;
movmatrix.sync.aligned.m8n8.trans.b16 $0, x;
movmatrix.sync.aligned.m8n8.trans.b16 $1, y;
}""")
STORE = tl.constexpr("""{
.reg .pred p;
setp.ne.s32 p, $2, 0;
@p st.global.v4.f32 [$1], {$3, $4, $5, $6};
mov.u32 $0, 0;
}""")
TWO_AGAIN, EIGHT_AGAIN, SIXTEEN_AGAIN = (kinds(("=&r", n), ("r", n), ("l", 1), ("r", 1)) for n in (2, 8, 16))
EIGHT_FROM_ONE, SIXTEEN_FROM_ONE = kinds(("=&r", 8), ("l", 1)), kinds(("=&r", 16), ("l", 1))
OF_PRODUCTS_4, OF_PRODUCTS_8 = kinds(("=&f", 4), ("r", 24)), kinds(("=&f", 4), ("r", 32))
OF_SUMS_4, OF_SUMS_8 = kinds(("=&f", 8), ("f", 10), ("r", 7)), kinds(("=&f", 8), ("f", 10), ("r", 11))
OF_LARGEST, OF_TOTALS = kinds(("=&f", 3), ("f", 3)), kinds(("=&f", 4), ("f", 4))
EIGHT_WORDS, SIXTEEN_WORDS, EIGHT_FLOATS = (tl.constexpr((kind,) * count) for kind, count in ((tl.int32, 8), (tl.int32, 16), (tl.float32, 8)))
TWO_INTS, THREE_FLOATS, FOUR_FLOATS = (tl.constexpr((kind,) * count) for kind, count in ((tl.int32, 2), (tl.float32, 3), (tl.float32, 4)))


@triton.jit
def word_at(pointer: tl.tensor) -> tl.tensor:
    """A word for each thread. Triton would load neighbours' words in another order and exchange them."""
    return tl.inline_asm_elementwise(WORD, "=r,l", [pointer], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def scales_at(pointer: tl.tensor) -> tl.tuple:
    """Scales with offsets of keys g and g + 8; `pointer`: of key g."""
    return tl.inline_asm_elementwise(SCALES, "=&r,=&r,l", [pointer], dtype=TWO_INTS, is_pure=False, pack=1)


@triton.jit
def _words_at(pointer: tl.tensor, WIDTH: tl.constexpr, ASM_4: tl.constexpr, ASM_8: tl.constexpr) -> tl.tuple:
    if WIDTH == "4":
        words = tl.inline_asm_elementwise(ASM_4, EIGHT_FROM_ONE, [pointer], dtype=EIGHT_WORDS, is_pure=False, pack=1)
    else:
        words = tl.inline_asm_elementwise(ASM_8, SIXTEEN_FROM_ONE, [pointer], dtype=SIXTEEN_WORDS, is_pure=False, pack=1)
    return words


@triton.jit
def keys_at(pointer: tl.tensor, WIDTH: tl.constexpr) -> tl.tuple:
    """Words of keys g and g + 8; `pointer`: the first of key g that the thread has."""
    return _words_at(pointer, WIDTH, KEYS_4, KEYS_8)


@triton.jit
def values_at(pointer: tl.tensor, WIDTH: tl.constexpr) -> tl.tuple:
    """Words of values 2 t, 2 t + 1, 2 t + 8 and 2 t + 9; `pointer`: the first of value 2 t that the thread has."""
    return _words_at(pointer, WIDTH, VALUES_4, VALUES_8)


@triton.jit
def _words_again(old: tl.tuple, pointer: tl.tensor, again: tl.tensor, WIDTH: tl.constexpr, ASM_4: tl.constexpr, ASM_8: tl.constexpr) -> tl.tuple:
    if WIDTH == "4":
        words = tl.inline_asm_elementwise(
            ASM_4, EIGHT_AGAIN, [old[0], old[1], old[2], old[3], old[4], old[5], old[6], old[7], pointer, again], dtype=EIGHT_WORDS, is_pure=False, pack=1
        )
    else:
        words = tl.inline_asm_elementwise(
            ASM_8, SIXTEEN_AGAIN,
            [old[0], old[1], old[2], old[3], old[4], old[5], old[6], old[7], old[8], old[9], old[10], old[11], old[12], old[13], old[14], old[15], pointer, again],
            dtype=SIXTEEN_WORDS, is_pure=False, pack=1,
        )  # fmt: skip
    return words


@triton.jit
def keys_again(old: tl.tuple, pointer: tl.tensor, again: tl.tensor, WIDTH: tl.constexpr) -> tl.tuple:
    """`keys_at` for threads where `again` is not 0; the others keep what they have."""
    return _words_again(old, pointer, again, WIDTH, KEYS_4_AGAIN, KEYS_8_AGAIN)


@triton.jit
def values_again(old: tl.tuple, pointer: tl.tensor, again: tl.tensor, WIDTH: tl.constexpr) -> tl.tuple:
    """`values_at` likewise."""
    return _words_again(old, pointer, again, WIDTH, VALUES_4_AGAIN, VALUES_8_AGAIN)


@triton.jit
def scales_again(old: tl.tuple, pointer: tl.tensor, again: tl.tensor) -> tl.tuple:
    """`scales_at` likewise."""
    return tl.inline_asm_elementwise(SCALES_AGAIN, TWO_AGAIN, [old[0], old[1], pointer, again], dtype=TWO_INTS, is_pure=False, pack=1)


@triton.jit
def products(k: tl.tuple, q: tl.tuple, WIDTH: tl.constexpr) -> tl.tuple:
    """Keys g and g + 8 times queries 2 t and 2 t + 1."""
    if WIDTH == "4":
        found = tl.inline_asm_elementwise(
            PRODUCTS_4, OF_PRODUCTS_4,
            [k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7], q[0], q[1], q[2], q[3], q[4], q[5], q[6], q[7], q[8], q[9], q[10], q[11], q[12], q[13], q[14], q[15]],
            dtype=FOUR_FLOATS, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        ASM: tl.constexpr = PRODUCTS_8 if WIDTH == "8" else PRODUCTS_FP8
        found = tl.inline_asm_elementwise(
            ASM, OF_PRODUCTS_8,
            [k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7], k[8], k[9], k[10], k[11], k[12], k[13], k[14], k[15],
             q[0], q[1], q[2], q[3], q[4], q[5], q[6], q[7], q[8], q[9], q[10], q[11], q[12], q[13], q[14], q[15]],
            dtype=FOUR_FLOATS, is_pure=True, pack=1,
        )  # fmt: skip
    return found


@triton.jit
def turned_weights(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tuple:
    """Weights of keys g (a, b) and g + 8 (c, d) and queries 2 t and 2 t + 1, rounded, as the other operand of a product."""
    return tl.inline_asm_elementwise(TURNED_WEIGHTS, "=&r,=&r,f,f,f,f", [a, b, c, d], dtype=TWO_INTS, is_pure=True, pack=1)


@triton.jit
def _added(
    s: tl.tuple, fade: tl.tuple, p: tl.tuple, v: tl.tuple, WORD_NUMBER: tl.constexpr, UPPER: tl.constexpr, WIDTH: tl.constexpr
) -> tl.tuple:  # fmt: skip
    """8 sums with the values of two bytes of a word."""
    if WIDTH == "4":
        ASM_4: tl.constexpr = UPPER_4 if UPPER else LOWER_4
        found = tl.inline_asm_elementwise(
            ASM_4, OF_SUMS_4,
            [s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], fade[0], fade[1], fade[2], p[0], p[1],
             v[WORD_NUMBER], v[2 + WORD_NUMBER], v[4 + WORD_NUMBER], v[6 + WORD_NUMBER]],
            dtype=EIGHT_FLOATS, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        UPPER_ASM: tl.constexpr = UPPER_8 if WIDTH == "8" else UPPER_FP8
        LOWER_ASM: tl.constexpr = LOWER_8 if WIDTH == "8" else LOWER_FP8
        ASM_8: tl.constexpr = UPPER_ASM if UPPER else LOWER_ASM
        found = tl.inline_asm_elementwise(
            ASM_8, OF_SUMS_8,
            [s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], fade[0], fade[1], fade[2], p[0], p[1],
             v[WORD_NUMBER], v[2 + WORD_NUMBER], v[4 + WORD_NUMBER], v[6 + WORD_NUMBER],
             v[8 + WORD_NUMBER], v[10 + WORD_NUMBER], v[12 + WORD_NUMBER], v[14 + WORD_NUMBER]],
            dtype=EIGHT_FLOATS, is_pure=True, pack=1,
        )  # fmt: skip
    return found


@triton.jit
def add_values(sums: tl.tuple, fade: tl.tuple, p: tl.tuple, v: tl.tuple, WIDTH: tl.constexpr) -> tl.tuple:
    """Four times 8 sums, times `fade` of either query (whose third says that both are 1 in all threads), plus weights `turned_weights` times values."""
    a, b, c, d = sums
    a, b = _added(a, fade, p, v, 0, False, WIDTH), _added(b, fade, p, v, 0, True, WIDTH)
    c, d = _added(c, fade, p, v, 1, False, WIDTH), _added(d, fade, p, v, 1, True, WIDTH)
    return a, b, c, d


@triton.jit
def largest_of_keys(a: tl.tensor, b: tl.tensor, c: tl.tensor) -> tl.tuple:
    """Each over the threads that have the same queries."""
    return tl.inline_asm_elementwise(LARGEST, OF_LARGEST, [a, b, c], dtype=THREE_FLOATS, is_pure=True, pack=1)


@triton.jit
def sums_of_keys(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tuple:
    """Each over the threads that have the same queries."""
    return tl.inline_asm_elementwise(SUMS, OF_TOTALS, [a, b, c, d], dtype=FOUR_FLOATS, is_pure=True, pack=1)


@triton.jit
def all_ones(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """1 where both are 1 in every thread, else 0: int32."""
    return tl.inline_asm_elementwise(ALL_ONES, "=r,f,f", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _store_four(pointer: tl.tensor, live: tl.tensor, a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tensor:
    return tl.inline_asm_elementwise(STORE, "=r,l,r,f,f,f,f", [pointer.to(tl.int64), live.to(tl.int32), a, b, c, d], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def store_sums(
    pointer: tl.tensor, live: tl.tensor, sums: tl.tuple, factor: tl.tensor, offset: tl.tensor, UPPER: tl.constexpr, ODD: tl.constexpr
) -> None:  # fmt: skip
    """The sums, times and plus something, of a thread's eight dims of either half for one of its queries, where live."""
    a, b, c, d = sums
    N: tl.constexpr = 2 * UPPER + ODD
    _ = _store_four(pointer, live, a[N] * factor + offset, a[N + 4] * factor + offset, b[N] * factor + offset, b[N + 4] * factor + offset)
    _ = _store_four(pointer + 4, live, c[N] * factor + offset, c[N + 4] * factor + offset, d[N] * factor + offset, d[N + 4] * factor + offset)
