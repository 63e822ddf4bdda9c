"""How a comparison's numbers are written for people: the same columns in the terminal and on the page. '' stands for what was not measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lmdeploy.lite.compare import Row
from lmdeploy.lite.compare_options import Policy


@dataclass(frozen=True, slots=True)
class Column:
    """Title, what it means, and the text of a row's cell."""

    title: str
    meaning: str
    cell: Callable[[Row], str]


def megabytes(count: float) -> str:
    """'39.7 MB', '16.2 GB'; decimal, as files are sold."""
    if count <= 0:
        return ""
    value, unit = (count / 1e9, "GB") if count >= 1e9 else (count / 1e6, "MB")
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def short(count: float) -> str:
    """Counts and rates in three or four digits: '9.31', '341', '16.8k', '3.79M'."""
    if count <= 0:
        return ""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if count >= limit:
            value = count / (1e3 if suffix == "k" else limit)
            return f"{value:.3g}{suffix}" if value < 999.5 else f"{value:.0f}{suffix}"
    return f"{count:.3g}" if count < 999.5 else f"{count:.0f}"


def perplexity(row: Row) -> str:
    """Four digits."""
    return "" if row.scores is None else f"{row.scores.perplexity:#.4g}".rstrip(".")


def change(row: Row) -> str:
    """Of perplexity against the reference, in percent, with its standard error."""
    scores = row.scores
    if scores is None or scores.ratio is None or scores.ratio_se is None:
        return ""
    return f"{100 * (scores.ratio - 1):+.2f} \u00b1 {100 * scores.ratio_se:.2f}" if math.isfinite(scores.ratio) else "broken"


def divergence(row: Row) -> str:
    """Mean KL in nats with its standard error."""
    scores = row.scores
    if scores is None or scores.kl is None or scores.kl_se is None:
        return ""
    return f"{scores.kl:.5f} \u00b1 {scores.kl_se:.5f}" if scores.kl < 1 else f"{scores.kl:.3g} \u00b1 {scores.kl_se:.2g}"


def tail(row: Row) -> str:
    """99th percentile of KL."""
    return "" if row.scores is None or row.scores.kl_p99 is None else _small(row.scores.kl_p99)


def agreement(row: Row) -> str:
    """Top-1 agreement in percent."""
    return "" if row.scores is None or row.scores.top1 is None else f"{100 * row.scores.top1:.2f}"


def _small(value: float) -> str:
    return f"{value:.4f}" if value < 1 else f"{value:#.3g}".rstrip(".")


def cache(row: Row) -> str:
    """The KV policy in words."""
    return Policy(row.policy).bits


QUALITY = (
    Column("perplexity", "exp of the mean loss of the scored tokens; lower is better", perplexity),
    Column("change %", "of perplexity against the reference, with the standard error of the paired differences", change),
    Column("KL, nats", "mean over tokens of KL(reference || row), with its standard error: how far the whole distribution moved; 0 is the same", divergence),
    Column("KL 99 %", "99 of 100 tokens have less divergence than this: the rare bad ones", tail),
    Column("same top %", "tokens where both models find the same token likeliest", agreement),
)
COST = (
    Column("disk", "all files of the folder", lambda row: megabytes(row.disk_bytes)),
    Column("weights", "in memory", lambda row: megabytes(row.weight_bytes)),
    Column("process", "memory of the whole process (CPU) or in use on the device, with the engine for one sequence", lambda row: megabytes(row.process_bytes)),
    Column("prefill", "tokens/s of one prompt alone, median", lambda row: "" if row.speed is None else short(row.speed.prefill)),
    Column("decode", "tokens/s of one answer alone, median", lambda row: "" if row.speed is None else short(row.speed.decode)),
    Column("KV tokens", "that fit into the memory budget beside weights and workspace", lambda row: short(row.kv_tokens)),
    Column("B/token", "bytes of keys and values of one token, all layers, scales included", lambda row: str(row.kv_bytes_per_token or "")),
)
