"""One rank on real tiny models: what a plan computes must not depend on how the work was cut, batched or repeated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from lmdeploy.config import TurbomindEngineConfig
from lmdeploy.engine.plan import NOTHING_MORE, Items, NewSequence, PlanItem, SlotResult, StepPlan
from lmdeploy.engine.runner import ModelRunner
from lmdeploy.engine.sizing import PoolRequest
from lmdeploy.kernels.reference import REFERENCE, gated
from lmdeploy.kernels.row_buckets import padded
from lmdeploy.messages import SamplingParams
from tests.helpers import Harness, load_model, write_llama

CPU = torch.device("cpu")
PROMPT = [5, 17, 90, 33, 2, 71, 64, 8, 120, 44, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("runner") / "llama")


def make_runner(folder: Path, **options: Any) -> ModelRunner:
    """A float32 rank of 8 slots, blocks of 4 tokens."""
    config = TurbomindEngineConfig(**{"dtype": "float32", "max_batch_size": 8, "max_prefill_token_num": 64, **options})
    return ModelRunner(load_model(folder), config, PoolRequest(128, 4, 64), CPU, torch.float32)


@pytest.fixture
def runner(folder: Path) -> Iterator[ModelRunner]:
    runner = make_runner(folder)
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def truth(folder: Path) -> Harness:
    return Harness(load_model(folder))


class Got(SlotResult):
    """A row of a result with its slot and token."""

    slot: int = -1
    token_id: int | None = None


class Driver:
    """A minimal scheduler: one block list a slot, items as asked for."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner, self.step, self.free, self.held = runner, 0, list(range(127, -1, -1)), dict[int, int]()

    def item(self, slot: int, start: int, count: int, *, sample: bool = True) -> PlanItem:
        """An item with the blocks that it needs."""
        need = -(-(start + count) // 4) - self.held.get(slot, 0)
        self.held[slot] = self.held.get(slot, 0) + max(0, need)
        return PlanItem(slot, start, count, [self.free.pop() for _ in range(need)], sample)

    def run(self, items: list[PlanItem], new: list[NewSequence] | None = None, released: list[int] | None = None) -> list[Got]:
        """One step."""
        self.step += 1
        result = self.runner.run(StepPlan(self.step, released or [], new or [], Items.of(items)))
        assert result.step == self.step and len(result.tokens) == len(items)
        more = [msgspec.structs.asdict(result.more.get(row, NOTHING_MORE)) for row in range(len(items))]
        return [Got(**m, slot=i.slot, token_id=None if t < 0 else t) for m, i, t in zip(more, items, result.tokens.tolist(), strict=True)]

    def start(self, slot: int, ids: list[int], **params: Any) -> NewSequence:
        """A new sequence without blocks."""
        self.held[slot] = 0
        return NewSequence(slot, ids, len(ids), SamplingParams(**{"max_new_tokens": 20, **params}), 0)

    def answer(self, slot: int, ids: list[int], count: int, **params: Any) -> list[int]:
        """`count` tokens, the prompt in one chunk."""
        results = self.run([self.item(slot, 0, len(ids))], [self.start(slot, ids, **params)])
        out = [results[0].token_id]
        while len(out) < count:
            out.append(self.run([self.item(slot, len(ids) + len(out) - 1, 1)])[0].token_id)
        assert None not in out
        return out  # type: ignore[return-value]


def test_greedy_tokens_are_those_of_the_model_run_directly(runner: ModelRunner, truth: Harness) -> None:
    assert Driver(runner).answer(3, PROMPT, 12) == truth.greedy(PROMPT, 12)


def test_chunks_and_batches_of_unequal_lengths_change_no_token(runner: ModelRunner, truth: Harness) -> None:
    driver = Driver(runner)
    prompts = {0: PROMPT, 5: [9], 2: PROMPT[::-1] * 2, 7: [4, 4]}
    first = driver.run(
        [driver.item(0, 0, 4, sample=False), driver.item(5, 0, 1), driver.item(2, 0, 22), driver.item(7, 0, 1, sample=False)],
        [driver.start(slot, ids) for slot, ids in prompts.items()],
    )
    assert [r.token_id is None for r in first] == [True, False, False, True]
    out = {0: [], 5: [first[1].token_id], 2: [first[2].token_id], 7: []}
    second = driver.run([driver.item(5, 1, 1), driver.item(0, 4, 7), driver.item(7, 1, 1), driver.item(2, 22, 1)])
    for result in second:
        out[result.slot].append(result.token_id)
    for _ in range(5):
        items = [driver.item(slot, len(prompts[slot]) + len(out[slot]) - 1, 1) for slot in (7, 0, 2, 5)]
        for result in driver.run(items):
            out[result.slot].append(result.token_id)
    assert out == {slot: truth.greedy(ids, len(out[slot])) for slot, ids in prompts.items()}


def test_a_seeded_answer_is_the_same_alone_in_a_batch_and_after_a_preemption(runner: ModelRunner) -> None:
    driver, params = Driver(runner), {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "seed": 77, "repetition_penalty": 1.1, "frequency_penalty": 0.2}
    alone = driver.answer(1, PROMPT, 8, **params)
    mate = driver.start(4, PROMPT * 2, temperature=1.5, seed=3, min_new_tokens=4, stop_token_ids=(2,))
    first = driver.run([driver.item(4, 0, 22), driver.item(6, 0, 11)], [mate, driver.start(6, PROMPT, **params)], released=[1])
    out = [first[1].token_id]
    for n in range(3):
        results = driver.run([driver.item(4, 22 + n, 1), driver.item(6, 11 + n, 1)])
        out.append(results[1].token_id)
    again = driver.start(0, PROMPT + out, **params)  # pre-empted and computed again in another slot
    again.prompt_len = len(PROMPT)
    out.append(driver.run([driver.item(0, 0, 15)], [again], released=[6])[0].token_id)
    out += [driver.run([driver.item(0, 15 + n, 1)])[0].token_id for n in range(3)]
    assert out == alone


def test_logprobs_are_those_of_the_raw_logits(runner: ModelRunner, truth: Harness) -> None:
    driver = Driver(runner)
    new = driver.start(0, PROMPT, logprobs=3, prompt_logprobs=2, logit_bias={7: 100.0})
    other = driver.start(1, PROMPT[:3])
    results = driver.run([driver.item(0, 0, 6, sample=False), driver.item(1, 0, 3)], [new, other])
    results += driver.run([driver.item(1, 3, 1), driver.item(0, 6, 5)])
    expected = torch.log_softmax(truth.step([(1, PROMPT)])[1], -1)
    truth.drop(1)
    assert results[3].token_id == 7 and results[1].logprobs is None and results[0].logprobs is None
    found = results[3].logprobs
    assert found is not None and found.token_id == 7 and found.logprob == pytest.approx(expected[-1, 7].item(), abs=1e-4)
    assert [t for t, _ in found.top] == expected[-1].topk(3).indices.tolist()
    places = [*(results[0].prompt_logprobs or []), *(results[3].prompt_logprobs or [])]
    assert [p.token_id for p in places] == PROMPT[1:]
    for row, place in zip(expected, places, strict=False):
        assert place.logprob == pytest.approx(row[place.token_id].item(), abs=1e-4)
        assert [v for _, v in place.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
    assert driver.run([driver.item(0, 11, 1)])[0].prompt_logprobs is None
    assert not runner._wanting.any()  # once the prompt is scored, steps need no longer be looked at row by row


def test_raw_logits_and_hidden_states_come_back_for_what_was_asked(runner: ModelRunner, truth: Harness) -> None:
    driver = Driver(runner)
    everything = driver.start(0, PROMPT, output_logits="all", output_last_hidden_state="all")
    last = driver.start(1, PROMPT, output_logits="generation", output_last_hidden_state="generation", logit_bias={3: 50.0})
    first, second, third = driver.run([driver.item(0, 0, 11), driver.item(1, 0, 11), driver.item(2, 0, 11)], [everything, last, driver.start(2, PROMPT)])
    expected = truth.step([(1, PROMPT)])[1]
    truth.drop(1)
    torch.testing.assert_close(first.logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(second.logits, expected[-1:], atol=1e-4, rtol=1e-4)
    assert second.token_id == 3 and first.token_id == third.token_id
    assert first.last_hidden_state.shape == (11, 64) and second.last_hidden_state.shape == (1, 64)  # type: ignore[attr-defined]
    assert third.logits is None and third.last_hidden_state is None
    kept = first.last_hidden_state.clone()  # type: ignore[attr-defined]
    more = driver.run([driver.item(0, 11, 1), driver.item(1, 11, 1)])
    assert more[0].logits.shape == more[1].logits.shape == (1, 131)  # type: ignore[attr-defined]
    assert torch.equal(first.last_hidden_state, kept), "a result must not be a view of the step's buffers"


def test_bad_ids_fail_their_own_slot_only(runner: ModelRunner, truth: Harness) -> None:
    driver = Driver(runner)
    new = [driver.start(0, [1, 131]), driver.start(1, PROMPT), driver.start(2, PROMPT, logit_bias={500: 1.0})]
    results = driver.run([driver.item(0, 0, 2), driver.item(1, 0, 11), driver.item(2, 0, 11)], new)
    assert "outside the vocabulary 0..130" in (results[0].error or "") and "logit_bias has token id 500" in (results[2].error or "")
    assert results[1].error is None and results[1].token_id == truth.greedy(PROMPT, 1)[0]
    assert driver.answer(0, PROMPT, 2) == truth.greedy(PROMPT, 2), "the slot works again for the next sequence"


class NaNFor:
    """A real model whose logits break for one token at the end of a row."""

    def __init__(self, model: Any) -> None:
        self.model, self.spec, self.weight_bytes, self.fail, self.nan_rows = model, model.spec, model.weight_bytes, False, slice(0, 0)

    def forward(self, inputs: Any) -> torch.Tensor:
        if self.fail:
            raise RuntimeError("broken kernel")
        return self.model.forward(inputs)

    def raw_logits(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        self.model.raw_logits(hidden, out)
        out[self.nan_rows] = float("nan")


def test_products_of_any_prompt_have_shapes_that_the_start_has_met(tmp_path: Path) -> None:
    shapes: set[tuple[int, ...]] = set()

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        shapes.add((x.shape[0], *weight.shape))
        REFERENCE.linear(x, weight, bias, out)

    products = padded(linear)
    kernels = replace(REFERENCE, linear=products, linear_silu=gated(products, REFERENCE.silu_mul))
    model = load_model(write_llama(tmp_path, num_hidden_layers=5), kernels=kernels)
    config = TurbomindEngineConfig(dtype="float32", max_batch_size=8, max_prefill_token_num=150)
    runner = ModelRunner(model, config, PoolRequest(128, 4, 160), CPU, torch.float32, pads_rows=True)
    met = set(shapes)
    assert runner.model is model and len(model.layers) == 5
    for slot, rows in enumerate((1, 2, 37, 64, 101, 128, 129, 150)):
        driver = Driver(runner)
        driver.run([driver.item(slot, 0, rows)], [driver.start(slot, [7] * rows)])
    runner.close()
    assert shapes == met and {rows for rows, *_ in met} >= {1, 2, 4, 8, 16, 32, 64, 128, 256}


def test_nan_logits_are_an_error_of_their_slot(runner: ModelRunner, truth: Harness) -> None:
    broken = NaNFor(runner.model)
    broken.nan_rows, runner.model = slice(1, 2), broken
    driver = Driver(runner)
    results = driver.run([driver.item(s, 0, 11) for s in (0, 1, 2)], [driver.start(s, PROMPT, logprobs=1) for s in (0, 1, 2)])
    assert results[1].token_id is None and results[1].error is None and results[1].logprobs is None, "which the scheduler knows to be an error"
    assert results[0].token_id == results[2].token_id == truth.greedy(PROMPT, 1)[0]


def test_a_failed_step_can_be_computed_again_one_by_one(runner: ModelRunner, truth: Harness) -> None:
    broken = NaNFor(runner.model)
    runner.model = broken
    driver = Driver(runner)
    items = [driver.item(0, 0, 11), driver.item(1, 0, 5)]
    new = [driver.start(0, PROMPT), driver.start(1, PROMPT[:5])]
    broken.fail = True
    with pytest.raises(RuntimeError, match="broken kernel"):
        driver.run(items, new)
    broken.fail = False
    for item, sequence in zip(items, new, strict=True):  # as the executor's contract says: released, new, the whole block table
        result = driver.run([item], [sequence], released=[item.slot])[0]
        assert result.token_id == truth.greedy(sequence.token_ids, 1)[0]


def test_a_plan_may_only_release_or_score(runner: ModelRunner) -> None:
    driver = Driver(runner)
    assert driver.run([], released=[3, 4]) == []
    results = driver.run([driver.item(0, 0, 11, sample=False)], [driver.start(0, PROMPT, max_new_tokens=0, prompt_logprobs=0)])
    assert results[0].token_id is None and len(results[0].prompt_logprobs or []) == 10
    assert all(p.top == [] for p in results[0].prompt_logprobs or [])


def test_start_up_reserves_what_steps_need(runner: ModelRunner) -> None:
    before = runner.scratch.nbytes, runner.sampler.scratch.nbytes
    driver = Driver(runner)
    params = {"temperature": 1.0, "presence_penalty": 0.5}
    driver.run([driver.item(s, 0, 8) for s in range(8)], [driver.start(s, PROMPT[:8], **params, top_p=0.9 if s % 2 else 1.0) for s in range(8)])
    driver.run([driver.item(s, 8, 1) for s in range(8)])
    assert (runner.scratch.nbytes, runner.sampler.scratch.nbytes) == before
    assert runner.memory.workspace >= sum(before)


def test_scores_do_not_depend_on_the_chunk_of_rows(folder: Path) -> None:
    found = []
    for chunk in (256, 3):
        runner = make_runner(folder)
        runner.chunk = chunk
        driver = Driver(runner)
        result = driver.run([driver.item(0, 0, 11)], [driver.start(0, PROMPT, prompt_logprobs=4, output_logits="all")])[0]
        found.append(result)
        runner.close()
    assert [p.token_id for p in found[0].prompt_logprobs or []] == [p.token_id for p in found[1].prompt_logprobs or []]
    torch.testing.assert_close(found[0].logits, found[1].logits)
