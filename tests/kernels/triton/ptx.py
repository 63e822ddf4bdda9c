"""Assembly in Triton's interpreter: kernels that have instructions written out are run as they are, warp by warp (from one barrier to the next), so that a test
sees what a device would do.

`install()` gives the interpreter `inline_asm_elementwise` for the instructions that the kernels here use. One element a thread (pack=1): thread i of a program
has element i of each tensor, as the default layout of a program's own tensors has it.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from triton.runtime import interpreter

Words = NDArray[np.uint32]
WARP = 32
SHARED: NDArray[np.uint32] = np.full(96 << 8, 0x7FC00000, dtype=np.uint32)  # NaN at first; what a program leaves there the next one finds
PLACES: dict[str, int] = {}  # where arrays begin in it, in bytes
LANE = np.arange(WARP)
GROUP, THREAD = LANE // 4, LANE % 4


def _floats(x: Words) -> NDArray[np.float32]:
    return x.view(np.float32)


def _bits(x: NDArray[Any]) -> Words:
    return np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)


def _halves(x: Words) -> NDArray[np.float16]:
    """[32, 2] of words of two float16, the lower one first."""
    return np.ascontiguousarray(x).view(np.float16).reshape(WARP, 2)


def _permuted(a: Words, b: Words, selector: Words) -> Words:
    """prmt.b32, without signs."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = np.zeros(WARP, dtype=np.uint64)
    for i in range(4):
        which = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(7)
        out |= ((both >> (which * np.uint64(8))) & np.uint64(255)) << np.uint64(8 * i)
    return out.astype(np.uint32)


def _three(a: Words, b: Words, c: Words, table: Words) -> Words:
    """lop3.b32."""
    out, t = np.zeros(WARP, dtype=np.uint32), int(table[0])
    for i in range(8):
        if t >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def _packed(high: Words, low: Words) -> Words:
    """cvt.rn.f16x2.f32."""
    with np.errstate(over="ignore"):
        pair = np.stack([_floats(low).astype(np.float16), _floats(high).astype(np.float16)], 1)
    return np.ascontiguousarray(pair).view(np.uint32).reshape(WARP)


def _transposed(x: Words) -> Words:
    """movmatrix.sync.aligned.m8n8.trans.b16: thread 4 g + t has columns 2 t and 2 t + 1 of row g."""
    matrix = np.ascontiguousarray(x).view(np.uint16).reshape(8, 8)
    return np.ascontiguousarray(matrix.T).view(np.uint32).reshape(WARP)


def _product(a: list[Words], b: list[Words], c: list[Words]) -> list[Words]:
    """mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32, by the layouts that the PTX manual gives for its fragments."""
    left, right = np.zeros((16, 16), np.float64), np.zeros((16, 8), np.float64)
    for i, word in enumerate(a):
        for half in range(2):
            left[GROUP + 8 * (i % 2), 2 * THREAD + half + 8 * (i // 2)] = _halves(word)[:, half]
    for i, word in enumerate(b):
        for half in range(2):
            right[2 * THREAD + half + 8 * i, GROUP] = _halves(word)[:, half]
    result = left @ right
    return [_bits(_floats(c[i]) + result[GROUP + 8 * (i // 2), 2 * THREAD + i % 2]) for i in range(4)]


def _load(addresses: NDArray[np.int64], words: int) -> list[Words]:
    raw = b"".join(ctypes.string_at(int(address), 4 * words) for address in addresses)
    return [np.ascontiguousarray(column) for column in np.frombuffer(raw, np.uint32).reshape(WARP, words).T]


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
    "prmt.b32": _permuted, "lop3.b32": _three, "cvt.rn.f16x2.f32": _packed, "movmatrix.sync.aligned.m8n8.trans.b16": _transposed,
    "shfl.sync.bfly.b32": lambda a, lanes, _clamp, _mask: a[LANE ^ int(lanes[0])],
}  # fmt: skip


class _Warp:
    """Registers of one warp, and what its instructions do to them and to memory."""

    def __init__(self, places: list[NDArray[Any]], first: int) -> None:
        self.registers: dict[str, NDArray[Any]] = {f"${i}": place for i, place in enumerate(places)}
        self.registers |= {"%laneid": LANE.astype(np.uint32), "%tid.x": (first + LANE).astype(np.uint32)}

    def value(self, operand: str) -> Words:
        operand = operand.strip()
        if operand in self.registers:
            return self.registers[operand]
        number = int(operand[2:], 16) if operand.startswith("0f") else int(operand, 0)
        return np.full(WARP, number & 0xFFFFFFFF, dtype=np.uint32)

    def addresses(self, operand: str) -> NDArray[np.int64]:
        name, _, offset = operand.strip()[1:-1].partition("+")
        at: NDArray[np.int64] = self.registers[name.strip()].astype(np.int64) + (int(offset, 0) if offset else 0)
        return at

    def predicate(self, operand: str) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = self.registers[operand.strip()].astype(bool)
        return found

    def run(self, statements: list[str]) -> Iterator[None]:
        """Up to the end, with a stop at each barrier."""
        at = 0
        while at < len(statements):
            if statements[at].startswith("bar.sync"):
                yield
                at += 1
                continue
            label = self.step(statements[at])
            at = statements.index(label + ":") if label else at + 1

    def step(self, statement: str) -> str:
        """Run one; the label to go on at, if it says so."""
        if statement.endswith(":") or statement.startswith(".reg"):
            return ""
        if statement.startswith(".shared"):
            name, size = statement.split()[-1].removesuffix("]").split("[")
            assert int(size) <= 48 << 10
            self.registers[name] = np.full(WARP, PLACES.setdefault(name, (48 << 10) * len(PLACES)), dtype=np.uint32)
            return ""
        live = np.ones(WARP, dtype=bool)
        if statement.startswith("@"):
            guard, statement = statement.split(None, 1)
            live = self.predicate(guard.lstrip("@!")) ^ guard.startswith("@!")
        name, rest = statement.split(None, 1)
        if name == "bra":
            assert live.all() or not live.any(), "the threads of a warp part"
            return rest.strip() if live.all() else ""
        operands = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", rest)
        if name.startswith("st.shared"):
            for i, part in enumerate(operands[1].strip("{}").split(",")):
                SHARED[self.addresses(operands[0])[live] // 4 + i] = self.value(part)[live]
            return ""
        if name.startswith("st.global"):
            for lane, address in zip(np.flatnonzero(live), self.addresses(operands[0])[live], strict=True):
                for i, part in enumerate(operands[1].strip("{}").split(",")):
                    ctypes.c_uint32.from_address(int(address) + 4 * i).value = int(self.value(part)[lane])
            return ""
        assert live.all() or name.startswith("ld.global"), f"{statement}: not modelled where not all threads are live"
        targets, values = operands[0].strip("{}").split(","), self.computed(name, operands[1:])
        if not live.all():
            values = [np.where(live, value, self.value(target)) for target, value in zip(targets, values, strict=True)]
        self.set(targets, values)
        return ""

    def computed(self, name: str, operands: list[str]) -> list[NDArray[Any]]:
        if name in _SIMPLE:
            return [_SIMPLE[name](*map(self.value, operands))]
        if name.startswith("mma"):
            return list(_product(*([self.value(part) for part in operand.strip("{}").split(",")] for operand in operands)))
        if name.startswith("ld.shared"):
            words = int(found[1]) if (found := re.search(r"\.v(\d)", name)) else 1
            return [SHARED[self.addresses(operands[0]) // 4 + i] for i in range(words)]
        if name.startswith("ld.global"):
            return list(_load(self.addresses(operands[0]), int(found[1]) if (found := re.search(r"\.v(\d)", name)) else 1))
        if name.startswith("setp"):
            how = name.removeprefix("setp.")
            found_all = _compared(how.replace(".and", ""), self.value(operands[0]), self.value(operands[1]))
            return [found_all & self.predicate(operands[2]) if ".and" in how else found_all]
        if name == "vote.sync.all.pred":
            return [np.full(WARP, self.predicate(operands[0]).all())]
        assert name in ("selp.b32", "selp.f32"), f"no model of {name}"
        return [np.where(self.predicate(operands[2]), self.value(operands[0]), self.value(operands[1]))]

    def set(self, targets: list[str], values: list[NDArray[Any]]) -> None:
        for name, value in zip(targets, values, strict=True):
            self.registers[name.strip()] = value


@dataclass
class _Result:
    """What an instruction of Triton's returns."""

    handles: list[Any]

    def get_result(self, number: int) -> Any:
        """One of several results."""
        return self.handles[number]


def _run(_builder: object, asm: str, _constraints: str, values: list[Any], types: list[Any], _pure: bool, pack: int) -> _Result:
    assert pack == 1
    text = asm.strip()
    statements = [s.strip() for s in re.sub(r":\s", ":;", text.removeprefix("{").removesuffix("}") if text.startswith("{\n") else text).split(";") if s.strip()]
    given = [np.ascontiguousarray(value.data) for value in values]
    shape, count = given[0].shape, given[0].size
    results = [np.zeros(count, dtype=np.uint32) for _ in types]
    flat = [x.reshape(-1) if x.itemsize == 8 else x.reshape(-1).view(np.uint32) for x in given]
    parts = [slice(start, start + WARP) for start in range(0, count, WARP)]
    warps = [_Warp([np.zeros(WARP, dtype=np.uint32) for _ in types] + [x[part] for x in flat], part.start) for part in parts]
    running = [warp.run(statements) for warp in warps]
    while running:  # each from one barrier to the next
        running = [steps for steps in running if next(steps, True) is None]
        assert len(running) in (0, len(warps)), "not all warps meet at a barrier"
    for warp, part in zip(warps, parts, strict=True):
        for i, result in enumerate(results):
            result[part] = warp.registers[f"${i}"]
    scalars = [kind.scalar for kind in types]
    kinds = [np.float32 if str(kind) == "fp32" else np.int32 for kind in scalars]
    return _Result([interpreter.TensorHandle(r.view(kind).reshape(shape), t) for r, kind, t in zip(results, kinds, scalars, strict=True)])


def install() -> None:
    """From now on the interpreter of this process runs assembly."""
    interpreter.InterpreterBuilder.create_inline_asm = _run
