"""Assembly in Triton's interpreter: kernels that have instructions written out are run as they are, so that a test sees what a device would do.

`install()` gives the interpreter `inline_asm_elementwise` for the instructions that the kernels here use. One element a thread (pack=1): thread i of a program
has element i of each tensor, as the default layout of a program's own tensors has it. Registers are [warps, 32]: where warps cannot meet, because nothing is
stored, all run side by side, which saves most of the time; else one after another, from one barrier to the next.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from triton.runtime import interpreter

Words = NDArray[np.uint32]
WARP = 32
SHARED: NDArray[np.uint32] = np.full(192 << 8, 0x7FC00000, dtype=np.uint32)  # NaN at first; what a program leaves there the next one finds
PLACES: dict[str, int] = {}  # where arrays begin in it, in bytes
LANE = np.arange(WARP)
GROUP, THREAD = LANE // 4, LANE % 4


def _floats(x: Words) -> NDArray[np.float32]:
    return x.view(np.float32)


def _bits(x: NDArray[Any]) -> Words:
    return np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)


@lru_cache
def _constant(number: int, warps: int) -> Words:
    return np.full((warps, WARP), number, dtype=np.uint32)


def _permuted(a: Words, b: Words, selector: Words) -> Words:
    """prmt.b32, without signs."""
    both = np.stack([a, b], -1).view(np.uint8)
    which = (selector[..., None] >> np.arange(0, 16, 4, dtype=np.uint32)) & np.uint32(7)
    return np.take_along_axis(both, which.astype(np.int64), -1).view(np.uint32)[..., 0]


def _three(a: Words, b: Words, c: Words, table: Words) -> Words:
    """lop3.b32."""
    out, t = np.zeros_like(a), int(table[0, 0])
    for i in range(8):
        if t >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def _packed(high: Words, low: Words) -> Words:
    """cvt.rn.f16x2.f32."""
    with np.errstate(over="ignore"):
        return np.stack([_floats(low), _floats(high)], -1).astype(np.float16).view(np.uint32)[..., 0]


def _packed_bf16(high: Words, low: Words) -> Words:
    """cvt.rn.bf16x2.f32, of numbers that are no NaN."""
    high, low = ((x + np.uint32(0x7FFF) + (x >> np.uint32(16) & np.uint32(1))) >> np.uint32(16) for x in (high, low))
    return high << np.uint32(16) | low


def _transposed(x: Words) -> Words:
    """movmatrix.sync.aligned.m8n8.trans.b16: thread 4 g + t has columns 2 t and 2 t + 1 of row g."""
    matrix = np.ascontiguousarray(x).view(np.uint16).reshape(-1, 8, 8)
    return np.ascontiguousarray(matrix.transpose(0, 2, 1)).view(np.uint32).reshape(x.shape)


def _fragments(shape: tuple[int, int], words: int, row: Callable[[int, int], Any], column: Callable[[int, int], Any]) -> NDArray[np.int64]:
    """Where an operand's numbers are among [words, 32, 2] halves."""
    found, numbers = np.full(shape, -1), np.arange(words * WARP * 2).reshape(words, WARP, 2)
    for i in range(words):
        for half in range(2):
            found[row(i, half), column(i, half)] = numbers[i, :, half]
    assert found.min() == 0
    return found


# mma.sync.aligned.m16n8k16.row.col.f32, of float16 or bfloat16, by the layouts that the PTX manual gives for its fragments
LEFT = _fragments((16, 16), 4, lambda i, half: GROUP + 8 * (i % 2), lambda i, half: 2 * THREAD + half + 8 * (i // 2))
RIGHT = _fragments((16, 8), 2, lambda i, half: 2 * THREAD + half + 8 * i, lambda i, half: GROUP)


def _operand(words: list[Words], places: NDArray[np.int64], kind: str) -> NDArray[np.float64]:
    halves = np.stack(words, 1).view(np.uint16).reshape(len(words[0]), -1)[:, places]
    numbers = halves.view(np.float16) if kind == "f16" else (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return numbers.astype(np.float64)


def _product(kind: str, a: list[Words], b: list[Words], c: list[Words]) -> list[Words]:
    """mma.sync.aligned.m16n8k16.row.col.f32.KIND.KIND.f32."""
    result = _operand(a, LEFT, kind) @ _operand(b, RIGHT, kind)
    return [_bits(_floats(c[i]) + result[:, GROUP + 8 * (i // 2), 2 * THREAD + i % 2]) for i in range(4)]


def _load(addresses: NDArray[np.int64], live: NDArray[np.bool_], words: int) -> list[Words]:
    """What live threads ask for; another one gets what one of these does, which nobody looks at."""
    if not live.any():
        return [np.zeros(addresses.shape, np.uint32)] * words
    wanted = addresses[live]
    first, size = int(wanted.min()), int(wanted.max() - wanted.min()) + 4 * words
    assert not (wanted % 4).any(), "a number across two words"
    memory = np.frombuffer((ctypes.c_uint8 * (1 << size.bit_length())).from_address(first), np.uint32)  # a view, of which only what is asked for is read
    places = np.where(live, addresses - first, 0) // 4
    return [memory[places + i] for i in range(words)]


def _fused(a: Words, b: Words, c: Words) -> Words:
    """fma.rn.f32: a product of two float32 is exact in float64."""
    return _bits(_floats(a).astype(np.float64) * _floats(b) + _floats(c))


def _power(x: Words) -> Words:
    """ex2.approx.ftz.f32, without its error."""
    return _bits(np.exp2(_floats(x).astype(np.float64)))


def _compared(how: str, a: Words, b: Words) -> NDArray[np.bool_]:
    compare: Callable[[Any, Any], Any] = {"eq": np.equal, "ne": np.not_equal, "lt": np.less}[how.split(".")[0]]
    found: NDArray[np.bool_] = compare(_floats(a), _floats(b)) if how.endswith("f32") else compare(a, b)
    return found


_SIMPLE: dict[str, Callable[..., Words]] = {
    "mov.b32": lambda a: a.copy(), "mov.u32": lambda a: a.copy(), "mov.f32": lambda a: a.copy(),
    "and.b32": np.bitwise_and, "or.b32": np.bitwise_or, "xor.b32": np.bitwise_xor, "shl.b32": np.left_shift, "shr.u32": np.right_shift,
    "add.u32": np.add, "mad.lo.u32": lambda a, b, c: a * b + c, "sub.f32": lambda a, b: _bits(_floats(a) - _floats(b)), "fma.rn.f32": _fused,
    "ex2.approx.ftz.f32": _power,
    "add.f32": lambda a, b: _bits(_floats(a) + _floats(b)), "mul.f32": lambda a, b: _bits(_floats(a) * _floats(b)),
    "max.f32": lambda a, b: _bits(np.fmax(_floats(a), _floats(b))),
    "prmt.b32": _permuted, "lop3.b32": _three, "cvt.rn.f16x2.f32": _packed, "cvt.rn.bf16x2.f32": _packed_bf16, "movmatrix.sync.aligned.m8n8.trans.b16": _transposed,
    "shfl.sync.bfly.b32": lambda a, lanes, _clamp, _mask: a[:, LANE ^ int(lanes[0, 0])],
}  # fmt: skip


@dataclass
class _Statement:
    """One instruction, or a label (without a name)."""

    name: str
    operands: list[list[str]]  # of each its parts, where it is a vector
    guard: str = ""
    unless: bool = False  # runs where the guard is not set
    label: str = ""
    words: int = 1  # of a vector
    numbers: dict[str, int] = field(default_factory=dict)  # parts that are immediate

    @classmethod
    def read(cls, text: str) -> _Statement:
        """One statement as it is written."""
        if text.endswith(":"):
            return cls("", [], label=text[:-1])
        if text.startswith(".shared"):
            return cls(".shared", [text.split()[-1].removesuffix("]").split("[")])
        guard = ""
        if text.startswith("@"):
            guard, text = text.split(None, 1)
        name, _, rest = text.partition(" ")
        operands = [[part.strip() for part in found.strip("{}[]").split(",")] for found in re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", rest)]
        words = int(found[1]) if (found := re.search(r"\.v(\d)", name)) else 1
        numbers = {part: _number(part) for operand in operands for part in operand if re.match(r"-?\d", part)}
        return cls(name, operands, guard.lstrip("@!"), guard.startswith("@!"), words=words, numbers=numbers)


def _number(text: str) -> int:
    return (int(text[2:], 16) if text.startswith("0f") else int(text, 0)) & 0xFFFFFFFF


@lru_cache
def _statements(asm: str) -> tuple[list[_Statement], bool]:
    """And whether warps may meet: what one stores another may load."""
    text = asm.strip()
    parts = re.sub(r":\s", ":;", text.removeprefix("{").removesuffix("}") if text.startswith("{\n") else text).split(";")
    found = [_Statement.read(part.strip()) for part in parts if part.strip() and not part.strip().startswith(".reg")]
    return found, any(one.name.startswith(("st.", "bar.", "ld.shared", ".shared")) for one in found)


class _Parted(Exception):
    """Warps that ran side by side go different ways."""


class _Warps:
    """Registers of warps, and what instructions do to them and to memory."""

    def __init__(self, places: list[NDArray[Any]], first: int) -> None:
        self.count = len(places[0])
        threads = np.arange(first, first + self.count * WARP, dtype=np.uint32).reshape(self.count, WARP)
        self.registers: dict[str, NDArray[Any]] = {f"${i}": place for i, place in enumerate(places)}
        self.registers |= {"%laneid": threads % WARP, "%tid.x": threads}

    def addresses(self, operand: list[str]) -> NDArray[np.int64]:
        name, _, offset = operand[0].partition("+")
        at: NDArray[np.int64] = self.registers[name.strip()].astype(np.int64) + (int(offset, 0) if offset else 0)
        return at

    def predicate(self, name: str) -> NDArray[np.bool_]:
        return self.registers[name].astype(bool)

    def run(self, statements: list[_Statement]) -> Iterator[None]:
        """Up to the end, with a stop at each barrier."""
        at = 0
        while at < len(statements):
            one = statements[at]
            at += 1
            if one.name == "bar.sync":
                yield
            elif one.name == "bra":
                if self.goes(one):
                    at = next(i for i, other in enumerate(statements) if other.label == one.operands[0][0])
            elif not one.label:
                self.step(one)

    def live(self, one: _Statement) -> NDArray[np.bool_] | None:
        """The threads that run a statement; None: all."""
        if not one.guard:
            return None
        found = self.predicate(one.guard) ^ one.unless
        return None if found.all() else found

    def goes(self, one: _Statement) -> bool:
        live = self.live(one)
        if live is None:
            return True
        some = live.any(axis=1)
        assert not (some & ~live.all(axis=1)).any(), "the threads of a warp part"
        if some.any():
            raise _Parted
        return False

    def step(self, one: _Statement) -> None:
        live = self.live(one)
        if one.name == ".shared":
            name, size = one.operands[0]
            assert int(size) <= 48 << 10
            self.registers[name] = _constant(PLACES.setdefault(name, (48 << 10) * len(PLACES)), self.count)
        elif one.name.startswith("st."):
            self.store(one, np.ones((self.count, WARP), bool) if live is None else live)
        else:
            assert live is None or one.name.startswith("ld.global"), f"{one.name}: not modelled where not all threads are live"
            values = self.computed(one, live)
            if live is not None:
                values = [np.where(live, value, self.value(one, target)) for target, value in zip(one.operands[0], values, strict=True)]
            self.registers.update(zip(one.operands[0], values, strict=True))

    def store(self, one: _Statement, live: NDArray[np.bool_]) -> None:
        where, values = self.addresses(one.operands[0])[live], [self.value(one, part)[live] for part in one.operands[1]]
        if one.name.startswith("st.shared"):
            for i, value in enumerate(values):
                SHARED[where // 4 + i] = value
            return
        for i, value in enumerate(values):
            for address, number in zip(where, value, strict=True):
                ctypes.c_uint32.from_address(int(address) + 4 * i).value = int(number)

    def value(self, one: _Statement, part: str) -> Words:
        return _constant(one.numbers[part], self.count) if part in one.numbers else self.registers[part]

    def computed(self, one: _Statement, live: NDArray[np.bool_] | None) -> list[NDArray[Any]]:
        name, operands = one.name, one.operands[1:]
        if name in _SIMPLE:
            return [_SIMPLE[name](*[self.value(one, part) for (part,) in operands])]
        if name.startswith("mma"):
            return list(_product(name.split(".")[-2], *([self.value(one, part) for part in operand] for operand in operands)))
        if name.startswith("ld.shared"):
            return [SHARED[self.addresses(operands[0]) // 4 + i] for i in range(one.words)]
        if name.startswith("ld.global"):
            return list(_load(self.addresses(operands[0]), np.ones((self.count, WARP), bool) if live is None else live, one.words))
        if name.startswith("setp"):
            how = name.removeprefix("setp.")
            found_all = _compared(how.replace(".and", ""), *(self.value(one, part) for (part,) in operands[:2]))
            return [found_all & self.predicate(operands[2][0]) if ".and" in how else found_all]
        if name == "vote.sync.all.pred":
            return [np.repeat(self.predicate(operands[0][0]).all(axis=1, keepdims=True), WARP, axis=1)]
        assert name in ("selp.b32", "selp.f32"), f"no model of {name}"
        return [np.where(self.predicate(operands[2][0]), self.value(one, operands[0][0]), self.value(one, operands[1][0]))]


@dataclass
class _Result:
    """What an instruction of Triton's returns."""

    handles: list[Any]

    def get_result(self, number: int) -> Any:
        """One of several results."""
        return self.handles[number]


def _side_by_side(statements: list[_Statement], given: list[Words], outputs: int) -> list[Words]:
    warps = _Warps([*[_constant(0, len(given[0]))] * outputs, *given], 0)
    for _ in warps.run(statements):
        raise AssertionError("a barrier")
    return [warps.registers[f"${i}"] for i in range(outputs)]


def _one_by_one(statements: list[_Statement], given: list[Words], outputs: int) -> list[Words]:
    warps = [_Warps([*[_constant(0, 1)] * outputs, *(x[i : i + 1] for x in given)], i * WARP) for i in range(len(given[0]))]
    running = [warp.run(statements) for warp in warps]
    while running:  # each from one barrier to the next
        running = [steps for steps in running if next(steps, True) is None]
        assert len(running) in (0, len(warps)), "not all warps meet at a barrier"
    return [np.concatenate([warp.registers[f"${i}"] for warp in warps]) for i in range(outputs)]


def _run(_builder: object, asm: str, _constraints: str, values: list[Any], types: list[Any], _pure: bool, pack: int) -> _Result:
    assert pack == 1
    statements, meet = _statements(asm)
    given = [np.ascontiguousarray(value.data) for value in values]
    shape = given[0].shape
    rows = [(x if x.itemsize == 8 else x.view(np.uint32)).reshape(-1, WARP) for x in given]
    try:
        results = (_one_by_one if meet else _side_by_side)(statements, rows, len(types))
    except _Parted:
        results = _one_by_one(statements, rows, len(types))
    scalars = [kind.scalar for kind in types]
    kinds = [np.float32 if str(kind) == "fp32" else np.int32 for kind in scalars]
    return _Result([interpreter.TensorHandle(r.view(kind).reshape(shape).copy(), t) for r, kind, t in zip(results, kinds, scalars, strict=True)])


def install() -> None:
    """From now on the interpreter of this process runs assembly."""
    interpreter.InterpreterBuilder.create_inline_asm = _run
