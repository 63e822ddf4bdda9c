"""Reasoning apart from the answer, whoever wrote the opening tag, and however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy.serving.options import REASONING_PARSERS
from lmdeploy.serving.parsers.events import Event
from lmdeploy.serving.parsers.reasoning import ReasoningFormat, ReasoningParser
from lmdeploy.serving.parsers.registry import REASONING_FORMATS
from tests.serving.parsers.reading import cut_at, joined


def read(pieces: list[str], *, opened: bool = False, interrupts: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    parser = ReasoningParser(ReasoningFormat(), opened=opened, interrupts=interrupts)
    events: list[Event] = [event for piece in pieces for event in parser.feed(piece)]
    return joined(events + parser.finish())


def test_the_options_names_are_those_of_the_registry() -> None:
    assert set(REASONING_PARSERS) == {"none", *REASONING_FORMATS}


@pytest.mark.parametrize(
    ("text", "opened", "wanted"),
    [
        ("<think>\nhm <b> x\n</think>\n\nYes.\n", False, [("reasoning", "hm <b> x"), ("content", "Yes.\n")]),
        ("hm\n</think>\nYes.", True, [("reasoning", "hm"), ("content", "Yes.")]),
        ("<think>hm</think>Yes.", True, [("reasoning", "hm"), ("content", "Yes.")]),  # the template opened it, the model again
        ("Yes.", False, [("content", "Yes.")]),
        (" Yes </think> no", False, [("content", " Yes </think> no")]),
        ("<think>\n\n</think>\n\nYes.", False, [("content", "Yes.")]),
        ("<think>never ends ", False, [("reasoning", "never ends")]),
        ("never ends </thi", True, [("reasoning", "never ends </thi")]),
        ("<think>a</think>", False, [("reasoning", "a")]),
        ("a <think>b</think>", False, [("content", "a <think>b</think>")]),
        ("<thin", False, [("content", "<thin")]),
        ("", True, []),
        ("<think>a</think>b <think>c</think>", False, [("reasoning", "a"), ("content", "b <think>c</think>")]),
    ],
)
def test_reasoning_and_content(text: str, opened: bool, wanted: list[tuple[str, str]]) -> None:
    assert read([text], opened=opened) == wanted
    assert read(list(text), opened=opened) == wanted


def test_the_tag_of_a_tool_call_ends_the_reasoning() -> None:
    text = "<think>I call <tool_call>\n{}"
    assert read(list(text), interrupts=("<tool_call>",)) == [("reasoning", "I call"), ("content", "<tool_call>\n{}")]


SCRAPS = st.sampled_from(["<think>", "</think>", "<", "</", "think", ">", "\n", " ", "a", "é", "<tool_call>", "<tool"])


@given(st.lists(SCRAPS, max_size=20), st.lists(st.integers(0, 200), max_size=10), st.booleans())
def test_no_cutting_changes_what_a_text_says(scraps: list[str], cuts: list[int], opened: bool) -> None:
    text = "".join(scraps)
    whole = read([text], opened=opened, interrupts=("<tool_call>",))
    assert read(cut_at(text, cuts), opened=opened, interrupts=("<tool_call>",)) == whole
    assert read(list(text), opened=opened, interrupts=("<tool_call>",)) == whole
