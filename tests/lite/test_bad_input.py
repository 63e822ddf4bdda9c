"""What can be wrong with a model, a text, a disk: one clear line, nothing half-written, the source as it was."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.lite import auto_awq, auto_gptq, calibrate_model, smooth_quant
from lmdeploy.lite.folder import check_room
from tests.helpers import write_llama
from tests.lite.tiny import change_tensors, checksums, write_text, write_tokenizer

METHODS: dict[str, Any] = {"awq": (auto_awq, {"w_group_size": 32}), "gptq": (auto_gptq, {"w_group_size": 32}), "w8a8": (smooth_quant, {})}
each_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Path]:
    """A model whose folder must be the same after the test."""
    folder = write_tokenizer(write_llama(tmp_path / "model", intermediate_size=96))
    yield folder


def run(method: str, model: Path, tmp_path: Path, **more: Any) -> Any:
    command, options = METHODS[method]
    common = {
        "calib_dataset": write_text(tmp_path),
        "calib_samples": 4,
        "calib_seqlen": 48,
        "eval_tokens": 0,
        "work_dir": str(tmp_path / "out"),
        "dtype": "float32",
    }
    return command(str(model), **{**common, **options, **more})


def assert_untouched(model: Path, before: dict[str, str]) -> None:
    """Nothing but the model and the text, and the model is as it was."""
    assert {p.name for p in model.parent.iterdir()} <= {"model", "calibration.txt"}
    assert checksums(model) == before


@each_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(bad: float, method: str, model: Path, tmp_path: Path) -> None:
    change_tensors(model, model__layers__1__self_attn__o_proj__weight=lambda t: t[3, 4].fill_(bad))
    before = checksums(model)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.self_attn\.o_proj\.weight' holds NaN or infinity"):
        run(method, model, tmp_path)
    assert_untouched(model, before)


@each_method
def test_activations_that_overflow_are_named_and_their_layer_rounded_without_them(method: str, model: Path, tmp_path: Path) -> None:
    change_tensors(model, model__layers__1__post_attention_layernorm__weight=lambda t: t[5].fill_(float("inf")))
    report = run(method, model, tmp_path)
    assert [w for w in report.warnings if w.startswith("layer 1: mlp.gate_proj, mlp.up_proj: inputs hold NaN or infinity")]
    assert all(w.startswith("layer 1: mlp.") for w in report.warnings)
    for name in ("qweight", "weight", "scales", "scale"):
        path = next((tmp_path / "out").glob("*.safetensors"))
        from safetensors import safe_open

        with safe_open(path, "pt") as tensors:
            if (full := f"model.layers.1.mlp.up_proj.{name}") in tensors.keys():  # noqa: SIM118  # no mapping
                assert bool(torch.isfinite(tensors.get_tensor(full).float()).all())


@each_method
def test_a_quantised_model_is_refused(method: str, model: Path, tmp_path: Path) -> None:
    run("w8a8", model, tmp_path, work_dir=str(tmp_path / "first"))
    with pytest.raises(CheckpointError, match=r"is already quantised \(quant_method=smooth_quant\); give the 16-bit model"):
        run(method, tmp_path / "first", tmp_path)
    (tmp_path / "first" / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="already quantised: it has the tensor"):
        run(method, tmp_path / "first", tmp_path)
    assert not (tmp_path / "out").exists()


@each_method
def test_too_little_text_and_an_unknown_dataset(method: str, model: Path, tmp_path: Path) -> None:
    before = checksums(model)
    with pytest.raises(ConfigError, match="the calibration text has 63 tokens; at least 64 are needed"):
        (tmp_path / "calibration.txt").write_text("a" * 63)
        METHODS[method][0](str(model), **METHODS[method][1], calib_dataset=str(tmp_path / "calibration.txt"), work_dir=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="calib_dataset='wikitext3' is neither a file or folder nor one of embedded, ptb, wikitext2, c4, pileval"):
        run(method, model, tmp_path, calib_dataset="wikitext3")
    assert_untouched(model, before)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_group_size_that_does_not_fit_names_the_layer_and_what_fits(method: str, model: Path, tmp_path: Path) -> None:
    before = checksums(model)
    with pytest.raises(ConfigError, match=r"w_group_size=64 does not divide the 96 inputs of 'model\.layers\.0\.\S+'; use --w-group-size 16 or 32"):
        run(method, model, tmp_path, w_group_size=64)
    assert_untouched(model, before)


def command(method: str, model: Path, out: Path, text: str) -> list[str]:
    name = {"awq": "auto_awq", "gptq": "auto_gptq", "w8a8": "smooth_quant"}[method]
    flags = f"--calib-dataset {text} --calib-samples 4 --calib-seqlen 48 --eval-tokens 0 --dtype float32"
    group = "" if method == "w8a8" else "--w-group-size 32"
    return [sys.executable, "-m", "lmdeploy", "lite", name, str(model), *flags.split(), *group.split(), "--work-dir", str(out)]


@pytest.mark.parametrize("limit", [10_000, 60_000])
def test_a_file_that_cannot_be_written_whole_leaves_nothing(limit: int, model: Path, tmp_path: Path) -> None:
    """The limit on file sizes stands for any failing write: the first layer's, or one of the embeddings when the layers are done."""
    text, before = write_text(tmp_path), checksums(model)
    done = subprocess.run(
        command("gptq", model, tmp_path / "out", text),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"lmdeploy: error: {tmp_path}: cannot be written: ")
    assert "too large" in message
    assert "free some space or give another --work-dir" in message
    assert_untouched(model, before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 kB, where the system lets us make one."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)], capture_output=True, check=False)
    if made.returncode:
        folder.rmdir()
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_and_nothing_stays_on_it(small_disk: Path, model: Path, tmp_path: Path) -> None:
    from lmdeploy.lite import job

    before = checksums(model)
    with pytest.raises(CheckpointError, match=r"MB are needed and 0 MB are free"):
        run("w8a8", model, tmp_path, work_dir=str(small_disk / "out"))
    with pytest.MonkeyPatch.context() as patch:  # what was free at the start need not be free later
        patch.setattr(job, "check_room", lambda *_: None)
        with pytest.raises(CheckpointError, match="cannot be written: .*No space left on device"):
            run("w8a8", model, tmp_path, work_dir=str(small_disk / "out"))
    assert list(small_disk.iterdir()) == []
    assert checksums(model) == before


def test_room_is_asked_for_before_the_work(tmp_path: Path) -> None:
    check_room(tmp_path / "new" / "out", 1000)
    with pytest.raises(CheckpointError, match=r"about 1000000000000 MB are needed and \d+ MB are free; free some space or give another --work-dir"):
        check_room(tmp_path / "new" / "out", 10**18)


def test_statistics_of_a_model_are_written_and_read(model: Path, tmp_path: Path) -> None:
    change_tensors(model, model__layers__1__input_layernorm__weight=lambda t: t[7].mul_(80))
    out = tmp_path / "statistics"
    found = calibrate_model(str(model), calib_dataset=write_text(tmp_path), calib_samples=4, calib_seqlen=48, work_dir=str(out), dtype="float32")
    modules = found["modules"]
    assert len(modules) == 2 * 7
    facts = modules["model.layers.1.self_attn.q_proj"]
    assert facts["loudest"][0] == 7
    assert facts["ratio"] > 20
    assert modules["model.layers.0.self_attn.q_proj"]["ratio"] < 10
    assert sorted(p.name for p in out.iterdir()) == ["activations-00001-of-00001.safetensors", "activations.json", "activations.safetensors.index.json"]
    from safetensors.torch import load_file

    tensors = load_file(out / "activations-00001-of-00001.safetensors")
    assert tensors["model.layers.1.self_attn.q_proj.absmax"].shape == (64,)
    assert float(tensors["model.layers.1.self_attn.q_proj.absmax"][7]) == facts["max"]
    calibrate_model(str(model), calib_dataset=write_text(tmp_path), calib_samples=4, calib_seqlen=48, work_dir=str(out), dtype="float32")
    with pytest.raises(ConfigError, match="calib_samples=0 leaves nothing to measure"):
        calibrate_model(str(model), calib_dataset=write_text(tmp_path), calib_samples=0, work_dir=str(tmp_path / "none"))
