"""The proof: both folders are loaded by the engine, as a user would, and score the same held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lmdeploy.config import TurbomindEngineConfig
from lmdeploy.errors import CheckpointError, LmdeployError
from lmdeploy.lite.options import AwqConfig
from lmdeploy.lite.report import Report
from lmdeploy.log import get_logger
from lmdeploy.pipeline import pipeline

logger = get_logger(__name__)

#: A perplexity this many times as high as before means that the model is broken, not that it lost some quality.
COLLAPSE = 3.0
BLOCK = 64


def perplexity(folder: Path, windows: Sequence[list[int]], *, dtype: str = "auto", device: str = "auto") -> float:
    """exp of the mean cross-entropy of all tokens but each window's first."""
    longest = max(map(len, windows)) + 1
    blocks = 2 * (-(-longest // BLOCK) + 1)
    config = TurbomindEngineConfig(
        dtype=dtype, device_type=device, session_len=longest, max_batch_size=2, cache_max_entry_count=blocks, cache_block_seq_len=BLOCK
    )
    with pipeline(str(folder), backend_config=config) as pipe:
        losses = pipe.get_ppl([list(w) for w in windows])
    counts = [len(w) - 1 for w in windows]
    mean = sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)
    return math.exp(mean) if mean < 700 else math.inf


def measure(report: Report, before: Path, after: Path, windows: Sequence[list[int]], config: AwqConfig) -> None:
    """Perplexity of both folders into the report. A model that collapsed is refused; one that cannot be loaded here is only not measured."""
    if not windows:
        report.perplexity_note = "no held-out text was asked for (eval_tokens=0)"
        return
    try:
        report.perplexity_before = perplexity(before, windows, dtype=config.dtype, device=config.device)
        report.perplexity_after = perplexity(after, windows, dtype=config.dtype, device=config.device)
    except LmdeployError as error:
        report.perplexity_note = str(error)
        logger.warning("perplexity is not measured: %s", error)
        return
    first, second = report.perplexity_before, report.perplexity_after
    if math.isfinite(first) and not second <= COLLAPSE * first:
        raise CheckpointError(
            f"the 4-bit model is broken: perplexity {second:.4g} instead of {first:.4g} on held-out text; nothing is written. "
            "Try --search-scale True, a smaller --w-group-size, or calibration text that is nearer to the model's use"
        )
