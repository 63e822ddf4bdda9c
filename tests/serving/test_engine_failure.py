"""What clients see when the engine crashes, hangs or computes nonsense, and when the server is stopped at a bad moment."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from safetensors.torch import load_file, save_file

from tests.serving.command import ServerCommand

LONG: dict[str, Any] = {"model": "tiny", "prompt": "Once upon a time", "ignore_eos": True, "temperature": 0}
SHORT = {**LONG, "max_tokens": 12}

Start = Callable[..., ServerCommand]


@pytest.fixture
def start(model_folder: Path, tmp_path: Path) -> Iterator[Start]:
    started: list[ServerCommand] = []

    def run(*flags: str, folder: Path = model_folder) -> ServerCommand:
        started.append(ServerCommand(folder, tmp_path / f"log{len(started)}", *flags))
        return started[-1]

    yield run
    for server in started:
        server.stop()


def is_gone(process: psutil.Process, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def until_trouble(server: ServerCommand, seconds: float = 30) -> httpx.Response:
    deadline = time.monotonic() + seconds
    while (ready := server.http.get("/ready")).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return ready


def counter(server: ServerCommand, name: str) -> float:
    lines = server.http.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"lmdeploy:{name}")).split()[-1])


def test_a_killed_engine_is_told_to_everybody_and_replaced(start: Start) -> None:
    server = start().ready()
    before = server.http.post("/v1/completions", json=SHORT).json()["choices"][0]["text"]
    with ThreadPoolExecutor(1) as pool, server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as reply:
        lines = reply.iter_lines()
        next(lines)
        whole = pool.submit(server.http.post, "/v1/completions", json={**LONG, "prompt": "The weather"})
        while counter(server, "num_requests_running") < 2:
            time.sleep(0.01)
        tokens = counter(server, "generation_tokens_total")
        while counter(server, "generation_tokens_total") < tokens + 8:  # some of both, so that neither is replayed
            time.sleep(0.01)
        first = server.engine
        first.kill()
        rest = [line for line in lines if line]
        failed = whole.result()
    assert rest[-1] == "data: [DONE]"
    assert '"error"' in rest[-2] and "signal 9" in rest[-2]
    assert failed.status_code == 503 and int(failed.headers["retry-after"]) > 0
    assert failed.json()["error"]["code"] == "engine_failed"
    server.ready()
    server.engine.kill()  # the second restart waits a second, time enough to look
    ready = until_trouble(server)
    health = server.http.get("/health")
    refused = server.http.post("/v1/completions", json=SHORT)
    assert ready.status_code == 503 and "signal 9" in ready.json()["message"]
    assert (health.status_code, health.json()["status"]) == (200, "restarting"), "nobody must kill a server that is recovering"
    assert "signal 9" in health.json()["message"]
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["code"] == "engine_restarting"
    assert server.http.get("/v1/models").status_code == 200
    server.ready()
    assert server.http.post("/v1/completions", json=SHORT).json()["choices"][0]["text"] == before
    assert counter(server, "engine_restarts_total") == 2
    assert is_gone(first)
    server.popen.send_signal(signal.SIGTERM)
    assert server.popen.wait(20) == 0
    assert "Traceback" not in server.log.read_text()


def test_a_request_that_was_waiting_is_answered_by_the_next_engine(start: Start) -> None:
    server = start("--max-batch-size", "1").ready()
    alone = server.http.post("/v1/completions", json=SHORT).json()["choices"][0]["text"]
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(server.http.post, "/v1/completions", json=LONG)
        while counter(server, "num_requests_running") < 1:
            time.sleep(0.01)
        waiting = pool.submit(server.http.post, "/v1/completions", json=SHORT)
        while counter(server, "num_requests_waiting") < 1:
            time.sleep(0.01)
        server.engine.kill()
        assert running.result().status_code in (200, 503)  # 200: it had not begun either
        assert waiting.result().json()["choices"][0]["text"] == alone


def test_an_engine_that_hangs_delays_nobody_else_and_is_replaced(start: Start) -> None:
    server = start("--engine-stall-seconds", "6").ready()
    hung = server.engine
    hung.suspend()
    began = time.monotonic()
    with ThreadPoolExecutor(24) as pool:
        waiting = pool.submit(server.http.post, "/v1/completions", json=SHORT)
        paths = ["/health", "/metrics", "/v1/models"] * 20
        statuses = list(pool.map(lambda path: server.http.get(path).status_code, paths))
        took = time.monotonic() - began
        assert set(statuses) == {200}
        assert took < 5, f"{len(paths)} questions about a hung engine took {took:.1f} s"
        assert waiting.result().status_code == 200, "nothing of it was delivered, so the next engine answers it"
    assert is_gone(hung)
    assert "hung" in server.log.read_text()


def test_a_server_whose_engine_fails_again_and_again_ends_with_one_line(start: Start) -> None:
    server = start("--max-engine-restarts", "1").ready()
    server.engine.kill()
    until_trouble(server)
    server.ready()
    server.engine.kill()
    assert server.popen.wait(30) not in (0, None)
    last = server.log.read_text().splitlines()[-1]
    assert "restarted 1 times" in last and "signal 9" in last
    assert "Traceback" not in server.log.read_text()


def test_logits_that_are_not_numbers_fail_their_request_and_nothing_else(start: Start, model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    name = "model.tok_embeddings.weight"
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name][42] = float("nan")
            path.unlink()
            save_file(tensors, path, {"format": "pt"})
    server = start(folder=folder).ready()
    bad = server.http.post("/generate", json={"input_ids": [1, 42, 50], "max_tokens": 4})
    assert bad.status_code >= 400 and "not numbers" in bad.text
    assert server.http.post("/v1/completions", json=SHORT).status_code == 200
    assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize("moment", ["load", "prefill", "decode"])
def test_sigterm_ends_server_and_engine_whatever_they_do(moment: str, start: Start) -> None:
    server = start("--shutdown-seconds", "1")
    if moment == "load":
        parent = psutil.Process(server.popen.pid)
        deadline = time.monotonic() + 60
        while not (children := parent.children()):
            assert time.monotonic() < deadline and server.popen.poll() is None, server.log.read_text()
            time.sleep(0.002)
        (engine,) = children
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(20) != 0
        assert is_gone(engine)
        return
    server.ready()
    engine = server.engine
    body = LONG if moment == "decode" else {**LONG, "prompt": [5] * 1900}

    def ask() -> int:
        try:
            return server.http.post("/v1/completions", json=body).status_code
        except httpx.TransportError:  # cut off
            return 0

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        while counter(server, "num_requests_running") < 1:
            time.sleep(0.002)
        began = time.monotonic()
        os.kill(server.popen.pid, signal.SIGTERM)
        assert server.popen.wait(30) == 0
        assert time.monotonic() - began < 20
        assert asked.result() in (0, 200, 503)
    assert is_gone(engine)
    assert "Traceback" not in server.log.read_text()


@pytest.mark.skipif(not hasattr(psutil, "RLIMIT_FSIZE"), reason="no limit of file sizes here")
def test_a_full_disk_for_logs_stops_no_answer(start: Start) -> None:
    server = start("--log-level", "DEBUG").ready()
    for process in (psutil.Process(server.popen.pid), server.engine):
        process.rlimit(psutil.RLIMIT_FSIZE, (0, 0))  # from now on every write to a file fails, as on a full disk
    size = server.log.stat().st_size
    assert server.http.post("/v1/completions", json=SHORT).status_code == 200
    server.engine.kill()
    until_trouble(server)
    server.ready()
    assert server.http.post("/v1/completions", json=SHORT).status_code == 200
    assert server.log.stat().st_size == size, "nothing could be written"
    server.popen.send_signal(signal.SIGTERM)
    server.popen.wait(20)
