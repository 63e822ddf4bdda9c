"""Calibration text: every kind of source, and no command that dies of a download."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest

from lmdeploy.errors import ConfigError
from lmdeploy.lite.datasets import cut_windows, embedded_text, load_text


def test_a_text_file_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Once upon a time.\n", encoding="utf-8")
    assert load_text(str(tmp_path / "a.txt")).text == "Once upon a time.\n"


def test_a_jsonl_file_gives_its_text_fields(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "one", "id": 1}) + "\n\n" + json.dumps({"content": "two"}) + "\n" + json.dumps("three") + "\n")
    assert load_text(str(file)).text == "one\n\ntwo\n\nthree"


def test_a_folder_gives_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n')
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    assert load_text(str(tmp_path)).text == "first\n\nsecond"


@pytest.mark.parametrize(("line", "problem"), [("{broken", "line 1: not valid JSON"), ('{"id": 3}', "line 1: has no text"), ("[1, 2]", "line 1: has no text")])
def test_a_broken_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match=problem):
        load_text(str(tmp_path / "a.jsonl"))


def test_a_file_that_is_no_text_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="no UTF-8 text"):
        load_text(str(tmp_path / "a.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="has no .txt"):
        load_text(str(tmp_path / "empty"))


def test_a_path_that_does_not_exist_is_an_error_and_never_the_embedded_text() -> None:
    with pytest.raises(ConfigError, match="neither a file or folder nor one of embedded, ptb"):
        load_text("/no/such/file.txt")


@pytest.mark.parametrize("name", ["ptb", "wikitext2", "c4", "pileval"])
def test_a_data_set_that_cannot_be_had_gives_the_embedded_text_and_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("Network is unreachable")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    found = load_text(name)
    assert found.text == embedded_text()
    assert found.notice.startswith(f"{name} cannot be had (")
    assert "--calib-dataset FILE" in found.notice


def test_the_hub_file_of_wikitext2_is_read_from_its_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("wikitext-2-raw/wiki.test.raw", "test")
        archive.writestr("wikitext-2-raw/wiki.train.raw", "train text")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(tmp_path / "w.zip"))
    found = load_text("wikitext2")
    assert (found.text, found.notice) == ("train text", "")


def test_the_embedded_text_is_small_and_long_enough() -> None:
    size = len(embedded_text().encode())
    assert 50_000 < size < 200_000


def test_windows_are_disjoint_and_leave_the_end_for_perplexity() -> None:
    cut = cut_windows(list(range(1000)), samples=8, seqlen=100, eval_tokens=64)
    assert cut.samples.shape == (8, 100)
    assert len(set(cut.samples.flatten().tolist())) == 800
    assert sum(cut.held_out, []) == list(range(936, 1000))
    assert int(cut.samples.max()) < 936
    assert cut.notice == ""


def test_too_few_tokens_for_the_windows_is_told_and_for_anything_is_refused() -> None:
    cut = cut_windows(list(range(500)), samples=128, seqlen=100, eval_tokens=50)
    assert cut.samples.shape == (4, 100)
    assert cut.notice == "the calibration text gives 4 windows of 100 tokens; 128 of 100 were asked for"
    with pytest.raises(ConfigError, match="has 63 tokens; at least 64 are needed"):
        cut_windows(list(range(63)), samples=1, seqlen=10, eval_tokens=0)


def test_no_samples_and_no_evaluation_are_possible() -> None:
    cut = cut_windows(list(range(500)), samples=0, seqlen=100, eval_tokens=0)
    assert cut.samples.shape[0] == 0
    assert cut.held_out == []
    assert cut.notice == ""
