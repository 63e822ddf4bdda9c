"""CUDA graphs of whole steps: embedding to the chosen token is one launch, whatever the number of kernels.

A graph serves a shape: so many sequences with one token, room for some prompts, both rounded up; contexts of any length. Graphs are captured when first needed,
or while there is no work, and share one memory pool. What fills up a shape belongs to a slot of its own and writes to a block of its own, so it changes nothing.
Everything that a step needs is read on the device from the slot tables: the host sends places only, and need not have seen the tokens of the step before. A step
of single tokens leaves the places of the next one, so that steps of the same sequences follow each other without anything from the host.
"""

from __future__ import annotations

import gc
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lmdeploy.engine.batch import MOST_PROMPTS, STAGES, BatchBuilder, Places, StepLayout, upload
from lmdeploy.engine.guided import GuidedStep
from lmdeploy.engine.masked_choice import MaskedChoice
from lmdeploy.engine.model import Model
from lmdeploy.engine.sampler import Sampler
from lmdeploy.log import get_logger
from lmdeploy.spec import ModelSpec

logger = get_logger(__name__)
Tensor = torch.Tensor
Ints = NDArray[np.int64]

#: tokens of prompts that a graph has room for, as far as `rows_worth_a_graph`
PROMPT_TOKENS = (64, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
#: seconds that the host needs to launch the kernels of a layer one by one (measured: 0.35 ms; a step's beginning takes longer than a graph's, too), and
#: multiplications and additions a second of a fast device
LAYER_LAUNCH, FLOPS = 7e-4, 7e14
#: rows for which cuBLAS chooses a bad product on an H200: gate and up of a 7B model take 269 us, those of 456 rows 157
SLOW_ROWS = 448
#: longer prompts are computed once for each multiple of this while there is no work: libraries make plans for lengths, and load code when it is first needed
LENGTHS = 512
#: numbers of rows up to which products have a kernel of their own (linear16.py, linear_w4.py, linear_w4_async.py)
KERNEL_ROWS = (1, 8, 16, 32, 64, 128, 192, 384)
#: sequences with one token beside prompts: few sizes, for there is a graph for each of them and each of PROMPT_TOKENS
DECODES_BESIDE = (0, 16, 64, 128, 256)


def row_buckets(most: int) -> list[int]:
    """Numbers of rows that have a graph: dense where a row more costs much, sparse above."""
    sizes = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, *range(48, 129, 16), *range(160, 257, 32), *range(320, most + 64, 64)]
    return sorted({most, *(min(size, most) for size in sizes if size != SLOW_ROWS)})


def rows_worth_a_graph(spec: ModelSpec) -> int:
    """Up to how many rows the host launches a step's kernels more slowly than the device runs them. With more, a graph saves nothing, and computes what fills
    its shape up."""
    width = spec.moe_intermediate_size * spec.experts_per_token if spec.num_experts else spec.intermediate_size
    weights = spec.hidden_size * (2 * (spec.num_heads + spec.num_kv_heads) * spec.head_dim + 3 * width)
    return int(LAYER_LAUNCH * FLOPS / (2 * weights))


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures of a device: cuBLAS keeps a workspace for each stream that it has seen, as long as the process lives."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def _no_collection() -> Iterator[None]:
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@cache
def device_turn(device: torch.device) -> AbstractContextManager[Any]:
    """Held while a step is launched or captured on a CUDA device: engines of one process share counters of kernels there, and a capture takes in what others launch."""
    return threading.RLock() if device.type == "cuda" else nullcontext()


@dataclass(frozen=True, slots=True)
class Shape:
    """What a graph has room for."""

    decodes: int  # sequences with one token
    tokens: int  # of prompts

    @property
    def sequences(self) -> int:
        """Of one token, and prompts."""
        return self.decodes + (MOST_PROMPTS if self.tokens else 0)

    @property
    def rows(self) -> int:
        """Tokens in all."""
        return self.decodes + self.tokens

    def lengths(self) -> tuple[int, ...]:
        """Of the parts of a step's input: positions, slots of the tokens; slots, ends; starts; wanted rows; slots that get a token, its place there, and its
        place among those that arrive."""
        b = self.sequences
        return self.rows, self.rows, b, b, b + 1, b, b, b, b


@dataclass(frozen=True, slots=True)
class Choice:
    """A graph of the choice among the logits of so many sequences with one token, with masks: see `MaskedChoice`."""

    rows: int


@cache
def _counted(shape: Shape, device: torch.device) -> Tensor:
    """int64 [3, 1]: where the parts of a step's input begin that are one more in the next one: positions, ends, places of tokens."""
    starts = list(accumulate(shape.lengths(), initial=0))
    return upload(np.array([[starts[0]], [starts[3]], [starts[7]]]), device)


def parts_of(shape: Shape, flat: Ints) -> list[Ints]:
    """`flat` as `shape.lengths` cuts it up."""
    bounds = [0, *accumulate(shape.lengths())]
    return [flat[a:b] for a, b in pairwise(bounds)]


def lay_out(layout: StepLayout, shape: Shape, filler: int, first: int, parts: list[Ints]) -> None:
    """Write a step into the parts of a shape: sequences with one token, what fills them up, prompts, what fills these up. Nothing is left as it was there.
    `first`: where the first token arrives."""
    if not shape.tokens and len(layout.chosen) == layout.num_decode:
        return _lay_out_tokens(layout, filler, first, parts)
    positions, token_slots, slots, ends, starts, rows, to_slots, to_places, where = parts
    decodes, gap = layout.num_decode, shape.decodes - layout.num_decode
    for part, values, empty in (
        (positions, layout.positions, 0),
        (token_slots, layout.token_slots, filler),
        (slots, layout.slots, filler),
        (ends, layout.ends, 0),
    ):
        part[:decodes] = values[:decodes]
        part[decodes : shape.decodes] = empty
        part[shape.decodes : gap + len(values)] = values[decodes:]
        part[gap + len(values) :] = empty
    ends[decodes : shape.decodes] = 1
    last = gap + len(layout.slots)
    starts[: shape.decodes] = np.arange(shape.decodes)
    starts[shape.decodes : last + 1] = layout.query_start[decodes:] + gap
    starts[last + 1 :] = starts[last]
    rows[:] = np.maximum(starts[1:] - 1, 0)
    to_slots[:], to_places[:], where[:] = filler, 1, -1  # the token of a sequence that is not sampled goes nowhere
    chosen = in_shape(layout, shape)
    to_slots[chosen], to_places[chosen], where[chosen] = slots[chosen], ends[chosen], layout.arrive + first
    return None


def _lay_out_tokens(layout: StepLayout, filler: int, first: int, parts: list[Ints]) -> None:
    """The same where every sequence has one token and gets one: nearly all steps are such."""
    positions, token_slots, slots, ends, starts, rows, to_slots, to_places, where = parts
    count = layout.num_decode
    for part, values, empty in ((positions, layout.positions, 0), (ends, layout.ends, 1), (to_places, layout.ends, 1), (where, layout.arrive + first, -1)):
        part[:count] = values
        part[count:] = empty
    for part in (token_slots, slots, to_slots):
        part[:count] = layout.slots
        part[count:] = filler
    starts[:] = np.arange(len(starts))
    rows[:] = starts[:-1]


def in_shape(layout: StepLayout, shape: Shape) -> Ints:
    """Where the sampled sequences of a step are among those of the shape."""
    return layout.chosen + (shape.decodes - layout.num_decode) * (layout.chosen >= layout.num_decode)


@dataclass(frozen=True, slots=True)
class Ran:
    """What a step brings: of each sequence of its shape the logits [B, V] as the head gave them, until the next one, and, on a line of those that arrive, the
    tokens that `Sampler.choose` chose for want of edits and masks."""

    logits: Tensor
    places: slice | Ints  # the sampled sequences among the B
    line: int


@dataclass(frozen=True, slots=True)
class _Graph:
    """How a captured step is launched, and destroyed."""

    replay: Callable[[], None]
    reset: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Input:
    """Where the input of a shape is on the device, and its copies on the host, whole and in parts, one for each step that may be on its way."""

    there: Tensor
    stages: list[tuple[Tensor, list[Ints]]]


class StepGraphs:
    """The steps of one rank. The builder's tables have one slot more than can be used: the last one belongs to what fills up."""

    def __init__(
        self, model: Model, builder: BatchBuilder, sampler: Sampler, lines: Tensor, take_line: Callable[[], int], most_rows: int, dtype: torch.dtype
    ) -> None:
        """`lines` int64 [L, N]: where tokens arrive; `take_line` gives the number of the next one."""
        self._model, self._builder, self._sampler = model, builder, sampler
        self._tables = tables = builder.tables
        self._lines, self._take_line = lines, take_line
        self._sizes = row_buckets(most_rows)
        self._beside = sorted({min(size, most_rows) for size in (*DECODES_BESIDE, most_rows)})
        most = min(max(rows_worth_a_graph(model.spec), PROMPT_TOKENS[0]), builder.scratch.max_rows)  # one at least, whose kernels are compiled at the start
        self._room = {beside: [tokens for tokens in PROMPT_TOKENS if SLOW_ROWS != beside + tokens <= most] for beside in self._beside}  # for prompts
        mixed = [Shape(beside, tokens) for beside, sizes in self._room.items() for tokens in sizes]
        shapes = [*(Shape(size, 0) for size in self._sizes), *mixed]
        self._largest = [shapes[len(self._sizes) - 1], *sorted(mixed, key=lambda shape: (shape.rows, shape.decodes))[-1:]]
        self._filler = tables.tokens.shape[0] - 1
        longest = max(sum(shape.lengths()) for shape in shapes)
        self._inputs = torch.zeros(longest, dtype=torch.int64, device=tables.device)
        self._stages = [torch.zeros(longest, dtype=torch.int64, pin_memory=True) for _ in range(STAGES)]
        self._stage = 0
        self._input_of: dict[Shape, _Input] = {}  # made when first needed: slices of tensors take their time
        self._before: Callable[[], None] | None = None  # launches the step before, where that can be done `again`
        self._shape_before: Shape | None = None
        # for the kernel that chooses in each graph: no row has a mask; or all are left to another launch
        self._places = torch.full((max(shape.sequences for shape in shapes),), -1, dtype=torch.int32, device=tables.device)
        self._leaves = False
        self._minus = torch.full((1,), -1, dtype=torch.int64, device=tables.device)
        self.logits = torch.zeros((max(shape.sequences for shape in shapes), model.spec.vocab_size), dtype=dtype, device=tables.device)
        # all of them, as a server that fills up needs them; a list, not a generator, which would hold `self` in a cycle: graphs must go as soon as they are dropped
        self._ahead: Iterator[Shape | Choice] = iter([*sorted(shapes, key=lambda shape: (shape.decodes, shape.tokens)), *map(Choice, self._sizes)])
        self._lengths = iter(range(LENGTHS, min(builder.scratch.max_rows, tables.width - 1) + 1, LENGTHS))
        self._masked = MaskedChoice(sampler, self.logits, lines, self._sizes)
        self._graphs: dict[Shape | Choice, _Graph] = {}
        self._refused: set[Shape | Choice] = set()
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, layout: StepLayout, settle: Callable[[], None], *, leave: bool = False) -> Ran | None:
        """Compute a step of which only sampled rows are wanted; their tokens are in the token table afterwards, unless they are left to a `choice`. None: no graph
        has room for it, or can be made.

        `settle` launches what the step before still owes, which reads what this one overwrites, as late as can be.
        """
        shape = self._shape(layout)
        if shape is None:
            return None
        if shape not in self._graphs:
            settle()
            if not self._capture(shape):
                return None
        line = self._take_line()
        self._send(layout, shape, line)
        settle()
        self._sampler.table.refresh()
        if leave != self._leaves:
            self._places.fill_(-2 if leave else -1)
            self._leaves = leave
        replay = self._graphs[shape].replay
        replay()
        every = not shape.tokens and len(layout.chosen) == layout.num_decode
        self._before, self._shape_before = replay if every else None, shape
        return Ran(self.logits[: shape.sequences], slice(0, layout.num_decode) if every else in_shape(layout, shape), line)

    def again(self, new_blocks: dict[int, list[int]]) -> None:
        """The step before once more, each of its sequences a token further, some with a new block; its tokens arrive on the line behind. Only behind a `run` that
        took a token of each sequence and gave it one, and nothing else was computed since, or behind another `again`: the step before has left its input."""
        assert self._before is not None
        if new_blocks:
            self._tables.append_blocks(new_blocks.items())
        self._before()

    def stay(self, rows: Tensor) -> None:
        """These rows, int64 [L] on the device, of the step that was launched last are no further in the next one, if that is launched `again`: their tokens were
        not known, so that nothing which it brings of them counts."""
        assert self._before is not None and self._shape_before is not None
        places = (_counted(self._shape_before, rows.device) + rows).view(-1)
        self._inputs.index_add_(0, places, self._minus.expand(places.shape[0]))

    def choice(self, slots: Ints, lengths: Ints, mask: GuidedStep, line: int, arrive: Ints) -> Callable[[], None]:
        """Choose among the logits of the last `run` or `again`, which had a token of each sequence and left it to this to give it one: what is returned joins the
        masks. Rows have these slots and so many known tokens; theirs arrive at these places of this line."""
        prepared = self._masked.prepare(slots, lengths, mask, arrive + line * self._lines.shape[1])
        graph = self._graphs.get(Choice(prepared.size))
        launch = partial(self._masked.choose, prepared.size) if graph is None else graph.replay

        def choose() -> None:
            self._masked.bring(mask, prepared)
            launch()

        return choose

    def drop(self) -> None:
        """Destroy what was captured, now."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._before = None

    def warm_up(self) -> None:
        """Capture the largest steps, whose memory all others share, and try out the smaller ones that have kernels of their own: no request waits for a compiler."""
        for shape in self._largest:
            self._captured(shape)
        for size in sorted({self._sizes[bisect_left(self._sizes, min(rows, self._sizes[-1]))] for rows in KERNEL_ROWS}):
            self._try_out(Shape(size, 0))

    @torch.inference_mode()
    def prepare_next(self) -> bool:
        """Capture a shape that no step has needed yet, or compute a prompt that no graph has room for; False when there is none left."""
        shape = next((shape for shape in self._ahead if shape not in self._graphs), None)
        if shape is not None:
            self._capture(shape)
            return True
        layouts = (self._prompt(length) for length in self._lengths)
        layout = next((layout for layout in layouts if self._shape(layout) is None), None)
        if layout is not None:
            self._model.forward(self._builder.inputs(layout))
            if self._tables.device.type == "cuda":  # one at a time: work may come
                torch.cuda.synchronize(self._tables.device)
        return layout is not None

    def _prompt(self, length: int) -> StepLayout:
        """A step of one prompt that is nobody's."""
        positions, slot, ends = np.arange(length), np.full(length, self._filler), np.array([0, length])
        none = np.zeros(0, dtype=np.int64)
        return StepLayout(positions, slot, slot[:1], ends[1:], ends, positions[-1:], none, none, 0)

    def _capture(self, shape: Shape | Choice) -> bool:
        """Have a graph of that shape; False where it could not be made, for lack of memory as a rule: such steps are launched kernel by kernel."""
        if shape in self._graphs or shape in self._refused:
            return shape in self._graphs
        stream = torch.cuda.current_stream() if self._tables.device.type == "cuda" else None
        try:
            self._captured(shape)
        except torch.AcceleratorError:
            raise  # no later call of this process works
        except Exception as e:
            if stream is not None:
                torch.cuda.set_stream(stream)  # a capture that fails at its end leaves its own
            self._refused.add(shape)
            logger.warning("no graph of %s: %s: %s", shape, type(e).__name__, str(e).splitlines()[0])
        return shape in self._graphs

    def _shape(self, layout: StepLayout) -> Shape | None:
        decodes, tokens = layout.num_decode, len(layout.positions) - layout.num_decode
        if not tokens:
            return Shape(self._sizes[bisect_left(self._sizes, decodes)], 0)
        beside = self._beside[bisect_left(self._beside, decodes)]
        sizes = self._room[beside]
        place = bisect_left(sizes, tokens)
        return None if place == len(sizes) or len(layout.slots) - decodes > MOST_PROMPTS else Shape(beside, sizes[place])

    def _send(self, layout: StepLayout, shape: Shape, line: int) -> None:
        found = self._input_of.get(shape)
        if found is None:
            total = sum(shape.lengths())
            wholes = [stage[:total] for stage in self._stages]
            found = self._input_of[shape] = _Input(self._inputs[:total], [(whole, parts_of(shape, whole.numpy())) for whole in wholes])
        whole, parts = found.stages[self._stage]
        self._stage, self._before = (self._stage + 1) % STAGES, None
        lay_out(layout, shape, self._filler, line * self._lines.shape[1], parts)
        found.there.copy_(whole, non_blocking=True)

    def _captured(self, shape: Shape | Choice) -> None:
        if isinstance(shape, Shape):
            self._try_out(shape)
            launch = partial(self._step, shape)
        else:  # kernels of mixed steps, which are tried out at the start
            launch = partial(self._masked.choose, shape.rows)
        graph = torch.cuda.CUDAGraph()
        # other threads may use the device, but graphs and events that a garbage collection finds must not be destroyed now: that would spoil the capture
        with _no_collection(), torch.cuda.graph(graph, pool=self._pool, stream=_side_stream(self._tables.device), capture_error_mode="thread_local"):
            launch()
        self._graphs[shape] = _Graph(super(torch.cuda.CUDAGraph, graph).replay, graph.reset)  # what torch's own `replay` calls
        logger.debug("captured a graph of %s", shape)

    def _try_out(self, shape: Shape) -> None:
        """Launch a step of nothing but filling kernel by kernel: kernels are compiled, and libraries take their buffers."""
        none = np.zeros(0, dtype=np.int64)
        self._send(StepLayout(none, none, none, none, np.zeros(1, dtype=np.int64), none, none, none, 0), shape, 0)
        torch.cuda.synchronize(self._tables.device)  # also for what other engines of this process have launched: kernels share counters
        side = _side_stream(self._tables.device)
        with torch.cuda.stream(side):
            self._step(shape)
        side.synchronize()

    def _step(self, shape: Shape) -> None:
        """The whole step, from the device's own tables."""
        parts = torch.split(self._inputs[: sum(shape.lengths())], list(shape.lengths()))
        inputs = self._builder.on_device(Places(*parts[:6]), [], [], shape.decodes)
        logits = self.logits[: shape.sequences]
        self._model.raw_logits(self._model.forward(inputs), logits)
        self._choose(shape, parts, logits)

    def _choose(self, shape: Shape, parts: Sequence[Tensor], logits: Tensor) -> None:
        positions, ends = parts[0], parts[3]
        slots, places, where = parts[6:]
        masks = self._sampler.table.young_words[:1], self._places[: len(logits)]
        self._sampler.choose(logits, slots, places, self._lines, masks, goes_on=None if shape.tokens else (positions, ends), where=where)
