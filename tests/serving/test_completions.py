"""POST /v1/completions: forms of the prompt, indexes, echo, log-probabilities, streams."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from openai import OpenAI

from lmdeploy.answer import Prepared
from lmdeploy.config import GenerationConfig
from lmdeploy.errors import RequestError
from lmdeploy.messages import SamplingParams
from lmdeploy.serving.logprob_limit import MAX_LOGPROBS, bounded
from tests.serving.running import RunningServer


@pytest.fixture(scope="module")
def client(server: RunningServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def complete(client: OpenAI, prompt: Any, **fields: Any) -> Any:
    return client.completions.create(**{"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 6, **fields})


def test_text_and_ids_give_the_same(client: OpenAI, server: RunningServer) -> None:
    ids = server.frontend.tokenizer.encode("The sky is")
    by_text, by_ids = complete(client, "The sky is"), complete(client, ids)
    assert by_text.object == "text_completion"
    assert by_text.choices[0].text == by_ids.choices[0].text != ""
    assert by_text.usage.prompt_tokens == by_ids.usage.prompt_tokens == len(ids)


def test_several_prompts_and_answers_are_numbered_in_order(client: OpenAI, server: RunningServer) -> None:
    prompts = ["The sky is", "Count from 1", "Hello"]
    answer = complete(client, prompts, n=2)
    assert [c.index for c in answer.choices] == list(range(6))
    alone = [complete(client, p).choices[0].text for p in prompts]
    assert [c.text for c in answer.choices] == [t for t in alone for _ in range(2)]
    ids = [server.frontend.tokenizer.encode(p) for p in prompts]
    assert [c.text for c in complete(client, ids).choices] == alone
    assert answer.usage.prompt_tokens == sum(map(len, ids))
    assert answer.usage.completion_tokens == 36


def test_a_stream_of_several_prompts_mixes_but_numbers_them(client: OpenAI) -> None:
    prompts = ["The sky is", "Hello"]
    texts = dict.fromkeys(range(4), "")
    ends = []
    for chunk in complete(client, prompts, n=2, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ends += [choice.index] if choice.finish_reason else []
        usage = chunk.usage
    assert list(texts.values()) == [c.text for c in complete(client, prompts, n=2).choices]
    assert sorted(ends) == [0, 1, 2, 3]
    assert usage.completion_tokens == 24


def test_a_slow_reader_of_several_prompts_gets_joined_increments(server: RunningServer) -> None:
    service = server.app.state.service
    gen = GenerationConfig(max_new_tokens=120, ignore_eos=True, do_sample=False)
    prepared = [service.frontend.prepare(text, gen, do_preprocess=False) for text in ("The sky is", "Once upon a time", "The cat")]

    async def read(slowly: bool) -> tuple[dict[int, str], int]:
        texts, count = dict.fromkeys(range(3), ""), 0
        async for response in service.merged(prepared):
            texts[response.index] += response.text
            count += 1
            if slowly and count == 1:
                await asyncio.to_thread(server.until_idle)
        return texts, count

    slow, increments = asyncio.run(read(slowly=True))
    assert increments < 30, "360 tokens were generated meanwhile"
    assert slow == asyncio.run(read(slowly=False))[0] and all(slow.values())


def test_echo_puts_the_prompt_before_each_answer(client: OpenAI) -> None:
    plain = complete(client, ["The sky is", "Hello"]).choices
    echoed = complete(client, ["The sky is", "Hello"], echo=True).choices
    assert [e.text for e in echoed] == ["The sky is" + plain[0].text, "Hello" + plain[1].text]
    assert "".join(c.choices[0].text for c in complete(client, "The sky is", echo=True, stream=True)) == echoed[0].text


def test_logprobs_have_the_older_form(client: OpenAI) -> None:
    choice = complete(client, "The sky is", logprobs=2).choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert all(p <= 0 for p in choice.logprobs.token_logprobs)
    assert all(len(t) == 2 for t in choice.logprobs.top_logprobs)
    assert choice.logprobs.text_offset[0] == 0 and choice.logprobs.text_offset == sorted(choice.logprobs.text_offset)


def test_logprobs_with_echo_cover_the_prompt(client: OpenAI, server: RunningServer) -> None:
    choice = complete(client, "The sky is", logprobs=1, echo=True).choices[0]
    prompt = server.frontend.tokenizer.encode("The sky is")
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == len(prompt) + 6
    assert choice.logprobs.token_logprobs[0] is None
    assert all(isinstance(p, float) and p <= 0 for p in choice.logprobs.token_logprobs[1:])


def test_no_max_tokens_means_the_rest_of_the_context(server: RunningServer) -> None:
    body = {"model": "tiny", "prompt": "The sky is", "temperature": 0, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as reply:
        lines = reply.iter_lines()
        assert all(next(lines) != "data: [DONE]" for _ in range(2 * 100)), "more than 100 tokens (each event is a line and a blank one)"
    server.until_idle()


@pytest.mark.parametrize("prompt", ["", [], [[]], [1, -1], [1, "a"], 5, None, [10**6]])
def test_impossible_prompts_are_refused(prompt: object, server: RunningServer) -> None:
    reply = server.http.post("/v1/completions", json={"model": "tiny", "prompt": prompt})
    assert reply.status_code == 400, reply.text
    assert "\n" not in reply.json()["error"]["message"]


def test_the_answers_of_one_request_are_limited(server: RunningServer) -> None:
    reply = server.http.post("/v1/completions", json={"model": "tiny", "prompt": ["a"] * 100, "n": 100, "max_tokens": 1})
    assert reply.status_code == 400
    assert "10000" in reply.json()["error"]["message"] and "512" in reply.json()["error"]["message"]


def test_prompts_tokens_and_logprobs_have_one_bound_together(server: RunningServer) -> None:
    def refused(path: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
        reply = server.http.post(path, json={"model": "tiny", **fields})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "logprobs"), reply.text[:300]
        return dict(reply.json()["error"])

    message = refused(prompt=[[5] * 1500] * 32, echo=True, logprobs=20, max_tokens=0)["message"]
    for part in ("logprobs=20", "48000 tokens of prompts", "1008000", f"at most {MAX_LOGPROBS}"):
        assert part in message, message
    message = refused(prompt=["a"] * 128, n=4, max_tokens=1000, logprobs=1, stream=True)["message"]
    assert "512 answers of at most 1000 tokens makes 1024000" in message
    hi = [{"role": "user", "content": "Hi"}]
    refused("/v1/chat/completions", messages=hi, n=16, max_tokens=1800, logprobs=True, top_logprobs=20)
    fits = server.http.post("/v1/completions", json={"model": "tiny", "prompt": [[5] * 1500] * 2, "echo": True, "logprobs": 20, "max_tokens": 0})
    assert len(fits.json()["choices"][1]["logprobs"]["tokens"]) == 1500


def test_without_max_tokens_answers_are_as_long_as_their_logprobs_allow() -> None:
    sampling = SamplingParams(max_new_tokens=100_000, logprobs=20)
    prepared = [Prepared([1, 2], sampling, 2, [], True, True, False)] * 3
    (first, *_) = bounded(prepared, None)
    assert first.sampling.max_new_tokens == MAX_LOGPROBS // (6 * 21) and sampling.max_new_tokens == 100_000
    assert bounded(prepared[:1], None)[0].sampling.max_new_tokens == MAX_LOGPROBS // 42
    with pytest.raises(RequestError, match="6 answers of at most 100000 tokens"):
        bounded(prepared, 100_000)
    plain = [Prepared([1, 2], SamplingParams(max_new_tokens=100_000), 128, [], True, True, False)]
    assert bounded(plain, None) is plain


def test_best_of_returns_the_likeliest_of_the_answers_that_n_would_give(client: OpenAI) -> None:
    ask = {"temperature": 1.5, "top_p": 1.0, "seed": 11, "logprobs": 0, "max_tokens": 8}
    every = complete(client, "Once upon a time", n=5, **ask).choices
    ranked = sorted(every, key=lambda c: -sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs))
    answer = complete(client, "Once upon a time", n=2, extra_body={"best_of": 5}, **ask)
    assert [c.text for c in answer.choices] == [c.text for c in ranked[:2]]
    assert [c.index for c in answer.choices] == [0, 1]
    assert answer.usage.completion_tokens == sum(len(c.logprobs.tokens) for c in every), "all five were computed"
    unasked = complete(client, "Once upon a time", n=2, extra_body={"best_of": 5}, **{**ask, "logprobs": None})
    assert [c.text for c in unasked.choices] == [c.text for c in ranked[:2]] and unasked.choices[0].logprobs is None


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"best_of": 2, "n": 3}, ["best_of=2", "n=3"]),
        ({"best_of": 3, "stream": True}, ["best_of", "streamed"]),
        ({"best_of": 129}, ["best_of", "128"]),
        ({"best_of": 100, "prompt": ["a"] * 6}, ["best_of=100", "600", "512"]),
        ({"suffix": "the end"}, ["suffix", "not available"]),
        ({"max_tokens": 0}, ["max_tokens=0", "echo"]),
        ({"logprobs": 21}, ["logprobs", "20"]),
    ],
    ids=str,
)
def test_what_cannot_be_is_said(fields: dict[str, Any], words: list[str], server: RunningServer) -> None:
    reply = server.http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 1, **fields})
    assert reply.status_code == 400
    assert all(word in reply.json()["error"]["message"] for word in words), reply.text


def test_a_stream_with_echo_and_logprobs_adds_up_to_the_whole_answer(client: OpenAI) -> None:
    ask = {"prompt": ["The sky is", "Hello"], "echo": True, "logprobs": 2, "n": 2}
    whole = complete(client, **ask).choices
    texts = dict.fromkeys(range(4), "")
    parts: dict[int, dict[str, list[Any]]] = {i: {"tokens": [], "token_logprobs": [], "text_offset": [], "top_logprobs": []} for i in range(4)}
    for chunk in complete(client, **ask, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            for name, values in parts[choice.index].items():
                values += getattr(choice.logprobs, name) if choice.logprobs else []
    for choice in whole:
        assert texts[choice.index] == choice.text
        for name, values in parts[choice.index].items():
            assert values == getattr(choice.logprobs, name), name


def test_text_offsets_point_into_the_echoed_text(client: OpenAI) -> None:
    choice = complete(client, "The sky is", logprobs=0, echo=True).choices[0]
    for token, offset in list(zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True))[2:]:
        assert choice.text[offset : offset + len(token)] == token


def test_no_tokens_and_echo_score_the_prompt(client: OpenAI, server: RunningServer) -> None:
    scored = complete(client, "The sky is blue.", max_tokens=0, echo=True, logprobs=1)
    longer = complete(client, "The sky is blue.", max_tokens=3, echo=True, logprobs=1).choices[0].logprobs.token_logprobs
    (choice,) = scored.choices
    assert (choice.text, choice.finish_reason, scored.usage.completion_tokens) == ("The sky is blue.", "length", 0)
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(longer[1:-3], abs=1e-4)


def test_every_chunk_can_carry_the_counts_so_far(client: OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [c.usage.completion_tokens for c in complete(client, "The sky is", stream=True, stream_options=options)]
    assert counts == sorted(counts) and 1 <= counts[0] < counts[-1] == 6  # increments that wait together are one chunk


def test_values_that_mean_nothing_are_accepted(server: RunningServer) -> None:
    nothing = dict.fromkeys(("temperature", "top_p", "n", "max_tokens", "logprobs", "echo", "best_of", "suffix", "seed", "user", "stream_options", "stop"))
    reply = server.http.post("/v1/completions", json={"model": "tiny", "prompt": "a", **nothing, "max_completion_tokens": 1})
    assert reply.status_code == 200, reply.text
