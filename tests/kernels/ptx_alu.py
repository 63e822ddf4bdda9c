"""What PTX's arithmetic does to registers, one number a thread (ptx_machine.py). They are uint64, whatever is in them."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tests.kernels.ptx_machine import Machine

Array = NDArray[Any]
WARP = 32
LOCAL = 1 << 44  # where a thread's own memory begins


@cache
def width_of(kind: str) -> int:
    """Bits of a type such as u32; 64 of one that says nothing."""
    return int(kind.lstrip("busf")) if re.fullmatch(r"[busf]\d+", kind) else 64


@cache
def words_of(op: str) -> list[str]:
    """The parts of an instruction's name."""
    return op.replace("::cta", "").split(".")


def cut(value: Array, width: int) -> Array:
    """So many low bits."""
    value = value.astype(np.uint64, copy=False)
    return value if width == 64 else value & np.uint64((1 << width) - 1)


def signed(value: Array, width: int) -> Array:
    """Numbers of so many low bits."""
    return (value.astype(np.int64) << (64 - width)) >> (64 - width) if width < 64 else value.astype(np.uint64).view(np.int64)


def floats(value: Array) -> Array:
    """float32 of the low bits."""
    return cut(value, 32).astype(np.uint32).view(np.float32)


def bits_of(value: Array) -> Array:
    """Of float32."""
    return np.ascontiguousarray(value, np.float32).view(np.uint32).astype(np.uint64)


def wide(value: Array) -> Array:
    """Floats of bfloat16's bits."""
    return (cut(value, 16).astype(np.uint32) << 16).view(np.float32)


def narrow(value: Array) -> Array:
    """Bits of bfloat16, to the nearest, even."""
    bits = bits_of(value)
    return ((bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)) & np.uint64(0xFFFF)


def names_in(operand: str) -> list[str]:
    """Of `{a, b}`."""
    return [part.strip() for part in operand.strip("{}").split(",")]


class Alu:
    """An instruction that makes a register of registers."""

    def __init__(self, machine: Machine, words: list[str], operands: list[str]) -> None:
        self.machine, self.words, self.operands, self.kind = machine, words, operands, words[-1]
        self.width = width_of(self.kind)

    def value(self, i: int) -> Array:
        """An operand, as it is."""
        return self.machine._value(self.operands[i])

    def number(self, i: int) -> Array:
        """An operand of the instruction's type."""
        if self.kind == "f32":
            return floats(self.value(i))
        if self.kind == "f64":
            return self.value(i).view(np.float64)
        if self.kind == "bf16":
            return wide(self.value(i))
        return signed(cut(self.value(i), self.width), self.width) if self.kind[0] == "s" else cut(self.value(i), self.width)

    def truth(self, i: int) -> Array:
        """An operand that is a predicate."""
        name = self.operands[i]
        return self.machine.state.registers[name] if name in self.machine.state.registers else np.full(self.machine.threads, int(name) != 0)

    def result(self) -> Array:
        """What is to be stored."""
        if self.kind == "pred":
            return self._truths()
        name = self.words[0]
        known: dict[str, Callable[[], Array]] = {
            "mov": self._moved,
            "setp": self._compared,
            "selp": lambda: np.where(self.truth(3), self.value(1), self.value(2)),
            "cvt": self._converted,
            "prmt": self._permuted,
            "lop3": self._tabled,
            "redux": self._reduced,
            "shfl": self._shuffled,
            "cvta": lambda: self.value(1) + np.uint64(LOCAL),
            "popc": lambda: np.bitwise_count(self.number(1)).astype(np.uint64),
        }
        if name in known:
            return known[name]()
        if self.kind in ("f32", "f64"):
            return self._floating()
        return self._halves() if self.kind.startswith("bf16") else self._whole(name)

    def _truths(self) -> Array:
        pairs = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
        if self.words[0] in pairs:
            return pairs[self.words[0]](self.truth(1), self.truth(2))
        return ~self.truth(1) if self.words[0] == "not" else self.truth(1)

    def _moved(self) -> Array:
        if not self.operands[1].startswith("{"):
            return cut(self.value(1), self.width)
        parts = names_in(self.operands[1])
        width, total = self.width // len(parts), np.zeros(self.machine.threads, np.uint64)
        for i, part in enumerate(parts):
            total |= cut(self.machine._value(part), width) << np.uint64(width * i)
        return total

    def _compared(self) -> Array:
        compare = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
        how, a, b = self.words[1], self.number(1), self.number(2)
        if a.dtype.kind != "f":
            return compare[how](a, b)
        unordered = np.isnan(a) | np.isnan(b)
        if how == "nan":
            return unordered
        return compare[how[:2]](a, b) | unordered if how.endswith("u") else compare[how](a, b) & ~unordered

    def _reduced(self) -> Array:
        reduce = {"max": np.max, "min": np.min, "add": np.sum}[self.words[2]]
        return cut(np.repeat(reduce(self.number(1).reshape(-1, WARP), axis=1), WARP), 32)

    def _shuffled(self) -> Array:
        threads, by = np.arange(self.machine.threads), int(self.value(2)[0])
        assert "|" not in self.operands[0], "nobody looks whether a lane was there"
        return self.value(1)[threads ^ by if self.words[2] == "bfly" else np.where(threads % WARP >= by, threads - by, threads)]

    def _permuted(self) -> Array:
        both, total = cut(self.value(1), 32) | (cut(self.value(2), 32) << np.uint64(32)), np.zeros(self.machine.threads, np.uint64)
        for i in range(4):
            place = ((self.value(3) >> np.uint64(4 * i)) & np.uint64(7)) * np.uint64(8)
            total |= ((both >> place) & np.uint64(255)) << np.uint64(8 * i)
        return total

    def _tabled(self) -> Array:
        a, b, c, table, total = self.value(1), self.value(2), self.value(3), int(self.value(4)[0]), np.zeros(self.machine.threads, np.uint64)
        for i in range(8):
            if table >> i & 1:
                total |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return cut(total, 32)

    def _floating(self) -> Array:
        a = self.number(1)
        b = self.number(2) if len(self.operands) > 2 else a
        known: dict[str, Callable[[], Array]] = {
            "fma": lambda: (a.astype(np.float64) * b + self.number(3)).astype(np.float32),
            "add": lambda: a + b,
            "sub": lambda: a - b,
            "mul": lambda: a * b,
            "div": lambda: a / b,
            "max": lambda: (np.maximum if "NaN" in self.words else np.fmax)(a, b),
            "min": lambda: (np.minimum if "NaN" in self.words else np.fmin)(a, b),
            "rsqrt": lambda: 1 / np.sqrt(a),
            "ex2": lambda: np.exp2(a),
            "neg": lambda: -a,
            "abs": lambda: np.abs(a),
        }
        assert self.kind == "f32" or self.words[0] in ("add", "sub", "mul", "div")
        result = known[self.words[0]]()
        return bits_of(result) if self.kind == "f32" else result.view(np.uint64)

    def _halves(self) -> Array:
        operate, total = {"mul": np.multiply, "add": np.add}[self.words[0]], np.zeros(self.machine.threads, np.uint64)
        for shift in (0, 16) if self.kind == "bf16x2" else (0,):
            total |= narrow(operate(wide(self.value(1) >> np.uint64(shift)), wide(self.value(2) >> np.uint64(shift)))) << np.uint64(shift)
        return total

    def _converted(self) -> Array:
        to, of, value = self.words[-2], self.words[-1], self.value(1)
        if to == "bf16x2":
            return (narrow(floats(value)) << np.uint64(16)) | narrow(floats(self.value(2)))
        source = cut(value, 16).astype(np.uint16).view(np.float16).astype(np.float32) if of == "f16" else self.number(1)
        if to == "f64":
            return source.astype(np.float64).view(np.uint64)
        if to in ("f32", "bf16"):
            source = np.ceil(source) if "rpi" in self.words else source
            return bits_of(source.astype(np.float32)) if to == "f32" else narrow(source)
        if of not in ("f32", "f64"):
            return cut(source, width_of(to))
        assert "rzi" in self.words and to[0] == "s"
        limit = 2.0 ** (width_of(to) - 1)  # beyond it is cut, and NaN is 0
        whole = np.trunc(np.nan_to_num(source.astype(np.float64), posinf=np.inf, neginf=-np.inf))
        inside = np.where(np.abs(whole) < limit, whole, 0).astype(np.int64)
        return cut(np.where(whole >= limit, int(limit) - 1, np.where(whole < -limit + 1, -int(limit), inside)), width_of(to))

    def _whole(self, name: str) -> Array:
        a = self.number(1)
        b = self.number(2) if len(self.operands) > 2 else a
        shift = cut(self.value(2), 32) if len(self.operands) > 2 else a
        if name in ("mul", "mad"):
            product = a * b
            if self.words[1] == "hi":
                assert self.width == 32 and name == "mul", self.words
                return cut(product >> product.dtype.type(32), 32)
            width = 2 * self.width if self.words[1] == "wide" else self.width
            return cut(product.astype(np.uint64) + self.value(3) if name == "mad" else product, width)
        known: dict[str, Callable[[], Array]] = {
            "not": lambda: ~a,
            "neg": lambda: -a,
            "and": lambda: a & b,
            "or": lambda: a | b,
            "xor": lambda: a ^ b,
            "shl": lambda: a << shift.astype(a.dtype),
            "shr": lambda: a >> shift.astype(a.dtype),
            "bfe": lambda: (a >> shift.astype(a.dtype)) & a.dtype.type((1 << int(self.value(3)[0])) - 1),
            "add": lambda: a + b,
            "sub": lambda: a - b,
            "min": lambda: np.minimum(a, b),
            "max": lambda: np.maximum(a, b),
            "div": lambda: np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b),
            "rem": lambda: np.fmod(a, b),
        }
        if name == "bfe" and self.kind[0] == "s":
            return cut(signed(known["bfe"](), int(self.value(3)[0])), self.width)
        return cut(known[name](), self.width)
