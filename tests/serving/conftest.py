"""A real server on a free port of this machine: HTTP in a thread, the embedded model's engine in a process of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from lmdeploy.config import TurbomindEngineConfig
from lmdeploy.frontend import Frontend
from lmdeploy.serving.options import ServerConfig
from lmdeploy.serving.server import build_server, reserve_port, url_of


class RunningServer:
    """uvicorn in a thread, over an open frontend."""

    def __init__(self, frontend: Frontend, config: ServerConfig) -> None:
        self.frontend = frontend
        self._sock: socket.socket = reserve_port(config)
        self.url = url_of(self._sock, config)
        self._server = build_server(frontend, config)
        self.app = self._server.config.app
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve(sockets=[self._sock])), daemon=True)
        self._thread.start()
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def until_idle(self, seconds: float = 10) -> None:
        """Wait until no request runs and no block is held; fails when that does not happen."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            stats = self.frontend.stats()
            if (stats.running, stats.waiting, stats.used_blocks) == (0, 0, 0):
                return
            time.sleep(0.02)
        raise AssertionError(f"the engine did not become idle: {stats}")

    def until_busy(self, seconds: float = 10) -> None:
        """Wait until something runs."""
        deadline = time.monotonic() + seconds
        while not self.frontend.stats().running:
            assert time.monotonic() < deadline, "nothing runs"
            time.sleep(0.01)

    def stop(self) -> None:
        """Stop serving; the frontend stays open."""
        self.http.close()
        self._server.should_exit = True
        self._thread.join(15)
        self._sock.close()


@pytest.fixture(scope="session")
def frontend(model_folder: Path) -> Iterator[Frontend]:
    """The embedded model in float32, so that tokens do not depend on the machine."""
    config = TurbomindEngineConfig(dtype="float32", max_batch_size=16, cache_max_entry_count=300, cpu_threads=1)
    with Frontend.open(str(model_folder), config, separate_process=True) as opened:
        yield opened


@pytest.fixture(scope="session")
def server(frontend: Frontend) -> Iterator[RunningServer]:
    """A server with default options, named `tiny`."""
    running = RunningServer(frontend, ServerConfig(server_port=0, model_name="tiny"))
    yield running
    running.stop()


@pytest.fixture
def serve(frontend: Frontend) -> Iterator[Callable[..., RunningServer]]:
    """Servers with other options, over the same engine."""
    started: list[RunningServer] = []

    def start(**options: object) -> RunningServer:
        started.append(RunningServer(frontend, ServerConfig(server_port=0, model_name="tiny", **options)))
        return started[-1]

    yield start
    for running in started:
        running.stop()
