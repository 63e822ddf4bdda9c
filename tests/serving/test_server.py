"""The server as a process: the port, signals, a dying engine, and the page in a real browser."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from lmdeploy.errors import ConfigError
from lmdeploy.frontend import Frontend
from lmdeploy.serving.opening import reserve_port, url_of
from lmdeploy.serving.options import ServerConfig
from lmdeploy.serving.server import announce
from lmdeploy.serving.service import Service
from tests.serving.command import ServerCommand
from tests.serving.running import SCRIPT, RunningServer, ServerProcess

LONG = {"model": "tiny", "prompt": "Once upon a time", "ignore_eos": True, "temperature": 0}


@pytest.fixture
def process(model_folder: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    started = ServerProcess(model_folder, tmp_path / "log", shutdown_seconds=2)
    yield started
    started.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_during_an_answer_ends_server_and_engine(number: signal.Signals, process: ServerProcess) -> None:
    with process.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as reply:
        pieces = reply.iter_bytes()
        next(pieces)
        began = time.monotonic()
        process.popen.send_signal(number)
        with contextlib.suppress(httpx.TransportError):
            for _ in pieces:
                pass
    assert process.popen.wait(10) == 0
    assert time.monotonic() - began < 8
    assert not process.engine.is_running() or process.engine.status() == psutil.STATUS_ZOMBIE
    log = process.log.read_text()
    assert process.url in log, "the start tells where to look"
    assert "Traceback" not in log, log


def test_a_port_in_use_is_told_before_the_model_is_loaded(server: RunningServer, model_folder: Path) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match=f"port {port} .*in use"):
        reserve_port(ServerConfig(server_port=port))
    began = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, "/no/such/model", json.dumps({"server_port": port})], capture_output=True, text=True, timeout=60, check=False
    )
    assert "in use" in run.stderr.splitlines()[-1]
    assert "no/such/model" not in run.stderr.splitlines()[-1]
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("name", ["256.1.1.1", "no such host", "192.0.2.1"])
def test_an_address_that_is_not_ours_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen") as caught:
        reserve_port(ServerConfig(server_name=name, server_port=0))
    assert "\n" not in str(caught.value)


def test_the_url_is_one_that_can_be_opened() -> None:
    for name, host in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("localhost", "127.0.0.1")):
        config = ServerConfig(server_name=name, server_port=0)
        with reserve_port(config) as sock:
            assert url_of(sock, config) == f"http://{host}:{sock.getsockname()[1]}"


@pytest.mark.parametrize("keys", [None, "file", "environment"])
def test_the_start_warns_of_an_open_network_unless_keys_are_needed(
    keys: str | None, frontend: Frontend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text("a:sesame\n")
    options: dict[str, Any] = {"file": {"api_keys_file": str(file)}, "environment": {"api_key_lines": ["sesame"]}}.get(keys or "", {})
    with caplog.at_level(logging.INFO, "lmdeploy.access"):
        announce(Service(frontend, ServerConfig(server_name="0.0.0.0", server_port=0, **options)), "http://127.0.0.1:1")
    assert ("every machine" in caplog.text) == (keys is None)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says what a process has loaded")
def test_the_server_process_has_no_torch(model_folder: Path, tmp_path: Path) -> None:
    """It would take seconds of the start and 300 MB of memory."""
    server = ServerCommand(model_folder, tmp_path / "log")
    try:
        server.ready()
        request = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Count from 1 to 5."}],
            "response_format": {"type": "json_object"},
            "max_tokens": 8,
        }
        assert server.http.post("/v1/chat/completions", json=request).status_code == 200
        loaded = {pid: "libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in (server.popen.pid, server.engine.pid)}
        assert list(loaded.values()) == [False, True]
    finally:
        server.stop()


def test_chunks_are_not_delayed_by_the_socket(server: RunningServer) -> None:
    """A socket that does not say TCP keeps Nagle's algorithm: 40 ms a chunk, instead of the step's few."""
    body: dict[str, Any] = {**LONG, "max_tokens": 60, "stream": True}
    server.http.post("/v1/completions", json=body)
    began = time.monotonic()
    events = server.http.post("/v1/completions", json=body).text.count("data: ")
    assert events >= 10  # a busy machine sends several tokens at once
    assert time.monotonic() - began < events * 0.04, "as slow as with Nagle's algorithm"


def test_a_full_queue_is_503_with_retry_after(model_folder: Path, tmp_path: Path) -> None:
    from lmdeploy.config import TurbomindEngineConfig

    config = TurbomindEngineConfig(dtype="float32", max_batch_size=1, max_waiting=1, cache_max_entry_count=64, cpu_threads=1, max_prefill_token_num=256)
    with Frontend.open(str(model_folder), config, separate_process=True) as frontend:
        running = RunningServer(frontend, ServerConfig(server_port=0, model_name="tiny"))
        streams = []
        try:
            for _ in range(2):
                streams.append(running.http.send(running.http.build_request("POST", "/v1/completions", json={**LONG, "stream": True}), stream=True))
                if len(streams) == 1:
                    running.until_busy()
                    break
            waiting = subprocess.Popen(
                [sys.executable, "-c", f"import httpx; httpx.post('{running.url}/v1/completions', json={LONG!r}, timeout=60, trust_env=False)"]
            )
            deadline = time.monotonic() + 20
            while not frontend.stats().waiting:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            refused = running.http.post("/v1/completions", json=LONG)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "overloaded"
            assert refused.headers["retry-after"]
            waiting.kill()
            waiting.wait()
        finally:
            for stream in streams:
                stream.close()
            running.until_idle()
            running.stop()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_the_page_renders_in_a_browser_without_a_network(serve: Callable[..., RunningServer], tmp_path: Path) -> None:
    server = serve()
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path}", "--virtual-time-budget=15000",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--dump-dom", server.url + "/",
    ]  # fmt: skip
    page = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False).stdout
    assert "opblock" in page, page[:2000]
    for path in ("/v1/chat/completions", "/v1/models", "/generate"):
        assert f'data-path="{path}"' in page
