"""Beyond the limits of docs/operate.md: every field is refused by name (tests/docs/test_limits.py: the page shows these limits)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.serving.running import RunningServer

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
BEYOND: dict[str, Callable[[], dict[str, Any]]] = {
    "messages": lambda: {"messages": [{"role": "user", "content": "a"}] * 10_001},
    "tools": lambda: {"tools": [{"type": "function", "function": {"name": "f"}}] * 129},
    "content": lambda: {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 1001}]},
    "tool_calls": lambda: {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}] * 129}]},
    "stop_token_ids": lambda: {"stop_token_ids": [1] * 1025},
    "n": lambda: {"n": 129},
    "top_logprobs": lambda: {"logprobs": True, "top_logprobs": 21},
    "stop": lambda: {"stop": ["a"] * 65},
    "bad_words": lambda: {"bad_words": ["a"] * 65},
    "logit_bias": lambda: {"logit_bias": {str(i): 0 for i in range(4097)}},
    "response_format": lambda: {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a" * 70_000]}}}},
}


@pytest.mark.parametrize("field", BEYOND)
def test_one_more_than_the_limit_is_refused(field: str, server: RunningServer) -> None:
    reply = server.http.post("/v1/chat/completions", json={**CHAT, **BEYOND[field]()})
    assert reply.status_code == 400, reply.text[:300]
    assert field in (reply.json()["error"]["param"] or "") or field in reply.json()["error"]["message"]


@pytest.mark.parametrize(("path", "count"), [("/v1/embeddings", 2048), ("/v1/encode", 128)])
def test_one_more_input_than_the_limit_is_refused(path: str, count: int, server: RunningServer) -> None:
    reply = server.http.post(path, json={"input": ["a"] * (count + 1)} | ({"model": "tiny"} if path == "/v1/embeddings" else {}))
    assert reply.status_code == 400, reply.text[:300]
    assert "input" in reply.json()["error"]["param"] and str(count) in reply.json()["error"]["message"]
