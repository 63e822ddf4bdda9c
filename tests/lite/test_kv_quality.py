"""The bars of KV cache quality on a real trained model: a change that makes a policy worse by more than the noise of this text fails here.

Measured on 2026-11-21 in bfloat16 on these 4,096 tokens, as change of perplexity with its standard error, and KL in nats: int8 -0.07 +- 0.05 %, 0.00028;
k8v4 -0.25 +- 0.20 %, 0.0031; int4 +1.1 +- 0.5 %, 0.0166; int4 without rotation +2.8 +- 0.7 %, 0.0335. The bounds of KL stand 1.5 times above.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lmdeploy.lite.compare import Comparer
from lmdeploy.lite.compare_options import CompareConfig
from lmdeploy.lite.scores import Scores


@pytest.fixture(scope="module")
def scores(model_folder: Path) -> dict[str, Scores]:
    """KV policy -> scores on the last 4,096 tokens of the package's text."""
    rows = Comparer([str(model_folder)], CompareConfig(policies="0,8,k8v4,4,4-plain", tokens=4096, device="cpu", speed=False)).run().rows
    return {row.policy: row.scores for row in rows if row.scores is not None}


def kl(scores: Scores) -> float:
    assert scores.kl is not None
    return scores.kl


@pytest.mark.parametrize(("policy", "percent", "nats"), [("8", 0.5, 0.00042), ("k8v4", 1.0, 0.0046), ("4", 3.0, 0.025)])
def test_a_quantised_cache_keeps_perplexity_and_distribution(scores: dict[str, Scores], policy: str, percent: float, nats: float) -> None:
    found = scores[policy]
    assert found.ratio is not None and found.ratio_se is not None
    assert 100 * (found.ratio - 1 - 2 * found.ratio_se) < percent, "certainly worse than the bar"
    assert kl(found) < nats


def test_more_bits_are_better_and_rotation_is_what_keeps_int4(scores: dict[str, Scores]) -> None:
    assert kl(scores["8"]) < kl(scores["k8v4"]) < kl(scores["4"]) < 0.7 * kl(scores["4-plain"])
