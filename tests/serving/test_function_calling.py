"""Calls are guaranteed: random models of every family, whose words are noise, make calls that parse and fit the tool's schema."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from openai import OpenAI

from lmdeploy.config import TurbomindEngineConfig
from lmdeploy.frontend import Frontend
from lmdeploy.serving.options import ServerConfig
from tests.serving.families import FAMILIES, write_family
from tests.serving.running import RunningServer

NUMBER = {"type": "int", "minimum": -9, "maximum": 99}
PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "str", "maxLength": 6},
        "unit": {"type": "string", "enum": ["C", 'F"', "é{"]},
        "days": {"type": "list", "items": {"type": "object", "properties": {"n": NUMBER, "rain": {"type": "bool"}}, "required": ["n"]}, "maxItems": 2},
    },
    "required": ["city", "unit"],
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": NUMBER, "b": NUMBER}, "required": ["a", "b"]}}},
    {"type": "function", "function": {"name": "get_weather", "description": "of a place", "parameters": PLACE}},
    {"type": "function", "function": {"name": "now"}},
]
#: what the arguments must fit, written out by hand
EXACT_NUMBER = {"type": "integer", "minimum": -9, "maximum": 99}
DAY = {"type": "object", "properties": {"n": EXACT_NUMBER, "rain": {"type": "boolean"}}, "required": ["n"], "additionalProperties": False}
EXACT: dict[str, dict[str, Any]] = {
    "add": {"type": "object", "properties": {"a": EXACT_NUMBER, "b": EXACT_NUMBER}, "required": ["a", "b"], "additionalProperties": False},
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 6},
            "unit": {"enum": ["C", 'F"', "é{"]},
            "days": {"type": "array", "items": DAY, "maxItems": 2},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    "now": {"type": "object", "maxProperties": 0},
}
#: first token of a call, as far as the family has one
OPENING = {"internlm": "<|action_start|>", "hermes": "<tool_call>", "llama3_1": "<|python_tag|>", "llama3": "<|python_tag|>", "mistral": "[TOOL_CALLS]"}


class Family:
    """A server of a random model of one family."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        config = TurbomindEngineConfig(dtype="float32", max_batch_size=4, cache_max_entry_count=200, session_len=4096, cpu_threads=1)
        self.frontend = Frontend.open(str(write_family(folder, name)), config)
        self.server = RunningServer(self.frontend, ServerConfig(server_port=0, model_name="random"))
        self.client = OpenAI(base_url=f"{self.server.url}/v1", api_key="none", max_retries=0)

    def close(self) -> None:
        self.server.stop()
        self.frontend.close()

    def ask(self, **fields: Any) -> Any:
        """One answer, with tools unless told otherwise."""
        messages = [{"role": "user", "content": "?"}]
        fields["logit_bias"] = {self.token(space): -8.0 for space in "ĠĉĊč"} | fields.get("logit_bias", {})  # less white space, shorter noise
        return self.client.chat.completions.create(**{"model": "random", "messages": messages, "tools": TOOLS, "max_tokens": 700, "seed": 1, **fields})  # type: ignore[call-overload]

    def token(self, text: str) -> str:
        """The id of a token, as logit_bias wants it."""
        return str(self.frontend.tokenizer.token_id(text))


@pytest.fixture(scope="module", params=sorted(FAMILIES.keys() - {"deepseek", "qwen3"}))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    opened = Family(request.param, tmp_path_factory.mktemp("models") / request.param)
    yield opened
    opened.close()


def check(calls: Any, names: set[str]) -> list[str]:
    """Every call names a tool and fits its schema; the names."""
    for call in calls:
        assert call.function.name in names
        jsonschema.validate(json.loads(call.function.arguments), EXACT[call.function.name])
    return [call.function.name for call in calls]


def test_a_required_call_comes_and_fits_whatever_the_model_is(family: Family) -> None:
    for seed in range(4):
        choice = family.ask(tool_choice="required", seed=seed, parallel_tool_calls=seed % 2 == 0).choices[0]
        # noise may go on making calls until its tokens are used up
        assert choice.finish_reason == "tool_calls" and choice.message.content is None or (choice.finish_reason == "length" and seed % 2 == 0)
        names = check(choice.message.tool_calls, set(EXACT))
        assert len(names) == 1 or (seed % 2 == 0 and family.name != "internlm")


def test_a_named_tool_is_called(family: Family) -> None:
    for name in EXACT:
        choice = family.ask(tool_choice={"type": "function", "function": {"name": name}}, parallel_tool_calls=False).choices[0]
        assert check(choice.message.tool_calls, {name}) == [name]


def test_a_stream_says_the_same_as_the_whole_answer(family: Family) -> None:
    fields: dict[str, Any] = {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}, "parallel_tool_calls": False, "seed": 5}
    (whole,) = family.ask(**fields).choices[0].message.tool_calls
    name, pieces, ids, finish = "", [], [], None
    for chunk in family.ask(**fields, stream=True):
        for call in chunk.choices[0].delta.tool_calls or ():
            ids += [call.id] if call.id else []
            name += call.function.name or ""
            pieces.append(call.function.arguments)
        finish = chunk.choices[0].finish_reason or finish
    assert (name, "".join(pieces), finish) == ("get_weather", whole.function.arguments, "tool_calls")
    assert len(ids) == 1  # how many pieces there are depends on how busy the machine is


def test_what_begins_like_a_call_is_one(family: Family) -> None:
    if family.name not in OPENING:
        pytest.skip("no token begins a call")
    bias = {family.token(OPENING[family.name]): 100.0}
    choice = family.ask(logit_bias=bias, parallel_tool_calls=False, temperature=0.9).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert len(check(choice.message.tool_calls, set(EXACT))) == 1


def test_without_a_call_the_noise_is_content(family: Family) -> None:
    answer = family.ask(max_tokens=40)
    assert answer.choices[0].finish_reason in ("length", "stop") and not answer.choices[0].message.tool_calls
    none, without = family.ask(max_tokens=40, tool_choice="none"), family.ask(max_tokens=40, tools=[])
    assert none.choices[0].message == without.choices[0].message and none.usage.prompt_tokens == without.usage.prompt_tokens < answer.usage.prompt_tokens


# ---------------------------------------------------------------- reasoning


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    opened = Family("deepseek", tmp_path_factory.mktemp("models") / "thinker")
    yield opened
    opened.close()


def closing(thinker: Family) -> dict[str, float]:
    """Makes the end of the reasoning likely."""
    return {thinker.token("</think>"): 4.0}


def test_reasoning_is_apart_and_counted(thinker: Family) -> None:
    answer = thinker.ask(tools=[], logit_bias=closing(thinker), max_tokens=60)
    message, details = answer.choices[0].message, answer.usage.completion_tokens_details
    assert message.reasoning_content and message.content
    assert 0 < details.reasoning_tokens < answer.usage.completion_tokens
    chunks = list(thinker.ask(tools=[], logit_bias=closing(thinker), max_tokens=60, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == message.reasoning_content
    assert "".join(d.content or "" for d in deltas) == message.content
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == details.reasoning_tokens


def test_without_thinking_all_is_content(thinker: Family) -> None:
    for extra in ({"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}):
        answer = thinker.ask(tools=[], max_tokens=20, extra_body=extra)
        assert answer.choices[0].message.content and not answer.choices[0].message.reasoning_content
        assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def test_a_response_format_and_a_required_call_come_behind_the_reasoning(thinker: Family) -> None:
    schema = {"name": "n", "schema": {"type": "object", "properties": {"n": EXACT_NUMBER}, "required": ["n"], "additionalProperties": False}}
    fields: dict[str, Any] = {"tools": [], "response_format": {"type": "json_schema", "json_schema": schema}}
    message = thinker.ask(**fields, logit_bias=closing(thinker)).choices[0].message
    assert message.reasoning_content and -9 <= json.loads(message.content)["n"] <= 99
    direct = thinker.ask(**fields, extra_body={"enable_thinking": False}).choices[0].message
    assert not direct.reasoning_content and -9 <= json.loads(direct.content)["n"] <= 99
    called = thinker.ask(tool_choice="required", logit_bias=closing(thinker), parallel_tool_calls=False).choices[0].message
    assert called.reasoning_content and len(check(called.tool_calls, set(EXACT))) == 1


def test_reasoning_that_need_not_come_does_not_loosen_the_guarantee(tmp_path: Path) -> None:
    hybrid = Family("qwen3", tmp_path / "hybrid")
    try:
        opening = {hybrid.token("<think>"): 100.0}
        schema = {"name": "n", "schema": EXACT["add"]}
        for fields in (
            {"tool_choice": "required", "parallel_tool_calls": False},
            {"tools": [], "response_format": {"type": "json_schema", "json_schema": schema}},
        ):
            plain = hybrid.ask(**fields).choices[0].message
            thought = hybrid.ask(**fields, logit_bias={**opening, hybrid.token("</think>"): 100.0}).choices[0].message
            for message in (plain, thought):
                if message.tool_calls:
                    check(message.tool_calls, set(EXACT))
                else:
                    jsonschema.validate(json.loads(message.content), EXACT["add"])
            assert not plain.reasoning_content and thought.reasoning_content
    finally:
        hybrid.close()


# ---------------------------------------------------------------- the embedded model


def client_of(server: RunningServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_a_schema_that_no_grammar_can_say_is_refused_where_a_call_was_promised(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    hard = {"name": "hard", "parameters": {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}}
    ask = client_of(server).chat.completions.create
    fields: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Compute 1+2"}], "max_tokens": 8}
    for tools, choice in (([hard], "required"), ([hard, TOOLS[2]], {"type": "function", "function": {"name": "hard"}}), ([{**hard, "strict": True}], "auto")):
        shown = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
        with pytest.raises(openai.BadRequestError, match="uniqueItems") as refused:
            ask(**fields, tools=shown, tool_choice=choice)
        assert refused.value.param == "tools" and "'hard'" in str(refused.value)
    with caplog.at_level(logging.WARNING, logger="lmdeploy"):
        for _ in range(2):
            ask(**fields, tools=[{"type": "function", "function": hard}])
    assert len([record for record in caplog.records if "uniqueItems" in record.getMessage()]) == 1


def test_tools_and_a_response_format_exclude_each_other(server: RunningServer) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS, "max_tokens": 4}
    with pytest.raises(openai.BadRequestError, match="exclude each other"):
        client_of(server).chat.completions.create(**fields, response_format={"type": "json_object"})
    client_of(server).chat.completions.create(**fields, response_format={"type": "json_object"}, tool_choice="none")


def test_the_parsers_can_be_switched_off(serve: Callable[..., RunningServer]) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Compute (3+5)*2"}], "temperature": 0}
    tools = [{"type": "function", "function": {"name": "add", "description": "Compute the sum of two numbers", "parameters": EXACT["add"]}}]
    client = client_of(serve(tool_call_parser="none"))
    off = client.chat.completions.create(**fields, tools=tools, extra_body={"skip_special_tokens": False})
    assert not off.choices[0].message.tool_calls and '"name": "add"' in off.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="--tool-call-parser none"):
        client.chat.completions.create(**fields, tools=tools, tool_choice="required")


def test_code_is_called_like_a_function(server: RunningServer) -> None:
    fields: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Compute 2**10"}],
        "tools": [{"type": "code_interpreter"}],
        "max_tokens": 60,
    }
    for choice in ("required", {"type": "code_interpreter"}):
        answer = client_of(server).chat.completions.create(**fields, tool_choice=choice, seed=3).choices[0]
        if answer.finish_reason == "tool_calls":  # it was never trained on code, so it may not come to an end
            (call,) = answer.message.tool_calls
            assert call.function.name == "interpreter" and list(json.loads(call.function.arguments)) == ["code"]
        else:
            assert answer.finish_reason == "length" and answer.message.content.startswith("<|action_start|><|interpreter|>\n")


# ---------------------------------------------------------------- stop words, several answers, log-probabilities


def streamed(chunks: Any) -> dict[int, tuple[str, list[tuple[str, str]], str]]:
    """Of each answer: its content, its calls (name, arguments), its finish reason."""
    texts: dict[int, str] = {}
    calls: dict[int, list[tuple[str, str]]] = {}
    finish: dict[int, str] = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        own = calls.setdefault(choice.index, [])
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        for call in choice.delta.tool_calls or ():
            if call.id:
                assert call.index == len(own)
                own.append((call.function.name, ""))
            own[call.index] = (own[call.index][0], own[call.index][1] + call.function.arguments)
        finish[choice.index] = choice.finish_reason or finish.get(choice.index, "")
    return {index: (text, calls[index], finish[index]) for index, text in texts.items()}


def complete(answer: Any) -> dict[int, tuple[str, list[tuple[str, str]], str]]:
    """The same of a complete answer."""
    return {
        c.index: (c.message.content or "", [(t.function.name, t.function.arguments) for t in c.message.tool_calls or ()], c.finish_reason)
        for c in answer.choices
    }


ADDING: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Compute 3+5"}],
    "tools": [{"type": "function", "function": {"name": "add", "description": "Compute the sum of two numbers", "parameters": EXACT["add"]}}],
    "temperature": 0,
}


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_stop_words_do_not_cut_calls(choice: str, server: RunningServer) -> None:
    ask = client_of(server).chat.completions.create
    fields = {**ADDING, "tool_choice": choice}
    wanted = complete(ask(**fields))
    assert wanted[0][2] == "tool_calls"
    for stop in ('"b"', ['{"', "}", '": ', "\n"]):
        assert complete(ask(**fields, stop=stop)) == streamed(ask(**fields, stop=stop, stream=True)) == wanted
    before = complete(ask(**fields, stop=[" "]))
    assert before == ({0: ("I", [], "stop")} if choice == "auto" else wanted), "outside of calls they count"


def test_code_that_was_cut_is_never_given_as_complete(server: RunningServer) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Compute 2**10"}], "seed": 0, "max_tokens": 24}
    fields |= {"tools": [{"type": "code_interpreter"}], "tool_choice": "required"}
    ask = client_of(server).chat.completions.create
    first = ask(**fields, extra_body={"return_token_ids": True})
    ids, text = first.choices[0].token_ids, first.choices[0].message.content
    assert first.choices[0].finish_reason == "length" and text.startswith("<|action_start|><|interpreter|>\n")
    middle = next(i for i, token in enumerate(ids) if i > 8 and token not in ids[:i])
    for extra in ({"stop": [text[40:44]]}, {"stop_token_ids": [ids[middle]]}):
        by_token = "stop_token_ids" in extra
        whole = ask(**fields, extra_body=extra)
        assert complete(whole)[0][1:] == ([], "stop" if by_token else "length") and text.startswith(whole.choices[0].message.content)
        content, calls, finish = streamed(ask(**fields, extra_body=extra, stream=True))[0]
        assert (content, finish) == ("", "stop" if by_token else "length")
        assert len(calls) == 1 and not calls[0][1].endswith('"}')


def test_an_item_of_a_call_that_was_cut_is_incomplete(server: RunningServer) -> None:
    function = ADDING["tools"][0]["function"]
    fields: dict[str, Any] = {"model": "tiny", "input": "Compute 3+5", "tools": [{"type": "function", **function}], "tool_choice": "required", "stream": True}
    seen = set()
    for limit in range(12, 28, 3):
        for event in client_of(server).responses.create(**fields, temperature=0, max_output_tokens=limit):
            if event.type == "response.output_item.done" and event.item.type == "function_call":
                seen.add(event.item.status)
                assert (event.item.status == "completed") == event.item.arguments.endswith("}")
    assert "incomplete" in seen


def test_stop_tokens_that_cut_a_json_call_leave_no_call(server: RunningServer) -> None:
    ask = client_of(server).chat.completions.create
    tokenizer = server.frontend.tokenizer
    cutting = {"stop_token_ids": tokenizer.encode('"b"', add_bos=False)}
    whole, stream = ask(**ADDING, extra_body=cutting), ask(**ADDING, extra_body=cutting, stream=True)
    content, calls, finish = complete(whole)[0]
    assert (calls, finish) == ([], "stop") and "<|action_start|><|plugin|>" in content
    content, calls, finish = streamed(stream)[0]
    assert finish == "stop" and ("<|action_start|>" in content) == (not calls), "told once"


def test_each_of_several_answers_has_its_own_calls(family: Family) -> None:
    fields: dict[str, Any] = {"n": 2, "tool_choice": "required", "parallel_tool_calls": False, "stop": ["a", "1"]}
    wanted = complete(family.ask(**fields))
    assert streamed(family.ask(**fields, stream=True)) == wanted
    assert sorted(wanted) == [0, 1]
    for _, calls, finish in wanted.values():
        assert finish == "tool_calls" and len(calls) == 1
        jsonschema.validate(json.loads(calls[0][1]), EXACT[calls[0][0]])


def test_log_probabilities_come_with_calls(server: RunningServer) -> None:
    ask = client_of(server).chat.completions.create
    fields = {**ADDING, "tool_choice": "required", "logprobs": True, "top_logprobs": 2}
    whole = ask(**fields).choices[0]
    tokens = [entry.token for entry in whole.logprobs.content]
    assert whole.finish_reason == "tool_calls" and "".join(tokens).startswith('<|action_start|><|plugin|>\n{"name": "add"')
    assert all(len(entry.top_logprobs) == 2 for entry in whole.logprobs.content)
    chunks = [chunk.choices[0] for chunk in ask(**fields, stream=True)]
    assert [entry.token for c in chunks if c.logprobs for entry in c.logprobs.content] == tokens


def test_parallel_calls_are_told_apart_in_a_stream(tmp_path: Path) -> None:
    hermes = Family("hermes", tmp_path / "hermes")
    try:
        now = [{"type": "function", "function": {"name": "now"}}]
        fields: dict[str, Any] = {"tools": now, "tool_choice": "required", "seed": 2, "stop": ["now", "\n"], "max_tokens": 150}
        fields["logit_bias"] = {hermes.token("<tool_call>"): 5.0}
        content, calls, finish = streamed(hermes.ask(**fields, stream=True))[0]
        whole = complete(hermes.ask(**fields))[0]
        assert len(whole[1]) >= 2 and calls[: len(whole[1])] == whole[1] and finish == whole[2]
        assert all(call == ("now", "{}") for call in whole[1])
        assert content in ("", whole[0]), "a call that breaks off before it was told is content"
    finally:
        hermes.close()
