"""Steps that are the one before, each sequence a token further, against steps that are looked at whole: whatever comes between, answers are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from lmdeploy.config import TurbomindEngineConfig
from lmdeploy.engine import graphs as graphs_of_steps
from lmdeploy.engine import runner as runners
from lmdeploy.engine.batch import Places
from lmdeploy.engine.engine import Engine
from lmdeploy.engine.executor.local import LocalExecutor
from lmdeploy.engine.graphs import Choice, Shape, StepGraphs
from lmdeploy.engine.guided import StepMask
from lmdeploy.engine.runner import ModelRunner
from lmdeploy.engine.sizing import PoolRequest
from lmdeploy.messages import EngineInfo, EngineRequest, SamplingParams
from tests.helpers import load_model, write_llama

CPU = torch.device("cpu")


class Replayed:
    """A graph of a step with single tokens that computes on the CPU what it finds in its input."""

    def __init__(self, graphs: EagerGraphs, shape: Shape) -> None:
        self.graphs, self.shape = graphs, shape

    @torch.inference_mode()
    def replay(self) -> None:
        graphs, shape = self.graphs, self.shape
        parts = torch.split(graphs._inputs[: sum(shape.lengths())], list(shape.lengths()))
        inputs = graphs._builder.on_device(Places(*parts[:6]), parts[4].diff().tolist(), parts[3].tolist(), shape.decodes)
        logits = torch.zeros((shape.sequences, graphs._model.spec.vocab_size))
        graphs._model.raw_logits(graphs._model.forward(inputs), logits)
        graphs.logits[: shape.sequences] = logits
        if graphs._sampler.kernel is not None:  # in Triton's interpreter: tests/kernels/triton/test_penalised_steps.py
            return graphs._choose(shape, parts, logits)
        rows = torch.nonzero(parts[6] != graphs._filler)[:, 0]
        lines, where = graphs._lines, parts[8]
        assert (where[rows] >= 0).all() and (where.sum() == where[rows].sum() - (len(where) - len(rows)))
        left = graphs._places[: shape.sequences]
        assert (left == left[0]).all() and left[0] in (-1, -2)
        if left[0] == -2:
            lines.view(-1)[where[rows]] = -1
        else:
            lines.view(-1)[where[rows]] = graphs._sampler._choose(logits[rows], parts[6][rows].numpy().copy(), parts[7][rows].numpy().copy(), None)
        for part in (parts[0], parts[3], parts[7]):  # the next step's, as the kernel leaves them
            part[rows] += 1
        where[rows] = (where[rows] + lines.shape[1]) % lines.numel()
        return None

    def reset(self) -> None:
        """Nothing is held."""


class Rechosen:
    """A graph of the choice with masks."""

    def __init__(self, graphs: EagerGraphs, choice: Choice) -> None:
        self.graphs, self.size = graphs, choice.rows

    @torch.inference_mode()
    def replay(self) -> None:
        graphs, masked = self.graphs, self.graphs._masked
        if graphs._sampler.kernel is not None:
            return masked.choose(self.size)
        slots, lengths, where, places = masked._inputs[:, : self.size].numpy().copy()
        used = slots != graphs._filler
        place = places.view(np.int32)[: self.size]
        assert (where[used] >= 0).all() and (where[~used] == -1).all() and (place[~used] == -1).all()
        place, slots, lengths, where = place[used], slots[used], lengths[used], where[used]
        rows = np.flatnonzero(place >= 0)
        mask = StepMask(rows, masked._words[torch.from_numpy(place[rows]).long()])
        logits = graphs.logits[: self.size][torch.from_numpy(used)]
        waits = (place < 0) & (graphs._sampler.table._young_until[slots] < 0)
        logits[torch.from_numpy(np.flatnonzero(waits))] = float("nan")  # nothing is chosen without its mask
        graphs._lines.view(-1)[torch.from_numpy(where)] = graphs._sampler._choose(logits, slots, lengths, mask)
        return None

    def reset(self) -> None:
        """Nothing is held."""


class EagerGraphs(StepGraphs):
    """Notes what is launched again: with how many new blocks."""

    def __init__(self, *args: Any) -> None:
        zeros = torch.zeros
        with (
            mock.patch("torch.zeros", lambda *size, pin_memory=False, **options: zeros(*size, **options)),
            mock.patch("torch.cuda.graph_pool_handle", lambda: (0, 0)),
        ):
            super().__init__(*args)
        self.noted: list[int] = []

    def _captured(self, shape: Shape | Choice) -> None:
        graph: Any = Replayed(self, shape) if isinstance(shape, Shape) else Rechosen(self, shape)
        self._graphs[shape] = graph

    def choice(self, *args: Any) -> Callable[[], None]:
        for size in self._sizes:
            self._capture(Choice(size))
        return super().choice(*args)

    def again(self, new_blocks: dict[int, list[int]]) -> None:
        self.noted.append(len(new_blocks))
        super().again(new_blocks)


class EagerRunner(ModelRunner):
    """A rank on the CPU whose steps of single tokens are graphs."""

    def _make_graphs(self) -> StepGraphs:
        return EagerGraphs(self.model, self.batches, self.sampler, self.arrivals.lines, self.arrivals.take_line, self.max_batch_size, self.dtype)

    def _graph_bytes(self) -> int:
        return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("again") / "llama")


@pytest.fixture(autouse=True)
def no_prompts_in_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_of_steps, "PROMPT_TOKENS", (1 << 20,))  # no graph has room for prompts
    monkeypatch.setattr(runners, "REPEATS", 5)


def engine_of(folder: Path, kind: type[ModelRunner], blocks: int, batch: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Engine, ModelRunner]:
    config = TurbomindEngineConfig(max_batch_size=batch, max_prefill_token_num=64)
    runner = kind(load_model(folder, dtype=dtype), config, PoolRequest(blocks, 4, 64), CPU, dtype, graphed=issubclass(kind, EagerRunner))
    info = EngineInfo(
        session_len=64, vocab_size=runner.model.spec.vocab_size, max_batch_size=batch, memory=runner.memory, kernels={}, dtype="float32", start_seconds=0
    )
    executor = LocalExecutor(runner, info)
    options: dict[str, Any] = {"max_prefill_token_num": 64, "max_waiting": 100, "enable_prefix_caching": True, "rope_depends_on_length": False}
    return Engine(executor, run_ahead=1, **options), runner


KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.2, "seed": 5},
    {"stop_token_ids": (3, 9, 40, 41, 90)},
    {"logprobs": 2},
    {"repetition_penalty": 1.3},
    {"min_new_tokens": 4, "stop_token_ids": (7,)},
    {"output_logits": "generation"},
]


def requests(seed: int, kinds: list[dict[str, Any]]) -> Iterator[tuple[int, EngineRequest | int]]:
    """At which step a request comes, or which is aborted then."""
    draw = np.random.default_rng(seed)
    at = 0
    for number in range(18):
        prompt = draw.integers(0, 120, int(draw.integers(1, 20))).tolist()
        params = SamplingParams(max_new_tokens=int(draw.integers(1, 40)), **kinds[int(draw.integers(len(kinds)))])
        yield at, EngineRequest(request_id=number, token_ids=prompt, sampling=params)
        at += int(draw.choice([0, 0, 0, 1, 2, 9, 20]))
        if draw.random() < 0.2:
            yield at + int(draw.integers(0, 8)), int(draw.integers(0, number + 1))


def answers(engine: Engine, plan: list[tuple[int, EngineRequest | int]]) -> dict[int, list[tuple[Any, ...]]]:
    """Everything that comes, by request."""
    found: dict[int, list[tuple[Any, ...]]] = {}
    step, todo = 0, sorted(plan, key=lambda entry: entry[0])
    while todo or engine.has_work:
        while todo and todo[0][0] <= step:
            what = todo.pop(0)[1]
            if isinstance(what, int):
                engine.abort(what)
            else:
                engine.add(what)
        step += 1
        if engine.has_work:
            for output in engine.step():
                logits = None if output.logits is None else output.logits.tolist()
                found.setdefault(output.request_id, []).append((output.token_ids, output.finish_reason, output.stop_token_id, output.logprobs, logits))
            engine.scheduler.check_integrity()
    return found


@pytest.mark.parametrize(
    ("seed", "kinds", "blocks"), [(1, KINDS[:1], 128), (2, KINDS[:3], 128), (3, KINDS, 128), (4, KINDS[:3], 20), (5, KINDS, 24), (6, KINDS[:2], 17)]
)
def test_answers_are_those_of_steps_that_are_looked_at_whole(folder: Path, seed: int, kinds: list[dict[str, Any]], blocks: int) -> None:
    plan = list(requests(seed, kinds))
    expected = answers(engine_of(folder, ModelRunner, blocks)[0], plan)
    engine, runner = engine_of(folder, EagerRunner, blocks)
    assert answers(engine, plan) == expected
    assert isinstance(runner.graphs, EagerGraphs)
    noted = runner.graphs.noted
    assert len(noted) > 10 or len(kinds) == len(KINDS), "only where nothing else than tokens is wanted"
    if len(kinds) == 1:
        assert {0, 1} < set(noted), "blocks come along"
    if blocks < 30:
        assert engine.stats().preemptions > 0


@pytest.mark.parametrize("late", [False, True])
def test_behind_a_step_that_failed_nothing_is_launched_again(folder: Path, late: bool) -> None:
    # a step that is repeated ends earlier: aborts would meet other tokens
    plan = [entry for entry in requests(1, KINDS[:1]) if not isinstance(entry[1], int)]
    expected = answers(engine_of(folder, ModelRunner, 128)[0], plan)
    engine, runner = engine_of(folder, EagerRunner, 128)
    replay = Replayed.replay

    def sometimes(self: Replayed) -> None:
        number = len(self.graphs.noted)
        fails = number > 0 and number % 4 == 0
        if late or not fails:
            replay(self)
        if fails:
            self.graphs.noted.append(0)  # once
            raise RuntimeError("a launch that failed")

    with mock.patch.object(Replayed, "replay", sometimes):
        assert answers(engine, plan) == expected
    assert isinstance(runner.graphs, EagerGraphs) and len(runner.graphs.noted) > 12 and engine.stats().failed == 0
