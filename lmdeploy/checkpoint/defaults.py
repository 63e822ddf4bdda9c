"""What a model's maker recommends for sampling: the file generation_config.json beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmdeploy.config import GenerationConfig
from lmdeploy.errors import CheckpointError, RequestError

#: generation_config.json key -> GenerationConfig field: what a model's maker recommends, used by the server
_GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_generation_defaults(folder: Path) -> dict[str, Any]:
    """Sampling values that the model's maker recommends (generation_config.json), those that we know and that are valid."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise CheckpointError(f"{path}: not valid JSON ({e})") from e
    values = {k: raw[k] for k in _GENERATION_DEFAULTS if isinstance(raw, dict) and raw.get(k) is not None}
    try:
        GenerationConfig(**values)
    except RequestError as e:
        raise CheckpointError(f"{path}: {e}") from e
    return values
