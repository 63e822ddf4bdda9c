"""Making quantised checkpoints. `auto_awq` is imported when it is called: reading the options must not wait for torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmdeploy.lite.report import Report

__all__ = ["auto_awq"]


def auto_awq(model: str | None = None, **options: Any) -> Report:
    """Write a 4-bit AWQ copy of `model` (folder, hub id, or None = the embedded one); `options` are those of `AwqConfig`. Returns what was measured."""
    from lmdeploy.lite.api import quantise_awq
    from lmdeploy.lite.options import AwqConfig

    return quantise_awq(model, AwqConfig(**options))
