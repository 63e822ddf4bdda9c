"""The arithmetic of scores on numbers small enough to check by hand, and on models that are broken."""

from __future__ import annotations

import math

import pytest
import torch

from lmdeploy.lite.scores import TokenScores, mean_and_error, score_rows

Tensor = torch.Tensor


class FixedHead:
    """A head whose hidden states are the logits."""

    device = torch.device("cpu")

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.clone()


def scored(own: Tensor, other: Tensor, targets: Tensor) -> TokenScores:
    return score_rows(own, targets, FixedHead(), other)  # type: ignore[arg-type]


def test_two_distributions_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    found = scored(q.log() + 3, p.log() - 1, torch.tensor([1]))  # any constant may be added to logits
    assert found.kl is not None and found.agrees is not None and found.reference_loss is not None
    assert float(found.kl) == pytest.approx(0.25 * math.log(2), rel=1e-5)
    assert float(found.loss) == pytest.approx(math.log(2), rel=1e-5)
    assert float(found.reference_loss) == pytest.approx(math.log(4), rel=1e-5)
    assert float(found.agrees) == 0.0


def test_summary_of_many_tokens() -> None:
    generator = torch.Generator().manual_seed(3)
    other = torch.randn(300, 50, generator=generator)
    own = other + 0.3 * torch.randn(300, 50, generator=generator)
    targets = torch.randint(50, (300,), generator=generator)
    found = TokenScores.join([scored(own[:100], other[:100], targets[:100]), scored(own[100:], other[100:], targets[100:])]).summary()
    p, q = torch.softmax(other.double(), -1), torch.softmax(own.double(), -1)
    kl = (p * (p / q).log()).sum(-1)
    losses = [-torch.log(x[torch.arange(300), targets]) for x in (q, p)]
    assert found.tokens == 300
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found.kl_se == pytest.approx(float(kl.std()) / 300**0.5, rel=1e-4)
    assert found.kl_p99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-4)
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found.perplexity == pytest.approx(math.exp(float(losses[0].mean())), rel=1e-5)
    assert found.ratio == pytest.approx(math.exp(float((losses[0] - losses[1]).mean())), rel=1e-5)
    assert found.ratio_se is not None
    assert found.ratio_se < found.perplexity_se / found.perplexity, "pairing takes the text's own spread away"


def test_standard_error_covers_the_truth() -> None:
    """Of 400 samples of a known mean, about 95 of 100 lie within two standard errors."""
    generator = torch.Generator().manual_seed(1)
    inside = 0
    for _ in range(400):
        mean, error = mean_and_error(torch.rand(200, generator=generator, dtype=torch.float64))
        inside += abs(mean - 0.5) < 2 * error
    assert 0.92 < inside / 400 < 0.98


def test_logits_are_left_as_they_are() -> None:
    own, other = torch.randn(4, 7), torch.randn(4, 7)
    before = own.clone()
    scored(own, other, torch.tensor([0, 1, 2, 3]))
    assert torch.equal(own, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_are_never_a_good_score(bad: float) -> None:
    own, other = torch.randn(4, 7), torch.randn(4, 7)
    own[2, 3] = bad
    found = scored(own, other, torch.tensor([0, 1, 2, 3])).summary()
    assert found.kl is not None
    assert not math.isfinite(found.perplexity)
    assert not math.isfinite(found.kl)


def test_a_token_that_cannot_come_is_infinitely_far() -> None:
    own, other = torch.randn(2, 5), torch.randn(2, 5)
    own[0, 1] = -math.inf
    found = scored(own, other, torch.tensor([1, 2])).summary()
    assert found.perplexity == math.inf
    assert found.kl == math.inf


def test_a_token_that_neither_allows_costs_nothing() -> None:
    own, other = torch.randn(2, 5), torch.randn(2, 5)
    own[:, 4] = other[:, 4] = -math.inf
    found = scored(own, other, torch.tensor([1, 2])).summary()
    assert found.kl is not None
    assert 0 < found.kl < 10
