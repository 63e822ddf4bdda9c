"""`lmdeploy lite compare` as users write it: narrow and wide terminals, both files, mistakes in one line, Ctrl-C."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from lmdeploy.cli.compare import add_compare_flags, command_line
from lmdeploy.cli.flags import FlagParser, config_from
from lmdeploy.cli.main import main
from lmdeploy.lite.compare_options import CompareConfig
from tests.helpers import write_llama

QUICK = ("--policies", "0,8", "--tokens", "128", "--window", "64", "--dtype", "float32", "--device", "cpu", "--cpu-threads", "1")


@pytest.fixture
def folders(tmp_path: Path, model_folder: Path) -> list[Path]:
    """Two models of the same tokenizer; the second has a long name."""
    made = []
    for seed, name in enumerate(("first", "a-model-whose-name-alone-is-wider-than-any-column-of-a-table-may-be-on-a-narrow-terminal")):
        folder = write_llama(tmp_path / name, seed=seed, vocab_size=5120)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(model_folder / file, folder)
        made.append(folder)
    return made


def run(folders: list[Path], *more: str) -> int:
    return main(["lite", "compare", *map(str, folders), *QUICK, *more])


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_a_narrow_terminal_gets_two_tables_that_fit(folders: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(folders) == 0
    printed = capsys.readouterr()
    heads = lines_of(printed.out, "  KV cache")
    assert [head.split()[2] for head in heads] == ["perplexity", "disk"]
    rows = lines_of(printed.out, "  int8") + lines_of(printed.out, "  16 bit")
    assert len(rows) == 8
    assert max(map(len, [*heads, *rows])) <= 80
    assert folders[1].name in printed.out, "a long name is written out"
    assert "comparing: 100%" in printed.err
    assert re.search(r"scoring 128 tokens in 2 windows: the end of the text of the package\nreference: first with a 16-bit KV cache", printed.out)


def test_a_wide_terminal_gets_one_table(folders: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "170")
    assert run(folders[:1]) == 0
    out = capsys.readouterr().out
    assert len(lines_of(out, "  KV cache")) == 1
    cells = lines_of(out, "  int8")[0].split()
    assert len(cells) > 12


def test_both_files_are_written_and_hold_the_command(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, web = tmp_path / "out.json", tmp_path / "out.html"
    assert run(folders, "--json", str(target), "--html", str(web), "--speed", "False", "--memory", "2") == 0
    found = json.loads(target.read_text(encoding="utf-8"))
    assert [row["policy"] for row in found["rows"]] == ["0", "8", "0", "8"]
    assert all(row["speed"] is None for row in found["rows"])
    assert found["memory_bytes"] == 2 << 30
    assert found["machine"]["cpu"] and found["versions"]["torch"]
    assert found["command"].startswith(f"lmdeploy lite compare {folders[0]} ")
    assert "--speed False" in found["command"] and "--memory 2" in found["command"]
    page = web.read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert folders[1].name in page
    assert capsys.readouterr().out.endswith(f"written to {target}\nwritten to {web}\n")


def test_the_recorded_command_gives_the_same_options() -> None:
    def parsed(words: list[str]) -> CompareConfig:
        parser = FlagParser(prog="lmdeploy lite compare", description="")
        add_compare_flags(parser)
        return config_from(parser.parse_args(words), CompareConfig)

    config = parsed(["a model", "--policies", "0,4-plain", "--tokens", "99", "--speed", "False", "--memory", "1.5", "--device", "cpu"])
    words = shlex.split(command_line(["a model"], config))
    assert words[:4] == ["lmdeploy", "lite", "compare", "a model"]
    again = parsed(words[3:])
    assert again == config
    assert again.given == config.given


def test_a_model_that_fails_does_not_end_the_others(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([folders[0], tmp_path / "gone", folders[1]], "--speed", "False") == 0
    out = capsys.readouterr().out
    assert re.search(r"^KV 0, 8 of gone: .*gone: there is no such folder", out, re.MULTILINE)
    assert len(lines_of(out, "  int8")) == 4


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--policies", "0,7"], "quant_policy=7"),
        (["--tokens", "1"], "tokens=1 must be in"),
        (["--json", "/nowhere/at/all.json"], "there is no folder '/nowhere/at'"),
        (["--text", "/nowhere.txt"], "text='/nowhere.txt' is neither a file or folder"),
        (["--policy", "0"], "did you mean --policies"),
        (["no/such/model/here"], "cannot be used"),
    ],
)
def test_every_mistake_is_one_line(words: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lite", "compare", *words]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


def test_ctrl_c_shows_what_was_finished_and_writes_nothing(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmdeploy.lite import compare

    def interrupt(*_: object, **__: object) -> None:
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(1)

    calls: list[int] = []
    monkeypatch.setattr(compare, "speed", interrupt)
    target = tmp_path / "out.json"
    assert run(folders, "--json", str(target)) == 130
    printed = capsys.readouterr()
    assert len(lines_of(printed.out, "  16 bit")) == 2
    assert lines_of(printed.out, "  int8") == []
    assert "interrupted" in printed.err
    assert not target.exists()


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["lite", "compare", "--help"])
    out = capsys.readouterr().out
    for flag in ("--policies", "--text", "--tokens", "--window", "--json", "--html", "--memory", "--speed", "--dtype", "--device", "--cpu-threads"):
        assert re.search(rf"^  {flag} \S.*\n?.*[a-z]{{3}}", out, re.MULTILINE), flag
    assert "MODEL" in out
