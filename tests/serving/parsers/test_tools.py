"""Tool calls in every family's notation: whole, in pieces, several, broken, and text that only looks like one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy.serving.options import TOOL_PARSERS
from lmdeploy.serving.parsers.registry import TOOL_FORMATS
from tests.serving.parsers.reading import NAMES, cut_at, joined, read_tools

ARGS = {"a": 3, "text": 'a "quoted" } ] </tool_call> <|action_end|> \\ é 😀', "nested": {"x": [1, {"y": None}], "z": "{"}, "t": True}
TEXT = json.dumps(ARGS)  # unicode as escapes


def write(family: str, name: str, arguments: str) -> str:
    """One call as the family's models write it."""
    forms = {
        "internlm": '<|action_start|><|plugin|>\n{"name": "%s", "parameters": %s}<|action_end|>',
        "hermes": '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>',
        "llama3_1": "<function=%s>%s</function>",
        "llama3": '{"name": "%s", "parameters": %s}',
        "python": '<|python_tag|>{"name": "%s", "parameters": %s}',
        "mistral": '[TOOL_CALLS] [{"name": "%s", "arguments": %s, "id": "abcdefghi"}]',
        "json": '{"name": "%s", "arguments": %s}',
        "json list": '[{"name": "%s", "arguments": %s}]',
    }
    return forms[family] % (name, arguments)


PARSERS = {"python": "llama3_1", "json list": "json"}
FAMILIES = ["internlm", "hermes", "llama3_1", "llama3", "python", "mistral", "json", "json list"]


def parser_of(family: str) -> str:
    return PARSERS.get(family, family)


def test_the_options_names_are_those_of_the_registry() -> None:
    assert set(TOOL_PARSERS) == {"none", *TOOL_FORMATS}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_comes_out_with_its_arguments_as_they_were_written(family: str) -> None:
    assert joined(read_tools(parser_of(family), [write(family, "add", TEXT)])) == [("call", "add", TEXT, "done")]


@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_are_given_away_while_they_are_written(family: str) -> None:
    text = write(family, "add", TEXT)
    place = text.index('"nested"')
    early = joined(read_tools(parser_of(family), [text[:place]], cut=True))
    assert early[0] == ("call", "add", TEXT[: TEXT.index('"nested"')], "failed")


@pytest.mark.parametrize("family", ["internlm", "hermes", "llama3_1", "python", "mistral"])
def test_text_before_a_call_stays_as_it_is(family: str) -> None:
    events = joined(read_tools(parser_of(family), ["I will <add>.\n", write(family, "add", "{}")]))
    assert events == [("content", "I will <add>.\n"), ("call", "add", "{}", "done")]


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        ("hermes", "<tool_call>\n{A}\n</tool_call>\n<tool_call>\n{B}\n</tool_call>"),
        ("mistral", "[TOOL_CALLS] [{A}, {B}]"),
        ("mistral", "[TOOL_CALLS][{A},{B}]"),
        ("llama3_1", '<function=add>{"a": 1}</function>\n<function=get_weather>{"city": "x"}</function>'),
        ("llama3", "{A}; {B}"),
        ("llama3", "<|python_tag|>{A}; {B}"),
        ("json", "[{A}, {B}]"),
        ("json", " {A}\n{B}\n"),
    ],
)
def test_several_calls(parser: str, text: str) -> None:
    text = text.replace("{A}", '{"name": "add", "arguments": {"a": 1}}').replace("{B}", '{"name": "get_weather", "arguments": {"city": "x"}}')
    wanted = [("call", "add", '{"a": 1}', "done"), ("call", "get_weather", '{"city": "x"}', "done")]
    assert joined(read_tools(parser, [text])) == wanted
    assert joined(read_tools(parser, [text], one_call=True)) == wanted[:1]


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ('{"arguments": {"a": 1}, "name": "add"}', '{"a": 1}'),  # the name comes last
        ('{"name": "add"}', "{}"),
        ('{"name": "add", "arguments": null}', "{}"),
        ('{"name": "add", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),  # JSON in a text
        ('{"type": "function", "name": "add", "parameters": {"a": 1}, "id": "7"}', '{"a": 1}'),
        ('{"name": "\\u0061dd", "arguments": {}}', "{}"),
    ],
)
def test_ways_to_write_a_call(call: str, arguments: str) -> None:
    for parser, text in (("json", call), ("hermes", f"<tool_call>{call}</tool_call>"), ("mistral", f"[TOOL_CALLS]{call}")):
        assert joined(read_tools(parser, list(text))) == [("call", "add", arguments, "done")]


NO_CALLS = [
    ("hermes", '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>'),
    ("hermes", "<tool_call> is how a call begins"),
    ("hermes", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": 7}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
    ("hermes", "a < b <tool> <tool_call"),
    ("internlm", "<|action_start|><|interpreter|>\nprint(1)"),  # nobody asked for an interpreter
    ("internlm", "<|action_start|>"),
    ("llama3_1", "<function=other>{}</function>"),
    ("llama3_1", "<function=add_and_more>{}"),
    ("llama3_1", "<function=add>7</function>"),
    ("json", '{"answer": {"name": "add"}}'),
    ("json", '{"name": "Bob", "age": 3}'),
    ("json", "[1, 2, 3]"),
    ("json", "[]"),
    ("json", 'The call {"name": "add", "arguments": {}} is not at the beginning.'),
    ("json", "7"),
    ("mistral", "[TOOL_CALLS] none"),
    ("mistral", "[1] [TOOL"),
]


@pytest.mark.parametrize(("parser", "text"), NO_CALLS)
def test_what_is_no_call_is_content(parser: str, text: str) -> None:
    assert joined(read_tools(parser, [text])) == [("content", text)]


@pytest.mark.parametrize("text", ['<tool_call>{"name": "add", "arguments": {"a": nope}}</tool_call>', '<tool_call>{"name": "add", "arguments": {"a": 1'])
def test_a_call_that_breaks_off_is_told_as_failed_and_comes_as_content(text: str) -> None:
    events = joined(read_tools("hermes", list(text)))
    assert (events[0][1], events[0][3]) == ("add", "failed")
    assert events[1:] == [("content", text)]


def test_another_call_may_follow_a_broken_one() -> None:
    events = joined(read_tools("hermes", ["<tool_call> oh ", write("hermes", "add", '{"a": 1}'), " bye"]))
    assert events == [("content", "<tool_call> oh "), ("call", "add", '{"a": 1}', "done"), ("content", "bye")]


def test_an_answer_that_is_plain_json_is_not_held_back() -> None:
    assert read_tools("json", ['{"ans'])[:1] != []
    parser_events = joined(read_tools("json", ['{"answer": ', "4"]))
    assert parser_events == [("content", '{"answer": 4')]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("\n```python\nprint('<a>')\n```\n<|action_end|>", "print('<a>')"),
        ("\n```python\nx = 1\n\ny = `2`\n```", "x = 1\n\ny = `2`"),  # the stop token took the end
        ("print(1) < 2", "print(1) < 2"),
        ("\n```py\ns = '''a\n```\nb'''\n```<|action_end|>", "s = '''a\n```\nb'''"),
        ("", ""),
    ],
)
def test_code_for_the_interpreter(text: str, code: str) -> None:
    text = f"Let me see.<|action_start|><|interpreter|>{text}"
    for pieces in ([text], list(text)):
        events = joined(read_tools("internlm", pieces, code=True))
        assert events[0] == ("content", "Let me see.")
        kind, name, arguments, end = events[1]
        assert (kind, name, json.loads(arguments), end) == ("call", "interpreter", {"code": code}, "done")
    assert joined(read_tools("internlm", [text[:-3]], code=True, cut=True))[-1][0] == "content" or not code


VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(st.text(max_size=8), VALUES, max_size=4)
SCRAPS = st.sampled_from(
    ["<tool_call>", "</tool_call>", "{", "}", "[", "]", '"', "\\", "\n", " ", ";", ",", "add", '"name": "add"', '"arguments": ', "<function=", "</function>", ">",
     "<|python_tag|>", "[TOOL_CALLS]", "<|action_start|>", "<|plugin|>", "<|interpreter|>", "<|action_end|>", "```", "```python\n", "x", "é", "1", ":", "<", "<|"]
)  # fmt: skip


@given(st.sampled_from(FAMILIES), ARGUMENTS, st.booleans(), st.lists(st.integers(0, 500), max_size=12), st.sampled_from(sorted(NAMES)))
def test_any_arguments_cut_anywhere_come_back_whole(family: str, arguments: dict[str, Any], ascii: bool, cuts: list[int], name: str) -> None:
    text = write(family, name, json.dumps(arguments, ensure_ascii=ascii))
    ((kind, called, given_back, end),) = joined(read_tools(parser_of(family), cut_at(text, cuts)))
    assert (kind, called, end) == ("call", name, "done")
    assert json.loads(given_back) == arguments


@given(st.sampled_from(sorted(TOOL_FORMATS)), st.lists(SCRAPS, max_size=24), st.lists(st.integers(0, 300), max_size=12), st.booleans(), st.booleans())
def test_no_cutting_changes_what_a_text_says(parser: str, scraps: list[str], cuts: list[int], code: bool, cut: bool) -> None:
    text = "".join(scraps)
    whole = joined(read_tools(parser, [text], code=code, cut=cut))
    assert joined(read_tools(parser, cut_at(text, cuts), code=code, cut=cut)) == whole
    assert joined(read_tools(parser, list(text), code=code, cut=cut)) == whole
    for event in whole:
        if event[0] == "call" and event[3] == "done":
            assert isinstance(json.loads(event[2]), dict)


@given(st.sampled_from(sorted(TOOL_FORMATS)), st.text(max_size=60))
def test_ordinary_text_is_content_to_the_letter(parser: str, text: str) -> None:
    assert "".join(e[1] for e in joined(read_tools(parser, [text])) if e[0] == "content") == text
