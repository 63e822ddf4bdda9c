"""The comparison end to end on tiny folders: rows, the JSON's schema, the page (also in a real browser), and everything that may go wrong with one model."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.lite import compare
from lmdeploy.lite.compare import Comparer, Comparison, Row, cut
from lmdeploy.lite.compare_html import page
from lmdeploy.lite.compare_options import CompareConfig
from lmdeploy.lite.compare_table import COST, QUALITY, megabytes, short
from tests.helpers import write_llama

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SHAPE = {"vocab_size": 5120, "num_hidden_layers": 2, "max_position_embeddings": 256}
POLICIES = "0,4"


def settings(**changes: Any) -> CompareConfig:
    return CompareConfig(**{"policies": POLICIES, "tokens": 300, "window": 160, "dtype": "float32", "device": "cpu", "memory": 1.0, **changes})


def with_tokenizer(folder: Path, model_folder: Path) -> Path:
    for name in TOKENIZER:
        shutil.copy(model_folder / name, folder)
    return folder


def changed(folder: Path, target: Path, amount: float) -> Path:
    """A copy with noise in its weights; NaN makes it broken."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    noisy = {name: t + amount * t.std() * torch.randn(t.shape, generator=generator) if t.dim() > 1 else t for name, t in tensors.items()}
    save_file(noisy, target / "model.safetensors")
    return target


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("compare")
    first = with_tokenizer(write_llama(root / "first", **SHAPE), model_folder)
    found = {"first": first, "noisy": changed(first, root / "noisy", 0.1), "broken": changed(first, root / "broken", math.nan)}
    found["other vocabulary"] = with_tokenizer(write_llama(root / "small", **{**SHAPE, "vocab_size": 4000}), model_folder)
    other = shutil.copytree(first, root / "other <tokens>")
    table = json.loads((other / "tokenizer.json").read_text())
    table["model"]["merges"] = table["model"]["merges"][:200]
    (other / "tokenizer.json").write_text(json.dumps(table))
    found["other tokens"] = Path(other)
    found["nothing"] = root / "nothing"
    return found


@pytest.fixture(scope="module")
def result(folders: dict[str, Path]) -> Comparison:
    """All of them, compared once."""
    return Comparer([str(folder) for folder in folders.values()], settings()).run()


def rows_of(result: Comparison, folder: Path) -> dict[str, Row]:
    return {row.policy: row for row in result.rows if row.folder == str(folder)}


def test_every_model_has_a_row_for_every_policy_and_the_reference_comes_first(result: Comparison, folders: dict[str, Path]) -> None:
    assert [(row.folder, row.policy) for row in result.rows] == [(str(f), p) for f in folders.values() for p in ("0", "4")]
    assert [row.reference for row in result.rows] == [True, *[False] * (len(result.rows) - 1)]
    assert result.reference == "first"


def test_quality_falls_with_the_bits_and_with_noise(result: Comparison, folders: dict[str, Path]) -> None:
    first, noisy = rows_of(result, folders["first"]), rows_of(result, folders["noisy"])
    assert first["0"].scores is not None and first["0"].scores.kl is None, "the reference is not compared with itself"
    kl = {name: row.scores.kl for name, row in first.items() if row.scores is not None and row.scores.kl is not None}
    noise = noisy["0"].scores
    assert noise is not None and noise.kl is not None and noise.top1 is not None
    assert list(kl) == ["4"]
    assert 0 < kl["4"] < noise.kl
    assert noise.top1 < 1
    assert all(row.problem == "" for row in [*first.values(), *noisy.values()])


def test_memory_is_counted_from_the_formats(result: Comparison, folders: dict[str, Path]) -> None:
    rows = rows_of(result, folders["first"])
    per_head = {"0": 2 * 24 * 4, "4": 2 * (12 + 4)}  # float32 cache of head_dim 24; scale and offset are 2 bytes each
    assert {name: row.kv_bytes_per_token for name, row in rows.items()} == {name: 2 * 2 * size for name, size in per_head.items()}
    for row in rows.values():
        assert 0.9 * 2**30 < row.kv_tokens * row.kv_bytes_per_token + row.weight_bytes < 2**30
        assert row.disk_bytes == sum(p.stat().st_size for p in folders["first"].iterdir())
        assert row.weight_bytes == pytest.approx((folders["first"] / "model.safetensors").stat().st_size, rel=0.01)
        assert row.process_bytes > row.weight_bytes


def test_speed_is_measured_for_every_model_that_runs(result: Comparison, folders: dict[str, Path]) -> None:
    for name in ("first", "noisy", "other vocabulary", "other tokens"):
        for row in rows_of(result, folders[name]).values():
            assert row.speed is not None
            assert row.speed.prefill > row.speed.decode > 1


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("other vocabulary", "not comparable: its vocabulary has 4000 tokens, that of first 5120"),
        ("other tokens", "not comparable: its tokenizer cuts the text into other tokens than that of first"),
        ("broken", "broken: its probabilities are no numbers"),
        ("nothing", "there is no such folder"),
    ],
)
def test_what_cannot_be_compared_is_a_row_with_its_reason(result: Comparison, folders: dict[str, Path], name: str, problem: str) -> None:
    for row in rows_of(result, folders[name]).values():
        assert problem in row.problem
        assert row.scores is None or not math.isfinite(row.scores.perplexity)


def test_json_has_the_documented_keys_and_only_finite_numbers(result: Comparison) -> None:
    found = json.loads(result.as_json(), parse_constant=lambda word: pytest.fail(word))
    documented = re.findall(r"^    (schema.*?)\n\n", compare.__doc__ or "", re.MULTILINE | re.DOTALL)[0]
    assert set(found) == set(re.findall(r"(?:^|\| *|\|\n *)(\w+)", documented))
    assert found["schema"] == 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["created"])
    assert set(found["text"]) == {"origin", "tokens", "windows", "window"}
    assert found["text"]["tokens"] == 300
    assert set(found["settings"]) == {f.name for f in dataclasses.fields(CompareConfig)}
    for row in found["rows"]:
        assert set(row) == {f.name for f in dataclasses.fields(Row)}
    scored = found["rows"][1]["scores"]
    assert set(scored) >= {"tokens", "perplexity", "kl", "kl_se", "kl_p99", "top1"}
    broken = next(row for row in found["rows"] if row["model"] == "broken")
    assert broken["scores"]["perplexity"] is None


class Tags(html.parser.HTMLParser):
    """Open tags, attributes, and whether every element is closed."""

    VOID = {"meta", "br", "circle", "rect", "path", "line"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_one_file_with_table_and_plots(result: Comparison) -> None:
    text = page(result)
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert not {"script", "link", "img", "iframe", "object"} & set(tags.seen)
    assert tags.addresses == []
    assert "url(" not in text and "@import" not in text and "http" not in text.replace("https://", "http://").lower().split("</head>")[0]
    assert tags.seen.count("svg") >= 5
    for column in (*QUALITY, *COST):
        assert column.title in tags.text
    assert "other <tokens>" in tags.text, "names are escaped"
    row = result.rows[1]
    for column in (*QUALITY, *COST):
        assert column.cell(row) in tags.text
    assert "its tokenizer cuts the text into other tokens" in tags.text
    assert "nan" not in re.findall(r"[a-z]+", " ".join(re.findall(r'(?:x|y|d|width)="([^"]*)"', text)).lower())


def test_a_browser_opens_the_page_without_complaint(result: Comparison, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium here")
    file, picture = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(page(result), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,900"]
    done = subprocess.run([browser, *flags, f"--screenshot={picture}", file.as_uri()], capture_output=True, text=True, timeout=100)
    assert "CONSOLE" not in done.stderr
    from PIL import Image

    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 20, "something is drawn"


def test_a_page_of_one_row_has_no_empty_plots(folders: dict[str, Path]) -> None:
    config = settings(policies="0", tokens=64, window=64, speed=False)
    result = Comparer([str(folders["first"])], config).run()
    assert result.rows[0].speed is None
    tags = Tags()
    tags.feed(page(result))
    assert "Decode speed" not in tags.text
    assert "Quality against memory" not in tags.text
    assert "KV tokens" in tags.text


def test_a_first_model_that_is_none_is_an_error(folders: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="the first model is what the others are compared with, and it cannot be used: .*no such folder"):
        Comparer([str(folders["nothing"]), str(folders["first"])], settings())


def test_a_model_larger_than_the_memory_is_not_loaded(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    comparer = Comparer([str(folders["first"])], settings(policies="0"))
    monkeypatch.setattr(compare, "free_bytes", lambda _: 1 << 20)
    row = comparer.run().rows[0]
    assert re.search(r"does not fit: its files are .* MiB, and 1 MiB of memory are free", row.problem)
    assert row.weight_bytes == 0


def test_an_engine_that_runs_out_of_memory_is_a_row_too(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    comparer = Comparer([str(folders["first"]), str(folders["noisy"])], settings(policies="0"))

    def build(folder: Path, config: object) -> object:
        if folder == folders["noisy"]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
        return original(folder, config)  # type: ignore[arg-type]

    from lmdeploy.lite import evaluate

    original = evaluate.build_engine
    monkeypatch.setattr(evaluate, "build_engine", build)
    rows = comparer.run().rows
    assert rows[0].problem == ""
    assert "can't allocate memory" in rows[1].problem


def test_ctrl_c_closes_the_engine_and_keeps_the_finished_rows(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from lmdeploy.engine.engine import Engine

    comparer, closed = Comparer([str(folders["first"])], settings()), []
    close, stop = Engine.close, compare.speed

    def interrupt(*args: Any, **options: Any) -> object:
        if comparer.comparison.rows:
            raise KeyboardInterrupt
        return stop(*args, **options)

    monkeypatch.setattr(Engine, "close", lambda self: (closed.append(self), close(self)))
    monkeypatch.setattr(compare, "speed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        comparer.run()
    assert [row.policy for row in comparer.comparison.rows] == ["0"]
    assert len(closed) == 2


def test_text_of_a_file_is_scored_from_its_end(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("The king went home. " * 50 + "A small dog ran to the sea and the red boat was gone. " * 50)
    comparer = Comparer([str(folders["first"])], settings(text=str(file), tokens=100, window=60))
    assert [len(window) for window in comparer.windows] == [50, 50]
    from lmdeploy.text.tokenizer import Tokenizer

    said = Tokenizer(folders["first"]).decode([token for window in comparer.windows for token in window])
    assert "king" not in said
    assert said.rstrip().endswith("the red boat was gone.")
    assert comparer.comparison.text["origin"] == str(file)


def test_windows_are_as_equal_as_can_be_and_lose_nothing() -> None:
    windows = cut(list(range(1000)), 500, 150)
    assert [token for window in windows for token in window] == list(range(500, 1000))
    assert [len(window) for window in windows] == [125] * 4
    assert cut(list(range(100)), 500, 1024) == [list(range(100))]
    with pytest.raises(ConfigError, match="the text has 20 tokens; at least 64 are needed"):
        cut(list(range(20)), 500, 150)


def test_models_of_one_name_are_told_apart(folders: dict[str, Path], tmp_path: Path) -> None:
    twins = [shutil.copytree(folders["first"], tmp_path / name / "model") for name in ("a", "b")]
    comparer = Comparer([str(twins[0]), str(twins[1]), str(twins[0])], settings())
    assert [candidate.name for candidate in comparer.candidates] == ["a/model (1)", "b/model", "a/model (2)"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"policies": "0,5"}, "quant_policy=5"),
        ({"policies": " , "}, "policies=' , ' names no KV policy"),
        ({"policies": "4-plan"}, "quant_policy='4-plan'"),
        ({"json": "/nowhere/x.json"}, "json='/nowhere/x.json': there is no folder '/nowhere'"),
        ({"html": "/tmp"}, "html='/tmp': is a folder"),
        ({"tokens": 3}, "tokens=3 must be in"),
        ({"memory": 0}, "memory=0 must be > 0"),
    ],
)
def test_wrong_options_are_found_before_any_work(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        CompareConfig(**options)


def test_policies_are_named_as_for_the_engine() -> None:
    config = CompareConfig(policies="8, K8V4,4-plain,8")
    assert [policy.name for policy in config.kv_policies()] == ["0", "8", "k8v4", "4-plain"]
    assert [policy.bits for policy in config.kv_policies()] == ["16 bit", "int8", "k8v4", "int4 plain"]
    engines = [policy.config(config.engine()) for policy in config.kv_policies()]
    assert [engine.quant_policy for engine in engines] == [0, 8, "k8v4", 4]
    assert [engine.kv_rotation for engine in engines] == [None, None, None, False]


@pytest.mark.parametrize(
    ("value", "text"), [(0, ""), (9.312, "9.31"), (341.2, "341"), (4553, "4553"), (16849, "16.8k"), (999_500, "1000k"), (3_790_000, "3.79M"), (2.5e9, "2.5G")]
)
def test_counts_are_short(value: float, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, ""), (39.7e6, "39.7 MB"), (16.2e9, "16.2 GB"), (520_000, "0.52 MB")])
def test_sizes_are_decimal(value: float, text: str) -> None:
    assert megabytes(value) == text
