"""GPTQ: errors that are made up for, rows that never get worse, the layout, act-order, and statistics that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmdeploy import GenerationConfig, TurbomindEngineConfig, pipeline
from lmdeploy.lite import auto_gptq
from lmdeploy.lite.awq import LayerWeights, LinearWeight
from lmdeploy.lite.calibrate import InputStats
from lmdeploy.lite.gptq import GptqMethod, inverse_factor, row_errors
from lmdeploy.lite.report import Report
from lmdeploy.models.decoder import SmoothingGroup
from tests.lite.unpacking import dense_copy, gptq_dequantised, read_folder

Tensor = torch.Tensor
GROUPS = (SmoothingGroup("norm", ("a", "b"), True),)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(count: int, width: int, seed: int = 1) -> Tensor:
    """Inputs that depend on each other and differ in size, as those of real layers do."""
    mixed = seeded(count, width, seed=seed) @ (seeded(width, width, seed=seed + 1) * torch.logspace(0, -1.5, width).unsqueeze(1))
    return mixed + 0.1 * seeded(count, width, seed=seed + 2)


def stats_of(x: Tensor) -> InputStats:
    stats = InputStats.empty(x.shape[1], 0, x.device, with_gram=True)
    stats.add(x, 64)
    return stats


def linear(rows: int, cols: int, seed: int, bias: bool = False) -> LinearWeight:
    return LinearWeight(seeded(rows, cols, seed=seed) * 0.1, torch.float32, seeded(rows, seed=seed + 50) if bias else None)


def gram_of(x: Tensor) -> Tensor:
    gram = stats_of(x).gram
    assert gram is not None
    return gram[0]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("group", [8, 32, 48, 96, 192])  # 192: a row is one group
def test_compensation_beats_plain_rounding(group: int, desc_act: bool, sym: bool) -> None:
    method, weight, gram = GptqMethod(group, sym, desc_act), seeded(24, 192) * 0.1, gram_of(correlated(600, 192))
    found = method.compensated(weight, gram)
    assert found is not None
    assert found.scales.shape == (24, 192 // group)
    plain, better = (float(row_errors(r.weight() - weight, gram).sum()) for r in (method.plain(weight), found))
    assert better < 0.6 * plain


def test_blocks_of_columns_give_what_one_column_after_the_other_gives() -> None:
    """The definition, in double precision: e_j = (w_j - q_j) / U_jj, and every later column loses e_j U_jk."""
    method, weight, gram = GptqMethod(16), seeded(6, 160) * 0.1, gram_of(correlated(400, 160))
    found = method.compensated(weight, gram)
    factor = inverse_factor(gram, 0.01)
    assert found is not None
    assert factor is not None
    left, upper = weight.double(), factor.double()
    numbers, scales, zeros = found.numbers.double(), found.scales.double(), found.zeros.double()
    for j in range(160):
        s, z = scales[:, j // 16], zeros[:, j // 16]
        expected = (torch.round(left[:, j] / s) + z).clamp(0, 15)
        exact = left[:, j] / s
        near_half = ((exact - exact.floor()) - 0.5).abs() < 1e-3
        assert bool(((numbers[:, j] == expected) | near_half).all()), j
        left[:, j + 1 :] -= torch.outer((left[:, j] - (numbers[:, j] - z) * s) / upper[j, j], upper[j, j + 1 :])


def test_the_factor_is_that_of_the_inverse() -> None:
    gram = gram_of(correlated(300, 40))
    factor = inverse_factor(gram, 0.01)
    assert factor is not None
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(40)
    torch.testing.assert_close(factor.t() @ factor @ damped, torch.eye(40), atol=2e-3, rtol=0)


def test_no_row_gets_worse_than_plain_rounding() -> None:
    x = seeded(40, 64, seed=3)  # fewer tokens than inputs: X^T X says little
    layer = LayerWeights({"a": linear(16, 64, 1), "b": linear(8, 64, 2)}, {})
    before = {name: module.weight.clone() for name, module in layer.linears.items()}
    seen, method = stats_of(x), GptqMethod(16)
    result = method.quantise(layer, {"a": seen, "b": seen}, ())
    for name, weight in before.items():
        found = gptq_dequantised(result.tensors, name)
        plain = row_errors(method.plain(weight).weight() - weight, gram_of(x))
        assert bool((row_errors(found - weight, gram_of(x)) <= plain * 1.001 + 1e-9).all())
        assert result.errors[name][1] <= result.errors[name][0]


@pytest.mark.parametrize("group", [16, 64])  # 64: a row is one group
@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("sym", [True, False])
def test_the_layout_is_read_by_an_independent_unpacker(sym: bool, desc_act: bool, group: int) -> None:
    method, weight = GptqMethod(group, sym, desc_act), seeded(16, 64) * 0.1 + (0 if sym else 0.05)
    rounded = method.compensated(weight, gram_of(correlated(300, 64)))
    assert rounded is not None
    tensors = {f"m.{suffix}": tensor for suffix, tensor in rounded.pack().items()}
    torch.testing.assert_close(gptq_dequantised(tensors, "m"), rounded.weight(), atol=1e-7, rtol=0)
    assert bool((tensors["m.g_idx"] == torch.arange(64) // group).all()) is (group == 64 or not desc_act)
    assert tensors["m.qweight"].is_contiguous()


def test_experts_use_what_their_router_was_given_and_the_router_stays() -> None:
    router, x = linear(4, 64, 9), correlated(300, 64)
    router.quantised = False
    layer = LayerWeights({"a": linear(8, 64, 1, bias=True), "b": router}, {"norm.weight": torch.ones(64)})
    result = GptqMethod(16).quantise(layer, {"b": stats_of(x)}, GROUPS)
    assert set(result.errors) == {"a"}
    assert result.errors["a"][1] < 0.7 * result.errors["a"][0]
    assert set(result.tensors) == {"a.qweight", "a.qzeros", "a.scales", "a.g_idx", "a.bias", "b.weight", "norm.weight"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_unusable_inputs_are_named_and_their_modules_rounded_plainly(bad: float) -> None:
    x = correlated(300, 64)
    x[7, 9] = bad
    layer, seen = LayerWeights({"a": linear(8, 64, 1), "b": linear(8, 64, 2)}, {}), stats_of(x)
    weight, method = layer.linears["a"].weight.clone(), GptqMethod(16)
    result = method.quantise(layer, {"a": seen, "b": seen}, ())
    assert result.warnings == ["a, b: inputs hold NaN or infinity; rounded plainly"]
    assert result.errors == {}
    torch.testing.assert_close(gptq_dequantised(result.tensors, "a"), method.plain(weight).weight())


def test_a_matrix_that_cannot_be_inverted_is_named() -> None:
    layer, seen = LayerWeights({"a": linear(8, 64, 1)}, {}), stats_of(correlated(300, 64))
    assert seen.gram is not None
    seen.gram[0] -= 5 * seen.gram[0].diagonal().max() * torch.eye(64)  # no X has such an X^T X
    result = GptqMethod(16).quantise(layer, {"a": seen}, ())
    assert result.warnings == ["a: X^T X cannot be inverted; rounded plainly"]


def test_inputs_that_were_always_zero_do_no_harm() -> None:
    x = correlated(300, 64)
    x[:, 10:14] = 0
    layer = LayerWeights({"a": linear(8, 64, 1)}, {})
    weight = layer.linears["a"].weight.clone()
    result = GptqMethod(16).quantise(layer, {"a": stats_of(x)}, ())
    assert result.warnings == []
    found = gptq_dequantised(result.tensors, "a")
    assert float((found - weight)[:, 10:14].square().mean()) < 2e-4, "they are rounded like all others"
    assert result.errors["a"][1] < 0.7 * result.errors["a"][0]


@pytest.fixture(scope="module")
def gptq_report(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Report:
    out = tmp_path_factory.mktemp("gptq") / "out"
    return auto_gptq(str(model_folder), calib_dataset="embedded", calib_samples=16, calib_seqlen=256, batch_size=4, work_dir=str(out))


def test_the_embedded_model_keeps_its_perplexity(gptq_report: Report) -> None:
    assert gptq_report.perplexity_before is not None
    assert gptq_report.perplexity_after is not None
    assert gptq_report.perplexity_after < 1.05 * gptq_report.perplexity_before
    assert (gptq_report.error_ratio() or 1) < 0.7
    assert 0.25 < gptq_report.linear_ratio < 0.275


def test_the_written_folder_is_what_was_computed(gptq_report: Report, tmp_path: Path) -> None:
    folder = Path(gptq_report.work_dir)
    modules = [name for name in read_folder(folder) if name.endswith(".g_idx")]
    assert len(modules) == 10 * 5
    config = TurbomindEngineConfig(dtype="float32", max_batch_size=2, cache_max_entry_count=40, max_prefill_token_num=256)
    answers = []
    dense = dense_copy(folder, tmp_path / "dense")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (dense / name).write_bytes((folder / name).read_bytes())
    for path in (folder, dense):
        with pipeline(str(path), backend_config=config) as pipe:
            answers.append(pipe("Count from 1 to 20.", gen_config=GenerationConfig(do_sample=False, max_new_tokens=80)).text)
    assert answers[0] == answers[1]
    assert ", ".join(map(str, range(1, 21))) in answers[0]
