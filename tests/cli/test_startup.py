"""A start that fails for lack of memory names `lmdeploy plan` and a setting that fits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lmdeploy.cli.startup import advised
from lmdeploy.config import TurbomindEngineConfig
from lmdeploy.engine import start
from lmdeploy.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("command", [["chat"], ["serve", "api_server", "--server-port", "0"]], ids=lambda c: c[-1])
def test_a_pool_that_holds_nothing_ends_with_a_command_that_works(command: list[str]) -> None:
    words = [sys.executable, "-m", "lmdeploy", *command, "--cache-max-entry-count", "0.0000001"]
    done = subprocess.run(words, input=b"Hi", capture_output=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2
    last = done.stderr.decode().strip().splitlines()[-1]
    assert last.endswith("`lmdeploy plan` shows what fits; this would start here: lmdeploy serve api_server")


def test_weights_that_cannot_be_held_are_refused_before_they_are_read(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "free_bytes", lambda device: 10 << 20)
    monkeypatch.setattr(start, "open_source", lambda folder: pytest.fail("read"))
    monkeypatch.setattr("lmdeploy.plan.machines.host_free", lambda: 10 << 20)
    config = TurbomindEngineConfig(dtype="bfloat16", device_type="cpu")
    with (
        pytest.raises(ConfigError, match=r"the weights take 37.5 MiB as 16 bit, but 10 MiB are free on cpu; `lmdeploy plan` shows what fits$"),
        advised(None, config),
    ):
        start.build_engine(model_folder, config)


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(ConfigError, match=r"^something else$"), advised(None, TurbomindEngineConfig()):
        raise ConfigError("something else")
