"""A server in a thread of the test, on a free port of this machine, over an open frontend."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import httpx

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
