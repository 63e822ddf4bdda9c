"""What a sequence knows of itself."""

from __future__ import annotations

import pytest

from lmdeploy.engine.prefix_cache import RootKey
from lmdeploy.engine.sequence import Sequence
from lmdeploy.messages import EngineRequest, SamplingParams


def build(**sampling: object) -> Sequence:
    params = SamplingParams(max_new_tokens=5, **sampling)  # type: ignore[arg-type]
    return Sequence(EngineRequest(request_id=1, token_ids=[1, 2, 3, 4], sampling=params), 0, 1, params, 9, RootKey("", 0))


def test_tokens_in_flight_count_as_tokens_but_not_as_generated() -> None:
    seq = build()
    seq.append(7)
    seq.num_pending = 1
    assert (seq.num_tokens, seq.num_generated, seq.prompt_len) == (6, 1, 4)


def test_the_request_keeps_its_own_prompt() -> None:
    seq = build()
    seq.append(7)
    assert seq.request.token_ids == [1, 2, 3, 4]


def test_ignore_eos_leaves_no_stop_ids() -> None:
    assert build(stop_token_ids=(3,)).stop_ids == {3}
    assert build(stop_token_ids=(3,), ignore_eos=True).stop_ids == frozenset()


def test_all_but_the_last_token_may_come_from_a_cache() -> None:
    assert build().max_reusable == 3
    assert build(logprobs=2, output_logits="generation").max_reusable == 3


@pytest.mark.parametrize("wish", [{"prompt_logprobs": 0}, {"output_logits": "all"}, {"output_last_hidden_state": "all"}])
def test_positions_whose_rows_are_owed_are_computed(wish: dict[str, object]) -> None:
    seq = build(**wish)
    assert seq.max_reusable == 0
    seq.rows_done = 2
    assert seq.max_reusable == 2


def test_prompt_logprobs_owe_nothing_after_the_prompt_but_all_logits_do() -> None:
    seq, every = build(prompt_logprobs=0), build(output_logits="all")
    for s in (seq, every):
        s.append(7)
        s.append(8)
        s.rows_done = 3
    assert (seq.max_reusable, every.max_reusable) == (5, 3)
