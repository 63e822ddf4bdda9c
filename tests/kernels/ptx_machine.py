"""Runs a compiled kernel's PTX on the CPU: programs one after the other, all threads of a program in step. For kernels that Triton's interpreter does not know,
such as Gluon's, and those whose warps meet in memory: what is run is what the compiler made, layouts, copies and barriers included.

Only the instructions that such kernels have are known; another one raises. There is no model of time: cp.async lands at once, or with `late` only when it is
waited for, and a right kernel gives the same either way. `Machine.races` names accesses to shared or global memory that no barrier keeps apart from another
warp's of the same program and that may not meet (ptx_races.py), or touch what cp.async may still write.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tests.kernels.ptx_alu import LOCAL, WARP, Alu, Array, bits_of, cut, floats, names_in, wide, width_of, words_of
from tests.kernels.ptx_races import CHANGE, LOOK, READ, SWAP, WRITE, Races

#: Where global memory begins; how much memory a thread has for its own, and a program to share.
BASE, OWN, SHARED = 1 << 40, 64, 227 << 10
MOST_STEPS = 1_000_000
NEVER_SET = 0xA5A5A5A5A5A5A5A5  # in a register: a compiler may have half of a number be anything
LANE = np.arange(WARP)


class Memory:
    """Global memory."""

    def __init__(self, size: int) -> None:
        self.data = np.zeros(-(-size // 512) * 512, np.uint8)
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

    races: Races  # in shared memory
    far: Races  # in global memory
    threads: int
    place: tuple[int, int, int]
    registers: dict[str, Array] = field(default_factory=dict)
    shared: Array = field(default_factory=lambda: np.full(SHARED, 0xFF, np.uint8))
    local: dict[int, Array] = field(default_factory=dict)  # by place, a byte of each thread
    groups: list[list[Copy]] = field(default_factory=list)
    open: list[Copy] = field(default_factory=list)


class Machine:
    """A kernel of so many threads a program."""

    def __init__(self, ptx: str, threads: int) -> None:
        self.threads, self.races = threads, set[tuple[str, int]]()  # what, and at which address
        self.parameters, self.code, self.labels = parsed(ptx)
        self.ran = np.zeros(len(self.code), bool)  # which instructions

    def run(self, memory: Memory, arguments: list[int], grid: tuple[int, int], *, late: bool = False, backwards: bool = False) -> None:
        """Run all programs; arguments as the kernel's parameters, those of Triton's own left out. `backwards`: atomics of the last thread come first."""
        self.memory, self.grid, self.late, self.backwards = memory, (*grid, 1), late, backwards
        self.arguments = dict(zip(self.parameters, arguments + [0] * (len(self.parameters) - len(arguments)), strict=True))
        for y in range(grid[1]):
            for x in range(grid[0]):
                self._program((x, y, 0))

    def _program(self, place: tuple[int, int, int]) -> None:
        self.state = State(
            Races(self.threads, SHARED // 4, 0, copies=True), Races(self.threads, self.memory.used // 4, BASE, copies=False), self.threads, place
        )
        at, steps, every = 0, 0, np.ones(self.threads, bool)
        with np.errstate(all="ignore"):
            while at < len(self.code):
                now, self.ran[at] = self.code[at], True
                at, steps = at + 1, steps + 1
                assert steps < MOST_STEPS, "it does not end"
                live = every if not now.guard else self.state.registers[now.guard] ^ now.negated
                if now.op.split(".")[0] == "bra":
                    assert live.all() or not live.any(), "threads part"
                    at = self.labels[now.operands[0]] if live.all() else at
                elif now.op == "ret":
                    break
                else:
                    self._execute(now, live)
        self.races |= self.state.races.found | self.state.far.found

    # operands
    def _value(self, name: str) -> Array:
        if name in self.state.registers:
            return self.state.registers[name]
        if name == "%tid.x":
            return np.arange(self.threads, dtype=np.uint64)
        if "ctaid." in name:
            number = (self.state.place if name.startswith("%ctaid") else self.grid)["xyz".index(name[-1])]
        elif name.startswith("%"):
            assert re.fullmatch(r"%[a-z]+\d+", name), name
            number = NEVER_SET
        elif name in ("global_smem", "__local_depot0"):
            number = 0
        else:
            number = int(name[2:], 16) if name[:2] in ("0f", "0d") else int(name.rstrip("U"), 0)
        return np.full(self.threads, number & (2**64 - 1), np.uint64)

    def _address(self, operand: str) -> Array:
        match = re.match(r"(\S+?)\s*(?:\+\s*(-?\w+))?$", operand[1:-1].strip())
        assert match
        return self._value(match[1]) + np.uint64(int(match[2] or "0", 0) & (2**64 - 1))

    def _set(self, name: str, value: Array, live: Array) -> None:
        old = None if live.all() else self.state.registers.get(name)
        self.state.registers[name] = value if old is None else np.where(live, value, old)

    def _execute(self, now: Instruction, live: Array) -> None:
        words = words_of(now.op)
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
            self._atomics(now, words, live)
        elif words[0] == "bar" or words[0] == "barrier":
            for races in (self.state.races, self.state.far):
                races.epoch += "warp" not in words
        elif words[0] == "mov" and now.operands[0].startswith("{"):
            names, value = names_in(now.operands[0]), self._value(now.operands[1])
            width = width_of(words[-1]) // len(names)
            for i, name in enumerate(names):
                self._set(name, cut(value >> np.uint64(width * i), width), live)
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

    def _own(self, now: Instruction, width: int, live: Array) -> None:
        """A thread's own memory, at a place that is the same for all."""
        load = now.op.startswith("ld")
        place, name = (now.operands[1], now.operands[0]) if load else now.operands[:2]
        at = int(self._address(place)[0]) - LOCAL
        assert live.all() and 0 <= at <= OWN - width
        byte = [np.uint64(8 * i) for i in range(width)]
        if load:
            self._set(name, sum((self.state.local[at + i] << byte[i] for i in range(width)), np.zeros(self.threads, np.uint64)), live)
        else:
            self.state.local |= {at + i: (self._value(name) >> byte[i]) & np.uint64(255) for i in range(width)}

    def _moves(self, now: Instruction, words: list[str], live: Array) -> None:
        width, load, shared = width_of(words[-1]) // 8, words[0] == "ld", "shared" in words
        if len(words) == 2:
            return self._own(now, width, live)
        place, listed = (now.operands[1], now.operands[0]) if load else now.operands[:2]
        names, address = names_in(listed), self._address(place)
        where, size = (self.state.shared, width * len(names)) if shared else (self.memory.data, width * len(names))
        at = np.where(live, address.astype(np.int64) - (0 if shared else BASE), 0)
        assert (at >= 0).all() and (at + size <= where.size).all() and (at % size == 0).all(), (now, "is outside, or not aligned")
        kind = WRITE if not load else LOOK if "volatile" in words else READ
        (self.state.races if shared else self.state.far).touch(now.op, at, size, live, kind)
        for i, name in enumerate(names):
            places = at[:, None] + i * width + np.arange(width)
            if load:
                value = np.zeros((self.threads, 8), np.uint8)
                value[:, :width] = where[places]
                self._set(name, value.view(np.uint64)[:, 0], live)
            else:
                where[places[live]] = np.ascontiguousarray(self._value(name)).view(np.uint8).reshape(-1, 8)[live, :width]
        return None

    def _matrices(self, now: Instruction, words: list[str]) -> None:
        """A thread has two neighbours of a row, or of a column, of 8 times 8 halves; their rows are where the threads say."""
        load = words[0] == "ldmatrix"
        place, listed = (now.operands[1], now.operands[0]) if load else now.operands[:2]
        rows = self._address(place).astype(np.int64).reshape(-1, WARP)
        group, thread, every = LANE // 4, LANE % 4, np.ones(self.threads, bool)
        for i, name in enumerate(names_in(listed)):
            value = np.zeros((self.threads, 8), np.uint8) if load else np.ascontiguousarray(self._value(name)).view(np.uint8).reshape(-1, 8)
            halves = [rows[:, 8 * i + 2 * thread + j] + 2 * group if "trans" in words else rows[:, 8 * i + group] + 4 * thread + 2 * j for j in (0, 1)]
            at = np.stack(halves, -1).reshape(-1, 2)
            self.state.races.touch(now.op, at, 2, every, READ if load else WRITE)
            byte = (at[..., None] + np.arange(2)).reshape(-1, 4)
            if load:
                value[:, :4] = self.state.shared[byte]
            else:
                self.state.shared[byte] = value[:, :4]
            if load:
                self.state.registers[name] = value.view(np.uint64)[:, 0]

    def _multiplies(self, now: Instruction) -> None:
        """m16n8k16 of bfloat16."""
        assert now.op == "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
        group, thread, warps = LANE // 4, LANE % 4, self.threads // WARP
        left, right = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8))
        for i, name in enumerate(names_in(now.operands[1])):
            for half in (0, 1):
                left[:, group + 8 * (i % 2), 2 * thread + half + 8 * (i // 2)] = wide(self._value(name) >> np.uint64(16 * half)).reshape(warps, WARP)
        for i, name in enumerate(names_in(now.operands[2])):
            for half in (0, 1):
                right[:, 2 * thread + half + 8 * i, group] = wide(self._value(name) >> np.uint64(16 * half)).reshape(warps, WARP)
        product = left @ right
        totals = [floats(self._value(name)) for name in names_in(now.operands[3])]
        for i, name in enumerate(names_in(now.operands[0])):
            part = product[:, group + 8 * (i // 2), 2 * thread + i % 2].reshape(-1)
            self.state.registers[name] = bits_of((totals[i] + part).astype(np.float32))

    def _atomics(self, now: Instruction, words: list[str], live: Array) -> None:
        """One thread after another."""
        target, place, more = now.operands if words[0] == "atom" else ("", *now.operands)
        change = {"add": lambda old, new: old + new, "or": lambda old, new: old | new, "exch": lambda old, new: new}[words[-2]]
        assert "global" in words and words[-1][0] in "bus", now
        kind = np.dtype(f"u{width_of(words[-1]) // 8}")
        at, value = np.where(live, self._address(place).astype(np.int64) - BASE, 0), self._value(more).astype(kind)
        assert (at >= 0).all() and (at % kind.itemsize == 0).all(), (now, "is outside, or not aligned")
        self.state.far.touch(now.op, at, kind.itemsize, live, SWAP if "exch" in words else CHANGE)
        old, cells = np.zeros(self.threads, np.uint64), self.memory.data.view(kind)
        for i in np.flatnonzero(live)[:: -1 if self.backwards else 1]:
            cell = at[i] // kind.itemsize
            old[i] = cells[cell]
            cells[cell] = change(cells[cell], value[i])
        if target:
            self._set(target, old, live)
