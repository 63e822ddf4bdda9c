"""Clients that are slow, silent or greedy: each is cut off, and nobody else notices."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from lmdeploy.serving.connections import MAX_PIPELINED
from lmdeploy.serving.options import ServerConfig
from tests.serving.running import RunningServer

LONG = {"model": "tiny", "prompt": "Once upon a time", "ignore_eos": True, "temperature": 0}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def strict(frontend: Any) -> Iterator[RunningServer]:
    """A server that waits for nobody."""
    options: dict[str, Any] = {"receive_timeout": 1.0, "send_timeout": 1.0, "keep_alive_seconds": 1.0, "max_connections": 12}
    running = RunningServer(frontend, ServerConfig(server_port=0, model_name="tiny", **options))
    yield running
    running.stop()


def connect(server: RunningServer, receive_buffer: int = 0) -> socket.socket:
    url = httpx.URL(server.url)
    raw = socket.socket()
    if receive_buffer:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    raw.settimeout(20)
    raw.connect((url.host, url.port))
    return raw


def read_all(raw: socket.socket) -> bytes:
    """Until the server closes."""
    data = b""
    try:
        while part := raw.recv(1 << 16):
            data += part
    except ConnectionError:
        pass
    return data


def test_headers_that_do_not_come_are_408(strict: RunningServer) -> None:
    with connect(strict) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        assert read_all(raw).startswith(b"HTTP/1.1 408 ")


def test_headers_that_drip_are_408_too(strict: RunningServer) -> None:
    began = time.monotonic()
    with connect(strict) as raw:
        raw.settimeout(0.2)
        answer = b""
        while not answer and time.monotonic() - began < 15:
            raw.sendall(b"G" if not answer else b"")
            try:
                answer = raw.recv(1000)
            except TimeoutError:
                continue
        assert answer.startswith((b"HTTP/1.1 408 ", b"HTTP/1.1 400 ")), answer


def test_a_silent_connection_is_closed(strict: RunningServer) -> None:
    with connect(strict) as raw:
        assert read_all(raw) == b""


def test_an_idle_connection_is_closed_after_its_answer(strict: RunningServer) -> None:
    with connect(strict) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_all(raw).startswith(b"HTTP/1.1 200 ")


def test_a_body_that_does_not_come_is_408(strict: RunningServer) -> None:
    with connect(strict) as raw:
        raw.sendall(HEAD + b'Content-Length: 1000\r\n\r\n{"model": ')
        answer = read_all(raw)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"receive_timeout" in answer


def test_a_body_that_makes_progress_is_waited_for(strict: RunningServer) -> None:
    body = json.dumps({**LONG, "prompt": "a " * 500, "max_tokens": 1, "user": "x" * 900}).encode() + b" " * 20_000
    with connect(strict) as raw:
        raw.sendall(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body))
        for start in range(0, len(body), 2500):  # over about 2.5 s, more than receive_timeout
            raw.sendall(body[start : start + 2500])
            time.sleep(0.27)
        assert read_all(raw).startswith(b"HTTP/1.1 200 ")


def test_a_reader_that_stops_reading_is_cut_off_and_its_blocks_are_free(strict: RunningServer) -> None:
    aborted = strict.frontend.stats().aborted
    body = json.dumps({**LONG, "n": 16, "logprobs": 20, "stream": True}).encode()
    with connect(strict, receive_buffer=4096) as raw:
        raw.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        strict.until_busy()
        deadline = time.monotonic() + 40
        while strict.frontend.stats().aborted < aborted + 16:
            assert time.monotonic() < deadline, "the request went on for nobody"
            time.sleep(0.1)
        strict.until_idle()
        answer = read_all(raw)
    assert b"[DONE]" not in answer
    assert strict.http.get("/health").status_code == 200


def test_more_connections_than_allowed_are_refused(strict: RunningServer) -> None:
    held = [connect(strict) for _ in range(12)]
    try:
        for raw in held:
            raw.sendall(b"G")
        with connect(strict) as raw:
            answer = read_all(raw)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"retry-after: " in answer and b"too many connections" in answer
    finally:
        for raw in held:
            raw.close()
    deadline = time.monotonic() + 10
    while True:
        try:
            assert strict.http.get("/health").status_code == 200
            break
        except (httpx.HTTPError, AssertionError):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_requests_ahead_of_their_answers_are_bounded(serve: Callable[..., RunningServer]) -> None:
    server = serve()
    request = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with connect(server) as raw:
        raw.sendall(request * 5 + b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert read_all(raw).count(b"HTTP/1.1 200 ") == 6
    with connect(server) as raw:
        raw.sendall(request * (MAX_PIPELINED * 3))
        assert read_all(raw).count(b"HTTP/1.1 ") <= MAX_PIPELINED + 1
    assert server.http.get("/health").status_code == 200


def test_a_client_that_leaves_the_servers_queue_is_forgotten(serve: Callable[..., RunningServer]) -> None:
    server = serve(max_concurrent_requests=1)
    running, waiting = connect(server), connect(server)
    body = json.dumps({**LONG, "stream": True}).encode()
    for raw in (running, waiting):
        raw.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        server.until_busy()
        time.sleep(0.1)
    places = server.app.state.service.admission
    assert (places.running, places.waiting) == (1, 1)
    waiting.close()
    deadline = time.monotonic() + 10
    while places.waiting:
        assert time.monotonic() < deadline, "it still waits for its turn"
        time.sleep(0.01)
    assert places.running == 1
    running.close()
    server.until_idle()
