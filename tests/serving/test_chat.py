"""POST /v1/chat/completions with the real openai client: answers, streams, choices, log-probabilities, seeds, sessions."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from lmdeploy.config import GenerationConfig
from lmdeploy.serving.openai.convert import messages_of
from lmdeploy.serving.openai.protocol import ChatMessage
from tests.serving.running import RunningServer

COUNT = [{"role": "user", "content": "Count from 1 to 5."}]
FIVE = "1, 2, 3, 4, 5"


@pytest.fixture(scope="module")
def client(server: RunningServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client: OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": COUNT, "temperature": 0, "max_tokens": 40, **fields})


def raw(server: RunningServer, **fields: Any) -> dict[str, Any]:
    reply = server.http.post("/v1/chat/completions", json={"model": "tiny", "messages": COUNT, "temperature": 0, "max_tokens": 40, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def text(client: OpenAI, **fields: Any) -> str:
    return ask(client, **fields).choices[0].message.content


def test_an_answer_has_openais_shape_and_true_counts(client: OpenAI, server: RunningServer) -> None:
    answer = ask(client)
    assert FIVE in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", "tiny", "chatcmpl-")
    prepared = server.frontend.prepare(COUNT, GenerationConfig(max_new_tokens=40, temperature=0))
    assert answer.usage.prompt_tokens == len(prepared.token_ids)
    assert answer.usage.completion_tokens == server.frontend.generate(prepared)[0].generate_token_len
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


def test_a_stream_gives_the_same_text_in_pieces(client: OpenAI) -> None:
    chunks = list(ask(client, stream=True))
    assert "".join(c.choices[0].delta.content for c in chunks) == text(client)
    assert len(chunks) > 5
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert len({c.id for c in chunks}) == 1
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(c.choices[0].delta.role == "assistant" for c in chunks)
    assert chunks[-1].choices[0].delta.content == ""


def test_a_stream_with_usage_ends_with_it(client: OpenAI) -> None:
    *chunks, last = ask(client, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    whole = ask(client).usage
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (whole.prompt_tokens, whole.completion_tokens)
    assert all(c.usage is None for c in chunks)


def test_the_stream_on_the_wire_is_events_and_done(server: RunningServer) -> None:
    reply = server.http.post("/v1/chat/completions", json={"model": "tiny", "messages": COUNT, "temperature": 0, "max_tokens": 3, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(e.removeprefix("data: "))["object"] == "chat.completion.chunk" for e in events[:-2])


def test_the_async_client_streams_many_answers_at_once(server: RunningServer) -> None:
    async def one(client: AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(model="tiny", messages=COUNT, temperature=0, max_tokens=40, stream=True)
        return "".join([c.choices[0].delta.content async for c in stream])

    async def all_of_them() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client) for _ in range(16)))

    answers = asyncio.run(all_of_them())
    assert len(answers) == 16
    assert len(set(answers)) == 1 and FIVE in answers[0]
    server.until_idle()


def test_n_answers_have_their_own_index_and_seed(client: OpenAI) -> None:
    story = [{"role": "user", "content": "Tell me a story."}]
    answer = ask(client, messages=story, n=4, temperature=1.5, seed=3, max_tokens=24)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert len({c.message.content for c in answer.choices}) > 1
    again = ask(client, messages=story, n=4, temperature=1.5, seed=3, max_tokens=24)
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]
    streamed = dict.fromkeys(range(4), "")
    for chunk in ask(client, messages=story, n=4, temperature=1.5, seed=3, max_tokens=24, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content
    assert list(streamed.values()) == [c.message.content for c in answer.choices]
    assert answer.usage.completion_tokens > 24


def test_the_seed_decides(client: OpenAI) -> None:
    story = [{"role": "user", "content": "Tell me a story."}]
    first, same, other = (text(client, messages=story, temperature=1.5, seed=s, max_tokens=32) for s in (7, 7, 8))
    assert first == same != other
    assert text(client, messages=story, temperature=1.5, seed=-1, max_tokens=8)


def test_logprobs_have_tokens_bytes_and_the_likeliest(client: OpenAI) -> None:
    choice = ask(client, logprobs=True, top_logprobs=3).choices[0]
    entries = choice.logprobs.content
    assert "".join(e.token for e in entries).strip() == choice.message.content.strip()
    assert b"".join(bytes(e.bytes) for e in entries).decode().strip() == choice.message.content.strip()
    assert all(len(e.top_logprobs) == 3 and e.logprob <= 0 for e in entries)
    assert all(e.top_logprobs[0].token == e.token for e in entries), "greedy: the chosen one is the likeliest"
    assert all(e.top_logprobs[0].logprob >= e.top_logprobs[1].logprob >= e.top_logprobs[2].logprob for e in entries)
    alone = ask(client, logprobs=True).choices[0].logprobs.content
    assert [e.top_logprobs for e in alone] == [[]] * len(entries)
    streamed = [e for c in ask(client, logprobs=True, top_logprobs=3, stream=True) if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [e.token for e in streamed] == [e.token for e in entries]


def test_stop_ends_the_text_before_it(client: OpenAI, server: RunningServer) -> None:
    assert text(client, stop=", 3").endswith("2")
    assert text(client, stop=["nothing", "4"]).rstrip().endswith("3,")
    assert "".join(c.choices[0].delta.content for c in ask(client, stop=", 3", stream=True)).endswith("2")
    kept = raw(server, stop=", 3", include_stop_str_in_output=True)["choices"][0]
    assert kept["message"]["content"].endswith(", 3")
    assert (kept["finish_reason"], kept["stop_reason"]) == ("stop", ", 3")


def test_max_tokens_cuts_and_says_so(client: OpenAI) -> None:
    answer = ask(client, max_tokens=3)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 3)
    assert ask(client, max_tokens=30, max_completion_tokens=2).usage.completion_tokens == 2
    assert FIVE in text(client, max_tokens=None)


def test_penalties_bias_and_minimum_change_the_answer(client: OpenAI, server: RunningServer) -> None:
    story = [{"role": "user", "content": "Tell me a story about a cat and a mouse."}]
    plain = text(client, messages=story, max_tokens=80)
    for field in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"extra_body": {"repetition_penalty": 2.0}}):
        assert text(client, messages=story, max_tokens=80, **field) != plain, field
    five = server.frontend.tokenizer.encode("5", add_bos=False)[-1]
    assert "5" not in text(client, logit_bias={str(five): -100})
    assert raw(server, min_new_tokens=30)["usage"]["completion_tokens"] >= 30
    assert raw(server, ignore_eos=True)["usage"]["completion_tokens"] == 40


def test_sampling_parameters_reach_the_sampler(server: RunningServer) -> None:
    plain = raw(server)["choices"][0]["message"]["content"]
    for field in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}):
        assert raw(server, temperature=1.5, seed=1, **field)["choices"][0]["message"]["content"] == plain, field


def test_token_ids_are_returned_when_asked_for(server: RunningServer) -> None:
    choice = raw(server, return_token_ids=True)["choices"][0]
    assert server.frontend.tokenizer.decode(choice["token_ids"]) == choice["message"]["content"]
    assert "token_ids" not in raw(server)["choices"][0]


def test_a_plain_text_is_used_without_a_template(server: RunningServer) -> None:
    answer = raw(server, messages="The sky is", max_tokens=4)
    assert answer["usage"]["prompt_tokens"] == len(server.frontend.tokenizer.encode("The sky is"))
    ids = server.frontend.tokenizer.encode("The sky is")
    assert raw(server, messages=[], input_ids=ids, max_tokens=4)["choices"][0]["message"] == answer["choices"][0]["message"]


def test_the_conversation_so_far_counts(client: OpenAI) -> None:
    first = ask(client)
    history = [*COUNT, first.choices[0].message.model_dump(), {"role": "user", "content": "Count from 1 to 3."}]
    second = ask(client, messages=history)
    assert "3" in second.choices[0].message.content
    assert second.usage.prompt_tokens > first.usage.prompt_tokens + first.usage.completion_tokens


def test_text_parts_are_joined(server: RunningServer) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Count from"}, {"type": "text", "text": "1 to 5."}]}]
    joined = [{"role": "user", "content": "Count from\n1 to 5."}]
    assert raw(server, messages=parts)["usage"] == raw(server, messages=joined)["usage"]


def test_everything_that_the_openai_client_may_send_is_accepted(client: OpenAI) -> None:
    answer = ask(
        client, user="me", store=False, metadata={"a": "b"}, service_tier="auto", parallel_tool_calls=True, tool_choice="none",
        response_format={"type": "text"}, logit_bias={}, top_p=1, n=1, seed=1, stop=None, modalities=["text"], presence_penalty=0, frequency_penalty=0,
    )  # fmt: skip
    assert FIVE in answer.choices[0].message.content


def test_a_session_id_answers_one_request_at_a_time(server: RunningServer) -> None:
    body = {"model": "tiny", "messages": COUNT, "ignore_eos": True, "session_id": 77}
    with server.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as running:
        pieces = running.iter_bytes()  # httpx closes the connection when this is forgotten
        next(pieces)
        refused = server.http.post("/v1/chat/completions", json={**body, "max_tokens": 2})
        assert refused.status_code == 409
        assert "77" in refused.json()["error"]["message"]
        assert server.http.post("/v1/chat/completions", json={**body, "session_id": 78, "max_tokens": 2}).status_code == 200
    server.until_idle()
    assert server.http.post("/v1/chat/completions", json={**body, "max_tokens": 2}).status_code == 200, "free again"


def test_errors_are_openais_exceptions(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist") as missing:
        ask(client, model="gpt-4")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(client, temperature=3)
    with pytest.raises(openai.BadRequestError, match="context length") as long:
        ask(client, messages=[{"role": "user", "content": "word " * 3000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="functions") as functions:
        ask(client, functions=[{"name": "f"}])
    assert functions.value.code == "unsupported"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"verbosity": "low"}, "verbosity"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, "messages.0.audio"),
        ({"messages": [{"role": "assistant", "function_call": {"arguments": "{}"}}]}, "messages.0.function_call"),
    ],
    ids=str,
)
def test_what_would_have_no_effect_is_refused(fields: dict[str, Any], param: str, server: RunningServer) -> None:
    reply = server.http.post("/v1/chat/completions", json={"model": "tiny", "messages": COUNT, "max_tokens": 1, **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text


def test_older_messages_keep_their_calls_and_refusals() -> None:
    call = {"name": "add", "arguments": '{"a": 1}'}
    wire = [
        ChatMessage(role="assistant", function_call=call),
        ChatMessage(role="assistant", refusal="I will not."),
        ChatMessage(role="assistant", content="Sorry.", refusal="I will not.", audio=None, function_call=None),
    ]
    assert messages_of(wire) == [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "assistant", "content": "I will not."},
        {"role": "assistant", "content": "Sorry.\nI will not."},
    ]


def test_a_call_of_the_older_form_is_shown_to_the_model(server: RunningServer) -> None:
    function = {"name": "add", "arguments": '{"a": 1, "b": 2}'}
    prompts = []
    for turn in ({"function_call": function}, {"tool_calls": [{"id": "c", "type": "function", "function": function}]}, {"content": ""}):
        history = [{"role": "user", "content": "1+2"}, {"role": "assistant", **turn}, {"role": "user", "content": "So?"}]
        prompts.append(server.http.post("/tokenize", json={"messages": history}).json()["tokens"])
    assert prompts[0] == prompts[1] != prompts[2]


def test_the_model_may_be_named_by_name_path_or_folder(client: OpenAI, server: RunningServer) -> None:
    path = server.frontend.model_path
    for name in ("tiny", path, path.rsplit("/", 1)[-1]):
        assert ask(client, model=name, max_tokens=1).model == "tiny"
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_values_that_ask_for_nothing_are_accepted(server: RunningServer) -> None:
    """What clients send when a user chose nothing."""
    nulls = (
        "temperature", "top_p", "n", "max_tokens", "logprobs", "top_logprobs", "stop", "seed", "user", "stream_options", "tools", "tool_choice", "logit_bias",
        "response_format", "parallel_tool_calls", "presence_penalty", "frequency_penalty", "metadata", "store", "service_tier", "functions", "function_call",
        "modalities", "prediction", "audio", "reasoning_effort", "web_search_options", "top_k", "min_p", "repetition_penalty", "session_id", "bad_words",
    )  # fmt: skip
    neutral = {
        "tool_choice": "none", "parallel_tool_calls": True, "logprobs": False, "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "user": "u", "tools": [],
        "response_format": {"type": "text"}, "modalities": ["text"], "stop": [], "logit_bias": {}, "prompt_cache_key": "k", "verbosity": "medium",
    }  # fmt: skip
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 1}
    for extra in (dict.fromkeys(nulls), neutral):
        reply = server.http.post("/v1/chat/completions", json={**asked, **extra})
        assert reply.status_code == 200, reply.text
    for name, value in neutral.items():
        assert server.http.post("/v1/chat/completions", json={**asked, name: value}).status_code == 200, name
