"""What a sequence knows of itself."""

from __future__ import annotations

import numpy as np
import pytest

from lmdeploy.engine.prefix_cache import RootKey
from lmdeploy.engine.sequence import KNOWN, Sequence, TokenLog
from lmdeploy.messages import EngineRequest, Picture, SamplingParams


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


def test_tokens_that_came_while_nobody_looked_are_taken_over() -> None:
    seq, row, log = build(), np.zeros(11, dtype=np.int64), TokenLog(4, 2)
    seq.take_slot(1, row, log)
    slot, both = np.array([1]), np.array([0, 1])
    log.add(slot, np.array([[50]]))
    log.add(both, np.array([[9, 51], [9, 52]]))  # two steps
    row[KNOWN] += 3
    assert (seq.num_known, seq.num_behind, seq.num_generated) == (7, 3, 3)
    assert seq.content(0, 4) == np.array([1, 2, 3, 4], dtype=np.int32).tobytes() and seq.num_behind == 3, "nothing new is needed for it"
    seq.append(53)
    assert seq.num_behind == 0 and seq.token_ids == [1, 2, 3, 4, 50, 51, 52, 53]
    log.add(slot, np.array([[54]]))
    row[KNOWN] += 1
    assert seq.content(1, 4) == np.array([50, 51, 52, 53], dtype=np.int32).tobytes()
    seq.leave_slot()
    log.rows[:] = 0
    assert seq.token_ids == [1, 2, 3, 4, 50, 51, 52, 53, 54] and seq.num_behind == 0


def test_what_is_compared_of_pictures_is_which_ones_they_are_and_where() -> None:
    def contents(*pictures: tuple[int, int, str], ids: list[int]) -> list[bytes]:
        shown = [Picture(start=start, count=count, tiles=1, size=1, pixels=b"", digest=digest) for start, count, digest in pictures]
        request = EngineRequest(request_id=1, token_ids=ids, sampling=SamplingParams(max_new_tokens=1), pictures=shown)
        seq = Sequence(request, 0, 1, request.sampling, 99, RootKey("", 0))
        return [seq.content(block, 4) for block in range(len(ids) // 4)]

    ids = [5, 6, *[99] * 7, 7, 8, 9]
    one = contents((2, 7, "ab"), ids=ids)
    assert one == contents((2, 7, "ab"), ids=[5, 6, *[0] * 7, 7, 8, 9]), "ids of a picture's tokens say nothing"
    other, plain, moved = contents((2, 7, "cd"), ids=ids), contents(ids=[5, 6, *[0] * 7, 7, 8, 9]), contents((1, 7, "ab"), ids=ids)
    assert all(a != b for case in (other, plain, moved) for a, b in zip(one, case, strict=True))
    assert len({*one, *other, *plain, *moved}) == 12
    two = contents((0, 2, "ab"), (2, 2, "cd"), ids=[99] * 4)
    assert two != contents((0, 2, "cd"), (2, 2, "ab"), ids=[99] * 4) and two != contents((0, 3, "ab"), (3, 1, "cd"), ids=[99] * 4)
