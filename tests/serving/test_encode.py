"""Text to token ids and back, and how likely a text is."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.serving.running import RunningServer

TALK = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello!"}]


def post(server: RunningServer, route: str, **body: Any) -> dict[str, Any]:
    reply = server.http.post(route, json=body)
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    assert isinstance(answer, dict)
    return answer


def test_tokens_of_a_text_come_back_as_the_text(server: RunningServer) -> None:
    answer = post(server, "/tokenize", model="tiny", prompt="The sky is blue. 天空")
    assert answer["tokens"] == server.frontend.tokenizer.encode("The sky is blue. 天空")
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 2048)
    assert post(server, "/detokenize", tokens=answer["tokens"], skip_special_tokens=True)["prompt"] == "The sky is blue. 天空"
    bare = post(server, "/tokenize", prompt="The sky", add_special_tokens=False)["tokens"]
    assert bare == server.frontend.tokenizer.encode("The sky", add_bos=False)


def test_tokens_of_a_conversation_are_those_that_chat_computes(server: RunningServer) -> None:
    answer = post(server, "/tokenize", messages=TALK, return_token_strs=True)
    chat = post(server, "/v1/chat/completions", model="tiny", messages=TALK, max_tokens=1)
    assert answer["count"] == chat["usage"]["prompt_tokens"] == len(answer["token_strs"])
    assert "<|im_start|>" in answer["token_strs"]
    closed = post(server, "/tokenize", messages=TALK, add_generation_prompt=False)
    assert closed["tokens"] == answer["tokens"][: closed["count"]] and closed["count"] < answer["count"]
    assert "<|im_start|>user\nHello!" in post(server, "/detokenize", tokens=answer["tokens"])["prompt"]


def test_perplexity_is_the_mean_of_the_prompts_log_probabilities(server: RunningServer) -> None:
    text = "Once upon a time there was a little cat."
    echoed = post(server, "/v1/completions", model="tiny", prompt=text, echo=True, logprobs=0, max_tokens=0)
    known = echoed["choices"][0]["logprobs"]["token_logprobs"][1:]
    answer = post(server, "/get_ppl", input=text)
    assert answer["ppl"] == pytest.approx(-math.fsum(known) / len(known), abs=1e-5)
    ids = server.frontend.tokenizer.encode(text)
    assert answer["tokens"] == len(ids)
    assert post(server, "/get_ppl", input=ids)["ppl"] == pytest.approx(answer["ppl"], abs=1e-6)
    assert post(server, "/get_ppl", input="cat time Once little upon was there a")["ppl"] > answer["ppl"] + 1


@pytest.mark.parametrize(
    "route, body, words",
    [
        ("/tokenize", {}, ["exactly one"]),
        ("/tokenize", {"prompt": "a", "messages": TALK}, ["exactly one"]),
        ("/tokenize", {"messages": []}, ["messages"]),
        ("/tokenize", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ["image_url"]),
        ("/detokenize", {"tokens": [-1]}, ["tokens.0"]),
        ("/detokenize", {"tokens": [99999]}, ["99999", "5119"]),
        ("/get_ppl", {"input": ""}, ["empty"]),
        ("/get_ppl", {"input": [5]}, ["one token"]),
        ("/get_ppl", {"input": [5] * 2049}, ["2049", "2048"]),
    ],
    ids=lambda v: str(v)[:40],
)
def test_what_cannot_be_is_said(route: str, body: dict[str, Any], words: list[str], server: RunningServer) -> None:
    reply = server.http.post(route, json=body)
    assert reply.status_code == 400, reply.text
    assert all(word in reply.json()["error"]["message"] for word in words), reply.text


def test_another_model_is_not_found(server: RunningServer) -> None:
    for route, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]}), ("/get_ppl", {"input": "a b"}), ("/v1/embeddings", {"input": "a"})):
        assert server.http.post(route, json={**body, "model": "other"}).status_code == 404, route
