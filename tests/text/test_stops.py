"""Stop words on text, against a naive search, for every way to cut the text."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.errors import RequestError
from lmdeploy.text.stops import StopMatcher


def naive(words: list[str], text: str, include: bool) -> tuple[str, str | None]:
    """The word complete first wins, of those the longest."""
    for end in range(1, len(text) + 1):
        found = [w for w in words if text[:end].endswith(w)]
        if found:
            word = max(found, key=len)
            return text[: end if include else end - len(word)], word
    return text, None


letters = st.text(alphabet="ab<", min_size=1, max_size=5)


@settings(max_examples=400, deadline=None)
@given(st.lists(letters, max_size=5), st.text(alphabet="ab<", max_size=40), st.lists(st.integers(0, 40), max_size=8), st.booleans())
def test_every_cut_of_the_text_gives_the_naive_result(words: list[str], text: str, cuts: list[int], include: bool) -> None:
    matcher = StopMatcher(words, include)
    edges = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    out = "".join(matcher.feed(text[a:b]) for a, b in zip(edges, edges[1:], strict=False)) + matcher.flush()
    assert (out, matcher.matched) == naive(words, text, include)


@settings(max_examples=200, deadline=None)
@given(st.lists(letters, min_size=1, max_size=5), st.text(alphabet="ab<", max_size=30))
def test_only_what_could_still_match_is_held_back(words: list[str], text: str) -> None:
    matcher = StopMatcher(words)
    shown = ""
    for i, char in enumerate(text, 1):
        shown += matcher.feed(char)
        if matcher.matched:
            return
        held = text[:i][len(shown) :]
        assert held == "" or any(w.startswith(held) and len(held) < len(w) for w in words)


def test_a_stop_word_across_token_borders_is_found_and_the_rest_dropped() -> None:
    matcher = StopMatcher(["</end>"])
    assert [matcher.feed(t) for t in ("Hi<", "/e", "nd", "> more", "x")] == ["Hi", "", "", "", ""]
    assert matcher.matched == "</end>" and matcher.flush() == ""


def test_include_keeps_the_word_and_holds_nothing_back() -> None:
    matcher = StopMatcher(["END"], include=True)
    assert [matcher.feed(t) for t in ("a E", "N", "D b")] == ["a E", "N", "D"]
    assert matcher.matched == "END"


def test_no_words_pass_everything_through_and_an_empty_word_is_refused() -> None:
    assert StopMatcher([]).feed("abc") == "abc"
    with pytest.raises(RequestError, match="empty"):
        StopMatcher(["a", ""])


def test_adversarial_text_stays_linear() -> None:
    words = ["a" * n + "b" for n in range(200, 264)]
    start = time.perf_counter()
    matcher = StopMatcher(words)
    out = "".join(matcher.feed("a") for _ in range(10_000)) + matcher.flush()
    assert out == "a" * 10_000 and time.perf_counter() - start < 1.0
