"""The door for messages: good ones are copied, bad ones are refused by name."""

from __future__ import annotations

import reprlib
from typing import Any

import pytest

from lmdeploy.errors import RequestError
from lmdeploy.text.conversation import messages_to_bounded, tools_to_bounded


def test_messages_are_normalised_copies() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given: list[dict[str, Any]] = [
        {"role": "developer", "content": parts},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "x", "name": "n"},
    ]
    found = messages_to_bounded(given)
    assert found == [{"role": "system", "content": "a\nb"}, {"role": "assistant", "content": ""}, {"role": "user", "content": "x", "name": "n"}]
    found[2]["name"] = "changed"
    assert given[2]["name"] == "n" and given[0]["role"] == "developer"


def test_tool_call_arguments_become_objects() -> None:
    for arguments, wanted in (('{"a": 1}', {"a": 1}), ({"a": 1}, {"a": 1}), ("", {}), (None, {})):
        call = {"id": "c", "function": {"name": "f", "arguments": arguments}}
        message = messages_to_bounded([{"role": "assistant", "tool_calls": [call]}])[0]
        assert message["tool_calls"][0]["function"]["arguments"] == wanted and call["function"]["arguments"] == arguments  # type: ignore[index]


NESTED: list[Any] = []
for _ in range(100):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        ([], "messages", "empty"),
        (None, "messages", "must be a list"),
        ("Hi", "messages", "must be a list"),
        (["Hi"], "messages[0]", "must be an object"),
        ([{"content": "x"}], "messages[0].role", "missing"),
        ([{"role": "king", "content": "x"}], "messages[0].role", "'king'; allowed are system, user"),
        ([{"role": 7, "content": "x"}], "messages[0].role", "int"),
        ([{"role": "user"}], "messages[0].content", "no content"),
        ([{"role": "user", "content": 5}], "messages[0].content", "not int"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]", "must be"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]", "must be"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type", "vision model"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content", "surrogate"),
        ([{"role": "user", "content": "x", "name": 3}], "messages[0].name", "text"),
        ([{"role": "user", "content": "x", "extra": {1, 2}}], "messages[0].extra", "set"),
        ([{"role": "user", "content": "x", "extra": NESTED}], "messages[0].extra", "nested"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "messages[0].tool_calls[0].function.arguments",
            "not valid JSON",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
            "messages[0].tool_calls[0].function.arguments",
            "JSON object",
        ),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].function.name", "function.name"),
        ([{"role": "assistant", "tool_calls": "x"}], "messages[0].tool_calls", "list"),
        ([{"role": "user", "content": "x"}] * 10_001, "messages", "10001 entries; at most 10000"),
        ([{"role": "user", "content": "x" * (1 << 20)}] * 17, "messages", "more than 16777216 bytes"),
        ([{"role": "user", "content": "x", "extra": [0] * 17_000_000}], "messages", "more than 16777216 bytes"),
    ],
    ids=lambda v: reprlib.repr(v)[:40],  # of a part of 17 million numbers
)
def test_bad_messages_are_refused_by_name(messages: Any, param: str, message: str) -> None:
    with pytest.raises(RequestError, match=message.replace("[", r"\[")) as caught:
        messages_to_bounded(messages)
    assert caught.value.param == param


def test_limits_are_parameters() -> None:
    with pytest.raises(RequestError, match="more than 3 bytes"):
        messages_to_bounded([{"role": "user", "content": "你好"}], max_bytes=3)
    with pytest.raises(RequestError, match="at most 1"):
        messages_to_bounded([{"role": "user", "content": ""}] * 2, max_messages=1)


def test_tools_are_wrapped_and_checked() -> None:
    function = {"name": "f", "parameters": {"type": "int"}}
    assert tools_to_bounded([function]) == [{"type": "function", "function": function}] == tools_to_bounded([{"type": "function", "function": function}])
    assert tools_to_bounded([]) is None is tools_to_bounded(None)
    for bad in ("x", [1], [{}], [{"function": {"name": ""}}], [function] * 1025):
        with pytest.raises(RequestError, match="tools"):
            tools_to_bounded(bad)
