"""Requests as bytes: heads that never end are refused, whatever they are made of; big bodies in small chunks are not."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator

import httpx
import pytest

from lmdeploy.serving.http_protocol import MAX_HEAD
from tests.serving.running import RunningServer

ENDLESS = {
    "request line": (b"GET /", b"a" * 4096),
    "one header": (b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: ", b"a" * 4096),
    "many headers": (b"GET / HTTP/1.1\r\nHost: x\r\n", b"X-A: b\r\n" * 512),
    "chunk extension": (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"a" * 4096),
    "trailers": (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X-A: b\r\n" * 512),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_head_that_never_ends_is_cut_off(server: RunningServer, kind: str) -> None:
    start, more = ENDLESS[kind]
    url = httpx.URL(server.url)
    sent, answer = 0, b""
    with socket.create_connection((url.host, url.port), timeout=20) as sock:
        with contextlib.suppress(OSError):  # the server closes
            sock.sendall(start)
            while sent < 64 * MAX_HEAD:
                sock.sendall(more)
                sent += len(more)
        with contextlib.suppress(OSError):
            answer = sock.recv(4096)
    assert sent < 64 * MAX_HEAD, "the server read megabytes"
    assert not answer or b" 400 " in answer.split(b"\r\n")[0]
    assert server.http.get("/health").status_code == 200


def test_a_head_of_60_000_bytes_is_accepted(server: RunningServer) -> None:
    assert server.http.get("/health", headers={"X-Long": "a" * 60_000}).status_code == 200


def test_a_body_may_come_in_small_chunks(server: RunningServer) -> None:
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 1, "user": "u" * 300_000}).encode()

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(body), 64):
            yield body[start : start + 64]

    reply = server.http.post("/v1/completions", content=chunks(), headers={"Content-Type": "application/json"})
    assert reply.status_code in (200, 400), reply.text
    if reply.status_code == 400:
        assert "user" in reply.text, "the body was read"


def test_requests_on_one_connection_are_counted_one_by_one(server: RunningServer) -> None:
    with httpx.Client(base_url=server.url, trust_env=False) as http:
        assert {http.get("/health", headers={"X-Long": "a" * 40_000}).status_code for _ in range(5)} == {200}
