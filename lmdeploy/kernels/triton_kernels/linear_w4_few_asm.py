"""Assembly of `linear_w4_few.py`: what a thread does with its words of a group of 128 inputs, and how they come to it.

Tensor cores multiply 16 channels by 8 rows of x, 16 inputs at a time. A thread (g, t) of a warp has 32 of a group's inputs, of channels g and g + 8 and of row g
of x: four words of numbers a channel, nibble n of word i being input 8 i + n. Nibbles 0 and 4, 1 and 5 make one product, 2 and 6, 3 and 7 the next one.

A nibble at bit 0 or 4 of a bfloat16 is a subnormal number, n * 2^-133 or n * 2^-129 (exponents 0 and 1 stand for the same power of two). So inputs are
multiplied by 2^96 or 2^92, which is exact, and sums by 2^37: eight weights take five operations, and nothing has to be taken from the sum but the zero point.
Inputs from 2^32 on become infinite.
"""

from __future__ import annotations

#: What the sums are to be multiplied by.
UNIT = 2.0**37
_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"


def kinds(*parts: tuple[str, int]) -> str:
    """Constraints: each kind so many times."""
    return ",".join(kind for kind, count in parts for _ in range(count))


def _numbers(word: str, to: str) -> str:
    """Nibbles 0 and 4, 1 and 5, 2 and 6, 3 and 7 of a word, to four registers."""
    return (
        f"and.b32 {to}0, {word}, 0x000F000F;\nand.b32 {to}1, {word}, 0x00F000F0;\nshr.u32 {to}3, {word}, 8;\n"
        f"and.b32 {to}2, {to}3, 0x000F000F;\nand.b32 {to}3, {to}3, 0x00F000F0;\n"
    )


def product(blocks: int) -> tuple[str, str]:
    """A group's part of the totals, of blocks of 8 rows, and its constraints. Results: 4 totals a block. Operands: 4 words of channel g, 4 of channel g + 8; 16 of
    x a block; 4 sums of x a block; the scales of both channels and minus their zero points; the 4 totals a block that were.

    The sums of x have rows 2 t, 2 t + 1, 2 t, 2 t + 1, as the totals have them, of channels g, g, g + 8, g + 8.
    """
    totals = 4 * blocks
    weights, x = totals, totals + 8
    sums = x + 16 * blocks
    scales = sums + totals
    old = scales + 4
    chains = "cd" if blocks == 1 else "c"  # of products that wait for each other; two blocks are two already
    text = f"{{\n.reg .b32 p<4>, q<4>;\n.reg .f32 c<{totals}>, d<{totals}>;\n"
    for i in range(totals):
        text += f"mul.f32 c{i}, ${sums + i // 4 * 4 + i % 2}, ${scales + 2 + i % 4 // 2};\n" + (f"mov.f32 d{i}, 0f00000000;\n" if blocks == 1 else "")
    for word in range(4):
        text += _numbers(f"${weights + word}", "p") + _numbers(f"${weights + 4 + word}", "q")
        for half in (0, 1):
            for block in range(blocks):
                total = ", ".join(f"{chains[half % len(chains)]}{4 * block + i}" for i in range(4))
                at, a, b = x + 16 * block + 4 * word + 2 * half, 2 * half, 2 * half + 1
                text += f"{_MMA} {{{total}}}, {{p{a}, q{a}, p{b}, q{b}}}, {{${at}, ${at + 1}}}, {{{total}}};\n"
    for i in range(totals):
        text += (f"add.f32 c{i}, c{i}, d{i};\n" if blocks == 1 else "") + f"fma.rn.f32 ${i}, c{i}, ${scales + i % 4 // 2}, ${old + i};\n"
    return text + "}", kinds(("=&f", totals), ("r", 8 + 16 * blocks), ("f", 2 * totals + 4))


def sums() -> tuple[str, str]:
    """Sums of 16 words of x over a group: 4 results, as `product` wants them."""
    text = "{\n.reg .b32 u, v;\n.reg .f32 c<4>, d<4>;\n" + "".join(f"mov.f32 {name}{i}, 0f00000000;\n" for name in "cd" for i in range(4))
    text += "mov.b32 u, 0x00010001;\nmov.b32 v, 0x00100010;\n"
    for i in range(8):
        total = ", ".join(f"{'cd'[i % 2]}{n}" for n in range(4))
        text += f"{_MMA} {{{total}}}, {{u, u, v, v}}, {{${4 + 2 * i}, ${5 + 2 * i}}}, {{{total}}};\n"
    return text + "".join(f"add.f32 ${i}, c{i}, d{i};\n" for i in range(4)) + "}", kinds(("=&f", 4), ("r", 16))


def ordered() -> tuple[str, str]:
    """Words of inputs 01, 23, 45, 67 become 04, 15, 26, 37, the first and third times 2^96, the others times 2^92."""
    text = "{\n.reg .b32 a<4>, m, n;\nmov.b32 m, 0x6F806F80;\nmov.b32 n, 0x6D806D80;\n"
    for i, (left, right, halves) in enumerate(((4, 6, "5410"), (4, 6, "7632"), (5, 7, "5410"), (5, 7, "7632"))):
        text += f"prmt.b32 a{i}, ${left}, ${right}, 0x{halves};\n"
    return text + "".join(f"mul.rn.bf16x2 ${i}, a{i}, {'mn'[i % 2]};\n" for i in range(4)) + "}", kinds(("=&r", 4), ("r", 4))


def copied(size: int) -> tuple[str, str]:
    """`size` bytes to shared memory where the last operand is not zero. Results mean nothing."""
    level = "cg" if size == 16 else "ca"
    text = f"{{\n.reg .pred p;\nsetp.ne.s32 p, $3, 0;\n@p cp.async.{level}.shared.global [$1], [$2], {size};\n}}\nmov.u32 $0, 0;"
    return text, "=r,r,l,r"


def words_copied() -> tuple[str, str]:
    """A thread's 16 bytes to shared memory, none where the last operand is zero; L2 fetches the whole line, of which another warp takes the other half. Operands
    are given for each of four elements."""
    text = "cp.async.cg.shared.global.L2::128B [$4], [$8], 16, $12;" + "".join(f" mov.u32 ${i}, 0;" for i in range(4))
    return text, kinds(("=r", 4), ("r", 4), ("l", 4), ("r", 4))


def words_taken() -> tuple[str, str]:
    """A thread's 16 bytes of shared memory."""
    return "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", kinds(("=r", 4), ("r", 4))


def scales_read() -> tuple[str, str]:
    """Scales at the first two addresses, and minus the zero points at the others."""
    text = "{\n.reg .b16 h;\n.reg .b32 u;\n"
    for i in (0, 1):
        text += f"ld.shared.b16 h, [${4 + 4 * i}];\ncvt.f32.f16 ${i}, h;\n"
    for i in (2, 3):  # -(128 + zero), put together from bits
        text += f"ld.shared.u8 u, [${4 + 4 * i}];\nshl.b32 u, u, 16;\nor.b32 u, u, 0xC3000000;\nmov.b32 ${i}, u;\nadd.f32 ${i}, ${i}, 0f43000000;\n"
    return text + "}", kinds(("=&f", 4), ("r", 16))


def totals_stored(blocks: int) -> tuple[str, str]:
    """Totals to shared memory, where the second operand is not zero, and zero in their place; else as they are. A thread's four of a block lie together, a block's
    in 512 bytes."""
    count = 4 * blocks
    text = f"{{\n.reg .pred p;\nsetp.ne.s32 p, ${count + 4}, 0;\n"
    for block in range(blocks):
        totals = ", ".join(f"${count + 8 + 4 * block + i}" for i in range(4))
        text += f"@p st.shared.v4.b32 [${count}+{512 * block}], {{{totals}}};\n"
    text += "".join(f"selp.f32 ${i}, 0f00000000, ${count + 8 + i}, p;\n" for i in range(count))
    return text + "}", kinds(("=&f", count), ("r", 8), ("f", count))


def number_read() -> tuple[str, str]:
    """A number of shared memory, zero where the second operand is."""
    return "{\n.reg .pred p;\nsetp.ne.s32 p, $2, 0;\nmov.f32 $0, 0f00000000;\n@p ld.shared.f32 $0, [$1];\n}", "=&f,r,r"


def x_stored() -> tuple[str, str]:
    """16 bytes to shared memory."""
    return "st.shared.v4.b32 [$4], {$8, $9, $10, $11};" + "".join(f" mov.u32 ${i}, 0;" for i in range(4)), kinds(("=r", 4), ("r", 8))


def sums_stored() -> tuple[str, str]:
    """The first two of a thread's sums to shared memory, where the second operand is not zero."""
    text = "{\n.reg .pred p;\nsetp.ne.s32 p, $8, 0;\n@p st.shared.v2.f32 [$4], {$12, $13};\n}\n"
    return text + "".join(f"mov.u32 ${i}, 0; " for i in range(4)), kinds(("=r", 4), ("r", 8), ("f", 4))


def sums_read() -> tuple[str, str]:
    """Two sums of shared memory, twice, as `product` wants them."""
    return "ld.shared.v2.f32 {$0, $1}, [$4]; mov.f32 $2, $0; mov.f32 $3, $1;", kinds(("=f", 4), ("r", 4))


def sum_read() -> tuple[str, str]:
    """A sum of shared memory, four times."""
    return "ld.shared.f32 $0, [$4]; mov.f32 $1, $0; mov.f32 $2, $0; mov.f32 $3, $0;", kinds(("=f", 4), ("r", 4))
