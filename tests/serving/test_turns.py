"""Answers read token by token: content, reasoning, calls, counts and finish reasons, from the embedded model's own tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmdeploy.messages import Response
from lmdeploy.serving.parsers.reasoning import ReasoningFormat, ReasoningParser
from lmdeploy.serving.parsers.registry import TOOL_FORMATS
from lmdeploy.serving.parsers.tools import ToolParser
from lmdeploy.serving.turns import Delta, TurnReader
from lmdeploy.text.tokenizer import Tokenizer

NAMES = frozenset(("add",))
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 5}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer(model_folder)


def reader(tokenizer: Tokenizer, *, opened: bool = False, tools: str | None = "hermes", one_call: bool = False) -> TurnReader:
    tags = ReasoningFormat()
    parser = ToolParser(TOOL_FORMATS[tools], NAMES, one_call=one_call) if tools else None
    return TurnReader(ReasoningParser(tags, opened=opened, interrupts=("<tool_call>",)), parser, tokenizer, tags.close)


def responses(tokenizer: Tokenizer, text: str, *, finish: str = "stop") -> list[Response]:
    """The text as the engine gives it, one token an increment."""
    ids = tokenizer.encode(text, add_bos=False)
    parts = [Response(tokenizer.token_bytes(token).decode(), count, 9, token_ids=[token], finish_reason=None) for count, token in enumerate(ids, 1)]
    return [*parts, Response("", len(ids), 9, finish_reason=finish)]  # type: ignore[arg-type]


def summed(deltas: list[Delta]) -> tuple[str, str, list[tuple[str, str]], str | None]:
    """(content, reasoning, calls, finish reason)"""
    calls: dict[int, tuple[str, str]] = {}
    for delta in deltas:
        for tool in delta.tools:
            if tool.id is not None:
                assert tool.place not in calls and tool.id.startswith("call_") and tool.name
                calls[tool.place] = (tool.name, "")
            name, arguments = calls[tool.place]
            calls[tool.place] = (name, arguments + tool.arguments)
    return "".join(d.content for d in deltas), "".join(d.reasoning for d in deltas), list(calls.values()), deltas[-1].finish_reason


@pytest.mark.parametrize("opened", [False, True])
def test_reasoning_content_and_two_calls(tokenizer: Tokenizer, opened: bool) -> None:
    text = ("" if opened else "<think>") + f"\nI must add.\n</think>\n\nI add.\n{CALL}\n{CALL}"
    turn = reader(tokenizer, opened=opened)
    deltas = [turn.read(response) for response in responses(tokenizer, text)]
    calls = [("add", '{"a": 3, "b": 5}')] * 2
    assert summed(deltas) == ("I add.\n", "I must add.", calls, "tool_calls")
    assert len([d for d in deltas if d.tools]) > 8, "arguments come in pieces"
    thought = text[: text.index("</think>") + len("</think>")]
    assert abs(deltas[-1].reasoning_tokens - len(tokenizer.encode(thought, add_bos=False))) <= 1, "the last token of the tag may hold what follows"


def test_whole_and_streamed_answers_say_the_same(tokenizer: Tokenizer) -> None:
    for text in (f"<think>a</think>b{CALL}", f"b {CALL} c", "<tool_call> no", "plain", "<think>open", f"<think>hm{CALL}"):
        parts = responses(tokenizer, text)
        turn = reader(tokenizer)
        streamed = summed([turn.read(part) for part in parts])
        ids = tokenizer.encode(text, add_bos=False)
        assert summed([reader(tokenizer).read(Response(text, len(ids), 9, token_ids=ids, finish_reason="stop"))]) == streamed


def test_a_call_that_max_tokens_cut_is_content_and_no_tool_call(tokenizer: Tokenizer) -> None:
    cut = CALL[:-24]
    whole = reader(tokenizer).read(Response(cut, 1, 9, finish_reason="length"))
    assert (whole.content, whole.tools, whole.finish_reason) == (cut, [], "length")
    turn = reader(tokenizer)
    deltas = [turn.read(response) for response in responses(tokenizer, cut, finish="length")]
    content, _, calls, finish = summed(deltas)
    assert (content, finish) == ("", "length") and calls, "its beginning had gone out, and is not told twice"
    assert deltas[-1].failed_call and not any(delta.failed_call for delta in deltas[:-1])


def code_reader(tokenizer: Tokenizer, own_stops: frozenset[int | str]) -> TurnReader:
    parser = ToolParser(TOOL_FORMATS["internlm"], frozenset(("interpreter",)), code=True)
    return TurnReader(None, parser, tokenizer, "", own_stops)


@pytest.mark.parametrize("reason", ["rem", 7, None, 5, "</end>"])
def test_code_that_the_caller_stopped_is_no_call(tokenizer: Tokenizer, reason: int | str | None) -> None:
    cut = "<|action_start|><|interpreter|>\nos.rem"
    ended = reason not in ("rem", 7)  # by the model's own token or word, or by its grammar
    last = Response("", 9, 9, finish_reason="stop", stop_reason=reason)  # type: ignore[arg-type]
    turn = code_reader(tokenizer, frozenset((5, "</end>")))
    *deltas, end = [turn.read(response) for response in (*responses(tokenizer, cut)[:-1], last)]
    content, _, calls, finish = summed([*deltas, end])
    assert (content, finish, end.failed_call) == ("", "tool_calls" if ended else "stop", not ended)
    assert calls[0][1] == '{"code": "os.rem' + ('"}' if ended else "")
    whole = code_reader(tokenizer, frozenset((5, "</end>"))).read(Response(cut, 9, 9, finish_reason="stop", stop_reason=reason))  # type: ignore[arg-type]
    assert (whole.content, len(whole.tools), whole.finish_reason) == (("", 1, "tool_calls") if ended else (cut, 0, "stop"))


def test_a_cut_call_is_not_hidden_by_a_good_one_before(tokenizer: Tokenizer) -> None:
    text = f"{CALL}\n{CALL[:-24]}"
    turn = reader(tokenizer)
    deltas = [turn.read(response) for response in responses(tokenizer, text)]
    assert summed(deltas)[3] == "stop" and deltas[-1].failed_call


def test_one_call_where_one_was_asked_for(tokenizer: Tokenizer) -> None:
    turn = reader(tokenizer, one_call=True)
    content, _, calls, finish = summed([turn.read(r) for r in responses(tokenizer, f"{CALL}\n{CALL} and more")])
    assert (content, len(calls), finish) == ("", 1, "tool_calls")


def test_reasoning_tokens_of_a_whole_answer_end_with_the_tag(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<think>one two</think> three four five", add_bos=False)
    delta = reader(tokenizer, tools=None).read(Response(tokenizer.decode(ids), len(ids), 9, token_ids=ids, finish_reason="stop"))
    assert delta.content == "three four five"
    assert 0 < delta.reasoning_tokens <= len(ids) - len(tokenizer.encode(" four five", add_bos=False))
    plain = reader(tokenizer, tools=None).read(Response("three", 1, 9, finish_reason="stop"))
    assert plain.reasoning_tokens == 0
