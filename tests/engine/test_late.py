"""Masks that are not there in time hold up nobody: the tokens that wait for them come a step later, and are the same."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmdeploy.config import TurbomindEngineConfig
from lmdeploy.engine import graphs as graphs_of_steps
from lmdeploy.engine.engine import Engine
from lmdeploy.engine.executor.local import LocalExecutor
from lmdeploy.engine.grammar_compiler import GrammarCompiler, GrammarLibrary
from lmdeploy.engine.guided import GuidedSlots, GuidedStep
from lmdeploy.engine.late import join_in_time
from lmdeploy.engine.mask_pool import MaskPool
from lmdeploy.engine.plan import Items, NewSequence, PlanItem, StepPlan
from lmdeploy.engine.runner import ModelRunner
from lmdeploy.engine.sizing import PoolRequest
from lmdeploy.grammar import Grammar
from lmdeploy.messages import EngineInfo, EngineOutput, EngineRequest, SamplingParams
from tests.engine.test_again import CPU, EagerRunner, Replayed
from tests.helpers import load_model

WORD = Grammar("regex", "[a-z]{1,12}( [a-z]{1,12}){2,9}")
PERSON = Grammar("json_schema", json.dumps({"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}}, "required": ["name"]}))
CHOICE = Grammar("choice", json.dumps(["red", "green, or nearly so"]))
STOPS = (2, 5118)


@pytest.fixture(autouse=True)
def no_prompts_in_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_of_steps, "PROMPT_TOKENS", (1 << 20,))


@pytest.fixture
def closing() -> Iterator[Callable[[Engine], None]]:
    """Engines that are closed when the test is over."""
    engines: list[Engine] = []
    yield engines.append
    for engine in engines:
        engine.close()


def engine_of(
    folder: Path, kind: type[ModelRunner] = EagerRunner, *, blocks: int = 128, grammars: GrammarCompiler | MaskPool | None = None
) -> tuple[Engine, GuidedSlots]:
    """A rank that computes as on a GPU, a step behind the host's plans."""
    config = TurbomindEngineConfig(dtype="float32", max_batch_size=8, max_prefill_token_num=64)
    model = load_model(folder)
    grammars = grammars or GrammarCompiler.open(folder, model.spec.vocab_size, STOPS)
    runner = kind(model, config, PoolRequest(blocks, 8, 128), CPU, torch.float32, grammars=grammars, graphed=kind is EagerRunner)
    for grammar in (WORD, PERSON, CHOICE):
        grammars.prepare(grammar).result()  # requests begin when they come
    info = EngineInfo(session_len=128, vocab_size=model.spec.vocab_size, max_batch_size=8, memory=runner.memory, kernels={}, dtype="float32", start_seconds=0)
    options: dict[str, Any] = {"max_prefill_token_num": 64, "max_waiting": 100, "enable_prefix_caching": True, "rope_depends_on_length": False}
    assert runner.guided is not None
    return Engine(LocalExecutor(runner, info), grammars=grammars, run_ahead=1, **options), runner.guided


def beside(folder: Path, closing: Callable[[Engine], None], kind: type[ModelRunner] = EagerRunner, *, blocks: int = 128) -> tuple[Engine, MaskPool]:
    """The same with processes for its grammars: one for WORD and CHOICE, and one for PERSON."""
    pool = MaskPool(folder, 5120, STOPS, most=2)
    engine, _ = engine_of(folder, kind, blocks=blocks, grammars=pool)
    closing(engine)
    return engine, pool


def request(number: int, grammar: Grammar | None, **options: Any) -> EngineRequest:
    params = SamplingParams(**{"max_new_tokens": 40, "stop_token_ids": STOPS, "seed": number, "grammar": grammar, **options})
    return EngineRequest(request_id=number, token_ids=[1, 5119, *range(300 + number, 312 + 2 * number)], sampling=params)


KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "top_k": 60},
    {"temperature": 1.2, "top_k": 40, "top_p": 0.9},
    {"min_new_tokens": 12, "temperature": 0.8, "top_k": 40},
    {"repetition_penalty": 1.2},
    {"logprobs": 2},
    {"prompt_logprobs": 1},
    {"logit_bias": {300: 2.0}},
    {"max_new_tokens": 1},
    {"ignore_eos": True, "max_new_tokens": 9},
]


def requests(seed: int, count: int = 20) -> Iterator[tuple[int, EngineRequest]]:
    """At which step a request comes."""
    draw, at = random.Random(seed), 0
    for number in range(count):
        yield at, request(number, draw.choice([WORD, PERSON, CHOICE, WORD, None]), **draw.choice(KINDS))
        at += draw.choice([0, 0, 0, 1, 3, 9])


def run(engine: Engine, todo: list[tuple[int, EngineRequest]], each_step: Callable[[int], None] = lambda _: None) -> dict[int, list[EngineOutput]]:
    found: dict[int, list[EngineOutput]] = {}
    todo = sorted(todo, key=lambda entry: entry[0])
    for step in itertools.count():
        while todo and todo[0][0] <= step:
            engine.add(todo.pop(0)[1])
        each_step(step)
        if not todo and not engine.has_work:
            return found
        if engine.has_work:
            for output in engine.step():
                found.setdefault(output.request_id, []).append(output)
            engine.scheduler.check_integrity()
    raise AssertionError


def answer(outputs: list[EngineOutput]) -> tuple[list[int], Any, Any, Any]:
    """Tokens, how they end, and their log-probabilities, whose last bits depend on how many rows are computed together."""
    tokens = [token for output in outputs for token in output.token_ids]
    logprobs = [(p.token_id, pytest.approx(p.logprob, abs=1e-3)) for output in outputs for p in output.logprobs or []]
    return tokens, outputs[-1].finish_reason, outputs[-1].stop_token_id, logprobs


@pytest.fixture
def often_late(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Whatever may be late is so every other time; how many rows of each step were."""
    draw, noted = np.random.default_rng(7), list[int]()
    await_masks = GuidedSlots._await

    def sometimes(self: GuidedSlots, step: GuidedStep, may: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        late = await_masks(self, step, may) | (may & (draw.random(may.size) < 0.5))
        noted.append(int(late.sum()))
        return late

    monkeypatch.setattr(GuidedSlots, "_await", sometimes)
    return noted


@pytest.mark.parametrize("processes", [False, True], ids=["here", "processes"])
@pytest.mark.parametrize(
    ("seed", "kind", "blocks"), [(1, EagerRunner, 128), (2, EagerRunner, 128), (3, ModelRunner, 128), (4, EagerRunner, 12), (5, ModelRunner, 12)]
)
def test_late_tokens_are_those_that_would_have_come_in_time(
    shallow_folder: Path,
    often_late: list[int],
    monkeypatch: pytest.MonkeyPatch,
    closing: Callable[[Engine], None],
    seed: int,
    kind: type[ModelRunner],
    blocks: int,
    processes: bool,
) -> None:
    plan = list(requests(seed))
    engine, _ = beside(shallow_folder, closing, kind, blocks=blocks) if processes else engine_of(shallow_folder, kind, blocks=blocks)
    found = {number: answer(outputs) for number, outputs in run(engine, plan).items()}
    assert sum(often_late) > 30 and max(often_late) > 1
    if blocks < 30:
        assert engine.stats().preemptions > 0
    monkeypatch.undo()
    engine, _ = engine_of(shallow_folder, ModelRunner)
    for number, outputs in run(engine, [(0, each) for _, each in plan]).items():
        assert found[number] == answer(outputs), plan[number]


@pytest.mark.parametrize("kind", [EagerRunner, ModelRunner])
def test_log_probabilities_of_one_answer_do_not_have_the_masks_of_others_filled_too_early(shallow_folder: Path, kind: type[ModelRunner]) -> None:
    """The step behind is launched before the tokens of this one are known, which the grammars must take in first."""
    plan = [(0, request(0, PERSON)), (0, request(1, WORD)), (0, request(2, None, logprobs=2)), (4, request(3, WORD, logprobs=1)), (6, request(4, PERSON))]
    together = run(engine_of(shallow_folder, kind)[0], plan)
    for number, (_, each) in enumerate(plan):
        assert answer(together[number]) == answer(run(engine_of(shallow_folder, ModelRunner)[0], [(0, each)])[number])
        assert together[number][-1].error is None


def test_steps_with_grammars_follow_each_other_without_being_looked_at_whole(shallow_folder: Path) -> None:
    """Where no mask is late."""
    engine, _ = engine_of(shallow_folder)
    plan = [(0, request(number, WORD if number % 3 else None, temperature=1.0, top_k=40, max_new_tokens=30, ignore_eos=number % 3 > 0)) for number in range(6)]
    found = run(engine, plan)
    graphs = engine._executor._runner.graphs  # type: ignore[attr-defined]
    assert len(graphs.noted) > 20
    expected = run(engine_of(shallow_folder, ModelRunner)[0], plan)
    assert {number: answer(outputs) for number, outputs in found.items()} == {number: answer(outputs) for number, outputs in expected.items()}


def test_answers_without_grammars_are_chosen_with_those_that_have_some_or_alone(shallow_folder: Path, often_late: list[int]) -> None:
    """Guided ones come and go beside two that stay."""
    drawn = {"temperature": 1.0, "top_k": 60}
    stay = [(0, request(number, None, max_new_tokens=70, ignore_eos=True, **drawn)) for number in range(2)]
    others = [(at, request(10 + at, grammar, **drawn)) for at, grammar in ((3, CHOICE), (20, CHOICE), (21, WORD), (55, CHOICE))]
    engine, _ = engine_of(shallow_folder)
    graphs = engine._executor._runner.graphs  # type: ignore[attr-defined]
    left: list[bool] = []
    found = run(engine, [*stay, *others], lambda _: left.append(graphs._leaves))
    assert sum(before != after for before, after in itertools.pairwise(left)) >= 4, "now and then there was none"
    expected = run(engine_of(shallow_folder, ModelRunner)[0], [*stay, *others])
    assert {number: answer(outputs) for number, outputs in found.items()} == {number: answer(outputs) for number, outputs in expected.items()}


def test_steps_follow_each_other_so_where_tokens_are_late_too(shallow_folder: Path, often_late: list[int]) -> None:
    engine, _ = engine_of(shallow_folder)
    plan = [(0, request(number, WORD if number % 3 else None, temperature=1.0, top_k=40, max_new_tokens=30, ignore_eos=number % 3 > 0)) for number in range(6)]
    found = run(engine, plan)
    graphs = engine._executor._runner.graphs  # type: ignore[attr-defined]
    assert sum(often_late) > 60 and len(graphs.noted) > len(often_late) * 3 // 4
    expected = run(engine_of(shallow_folder, ModelRunner)[0], plan)
    assert {number: answer(outputs) for number, outputs in found.items()} == {number: answer(outputs) for number, outputs in expected.items()}


def test_aborted_while_their_tokens_are_late(shallow_folder: Path, often_late: list[int]) -> None:
    plan = list(requests(8))
    engine, slots = engine_of(shallow_folder)
    draw = random.Random(3)

    def abort(step: int) -> None:
        if step % 4 == 3:
            engine.abort(draw.randrange(len(plan)))

    found = run(engine, plan, abort)
    assert sum(often_late) > 15 and any(outputs[-1].finish_reason == "abort" for outputs in found.values())
    run(engine, [(0, request(99, None))])  # the rank hears of slots that are free when it is told of others
    assert engine.stats().used_blocks == 0 and not slots.used and not slots._masks._followers  # type: ignore[attr-defined]
    engine, _ = engine_of(shallow_folder, ModelRunner)
    for number, outputs in run(engine, [(0, each) for _, each in plan]).items():
        tokens, reason, *_ = answer(found[number])
        whole = answer(outputs)
        assert (tokens, reason) == whole[:2] or (reason == "abort" and tokens == whole[0][: len(tokens)])


def test_steps_that_fail_behind_late_tokens_are_repeated_with_them(shallow_folder: Path, often_late: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = [(0, request(number, WORD, temperature=1.0, top_k=40, max_new_tokens=30)) for number in range(6)]
    engine, _ = engine_of(shallow_folder)
    replay, count = Replayed.replay, itertools.count(1)

    def sometimes(self: Replayed) -> None:
        replay(self)
        if next(count) % 9 == 0:
            raise RuntimeError("a launch that failed")

    monkeypatch.setattr(Replayed, "replay", sometimes)
    found = run(engine, plan)
    assert next(count) > 20 and sum(often_late) > 20 and engine.stats().failed == 0
    monkeypatch.undo()
    expected = run(engine_of(shallow_folder, ModelRunner)[0], plan)
    assert {number: answer(outputs) for number, outputs in found.items()} == {number: answer(outputs) for number, outputs in expected.items()}


@pytest.mark.parametrize("options", [{}, {"logprobs": 2}, {"logit_bias": {300: 2.0}}, {"max_new_tokens": 3}], ids=str)
def test_a_grammar_that_takes_long_holds_up_its_own_answer_only(shallow_folder: Path, closing: Callable[[Engine], None], options: dict[str, Any]) -> None:
    """Whatever it wants beside tokens, and even if all that is missing is its last token."""
    engine, pool = beside(shallow_folder, closing)
    plan = [
        (0, request(0, PERSON, **options)),
        *((0, request(number, WORD, temperature=1.0, top_k=40)) for number in range(1, 4)),
        (0, request(4, None, max_new_tokens=30, ignore_eos=True)),
    ]
    come: dict[int, int] = dict.fromkeys(range(5), 0)
    most, stopped = options.get("max_new_tokens", 12), 0
    found: dict[int, list[EngineOutput]] = {number: [] for number in range(5)}
    for _, each in plan:
        engine.add(each)
    while engine.has_work:
        for output in engine.step():
            found[output.request_id].append(output)
            come[output.request_id] += len(output.token_ids)
        engine.scheduler.check_integrity()
        if come[0] and not stopped:
            (holder,) = pool.prepare(PERSON).result().at
            assert holder.slots == 1, "it has a process to itself"
            stopped = holder.pid
            os.kill(stopped, signal.SIGSTOP)
        elif stopped > 0 and all(outputs and outputs[-1].finish_reason for number, outputs in found.items() if number):
            assert come[0] < most, "the others have ended meanwhile"
            os.kill(stopped, signal.SIGCONT)
            stopped = -1
    assert stopped == -1 and found[0][-1].finish_reason == ("length" if "max_new_tokens" in options else "stop")
    assert engine.stats().late_tokens > 5
    expected = run(engine_of(shallow_folder, ModelRunner)[0], plan)
    assert {number: answer(outputs) for number, outputs in found.items()} == {number: answer(outputs) for number, outputs in expected.items()}


def test_a_slot_whose_last_owner_has_a_mask_on_its_way_waits_for_it(shallow_folder: Path, closing: Callable[[Engine], None]) -> None:
    engine, pool = beside(shallow_folder, closing)
    outputs: list[EngineOutput] = []
    engine.add(request(0, WORD))
    engine.add(request(9, None, max_new_tokens=60, ignore_eos=True))
    asked, waited = False, False
    while engine.has_work:
        outputs += engine.step()
        waited |= bool(pool._deferred)
        if len(outputs) > 6 and not asked:
            asked = True
            (holder,) = pool.prepare(WORD).result().at
            os.kill(holder.pid, signal.SIGSTOP)
            engine.abort(0)
            engine.add(request(1, PERSON))
            threading.Timer(0.2, os.kill, (holder.pid, signal.SIGCONT)).start()
    assert waited and not pool._deferred
    texts = answer([output for output in outputs if output.request_id == 1])
    assert texts[1] == "stop"
    assert texts == answer(run(engine_of(shallow_folder, ModelRunner)[0], [(0, request(1, PERSON))])[1])


@pytest.mark.parametrize(
    ("may", "gone", "others", "waits"),
    [
        ([True, True], [False, False], 0, False),
        ([True, False], [False, False], 0, True),
        ([True, True], [True, False], 0, True),
        ([True, True], [True, False], 1, False),
        ([True, True], [True, True], 0, False),
    ],
    ids=["may be late", "may not be late", "nobody would get a token", "somebody without a grammar gets one", "nobody wants one"],
)
def test_which_masks_are_waited_for(shallow_folder: Path, may: list[bool], gone: list[bool], others: int, waits: bool) -> None:
    """The first of two is there, and the second comes after some time."""
    pool = MaskPool(shallow_folder, 5120, STOPS, most=2)
    slots = GuidedSlots.of(pool, 8, CPU)
    for slot, grammar in enumerate((WORD, PERSON)):
        pool.prepare(grammar).result(20)
        slots.set(slot, SamplingParams(max_new_tokens=40, grammar=grammar, stop_token_ids=STOPS), [])
        while not pool.there(np.array([slot])).all():
            pool.wait(0.1)
    holder = pool._processes[pool._process_of[1]]
    assert holder.slots == 1
    os.kill(holder.pid, signal.SIGSTOP)
    pool.advance(np.array([1]), np.array([GrammarLibrary.open(shallow_folder, 5120, STOPS).pieces.index(b"{")]), np.zeros(1, dtype=bool), 0)
    step = slots.masks(np.arange(2 + others), np.zeros(2 + others, dtype=bool))
    assert step is not None
    step.late, step.gone = np.array(may), np.array(gone)
    timer = threading.Timer(0.2, os.kill, (holder.pid, signal.SIGCONT))
    timer.start()
    step.join()
    timer.join()
    pool.close()
    assert step.late.tolist() == [False, not waits]


def test_who_has_a_slot_next_is_not_who_goes_on(shallow_folder: Path) -> None:
    """Though one token of it is computed, as of those who do."""
    compiler = GrammarCompiler.open(shallow_folder, 5120, STOPS)
    slots, params = GuidedSlots.of(compiler, 8, CPU), SamplingParams(max_new_tokens=40, grammar=WORD, stop_token_ids=STOPS)
    for slot in range(4):
        slots.set(slot, params, [])
    step = slots.masks(np.arange(5), np.zeros(5, dtype=bool))
    assert step is not None
    items = Items.of([PlanItem(0, 20, 1, [], True), PlanItem(1, 0, 1, [], True), PlanItem(2, 0, 1, [], True)])
    plan = StepPlan(2, [1], [NewSequence(slot, [300], 1, params, 128) for slot in (1, 2)], items)
    kept = join_in_time(step, plan, np.ones(4, dtype=bool))
    assert step.gone is not None and step.gone.tolist() == [False, True, False, False]
    assert step.further is not None and step.further.tolist() == [True, False, False, False]
    assert not kept.any() and not step.late.any()
    slots.close()
    compiler.close()


def test_steps_that_are_not_like_those_before_say_nothing_of_how_long_the_device_takes(shallow_folder: Path) -> None:
    """Prompts among them: what is launched behind such a step begins when it has ended, and not when it is launched."""
    _, slots = engine_of(shallow_folder)
    slots.set(0, SamplingParams(max_new_tokens=9, grammar=WORD), [])
    for paced in (True, False):
        step = slots.masks(np.array([0]), np.zeros(1, dtype=bool))
        assert step is not None
        step.paced = step.waited = paced
        step.join()
        slots.follow(step, np.array([300]))
        assert (slots._pace._since > 0) == paced


def test_alone_an_answer_waits_for_its_masks(shallow_folder: Path, closing: Callable[[Engine], None]) -> None:
    engine, _ = beside(shallow_folder, closing)
    outputs = run(engine, [(0, request(0, WORD, max_new_tokens=12))])[0]
    assert outputs[-1].finish_reason == "length" and engine.stats().late_tokens == 0
    assert engine.stats().steps <= 13, "no step is wasted"


@pytest.mark.parametrize("most", [3, 40], ids=["its last token", "not its last token"])
def test_an_answer_ends_with_the_last_token_of_its_grammar(shallow_folder: Path, closing: Callable[[Engine], None], most: int) -> None:
    """Also where the step behind is under way by then, and where it would end there anyway."""
    three = Grammar("regex", "[0-9]{3}")
    digits = {i for i, piece in enumerate(GrammarLibrary.open(shallow_folder, 5120, STOPS).pieces) if len(piece) == 1 and piece.isdigit()}
    plan = [(0, request(0, three, logit_bias=dict.fromkeys(digits, 50.0), max_new_tokens=most)), (0, request(1, None, ignore_eos=True))]
    found = run(beside(shallow_folder, closing)[0], plan)
    assert [len(answer(outputs)[0]) for outputs in (found[0], found[1])] == [3, 40]
    assert (found[0][-1].finish_reason, found[0][-1].stop_token_id, found[0][-1].num_generated) == ("stop", None, 3)
    expected = run(engine_of(shallow_folder, ModelRunner)[0], plan)
    assert {number: answer(outputs) for number, outputs in found.items()} == {number: answer(outputs) for number, outputs in expected.items()}


def test_answers_of_a_process_that_is_killed_fail_and_others_go_on(shallow_folder: Path, closing: Callable[[Engine], None]) -> None:
    engine, pool = beside(shallow_folder, closing)
    plan = [(0, request(0, PERSON, min_new_tokens=10)), (0, request(1, WORD)), (0, request(2, None)), (30, request(3, PERSON))]

    def kill(step: int) -> None:
        if step == 5:
            os.kill(pool.prepare(PERSON).result().at[0].pid, signal.SIGKILL)
        if step == 30:
            pool.prepare(PERSON).result()  # by the one that has taken its place, or by the other

    found = run(engine, plan, kill)
    assert (found[0][-1].finish_reason, found[0][-1].error_code) == ("error", "grammar_failed")
    assert "the process that followed its grammar ended" in (found[0][-1].error or "")
    expected = run(engine_of(shallow_folder, ModelRunner)[0], plan)
    assert all(answer(found[number]) == answer(expected[number]) for number in (1, 2, 3))
    assert engine.stats().used_blocks == 0
