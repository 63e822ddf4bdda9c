"""Large requests and answers hold up nobody: while they are read, prepared and written, the event loop goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lmdeploy import TurbomindEngineConfig
from lmdeploy.frontend import Frontend
from lmdeploy.serving.openai import convert, responses_convert
from lmdeploy.serving.openai.protocol import ChatRequest, CompletionRequest, TokenizeRequest
from lmdeploy.serving.options import ServerConfig
from tests.serving.running import RunningServer

WORDS = "word " * 500_000  # 2.5 MB: seconds of work
ASK = {"role": "user", "content": "hello"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": f'{{"a": "{WORDS}"}}'}}]}
TOOL = {"type": "function", "function": {"name": "f", "description": WORDS, "parameters": {"type": "object", "properties": {}}}}
LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "description of a tool": ("/v1/chat/completions", {"messages": [ASK], "tools": [TOOL]}),
    "arguments of a call": ("/v1/chat/completions", {"messages": [ASK, CALL, ASK]}),
    "token ids": ("/v1/completions", {"prompt": [[7] * 8000] * 128}),
    "a text to count": ("/tokenize", {"prompt": WORDS, "return_token_strs": True}),
}


@pytest.fixture(scope="module")
def patient(model_folder: Path) -> Iterator[RunningServer]:
    """A session so long that large prompts are not refused by their size alone."""
    config = TurbomindEngineConfig(dtype="float32", session_len=400_000, max_batch_size=2, cache_max_entry_count=100, cpu_threads=1)
    with Frontend.open(str(model_folder), config, separate_process=True) as frontend:
        running = RunningServer(frontend, ServerConfig(server_port=0, model_name="tiny"))
        yield running
        running.stop()


def longest_wait(server: RunningServer, route: str, body: dict[str, Any]) -> float:
    """Seconds of the slowest /health while the request is worked on."""
    waits, done = [], threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
            while not done.is_set():
                began = time.monotonic()
                assert http.get("/health").status_code == 200
                waits.append(time.monotonic() - began)
                time.sleep(0.005)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        assert server.http.post(route, json={"model": "tiny", **body}, timeout=60).status_code in (200, 400)
    finally:
        done.set()
        asking.join()
    return max(waits)


@pytest.mark.parametrize("what", LARGE)
def test_while_a_large_request_is_worked_on_others_are_answered(what: str, patient: RunningServer) -> None:
    """The machine may be busy with other things: one quiet try of several is enough. Prepared on the loop, most of these take longer."""
    waits: list[float] = []
    while not waits or min(waits) >= 0.4:
        waits.append(longest_wait(patient, *LARGE[what]))
        assert len(waits) < 6 or min(waits) < 0.4, waits


@pytest.mark.parametrize("what", LARGE)
def test_large_requests_are_neither_parsed_nor_encoded_on_the_event_loop(what: str, server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = {}

    def noted(name: str, made: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **options: Any) -> Any:
            threads[name] = threading.current_thread()
            return made(*args, **options)

        return make

    for body in (ChatRequest, CompletionRequest, TokenizeRequest):
        monkeypatch.setattr(body, "model_validate_json", noted("parsed", body.model_validate_json))
    monkeypatch.setattr(server.frontend.prompts, "encode", noted("encoded", server.frontend.prompts.encode))
    monkeypatch.setattr(server.frontend.tokenizer, "encode", noted("encoded", server.frontend.tokenizer.encode))
    route, body_of = LARGE[what]
    assert server.http.post(route, json={"model": "tiny", **body_of}).status_code in (200, 400)
    assert set(threads) == {"parsed", "encoded"} and server.loop_thread not in threads.values()


LOGPROBS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": [7] * 300, "echo": True, "logprobs": 20, "max_tokens": 1},
    "/v1/chat/completions": {"messages": [ASK], "logprobs": True, "top_logprobs": 20, "max_tokens": 300, "ignore_eos": True},
    "/v1/responses": {"input": "hello", "top_logprobs": 20, "max_output_tokens": 300, "ignore_eos": True},
}


@pytest.mark.parametrize("route, stream", [*((route, False) for route in LOGPROBS), ("/v1/completions", True)])
def test_log_probabilities_of_long_answers_are_not_written_on_the_event_loop(
    route: str, stream: bool, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []

    def noted(made: Callable[..., Any]) -> Callable[..., Any]:
        def make(ids: list[int], *args: Any) -> Any:
            if len(ids) >= 300:
                names.append(threading.current_thread())
            return made(ids, *args)

        return make

    for module in (convert, responses_convert):
        for name in {"chat_logprobs", "completion_logprobs"} & set(vars(module)):
            monkeypatch.setattr(module, name, noted(getattr(module, name)))
    reply = server.http.post(route, json={"model": "tiny", "stream": stream, **LOGPROBS[route]})
    assert reply.status_code == 200 and reply.text.count("logprob") >= 1, reply.text[:300]
    assert names and server.loop_thread not in names


def test_more_values_than_are_read_are_refused(server: RunningServer) -> None:
    """Parsing holds up the whole process, whichever thread does it."""
    for body in ({"prompt": [1] * 1_048_577}, {"prompt": "a", "tools": [{"a": [{}] * 1_048_577}]}):
        reply = server.http.post("/v1/completions", json={"model": "tiny", **body})
        assert reply.status_code == 400
        assert reply.json()["error"]["code"] == "too_many_values" and "1048576" in reply.json()["error"]["message"]
