"""What one client has is not another's: cached prompts, sessions, request ids; and the engine cannot be reached but through the server."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from lmdeploy.frontend import Frontend
from tests.serving.running import RunningServer

LONG = "The fox counted the stones of the river, and the river counted the days of the fox. " * 12


@pytest.fixture
def shared(serve: Callable[..., RunningServer]) -> RunningServer:
    return serve(api_keys=["alice-key", "bob-key"])


def post(server: RunningServer, key: str, path: str, body: dict[str, Any], **headers: str) -> Any:
    reply = server.http.post(path, json=body, headers={"Authorization": f"Bearer {key}", **headers})
    assert reply.status_code == 200, reply.text
    return reply


def cached(server: RunningServer, key: str, prompt: str) -> int:
    """Prompt tokens that were found in the cache."""
    usage = post(server, key, "/v1/completions", {"model": "tiny", "prompt": prompt, "max_tokens": 1}).json()["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def test_a_key_does_not_find_what_another_has_cached(shared: RunningServer) -> None:
    """The time to the first token would tell whether somebody else has sent the same text (CVE-2025-46570)."""
    prompt = f"{time.monotonic_ns()} {LONG}"
    assert cached(shared, "alice-key", prompt) == 0
    assert cached(shared, "bob-key", prompt) == 0
    assert cached(shared, "alice-key", prompt) >= 64
    assert cached(shared, "bob-key", prompt) >= 64


def test_keys_share_the_cache_where_the_server_is_told_so(serve: Callable[..., RunningServer]) -> None:
    server = serve(api_keys=["alice-key", "bob-key"], share_prefix_cache=True)
    prompt = f"{time.monotonic_ns()} {LONG}"
    assert cached(server, "alice-key", prompt) == 0
    assert cached(server, "bob-key", prompt) >= 64


def test_a_session_number_is_its_keys_own(shared: RunningServer) -> None:
    def turn(key: str, prompt: str, **more: Any) -> dict[str, Any]:
        body = {"prompt": prompt, "session_id": 7, "interactive_mode": True, "temperature": 0, "request_output_len": 24, **more}
        reply: dict[str, Any] = post(shared, key, "/v1/chat/interactive", body).json()
        return reply

    turn("alice-key", "Remember the word: umbrella.")
    assert turn("bob-key", "Hello!")["history_tokens"] == 0, "bob continues alice's conversation"
    post(shared, "bob-key", "/v1/chat/interactive", {"prompt": "", "session_id": 7, "request_output_len": 0})  # ends his own only
    assert turn("alice-key", "Which word?")["history_tokens"] > 0
    for key in ("alice-key", "bob-key"):
        post(shared, key, "/v1/chat/interactive", {"prompt": "", "session_id": 7, "request_output_len": 0})


def test_a_request_id_of_a_client_names_nothing_of_ours(shared: RunningServer) -> None:
    """Two clients with one id (CVE-2026-105755) get their own answers, and ids of ours that differ."""
    first = post(shared, "alice-key", "/generate", {"prompt": "Count from 1 to 5.", "max_tokens": 4}, **{"X-Request-Id": "same"})
    second = post(shared, "bob-key", "/generate", {"prompt": "The sky is", "max_tokens": 4}, **{"X-Request-Id": "same"})
    assert first.headers["x-request-id"] == second.headers["x-request-id"] == "same"
    assert first.headers["x-lmdeploy-id"] != second.headers["x-lmdeploy-id"]
    assert first.json()["meta_info"]["prompt_tokens"] != second.json()["meta_info"]["prompt_tokens"] or first.json()["text"] != second.json()["text"]


@pytest.mark.parametrize("name", ["http://evil.test/", "../../etc/passwd", "a\tb", "x" * 200, "{{7*7}}"])
def test_a_request_id_that_is_no_id_is_not_repeated(shared: RunningServer, name: str) -> None:
    reply = post(shared, "alice-key", "/v1/encode", {"input": "x"}, **{"X-Request-Id": name})
    assert reply.headers["x-request-id"] != name


def test_the_engine_listens_nowhere(frontend: Frontend) -> None:
    """It talks over one private pair of sockets; nothing on the network or in the file system leads to it."""
    engine = psutil.Process(frontend.client.pid)  # type: ignore[attr-defined]
    assert [c for c in engine.net_connections("inet") if c.status == psutil.CONN_LISTEN] == []
    assert [c.laddr for c in engine.net_connections("unix") if c.laddr] == [], "a socket with a name"
