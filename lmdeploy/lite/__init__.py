"""Making quantised checkpoints. Each command is imported when it is called: reading the options must not wait for torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmdeploy.lite.report import Report

__all__ = ["auto_awq", "auto_gptq", "calibrate_model", "smooth_quant"]


def auto_awq(model: str | None = None, **options: Any) -> Report:
    """Write a 4-bit AWQ copy of `model` (folder, hub id, or None = the embedded one); `options` are those of `AwqConfig`. Returns what was measured."""
    from lmdeploy.lite.api import quantise_awq
    from lmdeploy.lite.options import AwqConfig

    return quantise_awq(model, AwqConfig(**options))


def auto_gptq(model: str | None = None, **options: Any) -> Report:
    """Write a 4-bit GPTQ copy; `options` are those of `GptqConfig`."""
    from lmdeploy.lite.api import quantise_gptq
    from lmdeploy.lite.options import GptqConfig

    return quantise_gptq(model, GptqConfig(**options))


def smooth_quant(model: str | None = None, **options: Any) -> Report:
    """Write a copy with 8-bit weights and activations; `options` are those of `SmoothQuantConfig`."""
    from lmdeploy.lite.api import quantise_smooth
    from lmdeploy.lite.options import SmoothQuantConfig

    return quantise_smooth(model, SmoothQuantConfig(**options))


def calibrate_model(model: str | None = None, **options: Any) -> dict[str, Any]:
    """Write statistics of a model's activations; `options` are those of `CalibrateConfig`. Returns the summary."""
    from lmdeploy.lite.api import calibrate_model as run
    from lmdeploy.lite.options import CalibrateConfig

    return run(model, CalibrateConfig(**options))
