"""POST /v1/embeddings: the vectors are the pooled hidden states that transformers computes from the same weights, however they were computed."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from openai import OpenAI
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaModel

from lmdeploy.config import TurbomindEngineConfig
from lmdeploy.frontend import Frontend
from lmdeploy.messages import Response
from tests.serving.running import RunningServer

Vector = NDArray[np.float32]
TEXTS = ["The sky is blue.", "A cat sat on the mat and looked at the moon. " * 12, "Count from 1 to 5."]


@pytest.fixture(scope="module")
def client(server: RunningServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def reference(model_folder: Path) -> Callable[[list[int], str], Vector]:
    """The embedded model's weights in transformers' Llama; ids and a way of pooling in, a vector of length 1 out."""
    config = json.loads((model_folder / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta")
    model = LlamaModel(LlamaConfig(**{name: config[name] for name in names}, max_position_embeddings=2048)).eval()
    heads, kv_heads, width = config["num_attention_heads"], config["num_key_value_heads"], config["hidden_size"]
    tensors: dict[str, Any] = {}
    for file in sorted(model_folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    renames = (
        ("tok_embeddings", "embed_tokens"), ("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"), ("attention.wo", "self_attn.o_proj"),
        ("feed_forward.w1", "mlp.gate_proj"), ("feed_forward.w3", "mlp.up_proj"), ("feed_forward.w2", "mlp.down_proj"),
    )  # fmt: skip
    state: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name == "output.weight":
            continue
        name = name.removeprefix("model.")
        if "wqkv" in name:
            parts = tensor.view(kv_heads, heads // kv_heads + 2, -1, width)
            for key, rows in (("q_proj", parts[:, :-2]), ("k_proj", parts[:, -2]), ("v_proj", parts[:, -1])):
                state[name.replace("attention.wqkv", f"self_attn.{key}")] = rows.reshape(-1, width).float()
            continue
        for old, new in renames:
            name = name.replace(old, new)
        state[name] = tensor.float()
    model.load_state_dict(state)

    def embed(ids: list[int], pooling: str) -> Vector:
        with torch.inference_mode():
            hidden = model(torch.tensor([ids])).last_hidden_state[0]
        pooled = hidden.mean(0) if pooling == "mean" else hidden[-1]
        return np.asarray((pooled / pooled.norm()).numpy(), dtype=np.float32)

    return embed


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_those_of_transformers(client: OpenAI, server: RunningServer, reference: Callable[[list[int], str], Vector], pooling: str) -> None:
    answer = client.embeddings.create(model="tiny", input=TEXTS, extra_body={"pooling": pooling})
    ids = [server.frontend.tokenizer.encode(text) for text in TEXTS]
    assert len(ids[1]) > 100
    for place, (item, tokens) in enumerate(zip(answer.data, ids, strict=True)):
        assert item.index == place
        assert np.abs(np.array(item.embedding) - reference(tokens, pooling)).max() < 1e-4
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))


def test_every_form_of_input_and_encoding_gives_the_same_numbers(client: OpenAI, server: RunningServer) -> None:
    ids = server.frontend.tokenizer.encode(TEXTS[0])
    by_text = client.embeddings.create(model="tiny", input=TEXTS[0], encoding_format="float").data[0].embedding
    for given in ([TEXTS[0]], ids, [ids]):
        answer = client.embeddings.create(model="tiny", input=given, encoding_format="float")
        assert [d.embedding for d in answer.data] == [by_text]
    raw = server.http.post("/v1/embeddings", json={"model": "tiny", "input": TEXTS[0], "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(raw), dtype="<f4").tolist() == by_text
    assert float(np.linalg.norm(by_text)) == pytest.approx(1, abs=1e-6)


def test_fewer_dimensions_are_the_first_ones_at_length_one(client: OpenAI) -> None:
    whole = np.array(client.embeddings.create(model="tiny", input=TEXTS[0]).data[0].embedding)
    part = np.array(client.embeddings.create(model="tiny", input=TEXTS[0], dimensions=32).data[0].embedding)
    assert part == pytest.approx(whole[:32] / np.linalg.norm(whole[:32]), abs=1e-6)


def test_texts_that_mean_the_same_are_nearer_than_others(client: OpenAI) -> None:
    texts = ["The cat sleeps on the sofa.", "A cat is sleeping on a sofa.", "Count from 1 to 20."]
    first, near, far = (np.array(d.embedding) for d in client.embeddings.create(model="tiny", input=texts).data)
    assert first @ near > first @ far


def test_many_inputs_come_back_in_order(client: OpenAI) -> None:
    texts = [f"Number {i}." for i in range(300)]
    every = client.embeddings.create(model="tiny", input=texts).data
    assert [d.index for d in every] == list(range(300))
    for place in (0, 151, 299):
        alone = client.embeddings.create(model="tiny", input=texts[place]).data[0].embedding
        assert np.array(every[place].embedding) == pytest.approx(np.array(alone), abs=1e-5)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"input": ""}, ["input.0", "empty"]),
        ({"input": ["a", ""]}, ["input.1", "empty"]),
        ({"input": []}, ["input"]),
        ({"input": [[]]}, ["input"]),
        ({"input": ["a"] * 2049}, ["input", "2048"]),
        ({"input": [999999]}, ["999999"]),
        ({"input": "word " * 3000}, ["2048"]),
        ({"input": [5] * 2049}, ["2049", "2048"]),
        ({"dimensions": 5000}, ["dimensions=5000", "384"]),
        ({"dimensions": 0}, ["dimensions", "0"]),
        ({"encoding_format": "hex"}, ["encoding_format", "hex"]),
        ({"pooling": "max"}, ["pooling", "max"]),
    ],
    ids=lambda v: str(v)[:40],
)
def test_what_cannot_be_embedded_is_said(fields: dict[str, Any], words: list[str], server: RunningServer) -> None:
    reply = server.http.post("/v1/embeddings", json={"model": "tiny", "input": "a", **fields})
    assert reply.status_code == 400, reply.text[:300]
    assert all(word in reply.json()["error"]["message"] for word in words), reply.text
    server.until_idle()


def test_pooling_says_why_it_cannot(server: RunningServer) -> None:
    reply = server.http.post("/pooling", json={"model": "tiny", "input": "a"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "unsupported")
    assert "reward model" in reply.json()["error"]["message"]


@pytest.fixture(scope="module")
def narrow(model_folder: Path) -> Iterator[Frontend]:
    """Steps of 4 tokens and 6 blocks of 64: prompts come in chunks, and two long ones do not fit together."""
    config = TurbomindEngineConfig(dtype="float32", max_batch_size=4, max_prefill_token_num=4, cache_max_entry_count=6, session_len=320, cpu_threads=1)
    with Frontend.open(str(model_folder), config) as opened:
        yield opened


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_chunks_prefix_hits_and_pre_emption_do_not_show(narrow: Frontend, reference: Callable[[list[int], str], Vector], pooling: Any) -> None:
    story = narrow.tokenizer.encode(f"{pooling}: " + "A cat sat on the mat and looked at the moon. " * 30)
    prompts = [story[:250], story[:250], story[5:135], story[:70], story[:1]]
    answers: dict[int, list[Response]] = {}
    before = narrow.stats().preemptions
    work = [narrow.prepare_embedding(p, pooling) for p in prompts]
    chatter = narrow.prepare(story[:60], _long_answer(), do_preprocess=False)  # grows into the blocks of the others
    for response in narrow.stream_many([chatter, *work]):
        answers.setdefault(response.session_id, []).append(response)
    for place, prompt in enumerate(prompts, 1):
        (answer,) = answers[place]
        assert answer.finish_reason == "length" and answer.input_token_len == len(prompt)
        assert np.abs(np.frombuffer(answer.embedding or b"", dtype=np.float32) - reference(prompt, pooling)).max() < 1e-4
    assert narrow.stats().preemptions > before


def _long_answer() -> Any:
    from lmdeploy import GenerationConfig

    return GenerationConfig(max_new_tokens=150, ignore_eos=True, temperature=0)
