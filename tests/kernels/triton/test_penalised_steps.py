"""An engine on the CPU whose tokens are chosen by Triton's kernel in its interpreter, its steps pretended graphs: answers with penalties are the engine's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lmdeploy.engine import graphs as graphs_of_steps
from lmdeploy.engine import sampler as samplers
from lmdeploy.engine.runner import ModelRunner
from lmdeploy.kernels.select import TokenKernel
from lmdeploy.messages import EngineRequest, SamplingParams
from tests.engine import test_late
from tests.engine.test_again import EagerGraphs, EagerRunner, answers, engine_of
from tests.helpers import write_llama

sampling = pytest.importorskip("lmdeploy.kernels.triton_kernels.sampling", reason="triton is not installed")

often_late = test_late.often_late  # a fixture

PENALISED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4},
    {"presence_penalty": 1.0, "frequency_penalty": 0.4, "temperature": 0.9, "seed": 3},
]
OTHERS: list[dict[str, Any]] = [
    {"frequency_penalty": 1.0, "logit_bias": {9: 6.0, 40: 6.0}},
    {"repetition_penalty": 0.2, "logprobs": 1},
    {"frequency_penalty": 0.7, "min_new_tokens": 5, "stop_token_ids": tuple(range(0, 120, 2))},
    {},
]


def plan(kinds: list[dict[str, Any]], tokens: int) -> list[tuple[int, EngineRequest | int]]:
    """At each third step another request, with a prompt that repeats itself."""
    params = [SamplingParams(max_new_tokens=tokens, **kind) for kind in kinds]
    return [(3 * i, EngineRequest(request_id=i, token_ids=[5 + i, 9, 40, 9], sampling=p)) for i, p in enumerate(params)]


def unpenalised(kind: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kind.items() if not name.endswith("penalty")}


class Runner(EagerRunner):
    """Counts the steps whose tokens no graph has chosen."""

    sampled = 0

    def _sample(self, *arguments: Any) -> Any:
        self.sampled += 1
        return super()._sample(*arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("penalised") / "llama")


@pytest.fixture(autouse=True)
def no_prompts_in_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_of_steps, "PROMPT_TOKENS", (1 << 20,))


def compared(folder: Path, kinds: list[dict[str, Any]], tokens: int, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """The runner with kernel and graphs, whose answers are those of the one without either."""
    expected, plain = (answers(engine_of(folder, ModelRunner, 64, 3)[0], plan(some, tokens)) for some in (kinds, [unpenalised(kind) for kind in kinds]))
    assert expected[0] != plain[0] and expected[1] != plain[1], "they count"
    monkeypatch.setattr(samplers, "token_kernel", lambda _: TokenKernel(sampling.choose_tokens, sampling.scratch_width()))
    engine, runner = engine_of(folder, Runner, 64, 3)
    assert isinstance(runner, Runner) and runner.sampler.kernel is not None
    runner.sampled = 0
    assert answers(engine, plan(kinds, tokens)) == expected
    assert not runner.sampler._edits.any()
    return runner


def test_answers_with_penalties_alone_are_the_graphs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = compared(folder, PENALISED, 20, monkeypatch)
    assert isinstance(runner.graphs, EagerGraphs)
    assert runner.sampled == len(PENALISED) and len(runner.graphs.noted) > 10, "prompts only; steps are launched again unseen"


def test_other_edits_beside_penalties_give_the_same_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = compared(folder, OTHERS, 6, monkeypatch)
    assert runner.sampled > 8


def test_no_request_needs_a_kernel_that_a_start_has_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is compiled for each type of logits and each set of constants."""
    seen = set()

    def choose(logits: torch.Tensor, *rest: Any) -> None:
        seen.add((logits.dtype, *(rest[place] is None for place in (3, 9))))
        sampling.choose_tokens(logits, *rest)

    monkeypatch.setattr(samplers, "token_kernel", lambda _: TokenKernel(choose, sampling.scratch_width()))
    engine, _ = engine_of(folder, ModelRunner, 64, 3, torch.bfloat16)
    known = set(seen)
    answers(engine, plan([*PENALISED, *OTHERS, {"logit_bias": {9: 6.0}}, {"bad_words": ((9,),)}, {"temperature": 1.0}], 2))
    assert seen == known and len(known) == 2


def test_tokens_whose_masks_are_late_are_penalised_as_those_in_time(shallow_folder: Path, often_late: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a row is given while it waits counts for nothing."""
    monkeypatch.setattr(samplers, "token_kernel", lambda _: TokenKernel(sampling.choose_tokens, sampling.scratch_width()))
    kinds: list[dict[str, Any]] = [{"repetition_penalty": 0.3}, {"frequency_penalty": -2.0}, {"presence_penalty": -2.0, "temperature": 0.8, "top_k": 40}]
    todo = [(number, test_late.request(number, test_late.WORD, max_new_tokens=12, **kind)) for number, kind in enumerate(kinds)]
    found = test_late.run(test_late.engine_of(shallow_folder)[0], todo)
    assert sum(often_late) > 5
    monkeypatch.undo()
    expected = test_late.run(test_late.engine_of(shallow_folder, ModelRunner)[0], todo)
    assert {number: test_late.answer(outputs) for number, outputs in found.items()} == {
        number: test_late.answer(outputs) for number, outputs in expected.items()
    }
