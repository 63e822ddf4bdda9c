"""The whole way: a model folder in, a 4-bit folder out, which is small, in the public layout, runs, and answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lmdeploy import GenerationConfig, TurbomindEngineConfig, pipeline
from lmdeploy.checkpoint.source import open_source
from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.lite import api, auto_awq
from lmdeploy.lite.report import Report
from tests.helpers import write_llama
from tests.lite.modes import MODES, check_search_is_best, divergence, loss
from tests.lite.unpacking import dequantised, read_folder

TEXT = "It was a cold morning, and the fox walked along the river to find the king. " * 60


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, Report]:
    """Mode -> report of the embedded model, quantised by search, by the formula, and by plain rounding; `Path(report.work_dir)` is the folder."""
    root = tmp_path_factory.mktemp("awq")
    common = {"calib_dataset": "embedded", "calib_samples": 6, "calib_seqlen": 256, "batch_size": 2}
    return {mode: auto_awq(str(model_folder), work_dir=str(root / mode), **{**common, **options}) for mode, options in MODES.items()}


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "calibration.txt"
    file.write_text(TEXT, encoding="utf-8")
    return str(file)


def test_the_layout_is_read_by_an_independent_unpacker(reports: dict[str, Report], model_folder: Path) -> None:
    tensors, source = read_folder(Path(reports["plain"].work_dir)), open_source(model_folder)
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert len(modules) == 10 * 5, "wqkv stays fused; wo, w1, w3, w2"
    for module in modules:
        source.take(f"{module}.weight", weight := torch.empty(source.shape(f"{module}.weight")))
        found = dequantised(tensors, module, 128)
        assert found.shape == weight.shape
        scales = tensors[f"{module}.scales"].float().t().repeat_interleave(128, dim=1)
        assert bool(((found - weight).abs() <= 0.51 * scales + 1e-6).all()), module


@pytest.mark.parametrize("mode", ["search", "fixed", "plain"])
def test_what_is_not_linear_keeps_its_type_and_unscaled_tensors_their_bits(reports: dict[str, Report], mode: str, model_folder: Path) -> None:
    folder, source = Path(reports[mode].work_dir), open_source(model_folder)
    tensors = read_folder(folder)
    for name in ("model.tok_embeddings.weight", "output.weight", "model.norm.weight"):
        source.take(name, out := torch.empty(source.shape(name), dtype=torch.bfloat16))
        assert torch.equal(tensors[name], out)
    assert tensors["model.layers.0.attention_norm.weight"].dtype == torch.bfloat16
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128, "zero_point": True}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (model_folder / name).read_bytes()
    assert json.loads((folder / "quantisation_report.json").read_text())["perplexity_after"] == reports[mode].perplexity_after


def test_linear_weights_are_about_27_hundredths_of_their_size(reports: dict[str, Report]) -> None:
    for report in reports.values():
        assert 0.25 < report.linear_ratio < 0.275
        assert report.bytes_after < report.bytes_before


def test_search_is_never_worse_than_plain_rounding_in_any_layer(reports: dict[str, Report]) -> None:
    layers = reports["search"].layers
    assert len(layers) == 10
    for layer in layers:
        assert layer["error"] <= layer["plain_error"]
    assert (reports["search"].error_ratio() or 1) < 0.9


@pytest.mark.parametrize("mode", ["search", "fixed", "plain"])
def test_perplexity_is_measured_and_within_five_percent(reports: dict[str, Report], mode: str) -> None:
    before, after = reports[mode].perplexity_before, reports[mode].perplexity_after
    assert before is not None
    assert after is not None
    assert mode == "search" or before < after  # searched weights are so near that on little text chance decides; KL tells (test_quality.py)
    assert after != before and after < 1.05 * before


def test_search_is_best_on_the_embedded_model(reports: dict[str, Report]) -> None:
    check_search_is_best(reports)


def test_every_mode_keeps_the_embedded_models_quality(reports: dict[str, Report]) -> None:
    for mode, limit in (("search", 0.034), ("plain", 0.053), ("fixed", 0.059)):
        assert divergence(reports[mode]) < limit, mode
        assert loss(reports[mode]) < 0.05, mode


@pytest.mark.parametrize("mode", ["search", "fixed"])
def test_the_copy_still_counts_to_twenty(reports: dict[str, Report], mode: str) -> None:
    config = TurbomindEngineConfig(dtype="float32", model_format="awq", max_batch_size=2, cache_max_entry_count=40)
    with pipeline(reports[mode].work_dir, backend_config=config) as pipe:
        answer = pipe("Count from 1 to 20.", gen_config=GenerationConfig(do_sample=False, max_new_tokens=80)).text
    assert ", ".join(map(str, range(1, 21))) in answer


def test_a_quantised_model_is_refused_at_once(reports: dict[str, Report], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is already quantised"):
        auto_awq(reports["plain"].work_dir, work_dir=str(tmp_path / "again"))
    assert list(tmp_path.iterdir()) == []


def test_a_group_size_that_does_not_fit_names_the_layer_and_what_fits(tmp_path: Path, text: str) -> None:
    folder = write_llama(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"w_group_size=128 does not divide the 88 inputs of 'model.layers.0.mlp.down_proj'; no usual group size does"):
        auto_awq(str(folder), calib_dataset=text, work_dir=str(tmp_path / "out"))


@pytest.mark.parametrize("where", ["the model itself", "inside the model", "above the model"])
def test_the_source_is_never_written(where: str, tmp_path: Path, text: str) -> None:
    folder = write_llama(tmp_path / "parent" / "model")
    target = {"the model itself": folder, "inside the model": folder / "out", "above the model": folder.parent}[where]
    with pytest.raises(ConfigError, match="the model's own folder"):
        auto_awq(str(folder), calib_dataset=text, work_dir=str(target), overwrite=True)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path, model_folder: Path, text: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="already holds thesis.txt; give a new folder"):
            auto_awq(str(model_folder), calib_dataset=text, work_dir=str(out), overwrite=overwrite)
    assert (out / "thesis.txt").read_text() == "years of work"


class _Interrupted(KeyboardInterrupt):
    """What Ctrl-C raises."""


@pytest.mark.parametrize("moment", ["_note", "measure"])
def test_ctrl_c_leaves_nothing_behind(moment: str, tmp_path: Path, model_folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        assert (tmp_path / ".out.partial").is_dir()
        raise _Interrupted

    monkeypatch.setattr(api, moment, interrupt)
    with pytest.raises(_Interrupted):
        auto_awq(str(model_folder), calib_dataset=text, calib_seqlen=64, work_dir=str(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibration.txt"]


def test_a_model_that_collapses_is_refused(tmp_path: Path, model_folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmdeploy.lite.evaluate.COLLAPSE", 0.5)
    with pytest.raises(CheckpointError, match="the quantised model is broken: perplexity .* nothing is written"):
        auto_awq(str(model_folder), calib_dataset=text, calib_samples=0, calib_seqlen=64, work_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_nan_weights_are_named(tmp_path: Path, model_folder: Path, text: str) -> None:
    folder = write_llama(tmp_path / "model", intermediate_size=96)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_folder / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"'model.layers.1.mlp.up_proj.weight' holds NaN"):
        auto_awq(str(folder), calib_dataset=text, calib_samples=0, w_group_size=32, work_dir=str(tmp_path / "out"))
    assert not (tmp_path / ".out.partial").exists()
