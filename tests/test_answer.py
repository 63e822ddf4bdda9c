"""Answers: ids become text increments, stop words and stop tokens are taken out; increments become complete answers."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.answer import Answer, Merger, as_dict, joined, merge_increments
from lmdeploy.delivery import gathered
from lmdeploy.messages import EngineOutput, Response, StepOutputs, TokenLogprobs
from lmdeploy.text.stops import StopMatcher

END = 256


class Bytes:
    """A tokenizer whose token i is the byte i, and 256 a special token."""

    special_ids = frozenset({END})
    strip_first_space = False

    def token_bytes(self, token_id: int) -> bytes:
        return b"<end>" if token_id == END else bytes([token_id])


def answer(words: list[str] = [], *, include: bool = False, skip: bool = True, min_new_tokens: int = 0, prompt: list[int] = [65, 66]) -> Answer:  # noqa: B006
    return Answer(Bytes(), prompt, StopMatcher(words, include), include_stop=include, skip_special_tokens=skip, min_new_tokens=min_new_tokens)  # type: ignore[arg-type]


def outputs(text: str | bytes, finish: str | None = "length", *, stop: bool = False) -> list[EngineOutput]:
    """One output a byte, as the engine sends them; `stop` adds the stop token."""
    ids = list(text.encode() if isinstance(text, str) else text) + ([END] if stop else [])
    made = [EngineOutput(request_id=1, token_ids=[t], num_prompt=2, num_generated=i) for i, t in enumerate(ids, 1)]
    made[-1].finish_reason = "stop" if stop else finish  # type: ignore[assignment]
    made[-1].stop_token_id = END if stop else None
    return made


def run(one: Answer, parts: list[EngineOutput]) -> list[Response]:
    """The increments until the answer has finished."""
    out = []
    for part in parts:
        response = one.feed(part)
        if response is not None:
            out.append(response)
        if one.finished:
            break
    return out


def whole(one: Answer, parts: list[EngineOutput]) -> Response:
    return merge_increments(run(one, parts), 1)[0]


def test_the_stop_token_is_counted_but_not_shown() -> None:
    got = whole(answer(), outputs("ab", stop=True))
    assert (got.text, got.token_ids, got.generate_token_len, got.finish_reason, got.stop_reason) == ("ab", [97, 98], 3, "stop", END)
    kept = whole(answer(include=True, skip=False), outputs("ab", stop=True))
    assert (kept.text, kept.token_ids) == ("ab<end>", [97, 98, END])
    skipped = whole(answer(include=True), outputs("ab", stop=True))
    assert (skipped.text, skipped.token_ids) == ("ab", [97, 98, END]), "special tokens stay out of the text, not out of the ids"


def test_logprobs_and_logits_go_with_their_tokens() -> None:
    for include, count in ((False, 2), (True, 3)):
        parts = outputs("ab", stop=True)
        for place, part in enumerate(parts):
            part.logprobs = [TokenLogprobs(part.token_ids[0], -0.5 * place, [(7, -0.1)])]
            part.logits = torch.full((1, 4), float(place))
            part.last_hidden_state = torch.full((1, 2), float(place))
        got = whole(answer(include=include), parts)
        assert len(got.token_ids) == len(got.logprobs) == len(got.logits) == len(got.last_hidden_state) == count
        assert [next(iter(entry)) for entry in got.logprobs] == got.token_ids
        assert got.logits[:, 0].tolist() == [float(i) for i in range(count)]


def test_held_back_text_comes_at_the_end_when_no_stop_word_came_of_it() -> None:
    for finish in ("length", "abort", "error"):
        parts = run(answer(["END"]), outputs("xEN", finish))
        assert [p.text for p in parts] == ["x", "", "EN"]
        assert parts[-1].finish_reason == finish
    assert whole(answer(["END"]), outputs("xEN", stop=True)).text == "xEN"
    # the held text comes even when the engine's last output brings no token
    one = answer(["END"])
    run(one, outputs("xE", None))
    last = one.feed(EngineOutput(request_id=1, finish_reason="abort", num_prompt=2, num_generated=2))
    assert last is not None and (last.text, last.finish_reason, last.token_ids) == ("E", "abort", [])


def test_a_stop_word_that_is_complete_at_the_very_end_counts() -> None:
    got = whole(answer(["END"]), outputs("xEND", "length"))
    assert (got.text, got.finish_reason, got.stop_reason) == ("x", "stop", "END")


def test_half_a_character_is_shown_as_such_only_at_the_end() -> None:
    parts = run(answer(), outputs("é".encode() + "é".encode()[:1]))
    assert [p.text for p in parts] == ["", "é", "\ufffd"]


def test_an_error_keeps_what_had_come() -> None:
    one = answer()
    run(one, outputs("ab", None))
    last = one.feed(EngineOutput(request_id=1, finish_reason="error", error="the engine failed"))
    assert last is not None
    assert (last.generate_token_len, last.input_token_len, last.error_code, last.error_message) == (2, 2, "engine_error", "the engine failed")


def test_stop_words_count_only_from_min_new_tokens_on_also_across_that_border() -> None:
    assert whole(answer(["b"], min_new_tokens=3), outputs("abcab")).text == "abca"
    assert whole(answer(["cd"], min_new_tokens=4), outputs("abcdef")).text == "ab", "it ended within the allowed part"
    assert whole(answer(["abc"], min_new_tokens=4), outputs("abcdef")).text == "abcdef"
    ended = whole(answer(["b"], min_new_tokens=2), outputs("abc"))
    assert (ended.text, ended.generate_token_len) == ("a", 2)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab", min_size=1, max_size=30), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3), st.integers(0, 12), st.booleans())
def test_text_equals_a_naive_search_from_min_new_tokens_on(text: str, words: list[str], least: int, include: bool) -> None:
    expected, found = text, False
    for end in range(max(least, 1), len(text) + 1):
        ending = [w for w in words if text[:end].endswith(w)]
        if ending:
            expected, found = text[: end if include else end - len(max(ending, key=len))], True
            break
    got = whole(answer(words, include=include, min_new_tokens=least), outputs(text))
    assert got.text == expected
    assert got.finish_reason == ("stop" if found else "length")


def test_merging_is_linear_in_the_length() -> None:
    count, width = 3000, 8192
    start = time.perf_counter()
    merged = Merger(1)
    for place in range(count):
        last = place == count - 1
        merged.add(
            Response("x", place + 1, 2, token_ids=[place], logprobs=[{place: -1.0}], logits=torch.zeros(1, width), finish_reason="length" if last else None)
        )
    got = merged.answers[0]
    assert (len(got.text), len(got.logprobs), got.logits.shape) == (count, count, (count, width))
    assert time.perf_counter() - start < 5, "copying all rows for every token would take minutes"


def test_an_answer_that_was_cut_short_is_an_abort() -> None:
    merged = Merger(2)
    merged.add(Response("a", 1, 2, index=1, token_ids=[1], logits=torch.zeros(1, 3)))
    cut = merged.complete()
    assert [(a.text, a.finish_reason, a.index) for a in cut] == [("", "abort", 0), ("a", "abort", 1)]
    assert cut[1].logits.shape == (1, 3)


def test_merging_never_changes_the_parts() -> None:
    part = Response("a", 1, 2, token_ids=[1], logprobs=[{1: -1.0}], prompt_logprobs=[None])
    merged = Merger(1)
    merged.add(part)
    merged.add(Response("b", 2, 2, token_ids=[2], logprobs=[{2: -1.0}], finish_reason="stop"))
    assert (part.token_ids, part.logprobs, part.prompt_logprobs) == ([1], [{1: -1.0}], [None])
    assert merged.answers[0].prompt_logprobs == [None]


@pytest.mark.parametrize("chosen", [7, 9])
def test_the_chosen_token_is_first_among_its_logprobs(chosen: int) -> None:
    entry = as_dict(TokenLogprobs(chosen, -3.0, [(7, -0.1), (8, -0.2)]))
    assert next(iter(entry)) == chosen
    assert set(entry) == {chosen, 7, 8}


def test_increments_that_waited_together_become_one_per_answer() -> None:
    def part(text: str, index: int, count: int, **more: object) -> Response:
        return Response(text, count, 2, index=index, token_ids=[count], logprobs=[{count: -1.0}], **more)  # type: ignore[arg-type]

    made = [part("a", 0, 1, prompt_logprobs=[None]), part("x", 1, 1), part("b", 0, 2), part("c", 0, 3, finish_reason="stop", stop_reason=7)]
    first, second = joined(made)
    assert (first.text, first.index, first.token_ids, first.logprobs) == ("abc", 0, [1, 2, 3], [{1: -1.0}, {2: -1.0}, {3: -1.0}])
    assert (first.generate_token_len, first.finish_reason, first.stop_reason, first.prompt_logprobs) == (3, "stop", 7, [None])
    assert (second.text, second.index, second.finish_reason) == ("x", 1, None)


def test_the_text_before_an_error_stays_an_increment_of_its_own() -> None:
    made = [Response("a", 1, 2, token_ids=[1]), Response("", 1, 2, finish_reason="error", error_message="the engine failed")]
    assert [(p.text, p.finish_reason) for p in joined(made)] == [("a", None), ("", "error")]


def test_increments_with_tensors_are_not_joined() -> None:
    made = [Response("a", 1, 2, token_ids=[1], logits=torch.zeros(1, 3)), Response("b", 2, 2, token_ids=[2], logits=torch.ones(1, 3))]
    assert [p.text for p in joined(made)] == ["a", "b"]


def summed_up(increments: list[Response]) -> tuple[object, ...]:
    """What a reader has in the end."""
    got = merge_increments(increments, 1)[0]
    return got.text, got.token_ids, got.generate_token_len, got.finish_reason, got.stop_reason


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="abé\U0001f600", min_size=1, max_size=20),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3),
    st.integers(0, 12),
    st.booleans(),
    st.lists(st.integers(1, 6), max_size=20),
)
def test_tokens_that_came_together_say_what_they_say_one_by_one(text: str, words: list[str], least: int, include: bool, sizes: list[int]) -> None:
    single = outputs(text)
    steps = [StepOutputs([1], [0], one.token_ids) for one in single[:-1]]
    together: list[EngineOutput] = []
    while steps:
        size = sizes.pop() if sizes else 2
        together += gathered(steps[:size])
        del steps[:size]
    new = [answer(words, include=include, min_new_tokens=least) for _ in range(2)]
    assert summed_up(run(new[0], [*together, single[-1]])) == summed_up(run(new[1], single))
