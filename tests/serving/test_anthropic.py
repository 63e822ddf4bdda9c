"""Anthropic's Messages API with Anthropic's own client: answers, streams, counts, models, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic

from lmdeploy.serving.anthropic import convert
from lmdeploy.serving.anthropic.protocol import MessagesRequest
from tests.serving.running import RunningServer

BODY = {"model": "tiny", "max_tokens": 40, "messages": [{"role": "user", "content": "Count from 1 to 5."}]}
#: this version of the client has no argument for the temperature
ASK: dict[str, Any] = {**BODY, "extra_body": {"temperature": 0}}
RAW = {**BODY, "temperature": 0}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Anthropic:
    return Anthropic(base_url=server.url, api_key="none", max_retries=0)


def openai_text(server: RunningServer, messages: list[dict[str, Any]], **fields: Any) -> str:
    """What chat completions answer to the same conversation."""
    reply = server.http.post("/v1/chat/completions", json={"model": "tiny", "temperature": 0, "max_tokens": 40, "messages": messages, **fields})
    return str(reply.json()["choices"][0]["message"]["content"])


def test_an_answer_is_a_message(client: Anthropic, server: RunningServer) -> None:
    answer = client.messages.create(**ASK, system="Be short.")
    (block,) = answer.content
    assert block.type == "text"
    assert block.text == openai_text(server, [{"role": "system", "content": "Be short."}, *ASK["messages"]])
    assert (answer.type, answer.role, answer.model, answer.stop_reason, answer.stop_sequence) == ("message", "assistant", "tiny", "end_turn", None)
    assert answer.usage.output_tokens > 1
    counted = client.messages.count_tokens(model="tiny", messages=ASK["messages"], system="Be short.").input_tokens
    assert answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0) == counted


def test_content_may_be_blocks(client: Anthropic) -> None:
    plain = client.messages.create(**ASK, system="Be short.").content
    blocks = [{"role": "user", "content": [{"type": "text", "text": "Count from 1 to 5.", "cache_control": {"type": "ephemeral"}}]}]
    assert client.messages.create(**{**ASK, "messages": blocks}, system=[{"type": "text", "text": "Be short."}]).content == plain


def test_an_answer_that_was_begun_is_continued(client: Anthropic) -> None:
    begun = [*ASK["messages"], {"role": "assistant", "content": "1, 2, 3,"}]
    text = client.messages.create(**{**ASK, "messages": begun}).content[0].text
    assert text.lstrip().startswith("4")


def test_why_an_answer_ended(client: Anthropic, server: RunningServer) -> None:
    cut = client.messages.create(**{**ASK, "max_tokens": 3})
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 3)
    stopped = client.messages.create(**ASK, stop_sequences=["4", "never"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "4")
    assert "4" not in stopped.content[0].text
    silent = client.messages.create(**ASK, stop_sequences=[client.messages.create(**ASK).content[0].text[0]])
    assert [b.text for b in silent.content] == [""], "an answer without text has an empty block"
    long = [{"role": "user", "content": "word " * 2000}]
    full = client.messages.create(**{**BODY, "max_tokens": 2000, "messages": long}, extra_body={"ignore_eos": True})
    assert full.stop_reason == "model_context_window_exceeded"
    server.until_idle()


def test_the_events_come_in_anthropics_order(client: Anthropic, server: RunningServer) -> None:
    whole = client.messages.create(**ASK)
    events = list(client.messages.create(**ASK, stream=True))
    kinds = [e.type for e in events]
    deltas = kinds.count("content_block_delta")
    assert deltas > 3
    assert kinds == ["message_start", "content_block_start", *["content_block_delta"] * deltas, "content_block_stop", "message_delta", "message_stop"]
    assert "".join(e.delta.text for e in events if e.type == "content_block_delta") == whole.content[0].text
    start, end = events[0].message, events[-2]
    assert (start.content, start.stop_reason, start.usage.output_tokens) == ([], None, 0)
    assert (end.delta.stop_reason, end.usage.output_tokens) == ("end_turn", whole.usage.output_tokens)
    with client.messages.stream(**ASK) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        final = stream.get_final_message()
    assert final.content[0].text == whole.content[0].text and final.stop_reason == "end_turn"
    raw = server.http.post("/v1/messages", json={**RAW, "stream": True}).text
    for part in raw.strip().split("\n\n"):
        name, data = part.split("\n")
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]


def test_the_async_client_and_the_longer_base_url_work(server: RunningServer) -> None:
    async def ask() -> str:
        async with AsyncAnthropic(base_url=f"{server.url}/anthropic", api_key="none", max_retries=0) as client:
            async with client.messages.stream(**ASK) as stream:
                text = "".join([piece async for piece in stream.text_stream])
            assert (await client.messages.create(**ASK)).content[0].text == text
            return text

    assert "1, 2, 3" in asyncio.run(ask())


def test_models_have_anthropics_form(server: RunningServer) -> None:
    client = Anthropic(base_url=f"{server.url}/anthropic", api_key="none", max_retries=0)
    (card,) = client.models.list().data
    assert (card.id, card.type, card.max_input_tokens) == ("tiny", "model", 2048)
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("other")


def test_counts_include_tools_and_have_no_limit(client: Anthropic) -> None:
    tool = {"name": "add", "description": "Add numbers", "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    ask = {"model": "tiny", "messages": ASK["messages"]}
    plain = client.messages.count_tokens(**ask).input_tokens
    assert client.messages.count_tokens(**ask, tools=[tool]).input_tokens > plain + 10
    assert client.messages.count_tokens(**ask, tools=[tool], tool_choice={"type": "none"}).input_tokens == plain
    assert client.messages.count_tokens(model="tiny", messages=[{"role": "user", "content": "word " * 4000}]).input_tokens > 4000


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"max_tokens": 0}, ["max_tokens", "0"]),
        ({"messages": []}, ["messages"]),
        ({"messages": [{"role": "tool", "content": "x"}]}, ["messages.0.role"]),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "https://a.example/b.png"}}]}]},
            ["content.0", "text only"],
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, ["messages.0.content.0.text", "required"]),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}]}, ["messages.0.content.0.id", "required"]),
        ({"messages": [{"role": "user", "content": "word " * 4000}]}, ["context length"]),
        ({"temperature": 3}, ["temperature", "3"]),
        ({"tool_choice": {"type": "tool"}}, ["tool_choice.name"]),
        ({"tools": [{"name": "w", "type": "web_search_20250305"}]}, ["tools.0", "web_search_20250305"]),
        ({"tools": [{"name": "w"}]}, ["tools.0.input_schema", "required"]),
        ({"system": [{"type": "image"}]}, ["system.content.0", "image"]),
    ],
    ids=lambda v: str(v)[:50],
)
def test_a_bad_field_is_named_in_anthropics_shape(changes: dict[str, Any], words: list[str], server: RunningServer, client: Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**BODY, extra_body=changes)
    body = caught.value.body
    assert isinstance(body, dict) and set(body) == {"type", "error"} and body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert all(word in body["error"]["message"] for word in words), body
    server.until_idle()


def test_other_errors_have_anthropics_types_too(client: Anthropic, server: RunningServer, serve: Callable[..., RunningServer]) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(**{**ASK, "model": "claude"})
    assert caught.value.body["error"]["type"] == "not_found_error"  # type: ignore[index,call-overload]
    locked = serve(api_keys=["right"])
    assert Anthropic(base_url=locked.url, api_key="right").messages.create(**ASK).content
    assert locked.http.post("/v1/messages", json=RAW, headers={"x-api-key": "right"}).status_code == 200
    for headers in ({}, {"x-api-key": "wrong"}, {"authorization": "Bearer wrong"}):
        refused = locked.http.post("/v1/messages", json=RAW, headers=headers)
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
    assert server.http.post("/anthropic/v1/nothing", json={}).json()["error"]["type"] == "not_found_error"


def test_fields_that_we_do_not_know_are_ignored(client: Anthropic) -> None:
    plain = client.messages.create(**ASK).content
    extra = {"service_tier": "auto", "container": "c", "from_the_future": {"a": 1}}
    assert client.messages.create(**BODY, metadata={"user_id": "u"}, extra_body={**extra, "temperature": 0}).content == plain


def test_calls_results_and_thoughts_become_openais_messages() -> None:
    body = MessagesRequest.model_validate(
        {
            "model": "m",
            "max_tokens": 5,
            "messages": [
                {"role": "user", "content": "3+5?"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "hm", "signature": "s"},
                        {"type": "text", "text": "I add."},
                        {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 3}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "8"}]},
                        {"type": "tool_result", "tool_use_id": "t2", "is_error": True},
                        {"type": "text", "text": "And now?"},
                    ],
                },
            ],
        }
    )
    assert convert.messages_of(body) == [
        {"role": "user", "content": "3+5?"},
        {
            "role": "assistant",
            "content": "I add.",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "add", "arguments": '{"a": 3}'}}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "8", "name": "add"},
        {"role": "tool", "tool_call_id": "t2", "content": "error"},
        {"role": "user", "content": "And now?"},
    ]


def tool(name: str, what: str) -> dict[str, Any]:
    numbers = {"a": {"type": "integer", "description": "A number"}, "b": {"type": "integer", "description": "A number"}}
    return {"name": name, "description": what, "input_schema": {"type": "object", "properties": numbers, "required": ["a", "b"]}}


TOOLS = [tool("add", "Compute the sum of two numbers"), tool("mul", "Calculate the product of two numbers")]
SUM: list[dict[str, Any]] = [{"role": "user", "content": "Compute (3+5)*2"}]


def test_tools_are_called_until_the_answer_is_there(client: Anthropic) -> None:
    messages, called = list(SUM), []
    while len(called) < 3:
        answer = client.messages.create(**{**ASK, "max_tokens": 200, "messages": messages}, tools=TOOLS)
        if answer.stop_reason != "tool_use":
            break
        call = answer.content[-1]
        called.append((call.name, call.input))
        result = call.input["a"] + call.input["b"] if call.name == "add" else call.input["a"] * call.input["b"]
        messages += [
            {"role": "assistant", "content": answer.content},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": str(result)}]},
        ]
    assert called == [("add", {"a": 3, "b": 5}), ("mul", {"a": 8, "b": 2})]
    assert answer.stop_reason == "end_turn" and "16" in answer.content[0].text


def test_a_streamed_call_is_a_block_of_its_own(client: Anthropic) -> None:
    ask = {**ASK, "max_tokens": 200, "messages": SUM, "tools": TOOLS}
    whole = client.messages.create(**ask)
    with client.messages.stream(**ask) as stream:
        kinds = [e.content_block.type for e in stream if e.type == "content_block_start"]
        final = stream.get_final_message()
    assert kinds == ["text", "tool_use"]
    assert [getattr(b, "text", None) or (b.name, b.input) for b in final.content] == [getattr(b, "text", None) or (b.name, b.input) for b in whole.content]
    assert final.stop_reason == "tool_use" and final.usage.output_tokens == whole.usage.output_tokens
    pieces = [
        e.delta.partial_json for e in client.messages.create(**ask, stream=True) if e.type == "content_block_delta" and e.delta.type == "input_json_delta"
    ]
    assert len(pieces) > 1 and json.loads("".join(pieces)) == {"a": 3, "b": 5}


def test_tool_choice_none_calls_nothing_and_counts_agree_with_answers(client: Anthropic) -> None:
    ask = {**ASK, "max_tokens": 60, "messages": SUM, "tools": TOOLS}
    for choice in ({"type": "none"}, {"type": "auto"}, {"type": "tool", "name": "mul"}):
        answer = client.messages.create(**ask, tool_choice=choice)
        counted = client.messages.count_tokens(model="tiny", messages=SUM, tools=TOOLS, tool_choice=choice).input_tokens
        assert answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0) == counted, choice
        if choice["type"] == "none":
            assert all(block.type == "text" for block in answer.content)


def test_the_text_has_the_form_that_was_asked_for(client: Anthropic) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name", "age"]}
    form = {"output_config": {"format": {"type": "json_schema", "schema": schema}}, "temperature": 0}
    asked = [{"role": "user", "content": "Who is the oldest person that you know?"}]
    answer = client.messages.create(model="tiny", max_tokens=200, messages=asked, extra_body=form)
    person = json.loads(answer.content[0].text)
    assert isinstance(person["name"], str) and isinstance(person["age"], int)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "mul"}], ids=lambda c: c["type"])
def test_a_call_that_must_come_comes(client: Anthropic, choice: Any) -> None:
    for question in ("Compute (3+5)*2", "Tell me a story."):
        ask = {"model": "tiny", "max_tokens": 200, "messages": [{"role": "user", "content": question}], "extra_body": {"temperature": 1}}
        answer = client.messages.create(**ask, tools=TOOLS, tool_choice=choice)
        calls = [block for block in answer.content if block.type == "tool_use"]
        assert answer.stop_reason == "tool_use" and {c.name for c in calls} <= ({"mul"} if choice["type"] == "tool" else {"add", "mul"})
        assert all(set(c.input) == {"a", "b"} for c in calls)


def test_a_stream_that_fails_ends_with_an_error_event(serve: Callable[..., RunningServer]) -> None:
    server = serve(request_timeout=0.8)
    client = Anthropic(base_url=server.url, api_key="none", max_retries=0)
    events: list[str] = []
    with pytest.raises(anthropic.APIStatusError) as caught:
        for event in client.messages.create(**{**BODY, "max_tokens": 2000}, stream=True, extra_body={"ignore_eos": True}):
            events.append(event.type)
    assert events[0] == "message_start" and "content_block_delta" in events and "message_stop" not in events
    assert caught.value.body["error"]["type"] == "timeout_error"  # type: ignore[index,call-overload]
    with pytest.raises(anthropic.APIStatusError) as caught:
        client.messages.create(**{**BODY, "max_tokens": 2000}, extra_body={"ignore_eos": True})
    assert caught.value.status_code == 504
    server.until_idle()
