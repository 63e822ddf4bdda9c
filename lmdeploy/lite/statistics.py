"""What `lmdeploy lite calibrate` writes: how large the inputs of every linear layer are, channel by channel.

For people and scripts that decide about formats: a channel whose largest magnitude is a hundred times the usual one is what int8 activations and 4-bit
weights suffer from. No other command reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lmdeploy.lite.awq import LayerResult, LayerWeights
from lmdeploy.lite.calibrate import InputStats
from lmdeploy.models.decoder import SmoothingGroup

#: Channels of a module that the summary names.
LOUDEST = 5


@dataclass(frozen=True, slots=True)
class StatisticsMethod:
    """Looks, and changes nothing: per linear layer `<module>.absmax` and `<module>.absmean`, float32 [K]."""

    group: int = 0
    gram_group: int | None = None
    packs: bool = False

    def title(self, *, calibrated: bool) -> str:
        """Of an interrupted run."""
        return "activation statistics"

    def work_bytes(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        """Nothing worth counting."""
        return 0

    def entry(self, kept: Sequence[str]) -> Mapping[str, Any]:
        """No model is written."""
        return {}

    def quantise(self, layer: LayerWeights, stats: dict[str, InputStats], groups: Sequence[SmoothingGroup]) -> LayerResult:
        """The statistics in place of the weights. A module that no token reached (an expert) has none."""
        result = LayerResult({})
        for name, seen in stats.items():
            if not seen.finite:
                result.warnings.append(f"{name}: inputs hold NaN or infinity")
            result.tensors[f"{name}.absmax"] = seen.absmax
            result.tensors[f"{name}.absmean"] = seen.absmean
        return result


def summary(folder: Path, model: str, text: str, windows: Sequence[int]) -> dict[str, Any]:
    """Of every module: the largest input, the median over channels of the largest, their ratio, and the loudest channels."""
    modules: dict[str, Any] = {}
    for file in sorted(folder.glob("activations-*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in sorted(tensors.keys()):
                if name.endswith(".absmax"):
                    modules[name.removesuffix(".absmax")] = _module(tensors.get_tensor(name))
    return {"model": model, "text": text, "windows": list(windows), "modules": modules}


def _module(absmax: torch.Tensor) -> dict[str, Any]:
    top, places = absmax.topk(min(LOUDEST, absmax.shape[0]))
    median = float(absmax.median())
    return {"inputs": absmax.shape[0], "max": float(top[0]), "median": median, "ratio": float(top[0]) / max(median, 1e-12), "loudest": places.tolist()}
