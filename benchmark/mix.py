"""The requests of the throughput benchmarks: lengths of a chat service, and token ids that depend on the request's number alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

SEED = 20261121
#: ids are drawn below this, or below the vocabulary's end
TOP_ID = 90000


def lengths(file: str | None, requests: int, *, seed: int = SEED, shrink: int = 1) -> list[tuple[int, int]]:
    """(input, output) tokens of each request: from a JSON file with `input` and `output`, or drawn here from the same distribution."""
    if file:
        mix = json.loads(Path(file).read_text())
        pairs = list(zip(mix["input"], mix["output"], strict=True))
    else:
        rng = np.random.default_rng(seed)
        drawn = [np.clip(rng.lognormal(np.log(mean) - 0.5, 1.0, requests), 4, 1024).astype(int).tolist() for mean in (220, 180)]
        pairs = list(zip(*drawn, strict=True))
    return [(max(1, i // shrink), max(1, o // shrink)) for i, o in pairs[:requests]]


def prompt(number: int, length: int, top: int = TOP_ID) -> list[int]:
    """Token ids of request `number`, in [100, top)."""
    ids: list[int] = np.random.default_rng(1000003 + number).integers(min(100, top // 2), top, length).tolist()
    return ids
