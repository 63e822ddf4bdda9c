"""Runs a compiled kernel's PTX on the CPU: programs one after the other, all threads of a program in step. For kernels that Triton's interpreter does not know,
such as Gluon's: what is run is what the compiler made, layouts and copies included.

Only the instructions that such kernels have are known; another one raises. There is no model of time: cp.async lands at once, or with `late` only when it is
waited for, and a right kernel gives the same either way. `Machine.races` names accesses to shared memory that no barrier keeps apart from another warp's, or that
touch what cp.async may still write.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
#: Where global memory begins, and how much shared memory a program has.
BASE, SHARED = 1 << 40, 227 << 10
WARP = 32
MOST_STEPS = 1_000_000
LANE = np.arange(WARP)


class Memory:
    """Global memory."""

    def __init__(self, size: int) -> None:
        self.data = np.zeros(size, np.uint8)
        self.used = 512

    def put(self, array: Array) -> int:
        """The address of a copy."""
        raw, at = np.ascontiguousarray(array).view(np.uint8).reshape(-1), self.used
        self.data[at : at + raw.size] = raw
        self.used = (at + raw.size + 511) // 512 * 512
        assert self.used <= self.data.size
        return BASE + at

    def get(self, address: int, like: Array) -> Array:
        """What is there now."""
        return self.data[address - BASE : address - BASE + like.nbytes].view(like.dtype).reshape(like.shape).copy()


class Instruction(NamedTuple):
    """`@guard op operands`, or with `negated` `@!guard`."""

    guard: str
    negated: bool
    op: str
    operands: list[str]


def _width(kind: str) -> int:
    return int(kind.lstrip("busf"))


def _cut(value: Array, width: int) -> Array:
    return value.astype(np.uint64) & np.uint64((1 << width) - 1)


def _signed(value: Array, width: int) -> Array:
    return (value.astype(np.int64) << (64 - width)) >> (64 - width) if width < 64 else value.astype(np.uint64).view(np.int64)


def _float(value: Array) -> Array:
    return _cut(value, 32).astype(np.uint32).view(np.float32)


def _bits(value: Array) -> Array:
    return np.ascontiguousarray(value, np.float32).view(np.uint32).astype(np.uint64)


def wide(value: Array) -> Array:
    """Floats of bfloat16's bits."""
    return (_cut(value, 16).astype(np.uint32) << 16).view(np.float32)


def narrow(value: Array) -> Array:
    """Bits of bfloat16, to the nearest, even."""
    bits = _bits(value)
    return ((bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)) & np.uint64(0xFFFF)


def _listed(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{}").split(",")]


def _renamed(statement: str, scopes: list[dict[str, str]]) -> str:
    """With the names of registers that were declared in a block of assembly."""
    names = {name: own for scope in scopes for name, own in scope.items()}
    return re.sub(r"(?<![\w.%$])([A-Za-z]\w*)(?![\w.])", lambda match: names.get(match[1], match[1]), statement) if names else statement


def _declared(statement: str, scope: int) -> dict[str, str]:
    """New names for the registers of `.reg .b32 a, p<4>` in a block."""
    found = {}
    for name in statement.split(" ", 2)[2].split(","):
        match = re.match(r"\s*(\w+)(?:<(\d+)>)?", name)
        assert match
        for register in [f"{match[1]}{i}" for i in range(int(match[2]))] if match[2] else [match[1]]:
            found[register] = f"{register}__{scope}"
    return found


def parsed(ptx: str) -> tuple[list[str], list[Instruction], dict[str, int]]:
    """Names of parameters, instructions, and where labels are."""
    entry = ptx.index(".entry")
    head, body = ptx[entry : ptx.index("{", entry)], ptx[ptx.index("{", entry) + 1 : ptx.index("$L__func_end0")]
    body = re.sub(r"//[^\n]*|(?m:^\s*\.(loc|pragma|file)[^\n]*$)", "", body)
    body = re.sub(r"\n\s*\}", "\n#CLOSE;\n", re.sub(r"\n\s*\{\s*\n", "\n#OPEN;\n", body))
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    scopes: list[dict[str, str]] = []
    count = 0
    for statement in (" ".join(part.split()) for part in re.sub(r"(\$L__\w+):", r"#LABEL \1;", body).split(";")):
        if statement == "#OPEN":
            count += 1
            scopes.append({})
        elif statement == "#CLOSE":
            del scopes[-1:]
        elif statement.startswith("#LABEL"):
            labels[statement.split()[1]] = len(code)
        elif statement.startswith(".reg") and scopes:
            scopes[-1].update(_declared(statement, count))
        elif statement and not statement.startswith("."):
            match = re.match(r"(?:@(!?)(%?\w+) )?(\S+) ?(.*)", _renamed(statement, scopes))
            assert match
            code.append(Instruction(match[2] or "", match[1] == "!", match[3], re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", match[4])))
    return re.findall(r"(\w+_param_\d+)", head), code, labels


class Races:
    """What warps do to shared memory between two barriers."""

    def __init__(self, threads: int) -> None:
        self.warp, self.epoch, self.found = np.arange(threads) // WARP, 1, set[str]()
        self.written, self.writer, self.read, self.lowest, self.highest, self.pending = (np.zeros(SHARED // 4, np.int64) for _ in range(6))

    def touch(self, what: str, addresses: Array, size: int, live: Array, write: bool) -> None:
        """Note the threads' accesses, and those that are not allowed."""
        words = (addresses[live].astype(np.int64)[:, None] + np.arange(0, size, 4)) // 4
        warp = np.broadcast_to(self.warp[live][:, None], words.shape).reshape(-1)
        words = words.reshape(-1)
        bad = (self.written[words] == self.epoch) & (self.writer[words] != warp) | (self.pending[words] > 0)
        if write:
            bad |= (self.read[words] == self.epoch) & ((self.lowest[words] != warp) | (self.highest[words] != warp))
            self.written[words], self.writer[words] = self.epoch, warp
        else:
            first = words[self.read[words] != self.epoch]
            self.lowest[first], self.highest[first], self.read[first] = 1 << 30, -1, self.epoch
            np.minimum.at(self.lowest, words, warp)
            np.maximum.at(self.highest, words, warp)
        if bad.any():
            self.found.add(what)

    def begun(self, addresses: Array, size: int, live: Array) -> None:
        """cp.async may write there from now on."""
        self.touch("cp.async", addresses, size, live, True)
        words = (addresses[live].astype(np.int64)[:, None] + np.arange(0, size, 4)) // 4
        self.pending[words] += 1
        self.written[words] = 0

    def landed(self, addresses: Array, size: int, live: Array) -> None:
        """It has, as the threads that asked for it know."""
        words = (addresses[live].astype(np.int64)[:, None] + np.arange(0, size, 4)) // 4
        self.pending[words], self.written[words] = 0, self.epoch
        self.writer[words] = self.warp[live][:, None]


@dataclass
class Copy:
    """One cp.async of all threads: where to, how many bytes, of whom, and what."""

    to: Array
    size: int
    live: Array
    what: Array


@dataclass
class State:
    """A program's registers and shared memory, and copies that have not been waited for: groups of them, and the group that is open."""

    races: Races
    threads: int
    place: tuple[int, int, int]
    registers: dict[str, Array] = field(default_factory=dict)
    shared: Array = field(default_factory=lambda: np.full(SHARED, 0xFF, np.uint8))
    groups: list[list[Copy]] = field(default_factory=list)
    open: list[Copy] = field(default_factory=list)


class Machine:
    """A kernel of so many threads a program."""

    def __init__(self, ptx: str, threads: int) -> None:
        self.threads, self.races = threads, set[str]()
        self.parameters, self.code, self.labels = parsed(ptx)

    def run(self, memory: Memory, arguments: list[int], grid: tuple[int, int], *, late: bool = False) -> None:
        """Run all programs; arguments as the kernel's parameters, those of Triton's own left out."""
        self.memory, self.grid, self.late = memory, (*grid, 1), late
        self.arguments = dict(zip(self.parameters, arguments + [0] * (len(self.parameters) - len(arguments)), strict=True))
        for y in range(grid[1]):
            for x in range(grid[0]):
                self._program((x, y, 0))

    def _program(self, place: tuple[int, int, int]) -> None:
        self.state = State(Races(self.threads), self.threads, place)
        at = steps = 0
        with np.errstate(all="ignore"):
            while at < len(self.code):
                now = self.code[at]
                at, steps = at + 1, steps + 1
                assert steps < MOST_STEPS, "it does not end"
                live = np.ones(self.threads, bool) if not now.guard else self.state.registers[now.guard] ^ now.negated
                if now.op.split(".")[0] == "bra":
                    assert live.all() or not live.any(), "threads part"
                    at = self.labels[now.operands[0]] if live.all() else at
                elif now.op == "ret":
                    break
                else:
                    self._execute(now, live)
        self.races |= self.state.races.found

    # operands
    def _value(self, name: str) -> Array:
        if name in self.state.registers:
            return self.state.registers[name]
        if name == "%tid.x":
            return np.arange(self.threads, dtype=np.uint64)
        if name.startswith("%"):
            axis = "xyz".index(name[-1])
            number = {"%ctaid": self.state.place, "%nctaid": self.grid}[name.split(".")[0]][axis]
        elif name == "global_smem":
            number = 0
        else:
            number = int(name[2:], 16) if name.startswith("0f") else int(name.rstrip("U"), 0)
        return np.full(self.threads, number & (2**64 - 1), np.uint64)

    def _address(self, operand: str) -> Array:
        match = re.match(r"(\S+?)\s*(?:\+\s*(-?\w+))?$", operand[1:-1].strip())
        assert match
        return self._value(match[1]) + np.uint64(int(match[2] or "0", 0) & (2**64 - 1))

    def _set(self, name: str, value: Array, live: Array) -> None:
        old = self.state.registers.get(name)
        self.state.registers[name] = value if live.all() or old is None else np.where(live, value, old)

    def _execute(self, now: Instruction, live: Array) -> None:
        words = now.op.replace("::cta", "").split(".")
        if now.op.startswith("cp.async"):
            self._copies(now, live)
        elif now.op.startswith("ld.param"):
            self._set(now.operands[0], self._value(str(self.arguments[now.operands[1].strip("[]").split("+")[0]])), live)
        elif words[0] in ("ld", "st"):
            self._moves(now, words, live)
        elif words[0] in ("ldmatrix", "stmatrix"):
            self._matrices(now, words)
        elif words[0] == "mma":
            self._multiplies(now)
        elif words[0] in ("atom", "red"):
            self._adds(now, words, live)
        elif words[0] == "bar" or words[0] == "barrier":
            self.state.races.epoch += "warp" not in words
        elif words[0] == "mov" and now.operands[0].startswith("{"):
            names, value = _listed(now.operands[0]), self._value(now.operands[1])
            width = _width(words[-1]) // len(names)
            for i, name in enumerate(names):
                self._set(name, _cut(value >> np.uint64(width * i), width), live)
        elif words[0] not in ("griddepcontrol", "prefetch"):
            self._set(now.operands[0].split("|")[0], Alu(self, words, now.operands).result(), live)

    # memory
    def _copies(self, now: Instruction, live: Array) -> None:
        state = self.state
        if "commit_group" in now.op:
            state.groups.append(state.open)
            state.open = []
        elif "wait_group" in now.op:
            while len(state.groups) > int(now.operands[0], 0):
                for copy in state.groups.pop(0):
                    state.races.landed(copy.to, copy.size, copy.live)
                    self._land(copy, self.late)
        else:
            to, source, size = self._address(now.operands[0]), self._address(now.operands[1]).astype(np.int64) - BASE, int(now.operands[2], 0)
            have = self._value(now.operands[3]).astype(np.int64) if len(now.operands) > 3 else np.full(self.threads, size)
            assert (to[live] % size == 0).all() and (source[live & (have > 0)] % size == 0).all(), "not aligned"
            inside = np.arange(size) < have[:, None]
            what = np.where(inside, self.memory.data[np.where(inside & live[:, None], source[:, None] + np.arange(size), 0)], 0)
            copy = Copy(to.astype(np.int64), size, live, what)
            state.races.begun(to, size, live)
            state.open.append(copy)
            self._land(copy, not self.late)

    def _land(self, copy: Copy, now: bool) -> None:
        if now:
            self.state.shared[copy.to[copy.live][:, None] + np.arange(copy.size)] = copy.what[copy.live]

    def _moves(self, now: Instruction, words: list[str], live: Array) -> None:
        width, load, shared = _width(words[-1]) // 8, words[0] == "ld", "shared" in words
        place, listed = (now.operands[1], now.operands[0]) if load else now.operands[:2]
        names, address = _listed(listed), self._address(place)
        where, size = (self.state.shared, width * len(names)) if shared else (self.memory.data, width * len(names))
        at = np.where(live, address.astype(np.int64) - (0 if shared else BASE), 0)
        assert (at >= 0).all() and (at + size <= where.size).all() and (at % size == 0).all(), (now, "is outside, or not aligned")
        if shared:
            self.state.races.touch(now.op, address, size, live, not load)
        for i, name in enumerate(names):
            places = at[:, None] + i * width + np.arange(width)
            if load:
                value = np.zeros((self.threads, 8), np.uint8)
                value[:, :width] = where[places]
                self._set(name, value.view(np.uint64)[:, 0], live)
            else:
                where[places[live]] = np.ascontiguousarray(self._value(name)).view(np.uint8).reshape(-1, 8)[live, :width]

    def _matrices(self, now: Instruction, words: list[str]) -> None:
        load = words[0] == "ldmatrix"
        place, listed = (now.operands[1], now.operands[0]) if load else now.operands[:2]
        assert "trans" not in words
        rows = self._address(place).astype(np.int64).reshape(-1, WARP)
        for i, name in enumerate(_listed(listed)):
            at = (rows[:, 8 * i + LANE // 4] + LANE % 4 * 4).reshape(-1)
            self.state.races.touch(now.op, at, 4, np.ones(self.threads, bool), not load)
            places = at[:, None] + np.arange(4)
            if load:
                value = np.zeros((self.threads, 8), np.uint8)
                value[:, :4] = self.state.shared[places]
                self.state.registers[name] = value.view(np.uint64)[:, 0]
            else:
                self.state.shared[places] = np.ascontiguousarray(self._value(name)).view(np.uint8).reshape(-1, 8)[:, :4]

    def _multiplies(self, now: Instruction) -> None:
        """m16n8k16 of bfloat16."""
        assert now.op == "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
        group, thread, warps = LANE // 4, LANE % 4, self.threads // WARP
        left, right = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8))
        for i, name in enumerate(_listed(now.operands[1])):
            for half in (0, 1):
                left[:, group + 8 * (i % 2), 2 * thread + half + 8 * (i // 2)] = wide(self._value(name) >> np.uint64(16 * half)).reshape(warps, WARP)
        for i, name in enumerate(_listed(now.operands[2])):
            for half in (0, 1):
                right[:, 2 * thread + half + 8 * i, group] = wide(self._value(name) >> np.uint64(16 * half)).reshape(warps, WARP)
        product = left @ right
        totals = [_float(self._value(name)) for name in _listed(now.operands[3])]
        for i, name in enumerate(_listed(now.operands[0])):
            part = product[:, group + 8 * (i // 2), 2 * thread + i % 2].reshape(-1)
            self.state.registers[name] = _bits((totals[i] + part).astype(np.float32))

    def _adds(self, now: Instruction, words: list[str], live: Array) -> None:
        target, place, more = now.operands if words[0] == "atom" else ("", *now.operands)
        assert "add" in words
        at, value, kind = self._address(place).astype(np.int64) - BASE, self._value(more), np.dtype(f"u{_width(words[-1]) // 8}")
        old = np.zeros(self.threads, np.uint64)
        for i in np.flatnonzero(live):
            cell = self.memory.data[at[i] : at[i] + kind.itemsize].view(kind)
            old[i] = cell[0]
            cell[0] += value[i].astype(kind)
        if target:
            self._set(target, old, live)


class Alu:
    """An instruction that makes a register of registers."""

    def __init__(self, machine: Machine, words: list[str], operands: list[str]) -> None:
        self.machine, self.words, self.operands, self.kind = machine, words, operands, words[-1]
        self.width = _width(self.kind) if re.fullmatch(r"[busf]\d+", self.kind) else 64

    def value(self, i: int) -> Array:
        """An operand, as it is."""
        return self.machine._value(self.operands[i])

    def number(self, i: int) -> Array:
        """An operand of the instruction's type."""
        if self.kind == "f32":
            return _float(self.value(i))
        return _signed(_cut(self.value(i), self.width), self.width) if self.kind[0] == "s" else _cut(self.value(i), self.width)

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
            "redux": lambda: _cut(np.repeat({"max": np.max, "add": np.sum}[self.words[2]](self.number(1).reshape(-1, WARP), axis=1), WARP), 32),
            "shfl": lambda: self.value(1)[np.arange(self.machine.threads) ^ int(self.value(2)[0])],
        }
        if name in known:
            return known[name]()
        if self.kind == "f32":
            return self._floating()
        return self._halves() if self.kind.startswith("bf16") else self._whole(name)

    def _truths(self) -> Array:
        pairs = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
        if self.words[0] in pairs:
            return pairs[self.words[0]](self.truth(1), self.truth(2))
        return ~self.truth(1) if self.words[0] == "not" else self.truth(1)

    def _moved(self) -> Array:
        if not self.operands[1].startswith("{"):
            return _cut(self.value(1), self.width)
        parts = _listed(self.operands[1])
        width, total = self.width // len(parts), np.zeros(self.machine.threads, np.uint64)
        for i, part in enumerate(parts):
            total |= _cut(self.machine._value(part), width) << np.uint64(width * i)
        return total

    def _compared(self) -> Array:
        compare = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
        return compare[self.words[1]](self.number(1), self.number(2))

    def _permuted(self) -> Array:
        both, total = _cut(self.value(1), 32) | (_cut(self.value(2), 32) << np.uint64(32)), np.zeros(self.machine.threads, np.uint64)
        for i in range(4):
            place = ((self.value(3) >> np.uint64(4 * i)) & np.uint64(7)) * np.uint64(8)
            total |= ((both >> place) & np.uint64(255)) << np.uint64(8 * i)
        return total

    def _tabled(self) -> Array:
        a, b, c, table, total = self.value(1), self.value(2), self.value(3), int(self.value(4)[0]), np.zeros(self.machine.threads, np.uint64)
        for i in range(8):
            if table >> i & 1:
                total |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return _cut(total, 32)

    def _floating(self) -> Array:
        a = self.number(1)
        b = self.number(2) if len(self.operands) > 2 else a
        known: dict[str, Callable[[], Array]] = {
            "fma": lambda: (a.astype(np.float64) * b + self.number(3)).astype(np.float32),
            "add": lambda: a + b,
            "sub": lambda: a - b,
            "mul": lambda: a * b,
            "div": lambda: a / b,
            "rsqrt": lambda: 1 / np.sqrt(a),
            "ex2": lambda: np.exp2(a),
            "neg": lambda: -a,
        }
        return _bits(known[self.words[0]]())

    def _halves(self) -> Array:
        operate, total = {"mul": np.multiply, "add": np.add}[self.words[0]], np.zeros(self.machine.threads, np.uint64)
        for shift in (0, 16) if self.kind == "bf16x2" else (0,):
            total |= narrow(operate(wide(self.value(1) >> np.uint64(shift)), wide(self.value(2) >> np.uint64(shift)))) << np.uint64(shift)
        return total

    def _converted(self) -> Array:
        to, of, value = self.words[-2], self.words[-1], self.value(1)
        if to == "bf16x2":
            return (narrow(_float(value)) << np.uint64(16)) | narrow(_float(self.value(2)))
        if of == "f16":
            source = _cut(value, 16).astype(np.uint16).view(np.float16).astype(np.float32)
        else:
            source = wide(value) if of == "bf16" else self.number(1)
        if to in ("f32", "bf16"):
            return _bits(source.astype(np.float32)) if to == "f32" else narrow(source)
        return _cut(np.trunc(source.astype(np.float64)).astype(np.int64) if of == "f32" else source, _width(to))

    def _whole(self, name: str) -> Array:
        a = self.number(1)
        b = self.number(2) if len(self.operands) > 2 else a
        shift = _cut(self.value(2), 32) if len(self.operands) > 2 else a
        if name in ("mul", "mad"):
            product = a * b
            if self.words[1] == "hi":
                assert self.width == 32 and name == "mul", self.words
                return _cut(product >> product.dtype.type(32), 32)
            width = 2 * self.width if self.words[1] == "wide" else self.width
            return _cut(product.astype(np.uint64) + self.value(3) if name == "mad" else product, width)
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
            "div": lambda: np.trunc(a / b).astype(a.dtype),
            "rem": lambda: a - np.trunc(a / b).astype(a.dtype) * b,
        }
        if name == "bfe" and self.kind[0] == "s":
            return _cut(_signed(known["bfe"](), int(self.value(3)[0])), self.width)
        return _cut(known[name](), self.width)
