"""How a step is laid out in a graph's shape: what fills it up is told apart from what it is, whatever the step. The graphs themselves need CUDA: tests/gpu."""

from __future__ import annotations

import gc
import itertools
import random
import threading
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmdeploy.engine import graphs as graphs_of_steps
from lmdeploy.engine.batch import MOST_PROMPTS, STAGES, BatchBuilder, Places, SlotTables
from lmdeploy.engine.graphs import Choice, Shape, StepGraphs, device_turn, in_shape, lay_out, parts_of, row_buckets
from lmdeploy.engine.plan import Items, NewSequence, PlanItem
from lmdeploy.engine.sampler import Sampler, SamplingTable
from lmdeploy.inputs import Scratch
from lmdeploy.messages import SamplingParams

CPU = torch.device("cpu")
FILLER = 8  # a slot with a block of its own, 99
BLOCK = 4
WIDTH = FILLER + MOST_PROMPTS  # of a line of tokens that arrive
SMALL: Any = SimpleNamespace(vocab_size=64, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=128, num_experts=0)


def builder() -> BatchBuilder:
    tables = SlotTables(FILLER + 1, 40, BLOCK, CPU)
    for slot in range(FILLER):
        tables.set(NewSequence(slot, [100 * slot + p for p in range(40)], 40, SamplingParams(max_new_tokens=1), 0))
        tables.append_blocks([(slot, [10 * slot + i for i in range(10)])])
    tables.blocks[FILLER] = 99
    return BatchBuilder(tables, [], Scratch(256, torch.float32, CPU), uses_rope_lengths=False)


CHUNK, TOKEN = PlanItem(0, 0, 30, [], True), PlanItem(1, 5, 1, [], True)


class Captures(StepGraphs):
    """The host's part of it; captures are noted."""

    def __init__(self) -> None:
        table, build = SamplingTable(FILLER, 64, CPU), builder()
        model: Any = SimpleNamespace(spec=SMALL)
        zeros = torch.zeros
        with (
            mock.patch("torch.zeros", lambda *size, pin_memory=False, **options: zeros(*size, **options)),
            mock.patch("torch.cuda.graph_pool_handle", lambda: (0, 0)),
        ):
            numbers = itertools.count()
            super().__init__(
                model,
                build,
                Sampler(table, build.tables.tokens),
                zeros(STAGES, WIDTH, dtype=torch.int64),
                lambda: next(numbers) % STAGES,
                FILLER,
                torch.float32,
            )
        self.noted: list[Shape] = []
        self.choices: list[int] = []
        self.computed: list[Any] = []  # the inputs of steps
        self.too_large: set[Shape] = set()

    def _captured(self, shape: Shape | Choice) -> None:
        if isinstance(shape, Choice):
            self.choices.append(shape.rows)
            self._graphs[shape] = mock.Mock()
            return
        self.noted.append(shape)
        if shape in self.too_large:
            raise torch.OutOfMemoryError("no memory")
        given, computed = self._inputs[: sum(shape.lengths())].numpy(), self.computed

        def replay() -> None:
            """As far as the input goes: the last kernel of a step of single tokens leaves the next one's (`goes_on` of `choose_tokens`, see tests/kernels/triton)."""
            computed.append(given.copy())
            if not shape.tokens:
                positions, _, _, ends, _, _, to_slots, to_places, where = parts_of(shape, given)
                for part in (positions, ends, to_places):
                    part += to_slots != FILLER
                where[where >= 0] = (where[where >= 0] + WIDTH) % (STAGES * WIDTH)

        graph = mock.Mock()
        graph.replay.side_effect = replay
        self._graphs[shape] = graph


def test_every_shape_is_captured_ahead_once_and_small_batches_first() -> None:
    graphs = Captures()
    while graphs.prepare_next():
        pass
    plain = [shape.decodes for shape in graphs.noted if not shape.tokens]
    assert graphs.choices == row_buckets(FILLER)
    assert len(set(graphs.noted)) == len(graphs.noted) and plain == row_buckets(FILLER)
    assert {shape.decodes for shape in graphs.noted if shape.tokens} == {0, FILLER} and not graphs.prepare_next()
    assert graphs.noted[0].tokens and not graphs.noted[0].decodes, "a server's first step is a prompt"
    layout = builder().build(Items.of([PlanItem(0, 0, 30, [], True), PlanItem(1, 5, 1, [], True)]), None).layout
    known = len(graphs.noted)
    assert graphs._shape(layout) in graphs.noted[:known]


def test_prompts_have_graphs_as_long_as_the_device_is_done_before_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    large = SimpleNamespace(hidden_size=4096, num_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=14336, num_experts=0)
    experts = SimpleNamespace(**{**vars(large), "num_experts": 8, "experts_per_token": 2, "moe_intermediate_size": 14336})
    rows = [graphs_of_steps.rows_worth_a_graph(spec) for spec in (SMALL, large, experts)]
    assert rows[0] > 100_000 and 1000 < rows[1] < 1300 and 500 < rows[2] < 700
    monkeypatch.setattr(graphs_of_steps, "rows_worth_a_graph", lambda spec: 70)
    graphs = Captures()
    while graphs.prepare_next():
        pass
    assert [shape for shape in graphs.noted if shape.tokens] == [Shape(0, 64)]  # 8 + 64 rows are too many
    shapes = [graphs._shape(builder().build(Items.of(items), None).layout) for items in ([CHUNK], [CHUNK, TOKEN], [TOKEN])]
    assert shapes == [Shape(0, 64), None, Shape(1, 0)]


@pytest.mark.parametrize("rows", [64, 72, 135, 200, 1000])
def test_every_shape_fits_the_buffers_and_none_has_the_rows_that_cublas_is_slow_at(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shape with the most rows need not be the one with the most sequences."""
    monkeypatch.setattr(graphs_of_steps, "rows_worth_a_graph", lambda spec: rows)
    monkeypatch.setattr(graphs_of_steps, "SLOW_ROWS", 136)
    graphs = Captures()
    while graphs.prepare_next():
        pass
    assert all(sum(shape.lengths()) <= len(graphs._inputs) and shape.sequences <= len(graphs.logits) and shape.rows != 136 for shape in graphs.noted)
    assert set(graphs._largest) <= set(graphs.noted) and max(shape.rows for shape in graphs.noted) == max(shape.rows for shape in graphs._largest) <= max(
        rows, 8
    )
    with monkeypatch.context() as patch:
        patch.setattr(graphs_of_steps, "SLOW_ROWS", 64)
        assert row_buckets(64)[-1] == 64 and 64 not in row_buckets(100)


def test_prompts_without_a_graph_are_computed_once_ahead_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("rows_worth_a_graph", lambda spec: 0), ("PROMPT_TOKENS", (16,)), ("LENGTHS", 8)):
        monkeypatch.setattr(graphs_of_steps, name, value)
    graphs, seen = Captures(), []
    graphs._model.forward = seen.append  # type: ignore[method-assign]
    while graphs.prepare_next():
        pass
    assert [inputs.attention.query_lens for inputs in seen] == [[24], [32], [40]], "the others are in graphs"
    assert all((inputs.attention.block_table == 99).all() and not graphs.prepare_next() for inputs in seen)


def test_a_step_whose_graph_cannot_be_made_runs_without_one() -> None:
    graphs = Captures()
    layout = builder().build(Items.of([PlanItem(0, 0, 30, [], True)]), None).layout
    shape = graphs._shape(layout)
    assert shape is not None
    graphs.too_large = {shape}
    settled: list[int] = []
    assert graphs.run(layout, lambda: settled.append(1)) is None and graphs.run(layout, lambda: settled.append(2)) is None
    assert settled[0] == 1  # before a capture, which overwrites the logits of the step before
    assert graphs.noted == [shape]  # tried once
    while graphs.prepare_next():
        pass
    assert graphs.run(builder().build(Items.of([PlanItem(0, 5, 1, [], True)]), None).layout, lambda: settled.append(3)) is not None
    assert settled[-1] == 3


def test_engines_of_one_process_take_turns_on_a_cuda_device_only() -> None:
    first, other = torch.device("cuda", 0), torch.device("cuda", 1)
    turns: list[str] = []

    def launch() -> None:
        with device_turn(torch.device("cuda", 0)):
            turns.append("second")

    second = threading.Thread(target=launch)
    with device_turn(first), device_turn(first), device_turn(other):  # a step that captures is one turn
        second.start()
        second.join(0.1)
        turns.append("first")
    second.join()
    assert turns == ["first", "second"]
    with device_turn(CPU), device_turn(CPU):
        free = threading.Thread(target=lambda: device_turn(CPU).__enter__())
        free.start()
        free.join(10)
        assert not free.is_alive()


def test_graphs_go_with_their_last_user_not_when_garbage_is_collected() -> None:
    graphs = Captures()
    graphs.prepare_next()
    gone = weakref.ref(graphs)
    gc.collect()
    gc.disable()
    try:
        del graphs
        assert gone() is None
    finally:
        gc.enable()


steps = st.lists(
    st.tuples(st.integers(0, FILLER - 1), st.integers(0, 20), st.one_of(st.just(1), st.integers(1, 19)), st.booleans()),
    min_size=1, max_size=FILLER, unique_by=lambda t: t[0],
)  # fmt: skip


@settings(deadline=None, max_examples=100)
@given(steps, st.integers(0, 3), st.integers(0, 9))
@example([(2, 7, 1, True), (0, 0, 1, True), (1, 20, 1, True)], 0, 0)  # nearly all steps are such
@example([(2, 7, 1, True), (0, 0, 1, True)], 2, 0)
@example([(2, 7, 1, True), (0, 0, 1, False)], 1, 0)
def test_a_step_in_a_shape_is_the_step_and_harmless_filling(raw: list[tuple[int, int, int, bool]], more_decodes: int, more_tokens: int) -> None:
    build = builder()
    batch = build.build(Items.of([PlanItem(slot, start, count, [], sample) for slot, start, count, sample in raw]), None)
    layout = batch.layout
    prompt_tokens = len(layout.positions) - layout.num_decode
    shape = Shape(layout.num_decode + more_decodes, prompt_tokens + more_tokens if prompt_tokens else 0)
    flat = np.full(sum(shape.lengths()), -7)
    lay_out(layout, shape, FILLER, 1000, parts_of(shape, flat))
    parts = torch.split(torch.from_numpy(flat), list(shape.lengths()))
    found = build.on_device(Places(*parts[:6]), [], [], shape.decodes)
    plain = build.inputs(layout)
    sequence = np.arange(len(layout.slots)) + more_decodes * (np.arange(len(layout.slots)) >= layout.num_decode)  # where each is in the shape
    token = np.arange(len(layout.positions)) + more_decodes * (np.arange(len(layout.positions)) >= layout.num_decode)
    for name in ("token_ids", "positions"):
        assert torch.equal(getattr(found, name)[token], getattr(plain, name)), name
    assert torch.equal(found.attention.slot_mapping[token], plain.attention.slot_mapping)
    assert torch.equal(found.attention.kv_lens[sequence], plain.attention.kv_lens)
    assert torch.equal(
        found.attention.query_start[sequence],
        plain.attention.query_start[:-1] + torch.from_numpy(sequence - np.arange(len(sequence))) * (torch.from_numpy(sequence) >= shape.decodes),
    )
    assert torch.equal(found.attention.query_start.diff()[sequence], plain.attention.query_start.diff())
    others = np.setdiff1d(np.arange(shape.sequences), sequence)
    lengths = found.attention.query_start.diff()
    assert all(lengths[i] == (i < shape.decodes) for i in others) and len(lengths) == shape.sequences
    assert all(parts[2][i] == FILLER for i in others)
    idle = np.setdiff1d(np.arange(shape.rows), token)
    assert (found.attention.slot_mapping[idle] // BLOCK == 99).all()  # they write where nobody reads
    assert torch.equal(found.logit_rows[sequence], torch.from_numpy(token[layout.query_start[1:] - 1]))
    assert ((found.logit_rows >= 0) & (found.logit_rows < shape.rows)).all()
    places = in_shape(layout, shape)
    assert parts[6][places].tolist() == batch.slots.tolist() and parts[7][places].tolist() == batch.lengths.tolist()
    assert sorted(parts[8][places].tolist()) == list(range(1000, 1000 + len(places)))
    if batch.layout.num_decode == len(raw) and all(sample for *_, sample in raw):
        assert [raw[i - 1000][0] for i in parts[8][places].tolist()] == batch.slots.tolist(), "tokens arrive in the order of the plan"
    unsampled = np.setdiff1d(np.arange(shape.sequences), places)
    assert all(parts[6][i] == FILLER and parts[8][i] == -1 for i in unsampled)
    assert shape.sequences <= shape.decodes + MOST_PROMPTS


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.lists(st.integers(0, 20), min_size=1, max_size=FILLER), st.integers(1, STAGES + 2)), min_size=1, max_size=4), st.randoms())
@example([([3] * 7, 1), ([5] * 8, 2), ([5] * 5, 1)], random.Random(0))  # several numbers of sequences in one shape
def test_a_step_again_is_laid_out_as_the_step_itself(runs: list[tuple[list[int], int]], draw: random.Random) -> None:
    """But for rows that stay where they are."""
    graphs = Captures()
    for starts, times in runs:
        items = [PlanItem(slot, start, 1, [], True) for slot, start in enumerate(starts)]
        layout = builder().build(Items.of(items), None).layout
        ran = graphs.run(layout, lambda: None)
        assert ran is not None
        for further in range(1, times + 1):
            stays = np.array([draw.random() < 0.3 for _ in starts]) * (further > 1 or draw.random() < 0.5)
            if stays.any():
                graphs.stay(torch.from_numpy(stays.nonzero()[0]))
            layout = replace(layout, positions=layout.positions + 1 - stays, ends=layout.ends + 1 - stays)
            new = {0: [50 + further]} if further % 2 else {}
            graphs._tables.num_blocks[0] = 3
            graphs.again(new)
            shape = graphs._shape(layout)
            assert shape is not None
            wanted = np.zeros(sum(shape.lengths()), dtype=np.int64)
            lay_out(layout, shape, FILLER, (ran.line + further) % STAGES * WIDTH, parts_of(shape, wanted))
            assert np.array_equal(graphs.computed[-1], wanted)
            if new:
                assert graphs._tables.blocks[0, :5].tolist() == [0, 1, 2, 50 + further, 4]
