"""The scheduler, through an engine and a rank that checks every plan; then random operations in `machine.py`."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from lmdeploy.engine.engine import Engine
from lmdeploy.engine.plan import StepPlan, StepResult
from lmdeploy.engine.prefix_cache import RootKey
from lmdeploy.engine.running import LOGGED, Running
from lmdeploy.engine.scheduler import Fill
from lmdeploy.engine.sequence import Sequence
from lmdeploy.messages import EngineOutput, EngineRequest, SamplingParams
from tests.engine.fake_rank import FakeRank, expected_tokens, key_chain
from tests.engine.machine import EngineMachine

PROMPT = list(range(1, 14))  # three full blocks of 4 and one token


def build(rank: FakeRank, *, budget: int = 64, caching: bool = True, run_ahead: int = 0, fill: Fill | None = None) -> Engine:
    return Engine(
        rank,
        max_prefill_token_num=budget,
        max_waiting=100,
        enable_prefix_caching=caching,
        rope_depends_on_length=rank.rope_depends_on_length,
        run_ahead=run_ahead,
        fill=fill,
    )


def request(
    request_id: int, prompt: list[int] = PROMPT, max_new_tokens: int = 4, *, n: int = 1, salt: str = "", rope: int = 0, **sampling: Any
) -> EngineRequest:
    params = SamplingParams(max_new_tokens=max_new_tokens, **sampling)
    return EngineRequest(request_id=request_id, token_ids=prompt, sampling=params, n=n, cache_salt=salt, rope_length=rope)


def finish(engine: Engine, *requests: EngineRequest) -> dict[tuple[int, int], list[EngineOutput]]:
    """Add, then step to the end; outputs by (request, answer)."""
    for r in requests:
        engine.add(r)
    found: dict[tuple[int, int], list[EngineOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault((output.request_id, output.index), []).append(output)
        engine.scheduler.check_integrity()
    return found


def tokens(outputs: list[EngineOutput]) -> list[int]:
    return [t for o in outputs for t in o.token_ids]


# ------------------------------------------------------------------ the catch-up rule


def test_a_long_prompt_is_computed_in_chunks_of_the_budget_beside_running_answers() -> None:
    rank = FakeRank(num_blocks=32)
    engine = build(rank, budget=8)
    engine.add(request(1, [5, 6], max_new_tokens=12))
    engine.step()
    engine.add(request(2, list(range(1, 21))))
    for _ in range(4):
        engine.step()
    chunks = [[(item.num_tokens, item.sample) for item in plan.items] for plan in rank.plans[1:]]
    assert chunks == [[(1, True), (7, False)], [(1, True), (7, False)], [(1, True), (6, True)], [(1, True), (1, True)]]


def test_few_prompts_fill_the_steps_of_running_answers_up_and_many_are_computed_at_once() -> None:
    """Of 15 tokens at most; also those of prompts that have begun and of those that wait."""
    rank = FakeRank(num_blocks=64, max_batch_size=8)
    engine = build(rank, fill=Fill(((1, 6), (2, 4)), 15))
    engine.add(request(1, [5, 6], max_new_tokens=12))
    engine.step()
    engine.add(request(2, list(range(1, 14)), max_new_tokens=12))
    engine.step()
    engine.add(request(3, [7, 8, 9], max_new_tokens=12))
    for _ in range(3):
        engine.step()
    engine.add(request(4, list(range(40, 56)), max_new_tokens=12))  # too many
    engine.step()
    steps = [[(item.num_tokens, item.sample) for item in plan.items] for plan in rank.plans]
    assert steps[0] == [(2, True)]  # nothing is running
    assert steps[1:4] == [[(1, True), (6, False)], [(1, True), (6, False)], [(1, True), (1, True), (3, True)]]
    assert steps[5] == [(1, True), (1, True), (1, True), (16, True)]


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_an_answer_for_which_no_token_can_be_chosen_ends_alone(run_ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = FakeRank(num_blocks=64, max_batch_size=4)
    engine, result, seen = build(rank, run_ahead=run_ahead), rank.result, []

    def without_one() -> StepResult:
        found = result()
        seen.append(found.step)
        if len(seen) == 7:  # in the middle of all answers
            found.tokens[1] = -1
        return found

    monkeypatch.setattr(rank, "result", without_one)
    prompts = [[10 * i + k for k in range(1, 6)] for i in range(3)]
    found = finish(engine, *(request(i, prompt, max_new_tokens=20) for i, prompt in enumerate(prompts)))
    wanted = [expected_tokens(prompt, 20) for prompt in prompts]
    assert tokens(found[0, 0]) == wanted[0] and tokens(found[2, 0]) == wanted[2]
    assert tokens(found[1, 0]) == wanted[1][:6]
    last = found[1, 0][-1]
    assert last.finish_reason == "error" and "no token can be chosen" in (last.error or "") and last.num_generated == 6


def test_steady_steps_are_written_down_when_someone_looks_and_before_there_is_no_room() -> None:
    """Without a prefix cache nobody looks; the log has room for some steps only."""
    rank = FakeRank(num_blocks=400, block_size=4, session_len=600)
    engine = build(rank, run_ahead=1, caching=False)
    engine.add(request(1, [5, 6], max_new_tokens=2 * LOGGED + 40))
    engine.add(request(2, [7, 8, 9], max_new_tokens=LOGGED + 20))
    found: dict[int, list[int]] = {1: [], 2: []}
    step = 0
    while engine.has_work:
        for output in engine.step():
            found[output.request_id] += output.token_ids
        step += 1
        if step in (30, LOGGED + 5):
            running = engine.scheduler._running
            behind = running[0].num_known
            running.write_down()
            assert behind < running[0].num_known == len(running[0].token_ids) == 2 + len(found[1])
            engine.scheduler.check_integrity()
    assert found == {1: expected_tokens([5, 6], 2 * LOGGED + 40), 2: expected_tokens([7, 8, 9], LOGGED + 20)}


def test_a_full_batch_does_not_count_those_that_wait_for_a_slot() -> None:
    rank = FakeRank(num_blocks=64, max_batch_size=2)
    engine = build(rank, fill=Fill(((8, 5),), 20))
    engine.add(request(1, [5, 6], max_new_tokens=12))
    engine.step()
    for i in range(2, 5):
        engine.add(request(i, list(range(20 * i, 20 * i + 13))))
    engine.step()  # 39 tokens wait, and all might begin as far as anyone knows
    assert [item.num_tokens for item in rank.plans[-1].items] == [1, 13]
    engine.abort(2)
    engine.abort(3)
    engine.step()
    engine.add(request(5, list(range(1, 30))))
    engine.step()
    assert [item.num_tokens for item in rank.plans[-2].items] == [1, 5]
    assert [item.num_tokens for item in rank.plans[-1].items] == [1, 5]


def test_running_answers_keep_their_token_a_step_while_an_older_one_is_computed_again() -> None:
    rank = FakeRank(num_blocks=32)
    engine = build(rank, budget=6)
    engine.add(request(1, list(range(1, 31)), max_new_tokens=9))
    engine.add(request(2, [5, 6], max_new_tokens=20))
    while len(rank.slots) < 2:
        engine.step()
    oldest = engine.scheduler._running[0]
    oldest.num_done = oldest.num_computed = 0  # as if its blocks had been lost
    for _ in range(7):
        engine.step()
    assert [[item.num_tokens for item in plan.items] for plan in rank.plans[-7:-1]] == [[5, 1]] * 6


def test_the_oldest_gets_a_token_a_step_even_of_a_budget_smaller_than_the_batch() -> None:
    rank = FakeRank(num_blocks=32)
    engine = build(rank, budget=2)
    for i in range(4):
        engine.add(request(i, [i + 1], max_new_tokens=5))
    for _ in range(5):
        engine.step()
        assert rank.plans[-1].items[0].slot == rank.plans[0].items[0].slot


def test_answers_start_in_order_of_arrival_and_never_overtake() -> None:
    rank = FakeRank(num_blocks=64, max_batch_size=2)
    engine = build(rank)
    for i in range(6):
        engine.add(request(i, [i + 1, 2, 3], max_new_tokens=2 + i % 3))
    order: list[int] = []
    while engine.has_work:
        engine.step()
        order += [new.token_ids[0] - 1 for new in rank.plans[-1].new]
    assert order == [0, 1, 2, 3, 4, 5]


def test_a_short_request_does_not_overtake_a_long_one_that_waits_for_blocks() -> None:
    rank = FakeRank(num_blocks=8, max_batch_size=4, session_len=32)
    engine = build(rank)
    engine.add(request(1, list(range(16)), max_new_tokens=6))
    engine.step()
    engine.add(request(2, list(range(30, 54)), max_new_tokens=2))
    engine.add(request(3, [9], max_new_tokens=1))
    finish(engine)
    starts = [new.token_ids[0] for plan in rank.plans for new in plan.new]
    assert starts.index(30) < starts.index(9)


def test_answers_do_not_depend_on_batch_chunks_or_cache() -> None:
    prompts = [PROMPT, PROMPT[:9] + [40, 41], [7], PROMPT + [3, 3, 3]]
    mixed = [request(i, p, 9, seed=i) for i, p in enumerate(prompts)]
    for budget in (1, 3, 64):
        for caching in (True, False):
            engine = build(FakeRank(num_blocks=24), budget=budget, caching=caching)
            for _ in range(2):  # cold, then with hits
                found = finish(engine, *mixed)
                assert [tokens(found[i, 0]) for i in range(4)] == [expected_tokens(p, 9, seed=i) for i, p in enumerate(prompts)]


# ------------------------------------------------------------------ ends


@pytest.mark.parametrize(("place", "min_new_tokens", "length"), [(0, 0, 1), (2, 0, 3), (2, 2, 3), (2, 3, 6)])
def test_a_stop_id_ends_the_answer_but_not_before_min_new_tokens(place: int, min_new_tokens: int, length: int) -> None:
    want = expected_tokens(PROMPT, 6)
    assert len(set(want)) == 6
    found = finish(build(FakeRank()), request(1, max_new_tokens=6, stop_token_ids=(want[place],), min_new_tokens=min_new_tokens))[1, 0]
    assert tokens(found) == want[:length]
    last = found[-1]
    assert (last.finish_reason, last.stop_token_id) == (("stop", want[place]) if length < 6 else ("length", None))
    assert last.num_generated == length and all(o.finish_reason is None for o in found[:-1])


def test_ignore_eos_goes_on_to_max_new_tokens() -> None:
    want = expected_tokens(PROMPT, 6)
    found = finish(build(FakeRank()), request(1, max_new_tokens=6, stop_token_ids=tuple(want), ignore_eos=True))[1, 0]
    assert tokens(found) == want and found[-1].finish_reason == "length"


def test_session_len_ends_an_answer_whatever_max_new_tokens_says() -> None:
    found = finish(build(FakeRank(session_len=20)), request(1, max_new_tokens=1000))[1, 0]
    assert len(tokens(found)) == 7 and found[-1].finish_reason == "length"


def test_a_pool_smaller_than_session_len_ends_an_answer_too() -> None:
    found = finish(build(FakeRank(num_blocks=4, session_len=48)), request(1, max_new_tokens=1000))[1, 0]
    assert len(tokens(found)) == 3 and found[-1].finish_reason == "length"


def test_no_new_tokens_means_that_only_the_prompt_is_computed() -> None:
    rank = FakeRank()
    found = finish(build(rank, budget=5), request(1, max_new_tokens=0, prompt_logprobs=0, output_logits="all"))[1, 0]
    assert [o.finish_reason for o in found] == [None, None, "length"]
    assert sum(len(o.logits) for o in found) == len(PROMPT)
    assert found[-1].prompt_logprobs is not None and len(found[-1].prompt_logprobs) == len(PROMPT)
    assert not any(item.sample for plan in rank.plans for item in plan.items) and found[-1].num_generated == 0


# ------------------------------------------------------------------ prefix cache


def test_a_second_equal_prompt_computes_only_its_last_block() -> None:
    rank = FakeRank()
    engine = build(rank)
    finish(engine, request(1))
    found = finish(engine, request(2))[2, 0]
    assert found[-1].num_cached == 12
    assert [(i.start, i.num_tokens) for plan in rank.plans for i in plan.items if plan.new][-1] == (12, 1)
    assert engine.stats().cached_tokens == 12


def test_at_least_one_prompt_token_is_computed() -> None:
    rank = FakeRank()
    engine = build(rank)
    finish(engine, request(1, PROMPT[:8]))
    assert finish(engine, request(2, PROMPT[:8]))[2, 0][-1].num_cached == 4


def test_generated_blocks_are_found_by_the_next_turn() -> None:
    engine = build(FakeRank())
    answer = tokens(finish(engine, request(1, max_new_tokens=8))[1, 0])
    assert finish(engine, request(2, PROMPT + answer + [1]))[2, 0][-1].num_cached == 20


def test_blocks_of_a_running_answer_are_shared() -> None:
    engine = build(FakeRank())
    engine.add(request(1, max_new_tokens=10))
    engine.step()
    engine.add(request(2))
    engine.step()
    assert engine.stats().used_blocks == 5  # 3 shared, and 1 each


def test_generated_blocks_of_a_running_answer_are_found_by_a_request_that_comes_meanwhile() -> None:
    """They are not published in each step, but before the prefix cache is asked."""
    engine = build(FakeRank(num_blocks=32, block_size=8), run_ahead=1)
    answer = expected_tokens(PROMPT, 30)
    engine.add(request(0, max_new_tokens=30))
    cached = {}
    for known in range(30):  # tokens of the answer
        cached |= {output.request_id: output.num_cached for output in engine.step() if output.request_id}
        if known in (11, 12, 20):
            engine.add(request(known, PROMPT + answer[:known] + [96] * 9, max_new_tokens=1))
    assert cached == {11: 16, 12: 24, 20: 32}, "without the last token, which is not computed"


def test_an_aborted_answer_leaves_its_full_blocks_in_the_cache() -> None:
    engine = build(FakeRank(num_blocks=32), run_ahead=1)
    engine.add(request(1, max_new_tokens=30))
    for _ in range(10):
        engine.step()
    engine.abort(1)
    assert finish(engine, request(2, PROMPT + expected_tokens(PROMPT, 9)))[2, 0][-1].num_cached == 20


def test_a_copy_whose_published_prefix_was_evicted_publishes_its_own() -> None:
    engine = build(FakeRank(num_blocks=12))
    engine.add(request(1, PROMPT[:9], max_new_tokens=1))
    engine.add(request(2, PROMPT[:9], max_new_tokens=12))  # computed in the same step, so it has its own copy
    engine.step()
    engine.add(request(3, [50 + i for i in range(32)], max_new_tokens=1))  # takes the free blocks and one of request 1
    engine.step()
    cache = engine.scheduler.cache
    assert cache is not None and len(cache.match(RootKey("", 0), lambda block: array("i", PROMPT[4 * block : 4 * block + 4]).tobytes(), 8)[0]) == 1
    answer = tokens(finish(engine)[2, 0])  # its next block evicts the other one
    known = PROMPT[:9] + expected_tokens(PROMPT[:9], 12)
    assert known[-len(answer) :] == answer
    assert finish(engine, request(4, [*known[:20], 1]))[4, 0][-1].num_cached == 20
    assert finish(engine, request(5, [*known[8:20], 1]))[5, 0][-1].num_cached == 0, "a later block does not begin a prompt"


@pytest.mark.parametrize(("first", "second", "hits"), [({}, {"salt": "a"}, 0), ({"salt": "a"}, {"salt": "a"}, 12), ({"salt": "a"}, {"salt": "b"}, 0)])
def test_salts_do_not_share(first: dict[str, str], second: dict[str, str], hits: int) -> None:
    engine = build(FakeRank())
    finish(engine, request(1, salt=first.get("salt", "")))
    assert finish(engine, request(2, salt=second.get("salt", "")))[2, 0][-1].num_cached == hits


@pytest.mark.parametrize(("depends", "hits"), [(True, 0), (False, 12)])
def test_rope_lengths_share_only_where_rope_does_not_depend_on_them(depends: bool, hits: int) -> None:
    engine = build(FakeRank(rope_depends_on_length=depends))
    finish(engine, request(1, rope=20))
    assert finish(engine, request(2, rope=30))[2, 0][-1].num_cached == hits
    assert finish(engine, request(3, rope=20))[3, 0][-1].num_cached == 12


def test_without_prefix_caching_nothing_is_found() -> None:
    engine = build(FakeRank(), caching=False)
    finish(engine, request(1))
    assert finish(engine, request(2))[2, 0][-1].num_cached == 0
    assert engine.stats().cached_blocks == 0


def test_prompt_logprobs_and_all_logits_are_complete_despite_a_cached_prompt() -> None:
    engine = build(FakeRank(), budget=5)
    finish(engine, request(1))
    found = finish(engine, request(2, prompt_logprobs=0, output_logits="all"))[2, 0]
    first = next(o for o in found if o.prompt_logprobs is not None)
    assert first.prompt_logprobs is not None and first.token_ids and first.prompt_logprobs[0] is None
    assert [p.token_id for p in first.prompt_logprobs[1:] if p is not None] == PROMPT[1:]
    assert sum(len(o.logits or []) for o in found) == len(PROMPT) + 3


# ------------------------------------------------------------------ several answers


@pytest.mark.parametrize("caching", [True, False])
def test_answers_of_one_prompt_share_its_blocks(caching: bool) -> None:
    rank = FakeRank(num_blocks=32, max_batch_size=4)
    engine = build(rank, caching=caching)
    engine.add(request(1, n=4, max_new_tokens=6))
    engine.step()
    assert [len(plan.items) for plan in rank.plans] == [1]
    engine.step()
    assert engine.stats().used_blocks == 3 + 4
    assert [(i.start, i.num_tokens) for i in rank.plans[1].items] == [(13, 1), (12, 1), (12, 1), (12, 1)]
    found = finish(engine)
    for index in range(4):
        assert tokens(found[1, index])[-4:] == expected_tokens(PROMPT, 6, seed=index)[-4:]


def test_seeds_of_the_answers_differ_by_their_index() -> None:
    rank = FakeRank(num_blocks=32)
    found = finish(build(rank), request(1, n=3, seed=10))
    assert sorted(new.sampling.seed for plan in rank.plans for new in plan.new) == [10, 11, 12]
    assert [tokens(found[1, i]) for i in range(3)] == [expected_tokens(PROMPT, 4, seed=10 + i) for i in range(3)]


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_one_answer_can_be_ended_while_the_others_go_on(index: int, steps: int) -> None:
    engine = build(FakeRank(num_blocks=32), budget=5)
    engine.add(request(1, max_new_tokens=9, n=3))
    early = [o for _ in range(steps) for o in engine.step()]
    engine.abort(1, index)
    engine.scheduler.check_integrity()
    rest = finish(engine)
    answers = [[o for o in early if o.index == i] + rest.get((1, i), []) for i in range(3)]
    assert [answer[-1].finish_reason for answer in answers] == ["abort" if i == index else "length" for i in range(3)]
    for i in {0, 1, 2} - {index}:
        assert tokens(answers[i]) == expected_tokens(PROMPT, 9, seed=i)
    assert engine.stats().used_blocks == 0


def test_when_the_first_answer_fails_the_next_computes_the_prompt() -> None:
    rank = FakeRank(num_blocks=32)
    rank.broken, rank.half_applied = 2, True  # the step, and its repetition alone
    found = finish(build(rank, budget=5), request(1, n=3))
    assert [found[1, i][-1].finish_reason for i in range(3)] == ["error", "length", "length"]
    assert tokens(found[1, 2]) == expected_tokens(PROMPT, 4, seed=2)


# ------------------------------------------------------------------ pre-emption


def test_the_last_arrived_gives_way_and_every_answer_is_right() -> None:
    rank = FakeRank(num_blocks=8, max_batch_size=4, session_len=32)
    engine = build(rank)
    prompts = [[i] * 6 for i in range(1, 5)]
    found = finish(engine, *(request(i, p, 14, seed=i) for i, p in enumerate(prompts)))
    assert engine.stats().preemptions > 0
    assert [tokens(found[i, 0]) for i in range(4)] == [expected_tokens(p, 14, seed=i) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("caching", [True, False])
def test_rows_handed_on_before_a_preemption_do_not_come_twice(caching: bool) -> None:
    engine = build(FakeRank(num_blocks=6, session_len=24), caching=caching)
    found = finish(engine, request(1, [1] * 7, 10), request(2, [2] * 7, 10, output_logits="all"))[2, 0]
    assert engine.stats().preemptions > 0
    assert [row for o in found for row in o.logits] == key_chain([2] * 7 + expected_tokens([2] * 7, 9))


@pytest.mark.parametrize("caching", [True, False])
def test_prompt_logprobs_are_right_when_the_prompt_is_interrupted(caching: bool) -> None:
    engine = build(FakeRank(num_blocks=6, session_len=24), budget=2, caching=caching)
    (first, *rest) = finish(engine, request(1, [1] * 3, 17), request(2, PROMPT, prompt_logprobs=0))[2, 0]
    assert engine.stats().preemptions > 0
    assert first.prompt_logprobs is not None and not any(o.prompt_logprobs for o in rest)
    assert [p.logprob for p in first.prompt_logprobs[1:] if p is not None] == [-float(k % 100) for k in key_chain(PROMPT[:-1])]


def test_a_newcomer_waits_while_it_would_soon_be_preempted() -> None:
    rank = FakeRank(num_blocks=4, session_len=16)
    engine = build(rank)
    engine.add(request(1, [1] * 7, 9))
    engine.step()
    engine.add(request(2, [2] * 7, 1))
    engine.step()
    assert engine.stats().waiting == 1, "two blocks are free, but the first answer will need one"
    finish(engine)
    assert engine.stats().preemptions == 0


def test_answers_that_wait_with_shared_blocks_lose_them_before_a_running_one_is_preempted() -> None:
    engine = build(FakeRank(num_blocks=7, session_len=28), caching=False)
    engine.add(request(1, max_new_tokens=1, n=2))
    engine.add(request(2, list(range(8)), 14))
    engine.step()
    engine.step()
    assert (engine.stats().used_blocks, engine.stats().waiting) == (6, 1), "the second answer waits with three shared blocks"
    found = finish(engine)
    assert engine.stats().preemptions == 0
    assert tokens(found[1, 1]) == expected_tokens(PROMPT, 1, seed=1) and tokens(found[2, 0]) == expected_tokens(list(range(8)), 14)[2:]


def test_a_preempted_sequence_keeps_its_cached_blocks_while_nobody_needs_them() -> None:
    rank = FakeRank(num_blocks=6, session_len=24)
    engine = build(rank)
    finish(engine, request(1, [1] * 7, 10), request(2, [2] * 7, 10))
    assert engine.stats().preemptions > 0
    again = [plan for plan in rank.plans for new in plan.new if new.token_ids[0] == 2 and len(new.token_ids) > 7]
    assert again and all(item.start > 0 for item in again[0].items)


def test_the_oldest_is_never_preempted_and_gets_a_token_in_every_step() -> None:
    engine = build(FakeRank(num_blocks=6, max_batch_size=4, session_len=24), budget=4)
    engine.add(request(0, [9] * 3, 13))
    got: list[int] = []
    for i in range(1, 14):  # a new one in every step, each growing to the whole pool
        engine.add(request(i, [i] * 2, 22))
        got += [t for o in engine.step() if o.request_id == 0 for t in o.token_ids]
        assert len(got) == i
    assert got == expected_tokens([9] * 3, 13) and engine.stats().preemptions > 0


def new_blocks(plans: list[StepPlan]) -> list[list[int]]:
    """How many new blocks each plan's items have."""
    return [[len(item.new_blocks) for item in plan.items if item.new_blocks] for plan in plans]


def test_answers_that_will_need_a_block_soon_get_it_with_the_first_that_does() -> None:
    """Within half a block; only where one is left for each, and none that an answer will not need."""
    rank = FakeRank(num_blocks=16, block_size=16, max_batch_size=4, session_len=64)
    engine = build(rank)
    for i, length in enumerate((16, 14, 13, 8)):
        engine.add(request(i, [i + 1] * length, max_new_tokens=2 if i == 1 else 20))
    for _ in range(10):
        engine.step()
        engine.scheduler.check_integrity()
    assert new_blocks(rank.plans) == [[1, 1, 1, 1], [1, 1], *([[]] * 7), [1]]
    assert [item.start for item in rank.plans[1].items if item.new_blocks] == [16, 13], "the second one ends before, the fourth needs its own eight steps later"
    finish(engine)
    rank = FakeRank(num_blocks=8, block_size=16, max_batch_size=3, session_len=64)
    engine = build(rank)
    for i, length in enumerate((16, 15, 14)):
        engine.add(request(i, [i + 1] * length, max_new_tokens=30))
    for _ in range(4):
        engine.step()
    assert new_blocks(rank.plans) == [[1, 1, 1], [1], [1], [1]], "five blocks are free: three, and one for each, would be six"


def test_who_computes_nothing_in_a_step_gets_no_block_with_others() -> None:
    """The rank is told of blocks with items only."""
    running = Running(2, 16)
    for i in range(2):
        made = request(i, [1] * (16 - i), 20)
        seq = Sequence(made, 0, i, made.sampling, 36, RootKey("", 0))
        seq.blocks = [i]
        running.enter(seq)
    ends = np.array([17, 15])
    assert running._lacking(ends, np.array([1, 1]), 4) == ([(0, 1), (1, 1)], 15)
    assert running._lacking(ends, np.array([1, 0]), 4) == ([(0, 1)], 1)


def test_every_one_of_many_that_fill_the_pool_alone_is_answered_in_order() -> None:
    engine = build(FakeRank(num_blocks=4, max_batch_size=4, session_len=16), budget=4)
    found = finish(engine, *(request(i, [i] * 9, 7, seed=i) for i in range(12)))
    assert all(tokens(found[i, 0]) == expected_tokens([i] * 9, 7, seed=i) for i in range(12))


# ------------------------------------------------------------------ abort


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("run_ahead", [0, 1])
def test_abort_frees_the_blocks_at_once_wherever_the_request_is(steps: int, run_ahead: int) -> None:
    engine = build(FakeRank(max_batch_size=2), budget=5, run_ahead=run_ahead)
    engine.add(request(1, n=3, max_new_tokens=30))
    for _ in range(steps):
        engine.step()
    engine.abort(1)
    assert engine.stats().used_blocks == engine.stats().running == engine.stats().waiting == 0
    found = finish(engine)
    assert sorted(k for k, o in found.items() if o[-1].finish_reason == "abort") == [(1, 0), (1, 1), (1, 2)]
    assert all(len(o) == 1 and not o[0].token_ids for o in found.values()), "nothing comes of the step in flight"
    assert tokens(finish(engine, request(1))[1, 0]) == expected_tokens(PROMPT, 4), "the id may be used again"


def test_abort_of_an_unknown_request_is_nothing() -> None:
    engine = build(FakeRank())
    engine.abort(99)
    assert not engine.has_work


def test_ended_requests_do_not_pile_up_in_the_waiting_queue() -> None:
    engine = build(FakeRank(max_batch_size=1))
    engine.add(request(0, max_new_tokens=30))
    engine.step()
    for i in range(1, 1000):
        engine.add(request(i))
        engine.abort(i)
    assert len(engine.scheduler._waiting) <= 65


# ------------------------------------------------------------------ late tokens


def starts(rank: FakeRank, slot: int = 0) -> list[int]:
    """Where each plan's item of a slot began when it was submitted."""
    return [item.start for plan in rank.plans for item in plan.items if item.slot == slot]


def test_a_token_that_is_late_comes_a_step_later_and_no_other_answer_waits() -> None:
    rank = FakeRank(num_blocks=32)
    rank.delay((1, 15))
    engine = build(rank, run_ahead=1)
    for i in range(3):
        engine.add(request(i, [i + 1] * 13, max_new_tokens=6))
    steps = []
    while engine.has_work:
        steps.append([(output.request_id, *output.token_ids) for output in engine.step()])
        engine.scheduler.check_integrity()
    first, second, third = ([(i, token) for token in expected_tokens([i + 1] * 13, 6)] for i in range(3))
    assert [sorted(step) for step in steps] == [
        [],
        [first[0], second[0], third[0]],
        [first[1], second[1], third[1]],
        [first[2], third[2]],
        sorted([first[3], second[2], third[3]]),
        sorted([first[4], second[3], third[4]]),
        sorted([first[5], second[4], third[5]]),
        [second[5]],
    ]
    assert engine.stats().late_tokens == 1
    assert starts(rank, 0) == [0, 13, 14, 15, 16, 17]
    assert starts(rank, 1) == [0, 13, 14, 15, 15, 16, 17], "the step behind the late one was at 15 already, without its token"


def test_a_token_may_be_late_again_and_those_behind_it_too() -> None:
    rank = FakeRank()
    rank.delay((0, 15), (0, 15), (0, 15), (0, 16), (0, 18))
    assert tokens(finish(build(rank, run_ahead=1), request(1, max_new_tokens=9))[1, 0]) == expected_tokens(PROMPT, 9)
    assert rank.num_late == 5 and starts(rank) == [0, 13, 14, 15, 15, 15, 15, 16, 16, 17, 18, 18, 19, 20]


def test_every_token_but_the_last_can_be_late() -> None:
    """No plan goes on with an answer behind the step that brings its last token."""
    rank = FakeRank(num_blocks=32)
    rank.delay(*((slot, place) for slot in range(3) for place in range(13, 20)))
    found = finish(build(rank, run_ahead=1), *(request(i, max_new_tokens=4, seed=i) for i in range(3)))
    assert all(tokens(found[i, 0]) == expected_tokens(PROMPT, 4, seed=i) and found[i, 0][-1].finish_reason == "length" for i in range(3))
    assert rank.num_late == 3 * 3


def test_a_token_that_was_late_may_end_the_answer() -> None:
    rank = FakeRank()
    want = expected_tokens(PROMPT, 6)
    rank.delay((0, 15))
    found = finish(build(rank, run_ahead=1), request(1, max_new_tokens=6, stop_token_ids=(want[2],)))[1, 0]
    assert tokens(found) == want[:3] and (found[-1].finish_reason, found[-1].stop_token_id) == ("stop", want[2])


@pytest.mark.parametrize("caching", [True, False])
def test_a_first_token_that_is_late_holds_up_no_sibling(caching: bool) -> None:
    begun = []
    for delayed in ((), ((0, 13), (0, 13))):
        rank = FakeRank(num_blocks=32)
        rank.delay(*delayed)
        found = finish(build(rank, caching=caching, run_ahead=1), request(1, n=3, max_new_tokens=6))
        assert [tokens(found[1, i]) for i in range(3)] == [expected_tokens(PROMPT, 6, seed=i) for i in range(3)]
        begun.append([(plan.step, item.start) for plan in rank.plans for item in plan.items if item.slot in {new.slot for new in plan.new}])
    assert begun[0] == begun[1] == [(0, 0), (2, 12), (2, 12)]


def test_the_last_token_of_a_prompt_is_not_certain_while_the_first_of_its_answer_is_late() -> None:
    """So that a block is not shared while the rank may be told to compute something of it."""
    cached = []
    for delayed in ((), ((0, 12),)):
        rank = FakeRank(num_blocks=32)
        rank.delay(*delayed)
        engine = build(rank, run_ahead=1)
        engine.add(request(1, PROMPT[:12], max_new_tokens=6))
        engine.step()
        engine.step()
        found = finish(engine, request(2))
        assert tokens(found[2, 0]) == expected_tokens(PROMPT, 4)
        cached.append(found[2, 0][-1].num_cached)
    assert cached == [12, 8]


def test_an_answer_can_be_given_up_while_its_token_is_late() -> None:
    rank = FakeRank(num_blocks=8, max_batch_size=1)
    rank.delay((0, 15))
    engine = build(rank, run_ahead=1)
    engine.add(request(1, max_new_tokens=12))
    while not rank.num_late:
        got = engine.step()
    assert not got and engine.stats().running == 1
    engine.abort(1)
    assert engine.stats().used_blocks == 0
    found = finish(engine, request(2, [9] * 11))  # in the same slot, while the token is on its way
    assert tokens(found[2, 0]) == expected_tokens([9] * 11, 4) and tokens(found[1, 0]) == []


@pytest.mark.parametrize("caching", [True, False])
def test_answers_with_late_tokens_give_way_and_are_right(caching: bool) -> None:
    rank = FakeRank(num_blocks=8, max_batch_size=4, session_len=32)
    rank.delay(*((slot, place) for slot in range(4) for place in range(6, 20) if (slot + place) % 3))
    engine = build(rank, caching=caching, run_ahead=1)
    prompts = [[i] * 6 for i in range(1, 5)]
    found = finish(engine, *(request(i, p, 14, seed=i) for i, p in enumerate(prompts)))
    assert engine.stats().preemptions > 0 and rank.num_late > 10
    assert [tokens(found[i, 0]) for i in range(4)] == [expected_tokens(p, 14, seed=i) for i, p in enumerate(prompts)]


def test_steady_steps_end_at_a_late_token_and_begin_anew_behind_it() -> None:
    rank = FakeRank(num_blocks=64, block_size=16, session_len=64)
    rank.delay((1, 20))
    engine = build(rank, run_ahead=1)
    for i in range(3):
        engine.add(request(i, [i + 1] * 13, max_new_tokens=20))
    steady = []
    while rank.num_late == 0 or len(steady) < 15:
        engine.step()
        steady.append([plan.items.again for plan, _ in engine.scheduler._flights])
        engine.scheduler.check_integrity()
    # each step leaves one plan in flight: the prompts, the first that is looked at whole; the ninth was launched before it was known that a token is late
    assert steady == [[again] for again in (False, False, *([True] * 6), False, False, *([True] * 5))]


# ------------------------------------------------------------------ answers that a grammar ends


def ending(*ends: int, **sizes: Any) -> FakeRank:
    """A rank whose answers end with these tokens."""
    rank = FakeRank(**sizes)
    rank.ends = frozenset(ends)
    return rank


def computed_anew_when_over(rank: FakeRank) -> int:
    """How many sequences were told to the rank again with the last token of their answers already."""
    return sum(len(new.token_ids) > new.prompt_len and new.token_ids[-1] in rank.ends for plan in rank.plans for new in plan.new)


def test_the_step_behind_says_that_an_answer_ended_with_the_token_before_and_no_other_answer_notices() -> None:
    first, second, third = ([(i, token) for token in expected_tokens([i + 1] * 13, 6)] for i in range(3))
    rank = ending(second[2][1], num_blocks=32)
    assert second[2][1] not in [token for _, token in (*first, *second[:2], *third)]
    engine = build(rank, run_ahead=1)
    for i in range(3):
        engine.add(request(i, [i + 1] * 13, max_new_tokens=6))
    steps, last = [], None
    while engine.has_work:
        outputs = list(engine.step())
        last = next((output for output in outputs if output.request_id == 1 and output.finish_reason), last)
        steps.append([(output.request_id, *output.token_ids) for output in outputs])
        engine.scheduler.check_integrity()
    assert [sorted(step) for step in steps] == [
        [],
        [first[0], second[0], third[0]],
        [first[1], second[1], third[1]],
        [first[2], second[2], third[2]],
        sorted([first[3], (1,), third[3]]),
        [first[4], third[4]],
        [first[5], third[5]],
    ]
    assert last is not None and (last.finish_reason, last.stop_token_id, last.error) == ("stop", None, None)
    assert (last.num_prompt, last.num_cached, last.num_generated) == (13, 0, 3)
    assert rank.num_ended == 1 and starts(rank, 1) == [0, 13, 14, 15, 16], "one step more was launched before that was known"
    stats = engine.stats()
    assert (stats.finished, stats.failed, stats.generated_tokens, stats.used_blocks) == (3, 0, 15, 0)


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("max_new_tokens", [1, 2, 5, 6])
def test_the_end_comes_with_the_token_where_no_plan_goes_on_behind_it(max_new_tokens: int, run_ahead: int) -> None:
    """As behind what is the last token in any case: still it is the grammar that ended the answer."""
    for place, token in enumerate(want := expected_tokens(PROMPT, max_new_tokens)):
        rank = ending(token)
        engine = build(rank, run_ahead=run_ahead)
        found = finish(engine, request(1, max_new_tokens=max_new_tokens))[1, 0]
        assert tokens(found) == want[: place + 1] and all(output.finish_reason is None for output in found[:-1])
        goes_on = run_ahead == 1 and place + 1 < max_new_tokens
        assert rank.num_ended == goes_on and found[-1].token_ids == ([] if goes_on else [token])
        assert (found[-1].finish_reason, found[-1].stop_token_id, found[-1].num_generated) == ("stop", None, place + 1)
        assert engine.stats().generated_tokens == place + 1 and engine.stats().used_blocks == 0


def test_a_stop_id_behind_which_a_grammar_allows_nothing_is_a_stop_id() -> None:
    want = expected_tokens(PROMPT, 6)
    rank = ending(want[2])
    engine = build(rank, run_ahead=1)
    found = finish(engine, request(1, max_new_tokens=6, stop_token_ids=(want[2],)))[1, 0]
    assert tokens(found) == want[:3] and (found[-1].finish_reason, found[-1].stop_token_id) == ("stop", want[2])
    assert engine.stats().finished == 1, "what the step behind says comes to nobody"


@pytest.mark.parametrize("delayed", [(15,), (16,), (15, 15, 16, 16), (13, 14, 15, 16)])
@pytest.mark.parametrize("max_new_tokens", [3, 4, 6])
def test_an_answer_may_end_with_a_token_that_was_late_and_that_it_ended_may_be_late(max_new_tokens: int, delayed: tuple[int, ...]) -> None:
    """Also where one of these steps was to be the answer's last one, and only another answer goes on."""
    want, others = expected_tokens(PROMPT, 6), expected_tokens([8] * 11, 20)
    rank = ending(want[2], num_blocks=32)
    assert want[2] not in others
    rank.delay(*((0, place) for place in delayed))
    engine = build(rank, run_ahead=1)
    found = finish(engine, request(1, max_new_tokens=max_new_tokens), request(2, [8] * 11, 20))
    assert tokens(found[1, 0]) == want[:3] and (found[1, 0][-1].finish_reason, found[1, 0][-1].num_generated) == ("stop", 3)
    assert tokens(found[2, 0]) == others and engine.stats().used_blocks == 0
    assert rank.num_late == engine.stats().late_tokens == sum(place < 13 + max_new_tokens for place in delayed)
    assert rank.num_ended == (max_new_tokens > 3)


def test_one_answer_may_have_ended_where_the_token_of_another_is_late() -> None:
    want, others = expected_tokens(PROMPT, 6), expected_tokens([8] * 13, 6)
    rank = ending(want[2], num_blocks=32)
    assert want[2] not in others
    rank.delay((1, 16))
    found = finish(build(rank, run_ahead=1), request(1, max_new_tokens=6), request(2, [8] * 13, 6))
    assert tokens(found[1, 0]) == want[:3] and found[1, 0][-1].finish_reason == "stop"
    assert tokens(found[2, 0]) == others and rank.num_late == rank.num_ended == 1


@pytest.mark.parametrize("caching", [True, False])
def test_an_answer_that_gave_way_before_its_end_was_said_is_computed_anew_to_hear_it(caching: bool) -> None:
    prompts = [[i] * 6 for i in range(1, 5)]
    want = [expected_tokens(p, 14, seed=i) for i, p in enumerate(prompts)]
    anew = 0
    for token in {token for answer in want for token in answer}:
        rank = ending(token, num_blocks=8, max_batch_size=4, session_len=32)
        engine = build(rank, caching=caching, run_ahead=1)
        found = finish(engine, *(request(i, p, 14, seed=i) for i, p in enumerate(prompts)))
        for i, answer in enumerate(want):
            has_ended = token in answer
            assert tokens(found[i, 0]) == answer[: answer.index(token) + 1 if has_ended else 14]
            assert found[i, 0][-1].finish_reason == ("stop" if has_ended else "length")
        anew += computed_anew_when_over(rank)
        assert engine.stats().used_blocks == 0 and engine.stats().failed == 0
    assert anew > 0


@pytest.mark.parametrize("half_applied", [True, False])
def test_when_the_step_that_says_it_fails_the_answer_is_computed_alone_and_ends(half_applied: bool) -> None:
    want = expected_tokens(PROMPT, 6)
    rank = ending(want[2], num_blocks=32)
    engine = build(rank, run_ahead=1)
    engine.add(request(1, max_new_tokens=6))
    got: list[EngineOutput] = []
    while len(got) < 3:
        got += engine.step()
    rank.broken, rank.half_applied = 1, half_applied
    got += finish(engine, request(2, [9] * 11)).pop((1, 0))
    assert tokens(got) == want[:3] and (got[-1].finish_reason, got[-1].num_generated) == ("stop", 3)
    assert computed_anew_when_over(rank) == rank.num_ended == 1 and engine.stats().used_blocks == 0


def test_an_answer_can_be_given_up_before_its_end_is_said() -> None:
    want = expected_tokens(PROMPT, 6)
    rank = ending(want[2], num_blocks=8, max_batch_size=1)
    engine = build(rank, run_ahead=1)
    engine.add(request(1, max_new_tokens=6))
    got: list[EngineOutput] = []
    while len(got) < 3:
        got += engine.step()
    engine.abort(1)
    assert engine.stats().used_blocks == 0
    found = finish(engine, request(2, [9] * 11))  # in the same slot, while the end is on its way
    assert [output.finish_reason for output in found[1, 0]] == ["abort"] and found[1, 0][0].num_generated == 3
    assert rank.num_ended == 1 and tokens(found[2, 0]) == expected_tokens([9] * 11, 4)


@pytest.mark.parametrize("caching", [True, False])
def test_answers_of_one_prompt_end_each_with_its_own_token(caching: bool) -> None:
    """The first with its first one, when the others have just begun."""
    want = [expected_tokens(PROMPT, 6, seed=i) for i in range(3)]
    rank = ending(want[0][0], want[1][2], num_blocks=32)
    lengths = [next((place + 1 for place, token in enumerate(answer) if token in rank.ends), 6) for answer in want]
    assert lengths == [1, 3, 4]
    engine = build(rank, caching=caching, run_ahead=1)
    found = finish(engine, request(1, n=3, max_new_tokens=6))
    assert [tokens(found[1, i]) for i in range(3)] == [answer[:length] for answer, length in zip(want, lengths, strict=True)]
    assert [found[1, i][-1].finish_reason for i in range(3)] == ["stop"] * 3 and rank.num_ended == 3


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("logits", ["all", "generation"])
def test_nothing_counts_that_comes_with_the_word_that_an_answer_has_ended(logits: str, caching: bool) -> None:
    want = expected_tokens(PROMPT, 6)
    rank = ending(want[2])
    engine = build(rank, caching=caching, run_ahead=1)
    found = finish(engine, request(1, max_new_tokens=6, logprobs=0, prompt_logprobs=0, output_logits=logits))[1, 0]
    keys = key_chain(PROMPT + want[:2])
    assert tokens(found) == [p.token_id for o in found for p in o.logprobs or []] == want[:3]
    assert [row for o in found for row in o.logits or []] == (keys if logits == "all" else keys[len(PROMPT) - 1 :])
    assert rank.num_ended == 1 and (found[-1].finish_reason, found[-1].error) == ("stop", None) and engine.stats().failed == 0


def test_the_next_turn_finds_what_an_ended_answer_has_computed_but_its_last_token() -> None:
    want = expected_tokens(PROMPT, 12)
    rank = ending(want[10], num_blocks=32)
    engine = build(rank, run_ahead=1)
    assert tokens(finish(engine, request(1, max_new_tokens=12))[1, 0]) == want[:11] and rank.num_ended == 1
    follow_up = [*PROMPT, *want[:11], 9, 9]
    found = finish(engine, request(2, follow_up))[2, 0]
    assert found[-1].num_cached == 20, "of 24 tokens: that the last one's block was filled came with the word that the answer had ended, and does not count"
    assert tokens(found) == expected_tokens(follow_up, 4)


def test_steady_steps_end_where_an_answer_has_ended_and_begin_anew_without_it() -> None:
    answers = [expected_tokens([i + 1] * 13, 20) for i in range(3)]
    rank = ending(answers[1][8], num_blocks=64, block_size=16, session_len=64)
    assert answers[1].index(answers[1][8]) == 8 and answers[1][8] not in answers[0] + answers[2]
    engine = build(rank, run_ahead=1)
    for i in range(3):
        engine.add(request(i, [i + 1] * 13, max_new_tokens=20))
    steady: list[list[bool]] = []
    found: dict[int, list[int]] = {0: [], 1: [], 2: []}
    while rank.num_ended == 0 or len(steady) < 17:
        for output in engine.step():
            found[output.request_id] += output.token_ids
        steady.append([plan.items.again for plan, _ in engine.scheduler._flights])
        engine.scheduler.check_integrity()
    # the eleventh step brings the end, when the eleventh plan was launched; the next one is looked at whole
    assert steady == [[again] for again in (False, False, *([True] * 9), False, *([True] * 5))]
    for output in (output for outputs in finish(engine).values() for output in outputs):
        found[output.request_id] += output.token_ids
    assert [found[i] for i in range(3)] == [answers[0], answers[1][:9], answers[2]]


# ------------------------------------------------------------------ random operations


class AheadMachine(EngineMachine):
    """The same, launching a step before the last one's result is seen."""

    run_ahead = 1


SETTINGS = settings(max_examples=120, stateful_step_count=30, deadline=None, derandomize=True)
TestRandomRequests = EngineMachine.TestCase
TestRandomRequests.settings = SETTINGS
TestRandomRequestsWithRunAhead = AheadMachine.TestCase
TestRandomRequestsWithRunAhead.settings = SETTINGS
