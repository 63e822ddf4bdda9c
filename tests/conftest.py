"""Fixtures that many tests share: the embedded model's folder, and one loaded pipeline (loading takes a second, answers milliseconds)."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.order import longest_first

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # before torch is loaded: tests share the machine with the servers that they start

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background jobs begin so, and hand it on: Ctrl-C would do nothing in any program under test
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Workers' files in the order of the collection (see tests/order.py)."""
    if hasattr(config.option, "loadscopereorder"):  # xdist's
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        items[:] = longest_first(items)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Without a look for garbage: a fifth of the time, for all that is imported stays. Later looks, of which tests ask for some, leave it out."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # at the end everything goes: libraries complain of what is left


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """pytest's listens at the root only, and hears nothing once any test before has called `log.setup`, which keeps lmdeploy's records from there."""
    logger = logging.getLogger("lmdeploy")
    level, propagate, logger.propagate = logger.level, logger.propagate, False
    logger.setLevel(logging.WARNING)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)
    logger.propagate = propagate


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The embedded tiny chat model, a real trained checkpoint."""
    return ROOT / "lmdeploy" / "assets" / "tiny-internlm2-chat"


@pytest.fixture(scope="session")
def shallow_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of the embedded model's ten layers, for commands whose work grows with layers and whose answers do not matter."""
    from tests.helpers import write_shallow

    return write_shallow(tmp_path_factory.mktemp("shallow") / "model", model_folder)


@pytest.fixture(scope="session")
def pipe(model_folder: Path) -> Iterator[object]:
    """A pipeline on the embedded model in float32, so that tokens do not depend on the machine."""
    from lmdeploy import TurbomindEngineConfig, pipeline

    with pipeline(str(model_folder), backend_config=TurbomindEngineConfig(dtype="float32", max_batch_size=16, cache_max_entry_count=600)) as loaded:
        yield loaded
