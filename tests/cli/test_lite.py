"""`lmdeploy lite` as users write it: today's line, the older one, both spellings of the switch, and every refusal in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmdeploy.cli.flags import FlagParser, config_from
from lmdeploy.cli.lite import add_auto_awq_flags
from lmdeploy.cli.main import main
from lmdeploy.lite.options import AwqConfig
from tests.helpers import SHALLOW

TEXT = "Once upon a time there was a king who had a red boat and a small dog. The dog ran to the sea. " * 80


def parsed(*words: str) -> AwqConfig:
    parser = FlagParser(prog="lmdeploy lite auto_awq", description="")
    add_auto_awq_flags(parser)
    return config_from(parser.parse_args(words), AwqConfig)


def line(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    """Acceptance row A11, with a local text and fewer, shorter windows."""
    words = f"lite auto_awq {model} --calib-dataset {text} --calib-samples 4 --calib-seqlen 128 --w-bits 4 --w-group-size 128"
    return [*words.split(), *more, "--work-dir", str(out)]


@pytest.mark.parametrize(
    ("more", "searches"),
    [
        (("--batch-size", "1", "--search-scale", "False"), False),
        (("--batch-size", "1", "--search-scale", "True"), True),
        (("--batch-size", "2", "--search-scale"), True),
        ((), False),
    ],
)
def test_the_command_lines_of_the_tutorials(
    more: tuple[str, ...], searches: bool, shallow_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT, encoding="utf-8")
    assert main(line(shallow_folder, text, out, *more)) == 0
    report = json.loads((out / "quantisation_report.json").read_text())
    assert report["search_scale"] is searches
    assert (report["samples"], report["seqlen"], report["group_size"]) == (4, 128, 128)
    printed = capsys.readouterr()
    for word in ("memory needed", "folder", "linear weights", "perplexity", "time"):
        assert f"\n{word}" in printed.out
    assert "not measured" not in printed.out
    assert "quantising: 100%" in printed.err
    assert main(line(shallow_folder, text, out, "--calib-samples", "0")) == 0, "our own folder may be made again"


@pytest.mark.parametrize(
    ("words", "method"),
    [
        ("auto_gptq --w-bits 4 --w-group-size 128 --batch-size 2", "GPTQ, 4 bits, groups of 128, symmetric"),
        ("auto_gptq --w-sym False --desc-act", "GPTQ, 4 bits, groups of 128, with zero points, act-order"),
        ("smooth_quant --search-scale False", "SmoothQuant, int8 weights and activations, fixed scales"),
        ("smooth_quant --quant-dtype fp8 --search-scale True", "SmoothQuant, float8_e4m3fn weights and activations, scales searched"),
    ],
)
def test_the_other_commands_write_a_model_and_print_a_report(
    words: str, method: str, shallow_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT, encoding="utf-8")
    name, *more = words.split()
    line = ["lite", name, str(shallow_folder), "--calib-dataset", str(text), "--calib-samples", "4", "--calib-seqlen", "128", *more]
    assert main([*line, "--work-dir", str(out)]) == 0
    assert json.loads((out / "quantisation_report.json").read_text())["method"] == method
    printed = capsys.readouterr()
    assert method in printed.out
    assert "not measured" not in printed.out
    assert "quantising: 100%" in printed.err


def test_calibrate_names_the_loudest_modules(shallow_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT, encoding="utf-8")
    flags = "--calib-samples 2 --calib-seqlen 64 --batch-size 1 --search-scale False --w-bits 4 --w-group-size 128"
    assert main(["lite", "calibrate", str(shallow_folder), "--calib-dataset", str(text), *flags.split(), "--work-dir", str(out)]) == 0
    assert "  model.layers." in capsys.readouterr().out
    assert len(json.loads((out / "activations.json").read_text())["modules"]) == SHALLOW * 5


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["auto_gptq", "--w-bits", "3"], "invalid choice: 3"),
        (["auto_gptq", "--w-group-size", "7"], "w_group_size=7 is odd"),
        (["auto_gptq", "--damp", "0"], "damp=0.0 must be in"),
        (["smooth_quant", "--quant-dtype", "float8_e5m2"], "invalid choice: 'float8_e5m2'"),
        (["smooth_quant", "--w-bits", "4"], "invalid choice: 4"),
        (["calibrate", "--calib-samples", "0"], "calib_samples=0 leaves nothing to measure"),
        (["auto_gtpq"], "did you mean 'lmdeploy lite auto_gptq'?"),
    ],
)
def test_every_mistake_with_the_other_commands_is_one_line(words: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lite", *words, "--work-dir", str(tmp_path / "out"), "--calib-dataset", "embedded"]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_flags_become_the_config() -> None:
    config = parsed("--dtype", "float32", "--device", "cpu", "--revision", "main", "--download-dir", "/d", "--search_scale", "true", "--w_group_size", "64")
    assert config.given == {"dtype", "device", "revision", "download_dir", "search_scale", "w_group_size"}
    assert (config.search_scale, config.w_group_size, config.work_dir, config.calib_dataset) == (True, 64, "./work_dir", "ptb")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--w-sym"], "w_sym=True is not available"),
        (["--w-bits", "3"], "invalid choice: 3"),
        (["--w-group-size", "100"], "w_group_size=100 does not divide the 384 inputs of"),
        (["--calib-seqlen", "1"], "calib_seqlen=1 must be in"),
        (["--calib-dataset", "nowhere.txt"], "calib_dataset='nowhere.txt' is neither"),
        (["--search-scales"], "did you mean --search-scale?"),
    ],
)
def test_every_mistake_is_one_line(words: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lite", "auto_awq", "--work-dir", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_shows_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["lite", "auto_awq", "--help"])
    out = capsys.readouterr().out
    for flag in ("--calib-dataset", "--calib-samples", "--calib-seqlen", "--w-bits", "--w-group-size", "--batch-size", "--search-scale", "--work-dir"):
        assert flag in out
