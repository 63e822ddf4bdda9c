"""The gate: ids, the access log, time limits, refusals with the time to come back, and failures that tell nothing."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from lmdeploy import log
from tests.serving.running import RunningServer

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Count from 1 to 5."}], "temperature": 0, "max_tokens": 8}
LONG: dict[str, Any] = {"model": "tiny", "prompt": "Once upon a time", "ignore_eos": True, "temperature": 0}


class Records(logging.Handler):
    """Keeps the records of the access log."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record)

    def about(self, server_id: str) -> dict[str, Any]:
        """The fields of the line of a request; waits for it, for it comes after the answer."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            for record in self.kept:
                fields = getattr(record, "fields", {})
                if fields.get("id") == server_id:
                    return dict(fields)
            time.sleep(0.01)
        raise AssertionError(f"no line of {server_id}")


@pytest.fixture
def access() -> Iterator[Records]:
    logger, records = logging.getLogger("lmdeploy.access"), Records()
    level = logger.level
    logger.addHandler(records)
    logger.setLevel(logging.INFO)
    yield records
    logger.removeHandler(records)
    logger.setLevel(level)


def own_id(reply: httpx.Response) -> str:
    return reply.headers["x-lmdeploy-id"]


@pytest.mark.parametrize("sent", ["abc-123", "req_0.1:x", "a" * 128, "00000000-0000-0000-0000-000000000000"])
def test_a_well_formed_request_id_is_repeated_and_never_used(sent: str, server: RunningServer, access: Records) -> None:
    replies = [server.http.get("/v1/models", headers={"X-Request-Id": sent}) for _ in range(2)]
    assert [r.headers["x-request-id"] for r in replies] == [sent, sent]
    assert len({own_id(r) for r in replies} | {sent}) == 3, "our own ids differ from it and from each other"
    assert access.about(own_id(replies[0]))["client_id"] == sent


@pytest.mark.parametrize("sent", [b"", b" ", b"a" * 129, b"a b", b"a\tb", b"<script>", b"\xff\xfe", b"a;b", b"../../etc", b"$(id)"])
def test_any_other_request_id_is_replaced(sent: bytes, server: RunningServer) -> None:
    reply = server.http.get("/v1/models", headers={"X-Request-Id": sent} if sent.strip() else {})
    assert reply.headers["x-request-id"] == own_id(reply)
    assert re.fullmatch("[0-9a-f]{16}", own_id(reply))


def test_a_line_of_the_log_tells_everything_but_secrets(serve: Callable[..., RunningServer], access: Records) -> None:
    server = serve(api_key_lines=["team-a:sesame"])
    key = {"Authorization": "Bearer sesame"}
    reply = server.http.post("/v1/chat/completions?secret=1", json=CHAT, headers=key)
    line = access.about(own_id(reply))
    usage = reply.json()["usage"]
    assert line["key"] == "team-a" and line["method"] == "POST" and line["path"] == line["route"] == "/v1/chat/completions"
    assert (line["status"], line["prompt_tokens"], line["completion_tokens"]) == (200, usage["prompt_tokens"], usage["completion_tokens"])
    assert 0 <= line["queue_seconds"] <= line["ttft_seconds"] <= line["seconds"] < 30
    assert line["finish_reasons"] == ["length"] and line["client"].startswith("127.0.0.1:")
    refused = access.about(own_id(server.http.get("/v1/models", headers={"x-api-key": "guess"})))
    assert (refused["status"], refused["key"], refused["error"]) == (401, "-", "invalid_api_key")
    everything = " ".join(f"{r.getMessage()} {r.__dict__}" for r in access.kept)
    for secret in ("sesame", "guess", "secret", "Count"):
        assert secret not in everything
    assert "key=team-a" in everything and "tokens=" in everything


def test_a_stream_is_told_when_it_ends(server: RunningServer, access: Records) -> None:
    with server.http.stream("POST", "/v1/chat/completions", json={**CHAT, "n": 2, "stream": True}) as reply:
        reply.read()
    line = access.about(own_id(reply))
    assert (line["completion_tokens"], line["finish_reasons"], line["status"]) == (16, ["length", "length"], 200)
    with server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as reply:
        pieces = reply.iter_bytes()
        next(pieces)
    line = access.about(own_id(reply))
    assert line["finish_reasons"] == [] and line["completion_tokens"] >= 1, "given up by its client"
    server.until_idle()


def test_json_lines_are_json(capsys: pytest.CaptureFixture[str], server: RunningServer, access: Records) -> None:
    logger = logging.getLogger("lmdeploy")
    handlers, logger.handlers, level = logger.handlers, [], logger.level
    try:
        log.setup("INFO", "json")
        reply = server.http.get("/v1/models", headers={"X-Request-Id": "abc"})
        access.about(own_id(reply))
        logger.warning('quotes " and\nnewlines')
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    finally:
        logger.handlers, level = handlers, logger.setLevel(level)  # type: ignore[func-returns-value]
    (line,) = [entry for entry in lines if entry.get("id") == own_id(reply)]
    assert (line["path"], line["status"], line["client_id"], line["level"]) == ("/v1/models", 200, "abc", "INFO")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert lines[-1]["message"] == 'quotes " and\nnewlines'


# ---------------------------------------------------------------------- time


@pytest.mark.parametrize("route, body", [("/v1/completions", LONG), ("/v1/chat/completions", {**CHAT, "max_tokens": None, "ignore_eos": True})])
def test_at_the_time_limit_an_answer_is_504_and_its_blocks_are_free(route: str, body: dict[str, Any], serve: Callable[..., RunningServer]) -> None:
    server = serve(request_timeout=0.4)
    aborted = server.frontend.stats().aborted
    began = time.monotonic()
    reply = server.http.post(route, json={**body, "n": 4})
    assert reply.status_code == 504 and reply.json()["error"]["code"] == "timeout"
    assert reply.headers["x-should-retry"] == "false", "the clients' libraries would send it again"
    assert time.monotonic() - began < 10
    server.until_idle()
    assert server.frontend.stats().aborted >= aborted + 4


def test_at_the_time_limit_a_stream_ends_with_an_error_event(serve: Callable[..., RunningServer]) -> None:
    server = serve(request_timeout=0.8)
    for body in ({**LONG, "stream": True}, {**LONG, "n": 3, "stream": True}, {**LONG, "prompt": ["a", "b"], "stream": True}):
        for _ in range(10):
            reply = server.http.post("/v1/completions", json=body)
            if reply.status_code == 200:  # else the machine was too busy to begin it in time, which is a plain 504
                break
        assert reply.status_code == 200
        events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
        assert events[-1] == "[DONE]" and len(events) >= 3
        assert json.loads(events[-2])["error"]["code"] == "timeout"
        server.until_idle()


def test_waiting_counts_for_the_time_limit(serve: Callable[..., RunningServer]) -> None:
    server = serve(request_timeout=0.6, max_concurrent_requests=1)
    with server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as running:
        pieces = running.iter_bytes()
        next(pieces)
        reply = server.http.post("/v1/completions", json=LONG)
        assert reply.status_code in (503, 504), "refused while it waits, or cut short when its turn has come"
        assert reply.json()["error"]["code"] in ("queue_timeout", "timeout")
    server.until_idle()


# ---------------------------------------------------------------------- places


def test_a_full_queue_is_503_with_the_time_to_come_back(serve: Callable[..., RunningServer]) -> None:
    server = serve(max_concurrent_requests=1, max_queue=1)
    replies: list[httpx.Response] = []
    places = server.app.state.service.admission
    threads = [threading.Thread(target=lambda: replies.append(server.http.post("/v1/completions", json={**LONG, "max_tokens": 200}))) for _ in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while not places.full:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    refused = server.http.post("/v1/completions", json=LONG)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    busy = server.http.get("/ready")
    assert busy.status_code == 503 and "queue is full" in busy.json()["message"] and int(busy.headers["retry-after"]) >= 1
    assert server.http.get("/health").status_code == 200, "busy is not broken"
    for thread in threads:
        thread.join()
    assert [r.status_code for r in replies] == [200, 200]
    assert server.http.get("/ready").json()["status"] == "ready"
    assert server.http.head("/ready").status_code == server.http.head("/health").status_code == 200


def test_a_key_has_its_share_and_no_more(serve: Callable[..., RunningServer]) -> None:
    server = serve(api_key_lines=["a:ka", "b:kb"], max_concurrent_per_key=2)
    streams = [server.http.build_request("POST", "/v1/completions", json={**LONG, "stream": True}, headers={"x-api-key": "ka"}) for _ in range(2)]
    opened = [server.http.send(request, stream=True) for request in streams]
    third = server.http.post("/v1/completions", json=LONG, headers={"x-api-key": "ka"})
    assert (third.status_code, third.json()["error"]["code"]) == (429, "key_limit")
    assert int(third.headers["retry-after"]) >= 1
    assert server.http.post("/v1/completions", json={**LONG, "max_tokens": 2}, headers={"x-api-key": "kb"}).status_code == 200
    for stream in opened:
        stream.close()
    server.until_idle()
    assert server.http.post("/v1/completions", json={**LONG, "max_tokens": 2}, headers={"x-api-key": "ka"}).status_code == 200


# ---------------------------------------------------------------------- failures


def test_what_nobody_foresaw_is_a_500_with_an_id_and_no_details(serve: Callable[..., RunningServer], access: Records) -> None:
    server = serve()

    async def broken(request: Request) -> None:
        raise ZeroDivisionError("private detail")

    server.app.add_api_route("/broken", broken)
    reply = server.http.get("/broken")
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "internal_error" and "private" not in reply.text
    assert access.about(own_id(reply))["status"] == 500


# ---------------------------------------------------------------------- what waits for no place


def test_what_ends_an_answer_or_needs_no_engine_does_not_wait_for_a_place(serve: Callable[..., RunningServer]) -> None:
    server = serve(max_concurrent_requests=1, max_queue=0, enable_abort_handling=True)
    post = server.http.post
    # with no queue, whatever needs a place is refused as long as the answer runs
    with server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True, "session_id": 4}) as running:
        lines = running.iter_lines()
        next(lines)
        for path, body in {
            "/tokenize": {"prompt": "a b"},
            "/detokenize": {"tokens": [1, 2]},
            "/v1/encode": {"input": "a b"},
            "/v1/messages/count_tokens": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]},
            "/anthropic/v1/messages/count_tokens": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]},
        }.items():
            assert post(path, json=body).status_code == 200, path
        turn = {"prompt": "Hi", "session_id": 4}
        assert post("/v1/chat/interactive", json={**turn, "cancel": True}).status_code == 200
        assert post("/v1/chat/interactive", json={**turn, "session_id": 5}).status_code == 503, "an answer needs a place"
        assert post("/v1/chat/interactive", json={**turn, "prompt": "x" * (64 << 10), "cancel": True}).status_code == 503, "a large body is not read first"
        assert post("/v1/completions", json=LONG).status_code == 503, "it is still running"
        assert post("/abort_request", json={"session_id": 4}).json()["aborted"] == 1
        assert [line for line in lines if line][-1] == "data: [DONE]"
    server.until_idle()
    places, deadline = server.app.state.service.admission, time.monotonic() + 10
    while places.running:  # the client has read the last line, perhaps before the server knows that it is sent
        assert time.monotonic() < deadline, "the answer still has its place"
        time.sleep(0.01)
    assert post("/v1/chat/interactive", json=turn).status_code == 200


def test_a_route_that_waits_by_itself_gives_its_place_back(serve: Callable[..., RunningServer]) -> None:
    server = serve(max_concurrent_requests=1, max_queue=0)
    turn = {"prompt": "Hi", "request_output_len": 2}
    for body, status in ((turn, 200), ({**turn, "stream": True}, 200), ({**turn, "prompt": "word " * 3000}, 400), (turn, 200)):
        assert server.http.post("/v1/chat/interactive", json=body).status_code == status
        deadline = time.monotonic() + 5
        while server.app.state.service.admission.running:
            assert time.monotonic() < deadline, "the place was not given back"
            time.sleep(0.005)
    big = server.http.post("/abort_request", content=b" " * (64 << 10), headers={"authorization": "Bearer x"})
    assert big.status_code in (401, 403), "not opened to clients: an admin route as ever"


@pytest.mark.parametrize("trusted, client", [(None, "127.0.0.1"), (["10.0.0.0/8"], "127.0.0.1"), (["127.0.0.0/8", "::1"], "6.6.6.6")])
def test_only_a_named_proxy_says_whose_request_it_is(trusted: list[str] | None, client: str, serve: Callable[..., RunningServer], access: Records) -> None:
    """Else any local program could take others' addresses, in the log and in the queue where keys and addresses take turns."""
    server = serve(forwarded_allow_ips=trusted)
    reply = server.http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 1}, headers={"X-Forwarded-For": "5.5.5.5, 6.6.6.6"})
    assert reply.status_code == 200
    assert access.about(own_id(reply))["client"].rpartition(":")[0] == client
