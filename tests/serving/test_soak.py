"""The soak test for some seconds (`python -m benchmark.soak` is the long one), and that its judge sees what it must see."""

from __future__ import annotations

import json

import pytest

from benchmark.soak import Soak, parse
from benchmark.soak_clients import Task, Wrong, answers_of, check_stream


@pytest.mark.slow
def test_200_clients_that_leave_and_err_harm_nobody() -> None:
    soak = Soak(parse(["--minutes", "0.1", "--clients", "200"]))
    soak.run()
    assert soak.problems == [], "\n".join(soak.report)


TASK = Task("two", "/v1/completions", {}, {0: ("ab", "stop"), 1: ("x", "length")}, 3)


def chunk(index: int, text: str, end: str | None = None, *, id: str = "1", **more: object) -> str:
    return json.dumps({"id": id, "choices": [{"index": index, "text": text, "finish_reason": end}], **more})


GOOD = [chunk(0, "a"), chunk(1, "x"), chunk(0, "b", "stop"), chunk(1, "", "length")]


def test_a_right_stream_passes() -> None:
    check_stream(TASK, [*GOOD, "[DONE]"], usage=False)
    check_stream(TASK, [*GOOD, json.dumps({"id": "1", "choices": [], "usage": {"completion_tokens": 3}}), "[DONE]"], usage=True)
    assert answers_of({"choices": [{"index": 0, "message": {"content": "ab"}, "finish_reason": "stop"}]}) == {0: ("ab", "stop")}


@pytest.mark.parametrize(
    "events",
    [
        GOOD,
        [*GOOD, "[DONE]", "[DONE]"],
        [*GOOD[:3], "[DONE]"],
        [*GOOD, chunk(0, "c"), "[DONE]"],
        [*GOOD, chunk(1, "", "length"), "[DONE]"],
        [chunk(0, "x"), *GOOD, "[DONE]"],
        [chunk(0, "ab", "stop"), chunk(1, "x", "length", id="2"), "[DONE]"],
        [*GOOD, '{"error": {"message": "m"}}', "[DONE]"],
        [chunk(0, "x", "length"), chunk(1, "ab", "stop"), "[DONE]"],
    ],
    ids=["no end", "two ends", "one answer lost", "goes on", "ends twice", "wrong text", "another answer's id", "error", "exchanged"],
)
def test_a_wrong_stream_is_seen(events: list[str]) -> None:
    with pytest.raises(Wrong):
        check_stream(TASK, events, usage=False)


def test_missing_or_wrong_counts_are_seen() -> None:
    for usage in ([], [json.dumps({"id": "1", "choices": [], "usage": {"completion_tokens": 4}})]):
        with pytest.raises(Wrong):
            check_stream(TASK, [*GOOD, *usage, "[DONE]"], usage=True)
