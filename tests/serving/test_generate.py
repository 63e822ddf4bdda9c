"""POST /generate and POST /v1/encode."""

from __future__ import annotations

import json

import pytest

from tests.serving.running import RunningServer


def test_text_and_ids_are_continued_alike(server: RunningServer) -> None:
    ids = server.frontend.tokenizer.encode("The sky is")
    by_text = server.http.post("/generate", json={"prompt": "The sky is", "temperature": 0, "max_tokens": 6}).json()
    by_ids = server.http.post("/generate", json={"input_ids": ids, "temperature": 0, "max_tokens": 6}).json()
    assert by_text["text"] == by_ids["text"]
    assert server.frontend.tokenizer.decode([*ids, *by_text["output_ids"]]).endswith(by_text["text"])
    meta = by_text["meta_info"]
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["finish_reason"]) == (len(ids), 6, {"type": "length"})
    assert meta["output_token_logprobs"] is None


def test_the_stream_adds_up_to_the_answer(server: RunningServer) -> None:
    body = {"prompt": "The sky is", "temperature": 0, "max_tokens": 6, "return_logprob": True}
    whole = server.http.post("/generate", json=body).json()
    events = server.http.post("/generate", json={**body, "stream": True}).text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    parts = [json.loads(e.removeprefix("data: ")) for e in events[:-2]]
    assert "".join(p["text"] for p in parts) == whole["text"]
    assert [i for p in parts for i in p["output_ids"]] == whole["output_ids"]
    assert [tuple(x) for p in parts for x in p["meta_info"]["output_token_logprobs"]] == [tuple(x) for x in whole["meta_info"]["output_token_logprobs"]]
    assert [x[1] for x in whole["meta_info"]["output_token_logprobs"]] == whole["output_ids"]
    assert parts[-1]["meta_info"]["finish_reason"] == {"type": "length"}


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "input_ids": [1]}, {"prompt": ""}, {"input_ids": []}, {"input_ids": [99999]}, {"prompt": "a", "n": 2}])
def test_impossible_requests_are_refused(body: dict[str, object], server: RunningServer) -> None:
    assert server.http.post("/generate", json=body).status_code == 400


def test_encode_gives_ids_and_lengths(server: RunningServer) -> None:
    tokenizer = server.frontend.tokenizer
    one = server.http.post("/v1/encode", json={"input": "The sky is"}).json()
    assert one == {"input_ids": tokenizer.encode("The sky is"), "length": len(tokenizer.encode("The sky is"))}
    bare = server.http.post("/v1/encode", json={"input": "The sky is", "add_bos": False}).json()
    assert bare["input_ids"] == one["input_ids"][1:]
    many = server.http.post("/v1/encode", json={"input": ["The sky", "天空"]}).json()
    assert many["input_ids"] == [tokenizer.encode("The sky"), tokenizer.encode("天空")]
    assert many["length"] == [len(ids) for ids in many["input_ids"]]
    templated = server.http.post("/v1/encode", json={"input": "The sky is", "do_preprocess": True}).json()
    assert templated["input_ids"] == server.frontend.encode_prompt("The sky is")
    assert templated["length"] > one["length"]
