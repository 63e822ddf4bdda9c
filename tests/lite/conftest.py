"""Quantised copies of the embedded model, made once: by search, by the formula, and by plain rounding."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmdeploy.lite import auto_awq
from lmdeploy.lite.report import Report

MODES = {"search": {"search_scale": True}, "fixed": {}, "plain": {"calib_samples": 0}}


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, Report]:
    """Mode -> report; `Path(report.work_dir)` is the folder."""
    root = tmp_path_factory.mktemp("awq")
    common = {"calib_dataset": "embedded", "calib_samples": 6, "calib_seqlen": 256, "batch_size": 2}
    return {mode: auto_awq(str(model_folder), work_dir=str(root / mode), **{**common, **options}) for mode, options in MODES.items()}
