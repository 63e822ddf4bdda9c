"""The three ways to round to 4 bits, and how their results are compared."""

from __future__ import annotations

from lmdeploy.lite.report import Report

MODES = {"search": {"search_scale": True}, "fixed": {}, "plain": {"calib_samples": 0}}


def divergence(report: Report) -> float:
    """Mean KL against 16 bit, on enough tokens to tell."""
    assert report.kl is not None
    assert report.evaluated_tokens > 4000
    return report.kl


def loss(report: Report) -> float:
    """Of perplexity, relative."""
    assert report.perplexity_before is not None
    assert report.perplexity_after is not None
    return report.perplexity_after / report.perplexity_before - 1


def check_search_is_best(found: dict[str, Report]) -> None:
    """Clearly ahead in divergence, and not behind in what is noisier."""
    best = found["search"]
    for other in (found["plain"], found["fixed"]):
        assert divergence(best) < 0.7 * divergence(other)
        assert loss(best) < loss(other)
        assert best.top1 is not None
        assert other.top1 is not None
        assert best.top1 > other.top1
