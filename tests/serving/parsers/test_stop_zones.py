"""Stop words count in the text around calls and nowhere in them, however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy.answer import Answer
from lmdeploy.messages import EngineOutput
from lmdeploy.serving.parsers.reasoning import ReasoningFormat, ReasoningParser
from lmdeploy.serving.parsers.registry import TOOL_FORMATS
from lmdeploy.serving.parsers.stop_zones import OutsideCalls
from lmdeploy.serving.parsers.tools import ToolParser
from lmdeploy.text.stops import StopMatcher
from tests.serving.parsers.reading import NAMES, cut_at
from tests.test_answer import Bytes

ADD = '{"name": "add", "arguments": {"a": "x y"}}'
HERMES = f"<tool_call>\n{ADD}\n</tool_call>"
CODE = "<|action_start|><|interpreter|>\nx = 1\n"


def zones(family: str, *, required: bool = False, thinks: bool = False) -> OutsideCalls:
    tools = ToolParser(TOOL_FORMATS[family], NAMES | {"interpreter"}, code=True)
    return OutsideCalls(ReasoningParser(ReasoningFormat(), opened=True) if thinks else None, tools, required=required)


def where(reader: OutsideCalls, pieces: list[str]) -> tuple[str, str]:
    """(text where stop words count, text where they do not); all that went in has come out."""
    out = [part for number, piece in enumerate(pieces, 1) for part in reader.split(piece, last=number == len(pieces))]
    assert "".join(text for text, _ in out) == "".join(pieces)
    return "".join(text for text, counts in out if counts), "".join(text for text, counts in out if not counts)


@pytest.mark.parametrize(
    ("family", "text", "counts"),
    [
        ("hermes", f"a < b {HERMES} end", "a < b  end"),
        ("hermes", f"{HERMES}\n{HERMES}", "\n"),
        ("hermes", "a <tool_ca", "a <tool_ca"),
        ("internlm", f"I run. {CODE}", "I run. "),
        ("internlm", f"{CODE}<|action_end|>done", "done"),
        ("llama3_1", '<function=add>{"a": 1}</function>\nSo.', "\nSo."),
        ("json", f"{ADD}", ""),
        ("mistral", f"See: [TOOL_CALLS] [{ADD}, {ADD}]", "See: "),
        ("mistral", "plain [1] text", "plain [1] text"),
    ],
)
@given(places=st.lists(st.integers(0, 200), max_size=12))
def test_the_zones_of_a_text(family: str, text: str, counts: str, places: list[int]) -> None:
    assert where(zones(family), cut_at(text, places))[0] == counts


def test_a_required_answer_is_all_call_but_for_its_reasoning() -> None:
    assert where(zones("hermes", required=True), list(f"{HERMES}\n{HERMES}"))[0] == ""
    assert where(zones("hermes", required=True, thinks=True), list(f"I must.</think>\n\n{HERMES}")) == ("I must.", f"</think>\n\n{HERMES}")
    assert where(zones("hermes", thinks=True), list(f"I must.</think>\n\nSo {HERMES}"))[0] == "I must.</think>\n\nSo "


def text_of(words: list[str], text: str, *, include: bool = False) -> tuple[str, object]:
    """What is left of an answer, a byte at a time, and what stopped it."""
    answer = Answer(Bytes(), [1], StopMatcher(words, include), include_stop=include, zones=zones("hermes"))  # type: ignore[arg-type]
    ids = text.encode()
    out = ""
    for count, token in enumerate(ids, 1):
        response = answer.feed(
            EngineOutput(request_id=1, token_ids=[token], num_prompt=1, num_generated=count, finish_reason="length" if count == len(ids) else None)
        )
        out += response.text if response is not None else ""
        if answer.finished:
            assert response is not None
            return out, response.stop_reason
    raise AssertionError("it did not end")


@pytest.mark.parametrize("include", [False, True])
def test_stop_words_are_matched_around_a_call_only(include: bool) -> None:
    whole = f"See x: {HERMES} and y."
    for word in ("x y", '"name"', "tool", "\n", "}", ">", ": <", "> "):
        assert text_of([word], whole, include=include) == (whole, None), word
    assert text_of(["y"], whole, include=include) == (whole[:-1] if include else whole[:-2], "y")
    assert text_of(["x"], whole, include=include) == ("See x" if include else "See ", "x")
    assert text_of(["tool"], "a <tool", include=include) == ("a <tool" if include else "a <", "tool"), "it was no call"
