"""Interrupted runs: real signals to the real command; what is kept, what a second run makes of it, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmdeploy.checkpoint.writer import ShardWriter, partial_folder
from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.lite import api, auto_awq, auto_gptq
from tests.helpers import write_llama
from tests.lite.tiny import checksums, write_text, write_tokenizer

LAYERS = 12
#: of the whole folder only the reports differ from run to run: they hold times and speeds
REPORT = "quantisation_report"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tokenizer(write_llama(tmp_path / "model", num_hidden_layers=LAYERS, intermediate_size=96))


def options(tmp_path: Path, out: str = "out") -> dict[str, object]:
    text = write_text(tmp_path)
    return {
        "calib_dataset": text,
        "calib_samples": 6,
        "calib_seqlen": 64,
        "w_group_size": 32,
        "eval_tokens": 0,
        "work_dir": str(tmp_path / out),
        "dtype": "float32",
    }


def command(model: Path, tmp_path: Path, *more: str) -> list[str]:
    flags = [word for name, value in options(tmp_path).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "lmdeploy", "lite", "auto_gptq", str(model), *flags, *more]


def interrupted(model: Path, tmp_path: Path, number: signal.Signals, *more: str) -> tuple[int, str]:
    """Start the command, send it a signal when it has written three layers; (exit code, its messages)."""
    process = subprocess.Popen(command(model, tmp_path, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    partial, end = partial_folder(tmp_path / "out"), time.monotonic() + 60
    while len(list(partial.glob("*.part"))) < 3 if partial.exists() else True:
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_nothing_and_the_source_as_it_was(number: signal.Signals, model: Path, tmp_path: Path) -> None:
    before = checksums(model)
    code, _ = interrupted(model, tmp_path, number)
    assert code == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibration.txt", "model"]
    assert checksums(model) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_taken_up_again_writes_what_one_run_writes(number: signal.Signals, model: Path, tmp_path: Path) -> None:
    code, errors = interrupted(model, tmp_path, number, "--resume")
    assert code in (130, -signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    partial = partial_folder(tmp_path / "out")
    kept = len(list(partial.glob("*.part")))
    assert 3 <= kept <= LAYERS
    assert number == signal.SIGKILL or f"{kept} parts are kept in {partial}" in errors
    again = subprocess.run(command(model, tmp_path, "--resume"), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    # by a process of its own, too: the last bits of a sum depend on the number of threads, which other tests here may have changed
    subprocess.run(command(model, tmp_path, "--work-dir", str(tmp_path / "whole")), capture_output=True, check=True)
    resumed, whole = checksums(tmp_path / "out"), checksums(tmp_path / "whole")
    assert resumed.keys() == whole.keys()
    assert [n for n in whole if resumed[n] != whole[n] and not n.startswith(REPORT)] == []
    reports = [json.loads((tmp_path / name / f"{REPORT}.json").read_text()) for name in ("out", "whole")]
    for report in reports:
        for layer in report["layers"]:
            assert layer.pop("seconds") >= layer.pop("rounding_seconds") > 0
    for key in ("layers", "linear_bytes_before", "linear_bytes_after", "bytes_before", "warnings"):
        assert reports[0][key] == reports[1][key], key
    assert not partial.exists()


def stop_after(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C as soon as so many layers are written."""
    write, count = api._write_layer, []

    def run(*args: object) -> object:
        if len(count) == layers:
            raise KeyboardInterrupt
        count.append(1)
        return write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(api, "_write_layer", run)


def leave_four_layers(model: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(4, patch)
        with pytest.raises(KeyboardInterrupt):
            auto_gptq(str(model), resume=True, **options(tmp_path))  # type: ignore[arg-type]
    assert len(list(partial_folder(tmp_path / "out").glob("*.part"))) == 4


def test_finished_layers_are_not_computed_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_four_layers(model, tmp_path)
    done, write = [], api._write_layer
    monkeypatch.setattr(api, "_write_layer", lambda *args: done.append(args[1].index) or write(*args))
    auto_gptq(str(model), resume=True, **options(tmp_path))  # type: ignore[arg-type]
    assert done == list(range(4, LAYERS))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"w_group_size": 16}, r"differs in .*w_group_size \(32, now 16\)"),
        ({"calib_samples": 5}, r"differs in calibration text, calib_samples \(6, now 5\)"),
        ({"desc_act": True}, "differs in method"),
    ],
)
def test_a_run_with_other_options_is_refused_and_what_is_there_stays(change: dict[str, object], problem: str, model: Path, tmp_path: Path) -> None:
    leave_four_layers(model, tmp_path)
    before = checksums(partial_folder(tmp_path / "out"))
    with pytest.raises(ConfigError, match=problem):
        auto_gptq(str(model), resume=True, **{**options(tmp_path), **change})  # type: ignore[arg-type]
    assert checksums(partial_folder(tmp_path / "out")) == before


def test_another_model_and_another_method_are_refused(model: Path, tmp_path: Path) -> None:
    leave_four_layers(model, tmp_path)
    with pytest.raises(ConfigError, match="differs in method"):
        auto_awq(str(model), resume=True, **options(tmp_path))  # type: ignore[arg-type]
    write_llama(model, num_hidden_layers=LAYERS, intermediate_size=96, seed=1)
    with pytest.raises(ConfigError, match="differs in model; give the same options, or delete that folder"):
        auto_gptq(str(model), resume=True, **options(tmp_path))  # type: ignore[arg-type]


def test_what_was_kept_on_purpose_is_not_thrown_away(model: Path, tmp_path: Path) -> None:
    leave_four_layers(model, tmp_path)
    with pytest.raises(ConfigError, match="holds an interrupted run that was to be continued; add --resume, or delete that folder"):
        auto_gptq(str(model), **options(tmp_path))  # type: ignore[arg-type]
    assert len(list(partial_folder(tmp_path / "out").glob("*.part"))) == 4


def test_a_part_that_was_being_written_does_not_count(model: Path, tmp_path: Path) -> None:
    leave_four_layers(model, tmp_path)
    partial = partial_folder(tmp_path / "out")
    (partial / "layer-00003.part").rename(partial / "layer-00003.draft")
    (partial / "layer-00003.draft").write_bytes(b"half")
    auto_gptq(str(model), resume=True, **options(tmp_path))  # type: ignore[arg-type]
    auto_gptq(str(model), **options(tmp_path, "whole"))  # type: ignore[arg-type]
    assert checksums(tmp_path / "out")["model-00001-of-00001.safetensors"] == checksums(tmp_path / "whole")["model-00001-of-00001.safetensors"]


def test_two_runs_never_write_one_folder(model: Path, tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "out")
    with pytest.raises(ConfigError, match="another lmdeploy command is writing there"):
        auto_gptq(str(model), **options(tmp_path))  # type: ignore[arg-type]
    writer.discard()
    auto_gptq(str(model), **options(tmp_path))  # type: ignore[arg-type]


def test_an_error_of_the_models_keeps_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise CheckpointError("the model is broken")

    monkeypatch.setattr(api, "measure", refuse)
    with pytest.raises(CheckpointError):
        auto_gptq(str(model), resume=True, **options(tmp_path))  # type: ignore[arg-type]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibration.txt", "model"]
