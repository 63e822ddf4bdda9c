"""POST /v1/responses with OpenAI's own client: answers, streams, items, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from lmdeploy.messages import Response
from lmdeploy.serving.openai import responses_convert as convert
from lmdeploy.serving.openai.responses_events import ResponseEvents
from lmdeploy.serving.openai.responses_protocol import ResponsesRequest
from lmdeploy.serving.turns import Delta, ToolDelta
from tests.serving.running import RunningServer

ASK: dict[str, Any] = {"model": "tiny", "input": "Count from 1 to 5.", "temperature": 0, "max_output_tokens": 40}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def chat_text(client: OpenAI, messages: list[dict[str, Any]]) -> str:
    """What chat completions answer to the same conversation."""
    answer = client.chat.completions.create(model="tiny", temperature=0, max_tokens=40, messages=messages)  # type: ignore[arg-type]
    return answer.choices[0].message.content or ""


def test_an_answer_has_one_message_item(client: OpenAI) -> None:
    answer = client.responses.create(**ASK, instructions="Be short.", metadata={"a": "b"})
    asked = [{"role": "system", "content": "Be short."}, {"role": "user", "content": ASK["input"]}]
    assert answer.output_text == chat_text(client, asked) != ""
    (item,) = answer.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "completed")
    assert (answer.object, answer.status, answer.error, answer.incomplete_details) == ("response", "completed", None, None)
    assert answer.id.startswith("resp_") and item.id.startswith("msg_")
    assert (answer.instructions, answer.metadata, answer.temperature, answer.max_output_tokens) == ("Be short.", {"a": "b"}, 0, 40)
    assert answer.usage is not None and answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_items_are_a_conversation(client: OpenAI) -> None:
    turns = [{"role": "user", "content": "Count from 1 to 3."}, {"role": "assistant", "content": "1, 2, 3"}, {"role": "user", "content": "Count from 1 to 5."}]
    wanted = chat_text(client, turns)
    assert client.responses.create(**{**ASK, "input": turns}).output_text == wanted
    parts = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": turns[0]["content"]}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": turns[1]["content"], "annotations": []}]},
        {"role": "user", "content": [{"type": "input_text", "text": turns[2]["content"]}]},
    ]
    assert client.responses.create(**{**ASK, "input": parts}).output_text == wanted
    first = client.responses.create(**{**ASK, "input": turns[:1]})
    again = client.responses.create(**{**ASK, "input": [*turns[:1], *[item.model_dump() for item in first.output], turns[2]]})
    assert again.status == "completed", "an answer's items may be sent back as they came"


def test_an_answer_that_is_cut_is_incomplete(client: OpenAI, server: RunningServer) -> None:
    answer = client.responses.create(**{**ASK, "max_output_tokens": 3})
    assert answer.status == "incomplete" and answer.incomplete_details is not None and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete" and answer.usage is not None and answer.usage.output_tokens == 3  # type: ignore[union-attr]
    events = list(client.responses.create(**{**ASK, "max_output_tokens": 3}, stream=True))
    assert events[-1].type == "response.incomplete" and events[-1].response.status == "incomplete"
    server.until_idle()


def test_the_events_come_in_openais_order(client: OpenAI) -> None:
    whole = client.responses.create(**ASK)
    events = list(client.responses.create(**ASK, stream=True))
    kinds = [e.type.removeprefix("response.") for e in events]
    deltas = kinds.count("output_text.delta")
    assert deltas > 3
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert [e.sequence_number for e in events] == list(range(len(events)))
    final = events[-1].response
    assert final.output_text == whole.output_text == "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert final.id == events[0].response.id and final.output[0].id == events[2].item.id
    assert final.usage == whole.usage.model_copy(update={"input_tokens_details": final.usage.input_tokens_details})
    with client.responses.stream(**ASK) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == whole.output_text


def test_log_probabilities_come_with_the_text(client: OpenAI) -> None:
    ask = {**ASK, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    part = client.responses.create(**ask).output[0].content[0]  # type: ignore[union-attr]
    assert "".join(p.token for p in part.logprobs) == part.text  # type: ignore[union-attr]
    assert all(len(p.top_logprobs) == 2 for p in part.logprobs)  # type: ignore[union-attr]
    streamed = [p for e in client.responses.create(**ask, stream=True) if e.type == "response.output_text.delta" for p in e.logprobs]
    assert [(p.token, p.logprob) for p in streamed] == [(p.token, p.logprob) for p in part.logprobs]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"previous_response_id": "resp_1"}, ["previous_response_id", "keeps no responses"]),
        ({"conversation": "c"}, ["conversation", "keeps no responses"]),
        ({"background": True}, ["background"]),
        ({"prompt": {"id": "p"}}, ["prompt"]),
        ({"context_management": [{"type": "compaction"}]}, ["context_management"]),
        ({"input": []}, ["input", "empty"]),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, ["content.0", "text only"]),
        ({"input": [{"type": "item_reference", "id": "x"}]}, ["input.0", "item_reference"]),
        ({"input": [{"type": "function_call", "name": "f"}]}, ["input.0.arguments", "required"]),
        ({"input": [{"content": "x"}]}, ["input.0.role", "required"]),
        ({"tools": [{"type": "web_search"}]}, ["tools.0", "web_search"]),
        ({"tools": [{"type": "function"}]}, ["tools.0.name"]),
        ({"tool_choice": "sometimes"}, ["tool_choice", "sometimes"]),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, ["text.format.schema"]),
        ({"text": {"format": {"type": "xml"}}}, ["text.format.type", "xml"]),
        ({"temperature": 3}, ["temperature", "3"]),
        ({"max_output_tokens": 0}, ["max_output_tokens", "0"]),
        ({"top_logprobs": 21}, ["top_logprobs", "20"]),
        ({"truncation": "auto"}, ["truncation", "auto"]),
        ({"text": {"verbosity": "low"}}, ["text.verbosity"]),
        ({"moderation": {"model": "m"}}, ["moderation"]),
        ({"presence_penalty": 3}, ["presence_penalty", "3"]),
    ],
    ids=lambda v: str(v)[:50],
)
def test_what_cannot_be_obeyed_is_said(changes: dict[str, Any], words: list[str], client: OpenAI, server: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="tiny", input="x", extra_body=changes)
    assert set(caught.value.body) == {"message", "type", "param", "code"}  # type: ignore[arg-type]
    assert all(word in caught.value.message for word in words), caught.value.message
    server.until_idle()


def test_penalties_reach_the_sampler() -> None:
    body = ResponsesRequest(model="tiny", input="x", presence_penalty=0.5, frequency_penalty=-1.0)
    gen = convert.turn_call(body, {}).gen
    assert (gen.presence_penalty, gen.frequency_penalty) == (0.5, -1.0)


def test_log_probabilities_are_those_of_the_text_beside_calls(client: OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny", "input": "Compute (3+5)*2", "tools": TOOLS, "temperature": 0, "top_logprobs": 3}
    message, call = client.responses.create(**ask).output
    part = message.content[0]  # type: ignore[union-attr]
    assert call.type == "function_call" and "".join(p.token for p in part.logprobs) == part.text != ""  # type: ignore[union-attr]
    assert all(len(p.top_logprobs) == 3 for p in part.logprobs)  # type: ignore[union-attr]
    events = list(client.responses.create(**ask, stream=True))
    assert [p.token for e in events if e.type == "response.output_text.delta" for p in e.logprobs] == [p.token for p in part.logprobs]  # type: ignore[union-attr]


def test_log_probabilities_are_told_apart_by_their_bytes(server: RunningServer) -> None:
    tokenizer = server.frontend.tokenizer
    ids = tokenizer.encode("I think.</think>A café<tool_call>x</tool_call>, no.", add_bos=False)
    names = [tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids]
    thought = len(tokenizer.encode("I think.</think>", add_bos=False))
    body = ResponsesRequest(model="tiny", input="x", top_logprobs=1)
    whole = convert.TextLogprobs(body, tokenizer)
    everything = Response("", len(ids), 9, token_ids=ids, logprobs=[{i: -1.0} for i in ids])
    found = [entry["token"] for entry in whole.of("A café", everything, thought)]
    assert found == names[thought : thought + len(found)] and "caf" in "".join(found) and "think" not in "".join(found)
    streamed, told = convert.TextLogprobs(body, tokenizer), []
    for place, token in enumerate(ids):
        text = {len(ids) - 1: ", no."}.get(place, "")
        told += streamed.of(text, Response("", place + 1, 9, token_ids=[token], logprobs=[{token: -1.0}]), min(place + 1, thought))
    assert "".join(entry["token"] for entry in told).strip() == ", no."
    pieces = convert.TextLogprobs(body, tokenizer)
    counting = tokenizer.encode("Count", add_bos=False)
    first = pieces.of("Co", Response("", 1, 9, token_ids=counting, logprobs=[{i: -1.0} for i in counting]), 0)
    assert len(first + pieces.of("unt", Response("", 1, 9), 0)) == len(counting), "each token once, however its text was cut"


def test_fields_without_effect_here_are_ignored(client: OpenAI) -> None:
    nothing = {
        "truncation": "disabled",
        "max_tool_calls": 3,
        "stream_options": {"include_obfuscation": False},
        "service_tier": "auto",
        "store": True,
        "safety_identifier": "u",
        "prompt_cache_key": "k",
        "user": "u",
    }
    nulls = dict.fromkeys(("tools", "tool_choice", "text", "reasoning", "top_p", "metadata", "previous_response_id", "prompt", "include"))
    answer = client.responses.create(**ASK, extra_body={**nothing, **nulls, "background": False, "from_the_future": [1]})
    assert answer.output_text == client.responses.create(**ASK).output_text


def test_calls_outputs_and_thoughts_become_openais_messages() -> None:
    items = [
        {"role": "developer", "content": "Use tools."},
        {"role": "user", "content": "3+5 and 2*4?"},
        {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": "I compute."},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a":3}'},
        {"type": "function_call", "call_id": "c2", "name": "mul", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "8"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "8"}]},
    ]
    body = ResponsesRequest.model_validate({"model": "m", "input": items, "instructions": "Be short."})
    calls = [("c1", "add", '{"a":3}'), ("c2", "mul", "{}")]
    assert convert.messages_of(body) == [
        {"role": "system", "content": "Be short."},
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "3+5 and 2*4?"},
        {
            "role": "assistant",
            "content": "I compute.",
            "reasoning_content": "hm",
            "tool_calls": [{"id": i, "type": "function", "function": {"name": n, "arguments": a}} for i, n, a in calls],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "8", "name": "add"},
        {"role": "tool", "tool_call_id": "c2", "content": "8", "name": "mul"},
    ]


def test_allowed_tools_leave_only_these() -> None:
    tools = [{"type": "function", "name": name, "parameters": {"type": "object"}} for name in ("add", "mul")]
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "mul"}]}
    call = convert.turn_call(ResponsesRequest.model_validate({"model": "m", "input": "x", "tools": tools, "tool_choice": choice}), {})
    assert call.tool_choice == "required" and [t["function"]["name"] for t in call.tools or ()] == ["mul"]
    named = {"model": "m", "input": "x", "tools": tools, "tool_choice": {"type": "function", "name": "add"}}
    assert convert.turn_call(ResponsesRequest.model_validate(named), {}).tool_choice == "function:add"


def test_thoughts_text_and_calls_are_items_of_their_own(server: RunningServer) -> None:
    body = ResponsesRequest.model_validate({"model": "tiny", "input": "x"})
    draft = convert.Draft(body, "tiny", convert.turn_call(body, {}).gen)
    events = ResponseEvents(draft, convert.TextLogprobs(body, server.frontend.tokenizer))

    def delta(content: str = "", reasoning: str = "", tools: tuple[ToolDelta, ...] = (), end: str | None = None) -> Delta:
        return Delta(0, content, reasoning, list(tools), end, Response("", 9, 5))

    deltas = [
        delta(reasoning="I think"),
        delta(reasoning="."),
        delta("Calling."),
        delta(tools=(ToolDelta(0, "c1", "add", ""),)),
        delta(tools=(ToolDelta(0, None, None, '{"a":'), ToolDelta(0, None, None, "3}"))),
        delta(tools=(ToolDelta(1, "c2", "mul", "{}"),), end="tool_calls"),
    ]
    raw = events.first(deltas[0]) + b"".join(events.encode(d) for d in deltas)
    parsed = [json.loads(part.split(b"\ndata: ")[1]) for part in raw.split(b"\n\n") if part]
    opened = [(e["output_index"], e["item"]["type"]) for e in parsed if e["type"] == "response.output_item.added"]
    assert opened == [(0, "reasoning"), (1, "message"), (2, "function_call"), (3, "function_call")]
    done = [e for e in parsed if e["type"] == "response.function_call_arguments.done"]
    assert [(e["name"], e["arguments"]) for e in done] == [("add", '{"a":3}'), ("mul", "{}")]
    final = parsed[-1]["response"]
    assert parsed[-1]["type"] == "response.completed" and final["status"] == "completed"
    assert [item["type"] for item in final["output"]] == ["reasoning", "message", "function_call", "function_call"]
    assert [item["call_id"] for item in final["output"][2:]] == ["c1", "c2"]
    assert final["output"] == [e["item"] for e in parsed if e["type"] == "response.output_item.done"]


def tool(name: str, what: str) -> dict[str, Any]:
    numbers = {"a": {"type": "integer", "description": "A number"}, "b": {"type": "integer", "description": "A number"}}
    return {
        "type": "function",
        "name": name,
        "description": what,
        "strict": False,
        "parameters": {"type": "object", "properties": numbers, "required": ["a", "b"]},
    }


TOOLS = [tool("add", "Compute the sum of two numbers"), tool("mul", "Calculate the product of two numbers")]


def test_functions_are_called_until_the_answer_is_there(client: OpenAI) -> None:
    items: list[Any] = [{"role": "user", "content": "Compute (3+5)*2"}]
    called: list[tuple[str, dict[str, int]]] = []
    while len(called) < 3:
        answer = client.responses.create(model="tiny", input=items, tools=TOOLS, temperature=0)  # type: ignore[arg-type]
        calls = [item for item in answer.output if item.type == "function_call"]
        if not calls:
            break
        numbers = json.loads(calls[0].arguments)
        called.append((calls[0].name, numbers))
        result = numbers["a"] + numbers["b"] if calls[0].name == "add" else numbers["a"] * numbers["b"]
        items += [*answer.output, {"type": "function_call_output", "call_id": calls[0].call_id, "output": str(result)}]
    assert called == [("add", {"a": 3, "b": 5}), ("mul", {"a": 8, "b": 2})]
    assert "16" in answer.output_text and answer.status == "completed"


def test_a_streamed_call_adds_up(client: OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny", "input": "Compute (3+5)*2", "tools": TOOLS, "temperature": 0}
    whole = client.responses.create(**ask)
    with client.responses.stream(**ask) as stream:
        kinds = [e.type for e in stream]
        final = stream.get_final_response()
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 2
    assert kinds.count("response.function_call_arguments.done") == 1 and kinds[-1] == "response.completed"
    assert [(i.type, getattr(i, "arguments", "")) for i in final.output] == [(i.type, getattr(i, "arguments", "")) for i in whole.output]
    assert [i.type for i in final.output] == ["message", "function_call"]


class Person(BaseModel):
    name: str
    age: int


def test_the_text_has_the_form_that_was_asked_for(client: OpenAI) -> None:
    parsed = client.responses.parse(model="tiny", input="Who is the oldest person that you know?", text_format=Person, temperature=0, max_output_tokens=200)
    assert isinstance(parsed.output_parsed, Person)
    with client.responses.stream(
        model="tiny", input="Who is the oldest person that you know?", text_format=Person, temperature=0, max_output_tokens=200
    ) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_parsed == parsed.output_parsed
    free: dict[str, Any] = {"format": {"type": "json_object"}}
    assert isinstance(json.loads(client.responses.create(**{**ASK, "max_output_tokens": 200}, text=free).output_text), dict)  # type: ignore[arg-type]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "mul"}], ids=str)
def test_a_call_that_must_come_comes(client: OpenAI, choice: Any) -> None:
    for question in ("Compute (3+5)*2", "Tell me a story."):
        answer = client.responses.create(model="tiny", input=question, tools=TOOLS, tool_choice=choice, temperature=1, max_output_tokens=200)
        calls = [item for item in answer.output if item.type == "function_call"]
        assert calls and {c.name for c in calls} <= ({"mul"} if isinstance(choice, dict) else {"add", "mul"})
        assert all(set(json.loads(c.arguments)) == {"a", "b"} for c in calls)


def test_a_stream_that_fails_ends_with_response_failed(serve: Callable[..., RunningServer]) -> None:
    server = serve(request_timeout=0.8)
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    events = list(client.responses.create(model="tiny", input="Tell me a story.", stream=True, extra_body={"ignore_eos": True}))
    assert events[0].type == "response.created" and any(e.type == "response.output_text.delta" for e in events)
    last = events[-1]
    assert last.type == "response.failed" and last.response.status == "failed" and last.response.error is not None
    assert last.response.error.code == "server_error" and "longer" in last.response.error.message
    assert last.response.id == events[0].response.id
    server.until_idle()
