"""`lmdeploy.serve` and `lmdeploy.client`: a server inside a program, answered over real HTTP, gone after close."""

from __future__ import annotations

import socket

import pytest

import lmdeploy
from lmdeploy.errors import ConfigError, EngineError


def test_serve_answers_through_its_client_and_is_gone_after_close() -> None:
    with lmdeploy.serve(
        model_name="tiny", server_port=0, backend_config=lmdeploy.TurbomindEngineConfig(dtype="float32", cache_max_entry_count=64, max_prefill_token_num=256)
    ) as server:
        with lmdeploy.client(server.url) as other:
            assert other.available_models == ["tiny"]
        question = [{"role": "user", "content": "Count from 1 to 5."}]
        answer = next(server.chat_completions_v1("tiny", question, temperature=0.0, max_tokens=32))
        assert "1" in answer["choices"][0]["message"]["content"]
        url = server.url
    with lmdeploy.client(url) as late, pytest.raises(EngineError, match="no answer"):
        late.health()


def test_a_used_port_is_told_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="in use"):
            lmdeploy.serve("/no/such/model", server_port=taken.getsockname()[1])


def test_wrong_arguments_name_the_alternatives() -> None:
    with pytest.raises(ConfigError, match="turbomind, pytorch"):
        lmdeploy.serve(backend="vllm")
    with pytest.raises(ConfigError, match="api_server --ssl"):
        lmdeploy.serve(ssl=True)
