"""`benchmark.kernels` on the real device: its command, as a person types it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LINE = re.compile(r"(\S.*\S) +([\d.]+) us +([\d.]+) GB/s +\d+ GFLOP/s floor +([\d.]+) us +(\d+) %")


@pytest.mark.parametrize(
    ("only", "names"),
    [
        (" o T=8", {"linear o T=8", "linear_w4 o T=8", "linear_w8 int8 o T=8", "linear_w8 fp8 g128 o T=8", "linear_w8a8 fp8 o T=8"}),
        ("kv=2000", {"rope_attention kv16 B=64 kv=2000", "rope_attention kv4 B=1 kv=2000", "rope_attention kvfp8 B=1 kv=2000"}),
        ("choose", {"choose_tokens greedy S=256", "choose_tokens top-k, top-p S=64", "choose_tokens top-p S=1 penalties of 4000"}),
    ],
)
def test_each_kernel_stands_next_to_its_floor(only: str, names: set[str]) -> None:
    command = [sys.executable, "-m", "benchmark.kernels", "--rows", "8", "--only", only]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {match[1]: match.groups()[1:] for match in map(LINE.match, done.stdout.splitlines()) if match}
    assert names <= set(found)
    for seconds, _, floor, percent in found.values():
        assert 0.5 < float(seconds) < 1e5 and float(floor) > 0 and 0 < int(percent) <= 120
