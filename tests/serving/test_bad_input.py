"""Bad input over HTTP: each gets one clear line and a 4xx, the server goes on, nothing is held afterwards."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.routing import Route

from lmdeploy.serving import admin
from lmdeploy.serving.page import BODIES, EXAMPLES
from tests.serving.running import RunningServer

GOOD = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
ADMIN = {route.path for route in admin.router.routes if isinstance(route, Route)}  # refused without their key, whatever is sent
ROUTES = tuple(path for path in BODIES if path not in ADMIN)


def line(reply: httpx.Response) -> str:
    """The message of an error answer; checks its whole shape."""
    body = reply.json()
    error = body["error"]
    if body.get("type") == "error":  # Anthropic's shape
        assert set(body) == {"type", "error"} and set(error) == {"type", "message"}
        error = {"param": None, "code": None, **error}
        body = {"object": "error", **error}
    assert set(error) == {"message", "type", "param", "code"}
    assert body["object"] == "error"
    assert {k: body[k] for k in error} == error
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 1200
    assert "Traceback" not in reply.text and "/work/" not in error["message"]
    return error["message"]


@pytest.fixture(autouse=True)
def the_server_goes_on(server: RunningServer) -> Iterator[None]:
    yield
    assert server.http.get("/health").status_code == 200
    assert server.http.post("/v1/chat/completions", json=GOOD).status_code == 200
    server.until_idle()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"temperature": -0.1}, ["temperature", "0", "-0.1"]),
        ({"temperature": 2.1}, ["temperature", "2", "2.1"]),
        ({"temperature": "hot"}, ["temperature", "hot"]),
        ({"top_p": 1.1}, ["top_p", "1.1"]),
        ({"top_p": 0}, ["top_p", "0"]),
        ({"top_k": -1}, ["top_k", "-1"]),
        ({"min_p": 2}, ["min_p", "2"]),
        ({"repetition_penalty": 0}, ["repetition_penalty", "0"]),
        ({"presence_penalty": 3}, ["presence_penalty", "3"]),
        ({"max_tokens": 0}, ["max_tokens", "0"]),
        ({"max_tokens": -5}, ["max_tokens", "-5"]),
        ({"max_tokens": 10**30}, ["max_tokens"]),
        ({"max_tokens": 1.5}, ["max_tokens", "1.5"]),
        ({"max_tokens": True}, ["max_tokens", "True"]),
        ({"n": 1000}, ["n:", "128", "1000"]),
        ({"n": 0}, ["n:", "0"]),
        ({"messages": []}, ["messages", "empty"]),
        ({"messages": [{}]}, ["messages.0.role", "required"]),
        ({"messages": [{"role": "wizard", "content": "x"}]}, ["messages.0.role", "wizard", "user"]),
        ({"messages": [{"role": "user", "content": 5}]}, ["messages.0.content", "5"]),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, ["messages.0.colour"]),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, ["messages.0.content.0", "image_url"]),
        ({"messages": 3}, ["messages", "3"]),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, ["context length", "2048"]),
        ({"stop": ["x"] * 10_000}, ["stop", "64"]),
        ({"stop": ["x" * 2000]}, ["stop.0", "1000"]),
        ({"stop": [""]}, ["stop.0"]),
        ({"stop": {"a": 1}}, ["stop"]),
        ({"top_logprobs": 21, "logprobs": True}, ["top_logprobs", "20"]),
        ({"top_logprobs": 2}, ["top_logprobs", "logprobs"]),
        ({"logit_bias": {"cat": 1}}, ["logit_bias", "cat"]),
        ({"logit_bias": {"5": 101}}, ["logit_bias", "100"]),
        ({"logit_bias": {"999999": 1}}, ["logit_bias", "999999", "5120"]),
        ({"stop_token_ids": [-1]}, ["stop_token_ids.0"]),
        ({"seed": "x"}, ["seed"]),
        ({"stream": "yes"}, ["stream", "yes"]),
        ({"stream_options": {"include": True}}, ["stream_options.include"]),
        ({"session_id": -2}, ["session_id", "-2"]),
        ({"temprature": 0.5}, ["temprature", "temperature"]),
        ({"max_new_token": 5}, ["max_new_token"]),
        ({"functions": [{"name": "f"}]}, ["functions", "not available"]),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, ["tools.0.function.name", "a b"]),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 7}}]}, ["tools.0.function.parameters"]),
        ({"tools": [{"type": "retrieval"}]}, ["tools.0.type", "retrieval", "code_interpreter"]),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, ["tools.1", "twice"]),
        ({"tool_choice": "required"}, ["tool_choice", "needs tools"]),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "some"}, ["tool_choice", "some"]),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": {"type": "function", "function": {"name": "g"}}}, ["tool_choice", "'g'"]),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "messages": "raw text"}, ["tools", "conversation"]),
        ({"response_format": {"type": "yaml"}}, ["response_format", "yaml"]),
        ({"guided_regex": "a", "guided_choice": ["a"]}, ["guided_"]),
        ({"input_ids": [1, 2]}, ["input_ids", "messages"]),
        ({"user": "x" * 5000}, ["user"]),
        ({"model": 5}, ["model", "5"]),
        ({"model": None}, ["model"]),
        ({"bad_words": [1]}, ["bad_words.0"]),
    ],
    ids=lambda v: str(v)[:60],
)
def test_each_bad_field_gets_one_line_that_names_it(changes: dict[str, Any], words: list[str], server: RunningServer) -> None:
    reply = server.http.post("/v1/chat/completions", json={**GOOD, **changes})
    assert reply.status_code == 400, reply.text
    message = line(reply)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"5",
        b'"x"',
        b"\xff\xfe{}",
        b'{"model": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"prompt": "\\ud800", "model": "tiny"}',
        b"{}",
    ],
    ids=lambda b: repr(b[:20]),
)
def test_bodies_that_are_no_request_are_refused_on_every_route(route: str, body: bytes, server: RunningServer) -> None:
    reply = server.http.post(route, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    line(reply)


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_numbers_that_are_none_are_refused(number: bytes, server: RunningServer) -> None:
    reply = server.http.post("/v1/chat/completions", content=json.dumps(GOOD).encode()[:-1] + b', "temperature": ' + number + b"}")
    assert reply.status_code == 400
    assert "temperature" in line(reply)


def test_a_ten_megabyte_prompt_is_refused_at_once(server: RunningServer) -> None:
    reply = server.http.post("/v1/chat/completions", json={**GOOD, "messages": [{"role": "user", "content": "a" * 10_000_000}]})
    assert reply.status_code == 400
    assert "context length" in line(reply)
    assert reply.elapsed.total_seconds() < 5


def test_a_body_over_the_limit_is_413(server: RunningServer) -> None:
    huge = json.dumps({**GOOD, "messages": "a" * (17 << 20)}).encode()
    announced = server.http.post("/v1/chat/completions", content=huge)
    assert announced.status_code == 413
    assert "max_body_mib=16" in line(announced)
    chunked = httpx.post(f"{server.url}/v1/completions", content=(huge[i : i + 65536] for i in range(0, len(huge), 65536)), timeout=30, trust_env=False)
    assert chunked.status_code == 413


def test_another_content_type_is_refused(server: RunningServer) -> None:
    reply = server.http.post("/v1/chat/completions", content=json.dumps(GOOD), headers={"content-type": "text/plain"})
    assert reply.status_code == 400
    assert "application/json" in line(reply)


def test_unknown_routes_models_and_methods_have_the_same_shape(server: RunningServer) -> None:
    for reply, status in (
        (server.http.get("/v1/nothing"), 404),
        (server.http.delete("/v1/models"), 405),
        (server.http.get("/v1/models/other"), 404),
        (server.http.post("/v1/chat/completions", json={**GOOD, "model": "other"}), 404),
        (server.http.get("/static/../app.py"), 404),
        (server.http.get("/static/%2e%2e/app.py"), 404),
    ):
        assert reply.status_code == status
        line(reply)


def test_bytes_that_are_no_http_do_not_disturb(server: RunningServer) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for data in (b"\x00" * 1000, b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: -1\r\n\r\n", b"GET /" + b"a" * 200_000):
        with socket.create_connection((host, int(port)), timeout=5) as raw:
            try:
                raw.sendall(data)
                raw.shutdown(socket.SHUT_WR)
                answer = raw.recv(1000)
            except OSError:  # the server has closed it already
                answer = b""
            assert answer == b"" or answer.startswith(b"HTTP/1.1 ")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)
#: fields that say how long an answer is; they stay as they are, or an answer may take as long as the context
LENGTHS = {"max_tokens", "max_completion_tokens", "max_output_tokens", "request_output_len"}
FIELDS = [(route, field) for route in ROUTES for field in sorted(set(BODIES[route].model_fields) - LENGTHS)]


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(FIELDS), value=json_values)
def test_any_value_of_any_field_of_any_route_is_obeyed_or_refused_with_a_line(server: RunningServer, place: tuple[str, str], value: Any) -> None:
    route, field = place
    body = {**EXAMPLES[BODIES[route]], **dict.fromkeys(LENGTHS & set(BODIES[route].model_fields), 1)}
    body = {name: "tiny" if given == "MODEL" else given for name, given in body.items()}
    reply = server.http.post(route, json={**body, field: value})
    assert reply.status_code in ((200, 400, 404) if field == "model" else (200, 400)), (route, field, value, reply.text)
    if reply.status_code != 200:
        line(reply)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    route=st.sampled_from(ROUTES),
    body=st.dictionaries(
        st.sampled_from(["model", "prompt", "messages", "input", "input_ids", "n", "stop", "session_id", "system", "tools", "tokens"]), json_values
    ),
)
def test_random_objects_never_break_a_route(server: RunningServer, route: str, body: dict[str, Any]) -> None:
    lengths = dict.fromkeys(LENGTHS & set(BODIES[route].model_fields), 1)
    reply = server.http.post(route, json={**body, **lengths})
    assert reply.status_code in (200, 400, 404), (body, reply.text)
