"""How slowly prompts are read that nobody waits for: no answer of a batch ends after its longest one, and nobody else is made to wait."""

from __future__ import annotations

from math import inf

import pytest

from lmdeploy.engine.engine import Engine
from lmdeploy.engine.pace import MULTIPLE, STEPS, Pace, longest_first, tokens_needed
from lmdeploy.grammar import Grammar
from lmdeploy.messages import EngineRequest, SamplingParams
from tests.engine.fake_rank import FakeRank, expected_tokens


def test_the_pace_is_what_the_answer_needs_that_has_the_least_time() -> None:
    assert tokens_needed(100, 0, []) == 0
    assert tokens_needed(100, 0, [(300, 40)]) == 5  # 60 steps for 300 tokens
    assert tokens_needed(100, 60, [(300, 40)]) == 6  # after 60 of another prompt
    assert tokens_needed(100, 0, [(300, 40), (200, 90)]) == 50  # ten steps for all 500
    assert tokens_needed(100, 0, [(1, 100)]) == tokens_needed(0, 0, [(1, 1)]) == inf


def test_answers_of_unknown_length_go_first_then_the_longest() -> None:
    asked = [
        SamplingParams(max_new_tokens=5, ignore_eos=True),
        SamplingParams(max_new_tokens=9, ignore_eos=True),
        SamplingParams(max_new_tokens=1),
        SamplingParams(max_new_tokens=9, ignore_eos=True, grammar=Grammar("regex", "a")),
        SamplingParams(max_new_tokens=9, ignore_eos=True),
    ]
    assert longest_first(range(5), asked.__getitem__) == [2, 3, 1, 4, 0]


def test_a_pace_is_kept_for_some_steps_unless_others_come() -> None:
    pace, needed = Pace(100), iter([1.0, MULTIPLE * 2 + 1.0, inf, 7.0])
    assert [pace.tokens(step, needed.__next__) for step in range(STEPS)] == [100] * STEPS
    assert pace.tokens(STEPS, needed.__next__) == 3 * MULTIPLE
    pace.changed()
    assert pace.tokens(STEPS + 1, needed.__next__) is None
    assert pace.tokens(STEPS + 2, needed.__next__) is None
    assert pace.tokens(2 * STEPS + 2, needed.__next__) == 100


def _request(number: int, prompt: int, answer: int, batch: int = 1) -> EngineRequest:
    ids = [(7 * number + i) % 90 for i in range(prompt)]
    return EngineRequest(request_id=number, token_ids=ids, sampling=SamplingParams(max_new_tokens=answer, ignore_eos=True), batch=batch)


def _engine(rank: FakeRank, budget: int = 400) -> Engine:
    return Engine(rank, max_prefill_token_num=budget, max_waiting=100, enable_prefix_caching=False, rope_depends_on_length=False, run_ahead=1, pace=20)


def _read(rank: FakeRank) -> list[int]:
    """Tokens of each step's prompts."""
    return [sum(item.num_tokens for item in plan.items if item.num_tokens > 1) for plan in rank.plans]


@pytest.mark.parametrize("longest", [60, 200])
def test_a_list_is_done_when_its_longest_answer_is_and_prompts_are_spread_over_its_steps(longest: int) -> None:
    rank = FakeRank(num_blocks=2000, block_size=4, max_batch_size=64, session_len=600)
    engine, requests = _engine(rank), [_request(1, 300, longest), *(_request(i, 100, 40 - i) for i in range(2, 32))]
    for request in requests:
        engine.add(request)
    found: dict[int, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
        engine.scheduler.check_integrity()
    assert all(found[r.request_id] == expected_tokens(r.token_ids, r.sampling.max_new_tokens) for r in requests)
    assert len(rank.plans) == longest  # the first token comes with the prompt
    read = _read(rank)
    assert read[0] == 400 and sum(read) == 3300  # nothing was running
    assert sorted(read[1:])[-2] <= (192 if longest == 60 else 64), read  # the rest of the last prompt holds nobody up


def test_whoever_is_waited_for_is_read_at_once() -> None:
    rank = FakeRank(num_blocks=2000, block_size=4, max_batch_size=64, session_len=600)
    engine = _engine(rank)
    for request in (_request(1, 300, 200), *(_request(i, 100, 30) for i in range(2, 12))):
        engine.add(request)
    for _ in range(3):
        engine.step()
    assert _read(rank)[1:3] == [64, 64]
    engine.add(_request(50, 390, 5, batch=0))
    engine.step()
    assert _read(rank)[3] > 300
    engine.abort(50)
    engine.step()
    assert _read(rank)[4] == 64
    engine.add(_request(60, 390, 5, batch=2))  # another list knows nothing of this one's longest answer
    engine.step()
    assert _read(rank)[5] > 300


def test_with_fewer_slots_than_requests_nothing_is_slowed_down() -> None:
    rank = FakeRank(num_blocks=2000, block_size=4, max_batch_size=4, session_len=600)
    engine = _engine(rank)
    for request in (_request(1, 300, 200), *(_request(i, 100, 30) for i in range(2, 12))):
        engine.add(request)
    engine.step()
    engine.step()
    assert _read(rank)[:2] == [400, 200]
