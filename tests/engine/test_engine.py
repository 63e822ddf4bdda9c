"""The engine: what it refuses, how it keeps failures apart, and what it tells about itself."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from lmdeploy.engine.engine import Engine, _Rate
from lmdeploy.engine.plan import StepPlan, StepResult
from lmdeploy.errors import EngineError, OverloadedError, RequestError
from lmdeploy.messages import EngineOutput, EngineRequest, SamplingParams
from tests.engine.fake_rank import FakeRank, expected_tokens


def build(rank: FakeRank, *, max_waiting: int = 100, run_ahead: int = 0) -> Engine:
    return Engine(rank, max_prefill_token_num=64, max_waiting=max_waiting, enable_prefix_caching=True, rope_depends_on_length=False, run_ahead=run_ahead)


def request(request_id: int, prompt: list[int], *, n: int = 1, max_new_tokens: int = 5, **sampling: Any) -> EngineRequest:
    return EngineRequest(request_id=request_id, token_ids=prompt, n=n, sampling=SamplingParams(max_new_tokens=max_new_tokens, **sampling))


def finish(engine: Engine) -> dict[int, list[EngineOutput]]:
    found: dict[int, list[EngineOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output)
        engine.scheduler.check_integrity()
    return found


def tokens(outputs: list[EngineOutput]) -> list[int]:
    return [t for o in outputs for t in o.token_ids]


# ------------------------------------------------------------------ the door


@pytest.mark.parametrize(
    ("wrong", "message", "code"),
    [
        ({"prompt": []}, "the prompt is empty", "empty_prompt"),
        ({"prompt": [5, 97]}, r"prompt: token id 97 is not in the vocabulary \(0..96\)", "invalid_value"),
        ({"prompt": [5, -1]}, r"prompt: token id -1 is not in the vocabulary \(0..96\)", "invalid_value"),
        ({"prompt": [5, 1 << 70]}, r"prompt: token id 1180591620717411303424 is not in the vocabulary", "invalid_value"),
        ({"prompt": [5, -1]}, "prompt: token id -1", "invalid_value"),
        (
            {"prompt": [1] * 48},
            "the prompt has 48 tokens and the answer needs at least 1, but session_len and the KV cache allow 48",
            "context_length_exceeded",
        ),
        ({"n": 0}, r"n=0 must be in \[1, 128\]", "invalid_value"),
        ({"n": 1000}, "n=1000", "invalid_value"),
        ({"logprobs": 98}, r"logprobs=98 must be in \[0, 97\]", "invalid_value"),
        ({"prompt_logprobs": -1}, "prompt_logprobs=-1", "invalid_value"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1", "invalid_value"),
        ({"stop_token_ids": (3, 200)}, "stop_token_ids: token id 200", "invalid_value"),
        ({"logit_bias": {97: 1.0}}, "logit_bias: token id 97", "invalid_value"),
        ({"bad_words": ((1,), (2, 99))}, "bad_words: token id 99", "invalid_value"),
    ],
)
def test_a_bad_request_is_refused_with_field_value_and_limit(wrong: dict[str, Any], message: str, code: str) -> None:
    engine = build(FakeRank())
    prompt = wrong.pop("prompt", [1, 2])
    with pytest.raises(RequestError, match=message) as error:
        engine.add(request(1, prompt, **wrong))
    assert error.value.code == code and not engine.has_work


def test_the_longest_prompt_that_fits_is_answered() -> None:
    engine = build(FakeRank(num_blocks=10, session_len=48))
    engine.add(request(1, [3] * 39))
    assert tokens(finish(engine)[1]) == expected_tokens([3] * 39, 1)
    engine.add(request(2, [3] * 40, max_new_tokens=0))
    assert finish(engine)[2][-1].finish_reason == "length"
    with pytest.raises(RequestError, match="allow 40"):
        engine.add(request(3, [3] * 40))


def test_a_full_waiting_queue_refuses_and_recovers() -> None:
    engine = build(FakeRank(max_batch_size=1), max_waiting=2)
    for i in range(2):
        engine.add(request(i, [1, 2]))
    with pytest.raises(OverloadedError, match="2 requests are waiting and max_waiting=2") as error:
        engine.add(request(2, [1, 2]))
    assert error.value.code == "overloaded"
    engine.step()
    engine.add(request(3, [1, 2]))
    assert sorted(finish(engine)) == [0, 1, 3]


# ------------------------------------------------------------------ failures


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_a_request_whose_step_raises_fails_alone(run_ahead: int) -> None:
    rank = FakeRank()
    rank.poison = 77
    engine = build(rank, run_ahead=run_ahead)
    for i, prompt in enumerate(([1, 2, 3], [4, 77, 5], [6] * 9)):
        engine.add(request(i, prompt))
    found = finish(engine)
    assert tokens(found[0]) == expected_tokens([1, 2, 3], 5) and tokens(found[2]) == expected_tokens([6] * 9, 5)
    (failed,) = found[1]
    assert (failed.finish_reason, failed.error_code, failed.token_ids) == ("error", "step_failed", [])
    assert failed.error == "the step of this request failed: PoisonError: token 77"
    assert (engine.stats().failed, engine.stats().finished) == (1, 2)


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("half_applied", [True, False])
def test_a_step_that_failed_once_is_repeated_unseen(run_ahead: int, half_applied: bool) -> None:
    for when in range(7):
        rank = FakeRank()
        engine = build(rank, run_ahead=run_ahead)
        found: dict[int, list[int]] = {0: [], 1: [], 2: []}
        for i in range(3):
            engine.add(request(i, [i + 1] * (3 + 3 * i), max_new_tokens=4 + i))
        for k in range(100):
            rank.broken, rank.half_applied = int(k == when), half_applied
            for output in engine.step() if engine.has_work else []:
                found[output.request_id] += output.token_ids
        assert found == {i: expected_tokens([i + 1] * (3 + 3 * i), 4 + i) for i in range(3)}


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_an_error_of_one_slot_ends_only_that_answer_and_keeps_its_tokens(run_ahead: int) -> None:
    rank = FakeRank()
    want = expected_tokens([1, 2, 3], 5)
    rank.bad_draw = want[3]
    engine = build(rank, run_ahead=run_ahead)
    engine.add(request(0, [1, 2, 3]))
    engine.add(request(1, [6] * 8))
    found = finish(engine)
    assert tokens(found[0]) == want[:3] and found[0][-1].error == f"token {want[3]} cannot be drawn"
    assert tokens(found[1]) == expected_tokens([6] * 8, 5)


def test_slots_given_back_in_a_step_that_failed_can_be_used_again() -> None:
    rank = FakeRank(max_batch_size=3)
    engine = build(rank)
    for i in range(3):
        engine.add(request(i, [i + 1] * 3, max_new_tokens=2 if i == 0 else 9))
    engine.step()
    engine.step()
    rank.broken = 2  # the step that gives the slot of request 0 back, and the first repetition
    assert [(o.request_id, o.finish_reason) for o in engine.step()] == [(1, "error"), (2, None)]
    engine.add(request(3, [7, 7]))
    engine.add(request(4, [8, 8]))
    found = finish(engine)
    assert tokens(found[2])[-3:] == expected_tokens([3] * 3, 9)[-3:] and tokens(found[3]) == expected_tokens([7, 7], 5)


class LostRank(FakeRank):
    """A rank whose process dies at its third step."""

    def result(self) -> Any:
        if len(self.plans) == 3:
            raise EngineError("the rank is gone")
        return super().result()


def test_a_lost_executor_is_not_a_failed_step() -> None:
    engine = build(LostRank())
    engine.add(request(0, [1, 2, 3]))
    engine.step()
    engine.step()
    with pytest.raises(EngineError, match="the rank is gone"):
        engine.step()


# ------------------------------------------------------------------ running ahead


def test_running_ahead_launches_the_next_step_before_the_result_is_fetched() -> None:
    rank = FakeRank()
    engine = build(rank, run_ahead=1)
    engine.add(request(0, [1, 2, 3]))
    assert not engine.step() and len(rank.plans) == 1
    assert tokens(engine.step()) == expected_tokens([1, 2, 3], 1) and len(rank.plans) == 2


def test_running_ahead_throws_away_the_token_behind_a_stop_but_computes_none_behind_the_length() -> None:
    want = expected_tokens([1, 2, 3], 5)
    plans = {}
    for stop in ((), (want[2],)):
        rank = FakeRank()
        engine = build(rank, run_ahead=1)
        engine.add(request(0, [1, 2, 3], stop_token_ids=stop))
        assert tokens(finish(engine)[0]) == (want[:3] if stop else want)
        plans[stop] = len(rank.plans)
    assert plans == {(): 5, (want[2],): 4}


# ------------------------------------------------------------------ late tokens


@pytest.mark.parametrize("half_applied", [True, False])
def test_behind_a_late_token_a_step_that_failed_is_repeated_unseen(half_applied: bool) -> None:
    for prompt_len in (3, 4, 8):  # places of the late token in its block
        for behind in (0, 1, 2):
            rank = FakeRank()
            rank.delay((0, prompt_len), (1, prompt_len + 2), (1, prompt_len + 2))
            engine = build(rank, run_ahead=1)
            for i in range(2):
                engine.add(request(i, [i + 1] * prompt_len, max_new_tokens=7))
            found: dict[int, list[int]] = {0: [], 1: []}
            times = 0
            while engine.has_work:
                if rank.num_late == 1 + behind and not times:
                    rank.broken, rank.half_applied, times = 1, half_applied, 1
                for output in engine.step():
                    found[output.request_id] += output.token_ids
                engine.scheduler.check_integrity()
            assert times == 1 and rank.broken == 0 and engine.stats().failed == 0
            assert found == {i: expected_tokens([i + 1] * prompt_len, 7) for i in range(2)}


def test_an_answer_that_fails_instead_of_its_late_token_ends_alone() -> None:
    rank = FakeRank()
    want = expected_tokens([1, 2, 3], 5)
    rank.bad_draw = want[3]
    rank.delay((0, 6))
    engine = build(rank, run_ahead=1)
    engine.add(request(0, [1, 2, 3]))
    engine.add(request(1, [6] * 8))
    found = finish(engine)
    assert rank.num_late == 1 and tokens(found[0]) == want[:3] and found[0][-1].finish_reason == "error"
    assert tokens(found[1]) == expected_tokens([6] * 8, 5)


# ------------------------------------------------------------------ figures


def test_stats_count_what_happened() -> None:
    engine = build(FakeRank(max_batch_size=2))
    before = engine.stats()
    assert (before.steps, before.last_step_time, before.num_blocks) == (0, 0.0, 16)
    for i in range(3):
        engine.add(request(i, [9, 8, 7, 6, 5]))
    engine.step()
    now = engine.stats()
    assert (now.running, now.waiting, now.steps, now.generated_tokens, now.prompt_tokens) == (2, 1, 1, 2, 10)
    assert now.used_blocks == 4 and 0 < now.last_step_time <= time.monotonic() and now.step_seconds > 0
    finish(engine)
    after = engine.stats()
    assert (after.finished, after.generated_tokens, after.prompt_tokens, after.cached_tokens, after.used_blocks) == (3, 15, 15, 4, 0)
    assert after.tokens_per_second > 0


def test_the_rate_is_that_of_the_last_seconds() -> None:
    rate = _Rate(5.0)
    assert rate.value(0.0) == 0.0
    for second in range(20):
        rate.add(float(second), 10 * second)
    assert rate.value(19.0) == pytest.approx(10.0, rel=0.25)
    assert rate.value(60.0) == 0.0
    rate.add(61.0, 200)
    assert rate.value(61.0) == pytest.approx(2.0)


def test_close_closes_the_executor() -> None:
    rank = FakeRank()
    build(rank).close()
    assert rank.closed


class InstantRank(FakeRank):
    """Answers without computing, so that only the host's own work is left to measure."""

    def result(self) -> StepResult:
        plan = self.plans.pop()
        return StepResult(plan.step, np.where(plan.items.sample, 5, -1))

    def submit(self, plan: StepPlan) -> None:
        self.plans.append(plan)


def test_the_host_needs_well_under_a_millisecond_for_a_step_of_32() -> None:
    engine = build(InstantRank(num_blocks=1000, block_size=64, max_batch_size=32, session_len=2000))
    for i in range(32):
        engine.add(request(i, [i] * 50, max_new_tokens=1500, stop_token_ids=(6, 7)))
    seconds = []
    for _ in range(300):
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    assert sorted(seconds)[len(seconds) // 2] < 0.5e-3  # 0.04 ms on an idle core
