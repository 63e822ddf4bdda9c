"""The arithmetic of AWQ: scales, clipping, rounding; never worse than plain rounding, and safe with bad statistics."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.formats.awq import pack, quantise
from lmdeploy.lite.awq import LayerWeights, LinearWeight, Rounding, clipped, dequantised, fixed_scales, quantise_layer, refined, seen_gram
from lmdeploy.lite.calibrate import InputStats
from lmdeploy.models.decoder import SmoothingGroup

Tensor = torch.Tensor
GROUPS = (SmoothingGroup("norm", ("a", "b"), True), SmoothingGroup("b", ("c",), False))


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stats_of(x: Tensor) -> InputStats:
    stats = InputStats.empty(x.shape[1], 0, x.device, with_gram=True)
    stats.add(x, 256)
    return stats


def a_layer(dtype: torch.dtype = torch.float32) -> tuple[LayerWeights, dict[str, InputStats]]:
    """norm -> a, b [64, 32]; b -> c [32, 64]; a few input channels are far larger than the others."""
    linears = {name: LinearWeight(seeded(*shape, seed=i), dtype) for i, (name, shape) in enumerate({"a": (64, 32), "b": (64, 32), "c": (32, 64)}.items())}
    x = seeded(300, 32, seed=7) * torch.where(torch.arange(32) % 11 == 0, 30.0, 1.0)
    y = seeded(300, 64, seed=8) * torch.where(torch.arange(64) % 13 == 0, 20.0, 1.0)
    shared = stats_of(x)
    norm = (1 + 0.1 * seeded(32, seed=9)).to(dtype)
    return LayerWeights(linears, {"norm.weight": norm}), {"a": shared, "b": shared, "c": stats_of(y)}


def test_the_fixed_formula_is_the_documented_one() -> None:
    weight, absmax = torch.tensor([[1.0, 2.0, 4.0, 4.0], [3.0, 3.0, 1.0, 2.0]]), torch.tensor([1.0, 4.0, 9.0, 16.0])
    relative = torch.tensor([(0.5 + 1) / 2, 1.0, (1 + 0.5) / 2, 1.0])
    expected = (absmax / relative).sqrt()
    torch.testing.assert_close(fixed_scales(absmax, [weight], 2), expected / (expected.max() * expected.min()).sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_search_is_never_worse_than_plain_rounding_and_here_much_better(dtype: torch.dtype) -> None:
    layer, stats = a_layer(dtype)
    result = quantise_layer(layer, stats, GROUPS, Rounding(16, True))
    assert set(result.errors) == {"a", "b", "c"}
    assert sum(result.errors[n][1] for n in "ab") < 0.5 * sum(result.errors[n][0] for n in "ab")
    assert result.errors["c"][1] < 0.7 * result.errors["c"][0]


def test_search_is_better_than_the_fixed_formula() -> None:
    errors = []
    for search in (False, True):
        layer, stats = a_layer()
        result = quantise_layer(layer, stats, GROUPS, Rounding(16, search))
        errors.append(sum(e[1] for e in result.errors.values()))
    assert errors[1] < errors[0]


def test_clipping_lowers_the_error_of_a_group_with_one_large_unimportant_weight() -> None:
    weight, x = seeded(8, 16) * 0.1, seeded(200, 16, seed=3)
    weight[:, 5], x[:, 5] = 1.0, x[:, 5] * 1e-3
    gram = x.t() @ x
    cut = clipped(weight, gram, 16)
    how = Rounding(16, True)
    plain, better = ((x @ (how.rounded(w) - weight).t()).square().sum() for w in (weight, cut))
    assert better < 0.75 * plain
    assert bool((cut != weight).any())


def test_search_is_much_better_than_its_scales_and_clipping_alone() -> None:
    """Numbers are rounded in view of one another: half of the inputs are nearly copies of the other half."""
    x = seeded(400, 16, seed=5).repeat(1, 2) + 0.1 * seeded(400, 32, seed=6)
    layer = LayerWeights({"a": LinearWeight(seeded(64, 32), torch.float32)}, {})
    weight, stats = layer.linears["a"].weight, stats_of(x)
    gram = seen_gram(stats)
    assert gram is not None
    nearest = Rounding(16, True).rounded(clipped(weight, gram, 16))
    result = quantise_layer(layer, {"a": stats}, (), Rounding(16, True))
    error = (x @ (dequantised(*refined(weight, gram, 16)) - weight).t()).square().sum()
    assert error < 0.5 * (x @ (nearest - weight).t()).square().sum()
    assert result.errors["a"][1] < 0.5 * result.errors["a"][0]


def test_modules_that_share_inputs_are_rounded_as_they_would_be_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, stats = a_layer()
    together = quantise_layer(layer, stats, GROUPS, Rounding(16, True)).tensors
    monkeypatch.setattr("lmdeploy.lite.awq.ROUND_AT_ONCE", 1)
    layer, stats = a_layer()
    alone = quantise_layer(layer, stats, GROUPS, Rounding(16, True)).tensors
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[name], alone[name]) for name in together)


def test_two_experts_with_inputs_of_their_own_and_one_that_saw_nothing() -> None:
    """Gate and up get what the router got; a down projection without a token is rounded plainly."""
    shapes = {"router": (4, 32), "0.up": (64, 32), "1.up": (64, 32), "0.down": (32, 64), "1.down": (32, 64)}
    linears = {name: LinearWeight(seeded(*shape, seed=i), torch.float32, quantised=name != "router") for i, (name, shape) in enumerate(shapes.items())}
    groups = (SmoothingGroup("norm", ("router", "0.up", "1.up"), True), SmoothingGroup("0.up", ("0.down",), False), SmoothingGroup("1.up", ("1.down",), False))
    stats = {"router": stats_of(seeded(300, 32, seed=7)), "0.down": stats_of(seeded(300, 64, seed=8))}
    result = quantise_layer(LayerWeights(linears, {"norm.weight": torch.ones(32)}), stats, groups, Rounding(16, True))
    assert set(result.errors) == {"0.up", "1.up", "0.down"}
    assert all(error < plain for plain, error, _ in result.errors.values())
    assert result.warnings == []
    assert {name.rpartition(".")[0] for name in result.tensors if name.endswith(".qweight")} == shapes.keys() - {"router"}


def test_a_gram_that_overflowed_means_plain_rounding() -> None:
    layer, stats = a_layer()
    assert stats["c"].gram is not None
    stats["c"].gram.fill_(float("inf"))
    weight = layer.linears["c"].weight
    result = quantise_layer(layer, stats, GROUPS[:1], Rounding(16, True))
    expected = pack(*quantise(weight, 16))
    assert all(torch.equal(result.tensors[f"c.{name}"], tensor) for name, tensor in expected.items())


def test_a_group_with_nan_inputs_is_named_and_left_alone() -> None:
    layer, stats = a_layer()
    before = layer.others["norm.weight"].clone()
    stats["a"].add(torch.full((1, 32), float("nan")), 4)
    result = quantise_layer(layer, stats, GROUPS, Rounding(16, True))
    assert result.warnings == ["a, b: inputs hold NaN or infinity; left unscaled and unclipped"]
    assert torch.equal(result.tensors["norm.weight"], before)
    assert set(result.errors) == {"c"}
    assert bool(torch.isfinite(result.tensors["a.scales"]).all())


def test_a_norm_in_16_bits_costs_no_accuracy_of_the_scales() -> None:
    layer, stats = a_layer(torch.bfloat16)
    old, weight = layer.others["norm.weight"].float(), layer.linears["a"].weight
    quantise_layer(layer, stats, GROUPS, Rounding(16, True))
    torch.testing.assert_close(layer.others["norm.weight"].float() * layer.linears["a"].weight, old * weight, atol=1e-6, rtol=1e-5)


def test_without_statistics_weights_are_plainly_rounded() -> None:
    layer, _ = a_layer()
    before = layer.linears["c"].weight.clone()
    result = quantise_layer(layer, {}, GROUPS, Rounding(16, True))
    assert torch.equal(layer.linears["c"].weight, before)
    assert result.errors == {}
    assert result.tensors["c.qweight"].shape == (64, 4)


def test_a_router_is_scaled_but_not_rounded() -> None:
    layer, stats = a_layer()
    layer.linears["b"].quantised = False
    result = quantise_layer(layer, stats, GROUPS[:1], Rounding(16, True))
    assert "b.qweight" not in result.tensors
    assert result.tensors["b.weight"].dtype == torch.float32
    assert layer.linears["b"].columns is not None
