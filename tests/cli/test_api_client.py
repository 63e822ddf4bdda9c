"""`serve api_client` against servers that come and go, are busy, or say more than text: a real one under a pseudo-terminal, and a scripted one."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pexpect
import psutil
import pytest

from lmdeploy.cli import api_client
from lmdeploy.cli.api_client import RemoteModel
from lmdeploy.cli.terminal import PROMPT, Anew, Aside, Conversation, Screen
from lmdeploy.errors import LmdeployError, RequestError
from lmdeploy.messages import Response
from lmdeploy.serving.client import APIClient, ServerBusy, ServerNotReady, Unreachable

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "LC_ALL": "C.UTF-8"}
LMDEPLOY = [sys.executable, "-m", "lmdeploy"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


# -- a real server that is killed and started again --------------------------------------------------------------------


class RealServer:
    """`api_server` on a fixed port, as often as it is started."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin to start; does not wait."""
        small = ["--cache-max-entry-count", "100", "--max-prefill-token-num", "256", "--dtype", "float32"]
        flags = ["--server-port", str(self.port), *small, "--model-name", "tiny", "--api-keys", "sesame"]
        log = (self.folder / f"log{time.monotonic_ns()}").open("wb")
        self.process = subprocess.Popen([*LMDEPLOY, "serve", "api_server", *flags], stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT, cwd=ROOT)

    def kill(self) -> None:
        """At once, with everything it started, as when the machine is switched off."""
        assert self.process is not None
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for member in family:
            member.kill()
        psutil.wait_procs(family, 10)
        self.process.wait(10)

    def running(self) -> int:
        """Requests that the server computes now."""
        text = httpx.get(f"{self.url}/metrics", headers={"Authorization": "Bearer sesame"}, timeout=10, trust_env=False).text
        found = re.search(r"^lmdeploy:num_requests_running(?:\{[^}]*\})? (\d+)", text, re.MULTILINE)
        assert found, text[:2000]
        return int(found[1])


@pytest.fixture
def real(tmp_path: Path) -> Iterator[RealServer]:
    server = RealServer(tmp_path)
    yield server
    if server.process is not None and server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(30)


def terminal(url: str, *flags: str) -> Any:
    """The client under a pseudo-terminal, its key in the environment."""
    return pexpect.spawn(
        sys.executable, ["-m", "lmdeploy", "serve", "api_client", url, "--greedy", *flags],
        env={**ENVIRONMENT, "LMDEPLOY_API_KEY": "sesame"}, encoding="utf-8", timeout=60, dimensions=(40, 160), cwd=str(ROOT),
    )  # fmt: skip


def leave(child: Any) -> None:
    child.send("exit\r")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_conversation_outlives_its_server(real: RealServer) -> None:
    child = terminal(real.url)
    child.expect_exact("no answer from " + real.url)
    child.expect(r"trying again in \d+ s \(Ctrl-C stops waiting\)")
    real.start()
    child.expect_exact("talking with tiny")
    child.expect_exact(PROMPT)
    child.send("My name is Ann.\r\r")
    child.expect(r"\[\d+ tokens")
    child.expect_exact(PROMPT)
    real.kill()
    child.send("What is my name?\r\r")
    child.expect_exact("no answer from")
    child.expect("trying again")
    child.sendintr()  # stops the waiting, not the program
    child.expect_exact("type `again` to repeat the question")
    child.expect_exact(PROMPT)
    child.send("again\r\r")
    child.expect("trying again")  # it has asked in vain: a server that listens already would have been waited for without a word
    real.start()
    child.expect_exact("connected again")
    child.expect("Ann")  # the history was kept on this side
    child.expect(r"\[\d+ tokens")
    leave(child)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_an_answer_that_breaks_off_begins_anew_and_one_that_is_stopped_is_freed(real: RealServer) -> None:
    real.start()
    child = terminal(real.url, "--ignore-eos", "--max-new-tokens", "1500")
    child.expect_exact("talking with tiny")
    child.expect_exact(PROMPT)
    child.send("Tell me a story about a dog.\r\r")
    child.expect_exact("dog.")  # the echo
    child.expect(r"[a-z]+ [a-z]+ [a-z]+ [a-z]+")
    real.kill()
    child.expect("no answer from|in the middle of the answer")
    real.start()
    child.expect_exact("the answer begins anew")
    child.expect(r"[a-z]+ [a-z]+ [a-z]+ [a-z]+")
    child.sendintr()
    child.expect(r"\[\d+ tokens.*stopped\]")
    child.expect_exact(PROMPT)
    deadline = time.monotonic() + 20
    while real.running():
        assert time.monotonic() < deadline, "the server still computes what nobody reads"
        time.sleep(0.1)
    leave(child)


@pytest.mark.timeout(60)
def test_ctrl_c_at_the_first_waiting_leaves() -> None:
    child = terminal(f"http://127.0.0.1:{free_port()}")
    child.expect("trying again")
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130


# -- a scripted server ---------------------------------------------------------------------------------------------------


Reply = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers GET with the list of models, POST with the next of the script."""

    def do_GET(self) -> None:
        self.answer(200, json.dumps({"data": [{"id": name} for name in self.script.models]}))

    def do_POST(self) -> None:
        self.script.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.script.replies.pop(0)(self)

    def answer(self, status: int, body: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass

    @property
    def script(self) -> Script:
        assert isinstance(self.server, Script)
        return self.server


class Script(HTTPServer):
    """What it will say, and what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models, self.replies, self.bodies = ["first", "second"], list[Reply](), list[dict[str, Any]]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def script() -> Iterator[Script]:
    server = Script()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join(5)
    server.server_close()


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting that does not slow the tests; the terminal tests are processes of their own."""
    monkeypatch.setattr(api_client, "BACK_OFF", (0.01,))


def refuse(status: int, message: str, code: str | None = None, **headers: str) -> Reply:
    return lambda handler: handler.answer(status, json.dumps({"error": {"message": message, "code": code}}), **headers)


def stream(*deltas: dict[str, Any], finish: str | None = "stop") -> Reply:
    """Events of a stream; without `finish` it breaks off."""
    events = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    events += [{"choices": [{"delta": {}, "finish_reason": finish}]}] if finish else []
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + ("data: [DONE]\n\n" if finish else "")
    return lambda handler: handler.answer(200, body, Content_Type="text/event-stream")


class Output(io.StringIO):
    """What the terminal would show."""


def open_model(script: Script, *, patient: bool = True, model: str | None = None) -> tuple[RemoteModel, Output]:
    output = Output()
    remote = RemoteModel(APIClient(script.url), Screen(output, output), {}, patient=patient, model=model)
    remote.connect()
    return remote, output


def ask(remote: RemoteModel) -> tuple[str, list[object]]:
    """(the answer as the conversation keeps it, everything that came)."""
    items = list(remote([{"role": "user", "content": "Hi"}]))
    anew = max([i for i, item in enumerate(items) if isinstance(item, Anew)], default=-1)
    return "".join(item.text for item in items[anew + 1 :] if isinstance(item, Response)), list(items)


def test_a_busy_server_is_asked_again_after_the_time_that_it_says(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("lmdeploy.cli.api_client.time.sleep", slept.append)
    script.replies = [
        refuse(503, "512 requests wait, which is the most", "overloaded", Retry_After="7"),
        refuse(429, "too many of this key"),
        stream({"content": "Yes"}),
    ]
    remote, output = open_model(script)
    assert ask(remote)[0] == "Yes"
    assert slept == [7.0, 0.01]
    shown = output.getvalue()
    assert "512 requests wait" in shown
    assert "trying again in 7 s" in shown
    assert "too many of this key" in shown
    assert "connected again" in shown


def test_a_styled_terminal_counts_down(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("lmdeploy.cli.api_client.time.monotonic", lambda: now[0])
    monkeypatch.setattr("lmdeploy.cli.api_client.time.sleep", lambda s: now.__setitem__(0, now[0] + s))
    output = Output()
    remote = RemoteModel(APIClient(script.url), Screen(output, output, styled=True), {}, patient=True)
    remote.connect()
    script.replies = [refuse(503, "the engine starts", "engine_failed", Retry_After="3"), stream({"content": "Yes"})]
    ask(remote)
    assert re.findall(r"again in (\d) s", output.getvalue()) == ["3", "2", "1"]


def test_an_answer_that_breaks_off_is_void_and_asked_for_again(script: Script) -> None:
    script.replies = [stream({"content": "Half an ans"}, finish=None), stream({"content": "All of it"})]
    remote, output = open_model(script)
    answer, items = ask(remote)
    assert answer == "All of it"
    assert any(isinstance(item, Anew) for item in items)
    assert "ended in the middle of the answer" in output.getvalue()
    assert "the answer begins anew" in output.getvalue()


class Typed:
    """Messages of a person who is there."""

    interactive = True

    def __init__(self, *messages: str) -> None:
        self.messages = list(messages)

    def read(self) -> str | None:
        return self.messages.pop(0) if self.messages else None


def test_history_holds_whole_answers_only(script: Script) -> None:
    script.replies = [stream({"content": "Half"}, finish=None), stream({"content": "Whole"}), refuse(500, "a bug"), stream({"content": "Second"})]
    remote, output = open_model(script)
    talk = Conversation(remote, Typed("One", "Two", "again"), Screen(output, output))
    talk.run()
    assert [m["content"] for m in talk.history] == ["One", "Whole", "Two", "Second"]
    assert "error: a bug (HTTP 500)" in output.getvalue()
    assert [m["content"] for m in script.bodies[-1]["messages"]] == ["One", "Whole", "Two"]


def test_reasoning_and_calls_are_shown_apart_and_are_no_part_of_the_answer(script: Script) -> None:
    call = [{"index": 0, "id": "c", "function": {"name": "add", "arguments": ""}}]
    script.replies = [
        stream({"reasoning_content": "They want"}, {"reasoning_content": " a sum."}, {"content": "8"}, {"tool_calls": call},
               {"tool_calls": [{"index": 0, "function": {"arguments": '{"a": 3}'}}]}, finish="tool_calls"),
    ]  # fmt: skip
    remote, output = open_model(script)
    screen = Screen(output, output, styled=True)
    talk = Conversation(remote, Typed("Hi"), screen)
    talk.run()
    assert talk.history[-1]["content"] == "8"
    plain = re.sub(r"\x1b\[\d*m", "", output.getvalue())
    assert "They want a sum.\n\n8" in plain
    assert 'call of add: {"a": 3}' in plain
    assert "\x1b[2mThey want\x1b[0m" in output.getvalue(), "dimmed"


def test_a_model_is_chosen_by_name_and_an_unknown_one_lists_the_served(script: Script) -> None:
    remote, output = open_model(script, model="second")
    assert "talking with second" in output.getvalue()
    script.replies = [stream({"content": "x"})]
    ask(remote)
    assert script.bodies[-1]["model"] == "second"
    with pytest.raises(RequestError, match="does not serve 'third'; --model may be first, second"):
        open_model(script, model="third")
    script.models = []
    with pytest.raises(RequestError, match="serves no model"):
        open_model(script)


def test_a_server_that_came_back_with_another_model_goes_on_with_that(script: Script) -> None:
    remote, output = open_model(script)
    script.models = ["new"]
    script.replies = [refuse(404, "The model 'first' does not exist", "model_not_found"), stream({"content": "Hello"})]
    assert ask(remote)[0] == "Hello"
    assert "the server has new now" in output.getvalue()
    named, _ = open_model(script, model="new")
    script.replies = [refuse(404, "The model 'new' does not exist", "model_not_found")]
    with pytest.raises(RequestError, match="does not exist"):
        ask(named)


@pytest.mark.parametrize(
    ("reply", "part"),
    [
        (refuse(503, "the queue is full", "overloaded", Retry_After="5"), "queue is full"),
        (refuse(503, "the engine is being replaced", "engine_failed"), "being replaced"),
        (refuse(401, "a key is needed", "invalid_api_key"), "LMDEPLOY_API_KEY"),
        (refuse(400, "the prompt has 4096 tokens, session_len is 2048", "context_length_exceeded"), "4096 tokens"),
        (stream({"content": "Half"}, finish=None), "in the middle of the answer"),
        (lambda handler: handler.answer(200, "<html>not an API</html>"), "no JSON"),
        (lambda handler: handler.answer(502, "Bad gateway"), "Bad gateway (HTTP 502)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "reply",
)
def test_without_a_person_every_error_is_one_line_and_the_end(script: Script, reply: Reply, part: str) -> None:
    script.replies = [reply]
    remote, _ = open_model(script, patient=False)
    with pytest.raises(LmdeployError) as raised:
        ask(remote)
    assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def test_errors_that_may_pass_have_types_of_their_own(script: Script) -> None:
    with APIClient(script.url) as client:
        for reply, kind, seconds in (
            (refuse(429, "slow down", Retry_After="12"), ServerBusy, 12),
            (refuse(503, "full", "overloaded"), ServerBusy, None),
            (refuse(503, "starting", Retry_After="2"), ServerNotReady, 2),
            (refuse(503, "odd", Retry_After="Wed, 21 Oct 2026 07:28:00 GMT"), ServerNotReady, None),
        ):
            script.replies = [reply]
            with pytest.raises(kind) as raised:
                next(client.chat_completions_v1("first", "Hi"))
            assert raised.value.retry_after == seconds
    with APIClient(f"http://127.0.0.1:{free_port()}") as nobody, pytest.raises(Unreachable):
        next(nobody.chat_completions_v1("first", "Hi"))


def test_a_server_that_falls_silent_is_given_up_after_the_timeout(script: Script) -> None:
    script.replies = [lambda handler: time.sleep(1.5)]
    with APIClient(script.url, timeout=0.2) as client, pytest.raises(Unreachable, match="timed out"):
        next(client.chat_completions_v1("first", "Hi"))


def test_arguments_of_the_public_surface_are_sent_and_none_is_left_to_the_server(script: Script) -> None:
    done = json.dumps({"choices": []})
    script.replies = [lambda handler: handler.answer(200, done)] * 2
    with APIClient(script.url) as client:
        list(client.chat_completions_v1("first", "Hi", 0.7, 0.9, 2, 16, ["x"], ignore_eos=True, session_id=-1))
        list(client.completions_v1("first", "Hi", temperature=0.5, top_k=3))
    assert script.bodies[0] == {
        "model": "first", "messages": "Hi", "temperature": 0.7, "top_p": 0.9, "n": 2, "max_tokens": 16, "stop": ["x"], "stream": False, "ignore_eos": True, "session_id": -1,
    }  # fmt: skip
    assert script.bodies[1] == {"model": "first", "prompt": "Hi", "temperature": 0.5, "stream": False, "top_k": 3}


def test_an_aside_is_no_answer() -> None:
    output = Output()
    Screen(output, output).aside(Aside("thought").text)
    assert output.getvalue() == "thought"
