"""What several files of rows share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.commands import ENVIRONMENT


@pytest.fixture(scope="session")
def four_bit_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `lmdeploy lite auto_awq` makes of the embedded model; how good it is, tests/lite measures."""
    quantised = tmp_path_factory.mktemp("lite") / "chat-4bit"
    command = [
        sys.executable,
        "-m",
        "lmdeploy",
        "lite",
        "auto_awq",
        str(model_folder),
        "--calib-samples",
        "0",
        "--eval-tokens",
        "0",
        "--work-dir",
        str(quantised),
    ]
    made = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    return quantised
