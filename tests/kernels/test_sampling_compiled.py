"""The kernel that chooses tokens as it is compiled for a GPU, run on the CPU (ptx_machine.py): its tokens are the sampler's, and its warps do not race."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from lmdeploy.engine.guided import StepMask
from lmdeploy.kernels.select import TokenKernel
from tests.kernels.ptx_machine import Machine, Memory
from tests.kernels.sampled import MIXTURE, PENALTIES, Rows, rows_of, with_known

compiler = pytest.importorskip("triton.compiler", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
from triton.backends.compiler import GPUTarget  # noqa: E402

from lmdeploy.kernels.triton_kernels import sampling  # noqa: E402

KERNEL = sampling._choose_kernel
NAMES: list[str] = KERNEL.arg_names
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}


@cache
def compiled(capability: int, types: tuple[str, ...], constants: tuple[tuple[int, Any], ...], options: tuple[tuple[str, Any], ...]) -> str:
    """PTX for the types of all arguments and the values of those that are constants."""
    aligned: dict[Any, Any] = {(NAMES.index(name),): [["tt.divisibility", 16]] for name in ("logits_ptr", "scratch_ptr", "edits_ptr")}
    signature = dict(zip(NAMES, types, strict=True))
    attributes = {place: value for place, value in aligned.items() if types[place[0]] != "constexpr"}
    source = compiler.ASTSource(KERNEL, signature, {(place,): value for place, value in constants}, attributes)
    return str(compiler.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options)).asm["ptx"])


class OnMachine:
    """Launches the kernel, on tensors of the CPU, where Triton's own object does it on a GPU. `change` is done to the PTX."""

    def __init__(self, capability: int = 90, *, backwards: bool = False, change: Callable[[str], str] = str) -> None:
        self.capability, self.backwards, self.change = capability, backwards, change
        self.machine: Machine
        self.races: set[str] = set()  # on which arguments; "shared" memory

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *arguments, **named: self.launch(grid[0], arguments, named)

    def launch(self, programs: int, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        values = [*arguments, *(named[name] for name in NAMES[len(arguments) :])]
        constant = [i >= len(arguments) or value is None for i, value in enumerate(values)]
        types = ["constexpr" if fixed else TYPES[v.dtype] if isinstance(v, torch.Tensor) else "i32" for v, fixed in zip(values, constant, strict=True)]
        constants = tuple((i, value) for i, (value, fixed) in enumerate(zip(values, constant, strict=True)) if fixed)
        options = tuple((name, value) for name, value in named.items() if name not in NAMES)
        self.machine = Machine(self.change(compiled(self.capability, tuple(types), constants, options)), 32 * named["num_warps"])
        self.run({name: value for name, value, fixed in zip(NAMES, values, constant, strict=True) if not fixed}, programs)

    def run(self, arguments: dict[str, Any], programs: int) -> None:
        values = list(arguments.values())
        tensors = {id(value): value.view(torch.int16) if value.dtype == torch.bfloat16 else value for value in values if isinstance(value, torch.Tensor)}
        memory = Memory(sum(tensor.nbytes + 512 for tensor in tensors.values()) + 512)
        places = {key: memory.put(tensor.numpy()) for key, tensor in tensors.items()}
        self.machine.run(memory, [places.get(id(value), value) for value in values], (programs, 1), backwards=self.backwards)
        for key, tensor in tensors.items():
            tensor.copy_(torch.from_numpy(memory.get(places[key], tensor.numpy())))
        for _, address in self.machine.races:
            self.races |= {name for name, v in arguments.items() if id(v) in places and 0 <= address - places[id(v)] < v.nbytes} or {"shared"}


def chosen(rows: Rows, machine: OnMachine, mask: StepMask | None = None, *, warps: int = 16, goes_on: bool = False) -> tuple[list[int], torch.Tensor]:
    """The kernel's tokens, and what is in `edits` afterwards."""

    def choose(*arguments: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "_choose_kernel", machine)
            sampling.choose_tokens(*arguments, num_warps=warps, lines=16 * warps)

    sampler, tokens = rows.sampler("cpu", TokenKernel(choose, sampling.scratch_width())), torch.full((len(rows.params),), -7)
    slots, lengths, where = torch.from_numpy(rows.slots), torch.from_numpy(rows.lengths.copy()), torch.arange(len(rows.params))
    masks = None
    if mask is not None:
        places = torch.full((len(rows.params),), -1, dtype=torch.int32)
        places[torch.from_numpy(mask.rows)] = torch.arange(len(mask.rows), dtype=torch.int32)
        masks = (mask.words, places)
    following = (lengths.clone(), lengths.clone()) if goes_on else None
    sampler.choose(rows.logits, slots, lengths, tokens, masks, following, where)
    assert torch.equal(sampler.tokens[slots, torch.from_numpy(rows.lengths)], tokens.clamp_min(0).int())
    assert following is None or all(torch.equal(part, torch.from_numpy(rows.lengths + 1)) for part in (lengths, *following))
    return tokens.tolist(), sampler._edits


def normal(rows: int, vocab: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * scale


def mixed(vocab: int, dtype: torch.dtype, width: int, prompt: int, penalties: list[dict[str, Any]]) -> tuple[Rows, StepMask]:
    """Every kind of row; some under masks, some young, and some that are flat, steep, all alike, or no numbers."""
    flat: list[dict[str, Any]] = [{"temperature": 1.0, "top_k": vocab // 6}, {"temperature": 1.0, "top_p": 0.5}, {"temperature": 1.0, "top_k": 3}, {}, {}]
    kinds = [*MIXTURE, *flat]
    stops = tuple(range(0, vocab, 3))
    rows = rows_of([{**kind, **penalties[i % len(penalties)]} for i, kind in enumerate(kinds)], normal(len(kinds), vocab, 2.0).to(dtype))
    rows.logits[3:6] *= 0.05
    rows.logits[7:9] *= 4.0
    rows.logits[16:19] = 3.0
    rows.logits[19], rows.logits[20, vocab // 2] = float("-inf"), float("nan")
    params = [msgspec.structs.replace(p, min_new_tokens=width, stop_token_ids=stops) if i % 5 == 2 else p for i, p in enumerate(rows.params)]
    masked = np.array([1, 4, 5, 9, 13, 16, 17])
    words = torch.randint(-(2**31), 2**31, (len(masked), -(-vocab // 32)), generator=torch.Generator().manual_seed(1)).int()
    return with_known(Rows(params, rows.logits, rows.slots, rows.lengths), width, prompt), StepMask(masked, words)


def differing(found: list[int], rows: Rows, mask: StepMask) -> int:
    """How many tokens are not those of the sampler without a kernel."""
    expected = rows.sampler("cpu").sample(rows.logits.clone(), rows.slots, rows.lengths, mask).tolist()
    assert (expected[19], expected[20]) == (-1, -1) and min(expected[:19]) >= 0
    return sum(a != b for a, b in zip(found, expected, strict=True))


def left_out(machine: OnMachine) -> set[str]:
    """Instructions that none of the rows has run, but for the remainder of numbers above 32 bits, and jumps at the end of loops that end otherwise."""
    return {one.op for one, ran in zip(machine.machine.code, machine.machine.ran, strict=True) if not ran} - {"rem.s64", "bra.uni"}


# As edited and as the head's logits, for each chip. Known tokens that are looked at in one go and in two.
@pytest.mark.parametrize(
    ("vocab", "dtype", "capability", "warps", "width"),
    [(9000, torch.bfloat16, 90, 16, 60), (2001, torch.float32, 80, 4, 2600), (100, torch.float32, 90, 8, 300)],
)
def test_tokens_are_the_samplers(vocab: int, dtype: torch.dtype, capability: int, warps: int, width: int) -> None:
    rows, mask = mixed(vocab, dtype, width, width // 3, PENALTIES)
    machine = OnMachine(capability)
    found, edits = chosen(rows, machine, mask, warps=warps)
    assert differing(found, rows, mask) <= 1, "at a border only"
    assert not edits.any() and not machine.races
    assert vocab < 9000 or not left_out(machine)


def test_tokens_of_a_graph_are_the_samplers() -> None:
    rows, mask = mixed(9000, torch.bfloat16, 60, 20, PENALTIES)
    machine = OnMachine()
    found, edits = chosen(rows, machine, mask, goes_on=True)
    assert differing(found, rows, mask) <= 1 and not edits.any()
    # all warps load these at the end, and one thread, which needs no other's, stores them
    assert machine.races <= {"positions_ptr", "ends_ptr", "where_ptr"}
    assert not left_out(machine)


FEW: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3, "frequency_penalty": 0.2}, {"temperature": 1.0, "top_k": 40, "presence_penalty": 1.0},
    {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 0.7}, {"temperature": 1.0, "frequency_penalty": 1.1},
]  # fmt: skip


def few(prompt: int = 20) -> Rows:
    return with_known(rows_of(FEW, normal(4, 9000, 2.0).bfloat16()), 60, prompt)


def remembering(ptx: str) -> str:
    """Without the exchanges that make `edits` zero again, which are the second half."""
    exchanges = places(r"(?m)^.*atom\.global\.\S*exch", ptx)
    for at in reversed(exchanges[len(exchanges) // 2 :]):
        ptx = f"{ptx[:at]}//{ptx[at:]}"
    return ptx


def test_what_is_read_in_the_place_of_logits_is_exact() -> None:
    """To the last bit what the definition gives, operation by operation, but that nothing is below float32's smallest normal number; and nothing else is edited."""
    rows = few()
    rows.logits[:, :4] = torch.tensor([0.0, -0.0, float("-inf"), 1e-39])
    assert rows.known is not None
    rows.known[:, 20:24] = torch.arange(4)
    rows.lengths[:] = 55
    edits = chosen(rows, OnMachine(change=remembering))[1]
    wanted = rows.edited().logits
    wanted[wanted.abs() < 2.0**-126] = 0.0
    for row, slot in enumerate(rows.slots.tolist()):
        prompt = rows.known[row, :20] if rows.params[row].repetition_penalty != 1 else rows.known[row, :0]
        touched = torch.cat([prompt, rows.known[row, 20:55]]).unique().long()
        assert torch.equal(edits[slot].nonzero()[:, 0], touched)
        assert torch.equal(edits[slot].view(torch.float32)[touched], wanted[row, touched])  # -0 is 0 to both


def test_candidates_come_in_any_order() -> None:
    rows, machine = few(), OnMachine(backwards=True)
    assert chosen(rows, machine)[0] == chosen(rows, OnMachine())[0] and not machine.races


def places(pattern: str, ptx: str) -> list[int]:
    return [found.start() for found in re.finditer(pattern, ptx)]


#: where a barrier stands in the PTX, and what is raced on without it
BARRIERS: dict[str, tuple[Callable[[str], int], set[str]]] = {
    "counted, worked out": (lambda ptx: ptx.index("bar.sync", places(r"(red|atom)\.global\S*add\.u32", ptx)[-1]), {"edits_ptr"}),
    "worked out, read": (lambda ptx: ptx.index("bar.sync", ptx.rindex("ld.volatile.global.b32")), {"edits_ptr"}),
    "noted, counted": (lambda ptx: ptx.rindex("bar.sync", 0, ptx.rindex("ld.volatile.global.b64")), {"scratch_ptr"}),
    "stored, loaded": (lambda ptx: ptx.index("bar.sync", ptx.index("st.shared")), {"shared"}),
}


@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_barrier_that_is_missing_is_found(barrier: str) -> None:
    where, raced = BARRIERS[barrier]
    machine = OnMachine(change=lambda ptx: f"{ptx[: where(ptx)]}//{ptx[where(ptx) :]}")
    chosen(few(), machine)
    assert machine.races == raced
