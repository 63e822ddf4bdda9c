"""Real servers of the embedded model: HTTP in a thread, the engine in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmdeploy.config import TurbomindEngineConfig
from lmdeploy.frontend import Frontend
from lmdeploy.serving.options import ServerConfig
from tests.serving.running import RunningServer


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
