"""Servers on free ports of this machine: in a thread of the test over an open frontend, or as a process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from lmdeploy.frontend import Frontend
from lmdeploy.serving.opening import reserve_port, url_of
from lmdeploy.serving.options import ServerConfig
from lmdeploy.serving.server import build_server


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
        self.loop_thread = self._thread
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


SCRIPT = """
import json, sys
from lmdeploy.config import TurbomindEngineConfig
from lmdeploy.serving.options import ServerConfig
from lmdeploy.serving.server import serve_model
engine = TurbomindEngineConfig(dtype="float32", max_batch_size=4, cache_max_entry_count=64, cpu_threads=1, max_prefill_token_num=256)
serve_model(sys.argv[1], engine, ServerConfig(model_name="tiny", **json.loads(sys.argv[2])))
"""


class ServerProcess:
    """`serve_model` in a process of its own; `options` are those of ServerConfig."""

    def __init__(self, folder: Path, log: Path, *, ca: Path | None = None, key: str = "none", **options: Any) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = log
        self.popen = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), json.dumps({"server_port": port, **options})], stderr=log.open("wb"))
        self.url = f"{'https' if ca else 'http'}://127.0.0.1:{port}"
        headers = {"Authorization": f"Bearer {key}"}
        self.http = httpx.Client(base_url=self.url, timeout=30, trust_env=False, verify=ssl.create_default_context(cafile=ca) if ca else True, headers=headers)
        while True:
            assert self.popen.poll() is None, log.read_text()
            with contextlib.suppress(httpx.TransportError):
                if self.http.get("/health").status_code == 200:
                    break
            time.sleep(0.05)
        (self.engine,) = psutil.Process(self.popen.pid).children()

    def told(self, text: str, seconds: float = 10) -> None:
        """Wait until the log has `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.log.read_text():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def ended(self, seconds: float = 20) -> int:
        """Wait for the end; the exit code. The engine's process is gone too."""
        code = self.popen.wait(seconds)
        assert not self.engine.is_running() or self.engine.status() == psutil.STATUS_ZOMBIE
        return code

    def kill(self) -> None:
        """End it if it has not ended."""
        self.http.close()
        if self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait()
