"""`lmdeploy serve api_server` as users start it: a process of its own, on a free port, with its output in a file."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

ROOT = str(Path(__file__).resolve().parents[2])


class ServerCommand:
    """The command; `ready` waits until it answers."""

    def __init__(self, folder: Path, log: Path, *flags: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = log
        small = [
            "--dtype",
            "float32",
            "--max-batch-size",
            "4",
            "--max-prefill-token-num",
            "256",
            "--cache-max-entry-count",
            "64",
            "--cpu-threads",
            "1",
            "--model-name",
            "tiny",
        ]
        command = [sys.executable, "-m", "lmdeploy", "serve", "api_server", str(folder), "--server-port", str(port), *small, *flags]
        with log.open("wb") as out:
            self.popen = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "PYTHONPATH": ROOT})
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)

    def ready(self, seconds: float = 90) -> ServerCommand:
        """Wait for /ready to say that all is well."""
        deadline = time.monotonic() + seconds
        while not self.healthy():
            assert self.popen.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, "the server did not become ready"
            time.sleep(0.05)
        return self

    def healthy(self) -> bool:
        """Whether the server answers and its engine works."""
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/ready").status_code == 200
        return False

    @property
    def engine(self) -> psutil.Process:
        """The engine's process of now."""
        (child,) = psutil.Process(self.popen.pid).children()
        return child

    def stop(self) -> None:
        """Kill what still runs."""
        self.http.close()
        if self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait()
