"""SmoothQuant: outliers move into the weights, the layout, both types, and the search."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lmdeploy import GenerationConfig, TurbomindEngineConfig, pipeline
from lmdeploy.lite import smooth_quant
from lmdeploy.lite.awq import LayerWeights, LinearWeight
from lmdeploy.lite.calibrate import InputStats
from lmdeploy.lite.report import Report
from lmdeploy.lite.smoothquant import SmoothQuantMethod, smoothing_scales
from lmdeploy.models.decoder import SmoothingGroup
from tests.lite.unpacking import read_folder

Tensor = torch.Tensor
INT8, FP8 = torch.int8, torch.float8_e4m3fn
GROUPS = (SmoothingGroup("norm", ("a", "b"), True), SmoothingGroup("a", ("c",), False))


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stats_of(x: Tensor) -> InputStats:
    stats = InputStats.empty(x.shape[1], 0, x.device, with_gram=False)
    stats.add(x, 64)
    return stats


def a_layer(outlier: float = 60.0) -> tuple[LayerWeights, dict[str, InputStats]]:
    """norm -> a, b; a -> c, with two channels of the norm's output far larger than the others."""
    x = seeded(300, 32, seed=9)
    x[:, [3, 17]] *= outlier
    linears = {
        name: LinearWeight(seeded(rows, cols, seed=i) * 0.1, torch.float32, seeded(rows, seed=i + 9))
        for i, (name, rows, cols) in enumerate((("a", 24, 32), ("b", 16, 32), ("c", 8, 24)), 1)
    }
    seen = stats_of(x)
    hidden = x @ linears["a"].weight.t()
    return LayerWeights(linears, {"norm.weight": 1 + 0.1 * seeded(32, seed=5)}), {"a": seen, "b": seen, "c": stats_of(hidden)}


@pytest.mark.parametrize("search", [False, True])
def test_outlier_channels_cost_little_once_they_are_smoothed(search: bool) -> None:
    layer, stats = a_layer()
    result = SmoothQuantMethod(INT8, search).quantise(layer, stats, GROUPS)
    plain, error = (sum(result.errors[name][i] for name in "ab") for i in range(2))
    assert error < 0.2 * plain
    assert result.warnings == []


@pytest.mark.parametrize("stored", [INT8, FP8])
def test_the_search_is_never_worse_than_no_smoothing(stored: torch.dtype) -> None:
    for outlier in (1.0, 5.0, 60.0):
        layer, stats = a_layer(outlier)
        result = SmoothQuantMethod(stored, True).quantise(layer, stats, GROUPS[:1])
        plain, error = (sum(result.errors[name][i] for name in "ab") for i in range(2))
        assert error <= plain * 1.0001


@pytest.mark.parametrize(("stored", "largest"), [(INT8, 127.0), (FP8, 448.0)])
def test_a_row_of_a_weight_has_one_scale_and_fills_the_type(stored: torch.dtype, largest: float) -> None:
    layer, stats = a_layer()
    result = SmoothQuantMethod(stored, False).quantise(layer, stats, GROUPS)
    for name, linear in layer.linears.items():
        numbers, scale = result.tensors[f"{name}.weight"], result.tensors[f"{name}.scale"]
        assert (numbers.dtype, scale.dtype, scale.shape) == (stored, torch.float32, (linear.weight.shape[0], 1))
        assert bool((numbers.float().abs().amax(1) == largest).all())
        torch.testing.assert_close(numbers.float() * scale, linear.weight, atol=float(linear.weight.abs().max()) * 0.04, rtol=0.07)


def test_smoothing_alone_changes_no_output() -> None:
    layer, stats = a_layer()
    x = seeded(20, 32, seed=30)
    norm, weights = layer.others["norm.weight"].clone(), {n: m.weight.clone() for n, m in layer.linears.items()}
    biases = {n: m.bias.clone() for n, m in layer.linears.items() if m.bias is not None}
    before = ((x * norm) @ weights["a"].t() + biases["a"]) @ weights["c"].t() + biases["c"]
    result = SmoothQuantMethod(INT8, False).quantise(layer, stats, GROUPS)
    new = {n: m.weight for n, m in layer.linears.items()}
    hidden = (x * result.tensors["norm.weight"]) @ new["a"].t() + result.tensors["a.bias"]
    torch.testing.assert_close(hidden @ new["c"].t() + result.tensors["c.bias"], before, atol=1e-4, rtol=1e-4)
    assert not torch.equal(result.tensors["norm.weight"], norm)


def test_the_formula_of_the_paper() -> None:
    absmax, weights = torch.tensor([16.0, 1.0]), [torch.tensor([[1.0, 0.5]]), torch.tensor([[-4.0, 0.25]])]
    raw = torch.tensor([16.0, 1.0]).sqrt() / torch.tensor([4.0, 0.5]).sqrt()
    torch.testing.assert_close(smoothing_scales(absmax, weights, 0.5), raw / (raw.max() * raw.min()).sqrt())


def test_a_group_with_nan_inputs_is_named_and_left_alone() -> None:
    layer, stats = a_layer()
    stats["a"].add(torch.full((1, 32), float("nan")), 4)
    before = layer.others["norm.weight"].clone()
    result = SmoothQuantMethod(INT8, True).quantise(layer, stats, GROUPS[:1])
    assert result.warnings == ["a, b: inputs hold NaN or infinity; left unscaled"]
    assert torch.equal(result.tensors["norm.weight"], before)
    assert bool(torch.isfinite(result.tensors["a.scale"]).all())


@pytest.fixture(scope="module", params=["int8", "fp8"])
def w8a8(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Report:
    out = tmp_path_factory.mktemp("w8a8") / "out"
    options = {"calib_dataset": "embedded", "calib_samples": 8, "calib_seqlen": 256, "batch_size": 4, "work_dir": str(out)}
    return smooth_quant(str(model_folder), quant_dtype=request.param, **options)


def test_the_embedded_model_keeps_its_perplexity_and_its_answers(w8a8: Report) -> None:
    assert w8a8.perplexity_before is not None
    assert w8a8.perplexity_after is not None
    assert w8a8.perplexity_after < 1.03 * w8a8.perplexity_before
    assert 0.5 < w8a8.linear_ratio < 0.52
    with pipeline(w8a8.work_dir, backend_config=TurbomindEngineConfig(max_batch_size=2, cache_max_entry_count=40, max_prefill_token_num=256)) as pipe:
        answer = pipe("Count from 1 to 20.", gen_config=GenerationConfig(do_sample=False, max_new_tokens=80)).text
    assert ", ".join(map(str, range(1, 21))) in answer


def test_the_folder_says_what_it_holds(w8a8: Report) -> None:
    folder = Path(w8a8.work_dir)
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "smooth_quant"
    tensors = read_folder(folder)
    stored = getattr(torch, entry["quant_dtype"])
    assert tensors["model.layers.0.attention.wqkv.weight"].dtype == stored
    assert tensors["model.layers.9.feed_forward.w2.scale"].shape == (tensors["model.layers.9.feed_forward.w2.weight"].shape[0], 1)
    assert tensors["output.weight"].dtype == torch.bfloat16
