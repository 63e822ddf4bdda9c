"""POST /v1/chat/interactive: the server keeps the conversation."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import httpx

from lmdeploy.serving.call import ANYBODY
from lmdeploy.serving.interactive import Conversation, Conversations
from tests.serving.running import RunningServer


def say(server: RunningServer, prompt: str, **fields: Any) -> httpx.Response:
    return server.http.post("/v1/chat/interactive", json={"prompt": prompt, "temperature": 0, "request_output_len": 24, **fields})


def test_a_kept_session_remembers(server: RunningServer) -> None:
    first = say(server, "Count from 1 to 5.", session_id=5, interactive_mode=True).json()
    assert "1, 2, 3, 4, 5" in first["text"]
    assert first["history_tokens"] == 0
    second = say(server, "Count from 1 to 3.", session_id=5, interactive_mode=True).json()
    assert second["history_tokens"] == first["input_tokens"] + first["tokens"]
    assert second["input_tokens"] > 0
    last = say(server, "Hi", session_id=5).json()
    assert last["history_tokens"] > second["history_tokens"]
    assert say(server, "Hi", session_id=5).json()["history_tokens"] == 0, "interactive_mode false ended it"


def test_an_empty_prompt_ends_the_session(server: RunningServer) -> None:
    say(server, "Hello", session_id=6, interactive_mode=True)
    ended = say(server, "", session_id=6, request_output_len=0)
    assert (ended.status_code, ended.json()["text"], ended.json()["finish_reason"]) == (200, "", "stop")
    assert say(server, "Hello", session_id=6).json()["history_tokens"] == 0


def test_a_stream_is_one_object_a_line(server: RunningServer) -> None:
    whole = say(server, "Count from 1 to 5.").json()
    lines = [json.loads(line) for line in say(server, "Count from 1 to 5.", stream=True).text.splitlines()]
    assert "".join(line["text"] for line in lines) == whole["text"]
    assert lines[-1]["finish_reason"] == whole["finish_reason"]
    assert lines[-1]["tokens"] == whole["tokens"]


def test_cancel_stops_the_answer_and_keeps_the_session(server: RunningServer) -> None:
    answers: list[dict[str, Any]] = []
    fields = {"session_id": 8, "interactive_mode": True, "ignore_eos": True, "request_output_len": 1500}
    thread = threading.Thread(target=lambda: answers.append(say(server, "Tell me a story.", **fields).json()))
    thread.start()
    server.until_busy()
    assert say(server, "x", session_id=8).status_code == 409, "busy"
    assert say(server, "", session_id=8, cancel=True).json()["finish_reason"] == "stop"
    thread.join(10)
    assert answers[0]["finish_reason"] == "stop"
    assert 0 < answers[0]["tokens"] < 1500
    server.until_idle()
    assert say(server, "Hi", session_id=8).json()["history_tokens"] > 0


def test_refusals_leave_the_session_as_it_was(server: RunningServer) -> None:
    say(server, "Hello", session_id=9, interactive_mode=True)
    for fields in (
        {"prompt": "word " * 3000},
        {"prompt": ""},
        {"prompt": "x", "temperature": 5},
        {"prompt": "x", "cancel": True, "session_id": -1},
        {"prompt": "x", "image_url": "y"},
    ):
        assert server.http.post("/v1/chat/interactive", json={"session_id": 9, "interactive_mode": True, **fields}).status_code == 400, fields
    assert say(server, "Hi", session_id=9).json()["history_tokens"] > 0


def test_only_so_many_sessions_are_kept(serve: Callable[..., RunningServer]) -> None:
    server = serve(max_sessions=2)
    for session_id in (1, 2, 3):
        say(server, "Hello", session_id=session_id, interactive_mode=True)
    assert say(server, "Hi", session_id=1).json()["history_tokens"] == 0, "the oldest was forgotten"


def test_new_ids_are_never_in_use() -> None:
    sessions = Conversations(10)
    sessions.keep((ANYBODY, 1), Conversation())
    assert sessions.new_id() == 2
    assert sessions.new_id() == 3


def test_refused_requests_make_no_sessions(serve: Callable[..., RunningServer]) -> None:
    server = serve(max_sessions=2)
    say(server, "Hello", session_id=1, interactive_mode=True)
    for session_id in range(10, 15):
        assert say(server, "", session_id=session_id, interactive_mode=True).status_code == 400
        assert say(server, "word " * 3000, session_id=session_id, interactive_mode=True).status_code == 400
    assert say(server, "Hi", session_id=1).json()["history_tokens"] > 0


def test_a_key_with_many_sessions_makes_room_of_its_own(serve: Callable[..., RunningServer]) -> None:
    server = serve(max_sessions=3, api_key_lines=["a:key-a", "b:key-b"])

    def talk(key: str, session_id: int, **fields: Any) -> int:
        body = {"prompt": "Hi", "session_id": session_id, "request_output_len": 2, **fields}
        return int(server.http.post("/v1/chat/interactive", json=body, headers={"x-api-key": key}).json()["history_tokens"])

    talk("key-a", 1, interactive_mode=True)
    for session_id in range(1, 8):
        talk("key-b", session_id, interactive_mode=True)
    assert talk("key-a", 1) > 0, "another key's sessions take none of its own"
    assert talk("key-b", 7) > 0 and talk("key-b", 6) > 0 and talk("key-b", 5) == 0
