"""A client that goes away stops its request, in every phase and form; its KV blocks are free at once."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import httpx
import pytest

from tests.serving.running import RunningServer

LONG = {"model": "tiny", "prompt": "Once upon a time", "ignore_eos": True, "temperature": 0}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Tell me a story."}], "ignore_eos": True, "temperature": 0}

ITEMS = {"model": "tiny", "input": "Tell me a story.", "ignore_eos": True, "temperature": 0}


def send(server: RunningServer, route: str, body: dict[str, Any]) -> socket.socket:
    """A raw connection with the request sent and nothing read."""
    host, port = server.url.removeprefix("http://").split(":")
    raw = socket.create_connection((host, int(port)), timeout=20)
    data = json.dumps(body).encode()
    raw.sendall(f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    return raw


@pytest.mark.parametrize(
    "route, body",
    [
        ("/v1/chat/completions", {**CHAT, "stream": True}),
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", {**CHAT, "n": 3, "stream": True}),
        ("/v1/chat/completions", {**CHAT, "n": 3}),
        ("/v1/completions", {**LONG, "stream": True}),
        ("/v1/completions", {**LONG, "prompt": ["a", "b", "c"], "stream": True}),
        ("/v1/completions", {**LONG, "prompt": ["a", "b", "c"]}),
        ("/generate", {"prompt": "Once", "ignore_eos": True, "max_tokens": None, "stream": True}),
        ("/generate", {"prompt": "Once", "ignore_eos": True, "max_tokens": None}),
        ("/v1/messages", {**CHAT, "max_tokens": 2000, "stream": True}),
        ("/v1/messages", {**CHAT, "max_tokens": 2000}),
        ("/v1/responses", {**ITEMS, "stream": True}),
        ("/v1/responses", ITEMS),
        ("/v1/embeddings", {"model": "tiny", "input": ["word " * 400] * 400}),
        ("/v1/chat/interactive", {"prompt": "Once", "ignore_eos": True, "stream": True}),
        ("/v1/chat/interactive", {"prompt": "Once", "ignore_eos": True}),
    ],
    ids=lambda v: (
        v if isinstance(v, str) else f"n={v.get('n', 1)} prompts={len(v['prompt']) if isinstance(v.get('prompt'), list) else 1} stream={v.get('stream', False)}"
    ),
)
def test_a_client_that_goes_away_frees_its_blocks(route: str, body: dict[str, Any], server: RunningServer) -> None:
    aborted = server.frontend.stats().aborted
    raw = send(server, route, body)
    server.until_busy()
    assert server.frontend.stats().used_blocks > 0
    raw.close()
    server.until_idle(5)
    assert server.frontend.stats().aborted > aborted, "it did not simply finish"


def test_a_waiting_request_leaves_the_queue(server: RunningServer) -> None:
    running = [send(server, "/v1/completions", {**LONG, "stream": True}) for _ in range(16)]
    while server.frontend.stats().running < 16:
        time.sleep(0.02)
    waiting = send(server, "/v1/completions", LONG)
    while not server.frontend.stats().waiting:
        time.sleep(0.02)
    waiting.close()
    deadline = time.monotonic() + 5
    while server.frontend.stats().waiting:
        assert time.monotonic() < deadline, "the waiting request stayed"
        time.sleep(0.02)
    for raw in running:
        raw.close()
    server.until_idle(5)


def test_a_reader_that_stops_reading_holds_nobody_up(server: RunningServer) -> None:
    raw = send(server, "/v1/completions", {**LONG, "stream": True, "logprobs": 20})
    server.until_busy()
    reply = server.http.post("/v1/completions", json={**LONG, "max_tokens": 5})
    assert reply.status_code == 200
    raw.close()
    server.until_idle(5)


def test_many_comings_and_goings_leave_nothing(server: RunningServer) -> None:
    def visit(number: int) -> None:
        raw = send(server, "/v1/chat/completions", {**CHAT, "stream": bool(number % 2), "session_id": 1000 + number})
        time.sleep(0.01 * (number % 7))
        raw.close()

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(48)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.until_idle(10)
    routed = next(line for line in server.http.get("/metrics").text.splitlines() if line.startswith("lmdeploy:num_api_requests_routed{"))
    assert float(routed.split()[-1]) == 0
    again = server.http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 2, "session_id": 1000})
    assert again.status_code == 200, "its session is free"


def test_sixteen_at_once_are_all_answered(server: RunningServer) -> None:
    statuses: list[int] = []

    def ask() -> None:
        reply = httpx.post(f"{server.url}/v1/chat/completions", json={**CHAT, "max_tokens": 20}, timeout=60, trust_env=False)
        statuses.append(reply.status_code)

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 16
    server.until_idle()
