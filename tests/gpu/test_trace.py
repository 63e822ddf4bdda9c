"""`benchmark.trace` on the real device and model: its command, as a person types it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_the_command_measures_and_draws_steps(tmp_path: Path) -> None:
    picture = tmp_path / "step.svg"
    command = [sys.executable, "-m", "benchmark.trace", "--batch", "1", "4", "--steps", "8", "--svg", str(picture)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [re.findall(r"[\d.]+", line) for line in done.stdout.splitlines() if re.match(r"\| [14] ", line)]
    assert len(rows) == 2
    for row, batch in zip(rows, (1, 4), strict=True):
        answers, step, busy, host, *_, kernels = map(float, row)
        assert answers == batch and host / 1e3 > 0 and 0.01 < step < 1000 and 0 < busy <= 100 and kernels > 10
    text = picture.read_text()
    assert "attention" in text and "launch" in text and "4 answers" in text
