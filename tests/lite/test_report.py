"""The report: old files stay readable, every figure is in the table and on the model's card, and what was not measured says so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from lmdeploy.lite.report import CARD, FILE, Report, folder_bytes, format_report

#: quantisation_report.json as the first version wrote it
OLD = {
    "model": "m", "work_dir": "w", "method": "AWQ, 4 bits, groups of 128, fixed scales", "calibration": "c", "samples": 4, "seqlen": 256, "group_size": 128,
    "search_scale": False, "bytes_before": 100, "bytes_after": 40, "linear_bytes_before": 80, "linear_bytes_after": 20, "perplexity_before": 4.0,
    "perplexity_after": 4.1, "perplexity_note": "", "seconds": 3.0, "peak_bytes": 5000000, "layers": [{"layer": 0, "plain_error": 0.1, "error": 0.05}], "warnings": [],
}  # fmt: skip


def measured(**changes: object) -> Report:
    figures = {
        "perplexity_ratio_se": 0.004, "kl": 0.0123456, "kl_se": 0.0004, "kl_p99": 0.21, "top1": 0.9468, "top1_se": 0.0031, "evaluated_tokens": 4079,
        "evaluated_on": "bfloat16 on cpu", "prefill_before": 1000.0, "prefill_after": 1100.0, "decode_before": 40.0, "decode_after": 70.0,
    }  # fmt: skip
    return Report(**{**OLD, **figures, **changes})  # type: ignore[arg-type]


def test_a_report_of_an_older_version_is_still_read_and_shown() -> None:
    text = format_report(Report(**OLD))  # type: ignore[arg-type]
    assert "perplexity      4.000 -> 4.100 (+2.50 %) on held-out text" in text
    assert "KL" not in text
    assert "decode" not in text


def test_every_figure_is_in_the_table() -> None:
    text = format_report(measured())
    assert "perplexity      4.000 -> 4.100 (+2.50 \u00b1 0.40 %) on 4079 held-out tokens, bfloat16 on cpu" in text
    assert "KL divergence   0.01235 \u00b1 0.00040 nats a token, 99 % below 0.21\n" in text
    assert "same top token  94.68 \u00b1 0.31 %" in text
    assert "decode          40.0 -> 70.0 tok/s (1.75x), one request alone" in text
    assert "prefill         1000.0 -> 1100.0 tok/s (1.10x)" in text
    assert "output error    0.50x that of plain rounding" in text


def test_what_8_bit_activations_add_is_stated() -> None:
    assert "99 % below 0.21; 8-bit activations add 0.00210 of it" in format_report(measured(kl_activations=0.0021))


def test_what_was_not_measured_says_why() -> None:
    report = Report(**{**OLD, "perplexity_before": None, "perplexity_after": None, "perplexity_note": "no memory"})  # type: ignore[arg-type]
    assert "perplexity      not measured: no memory" in format_report(report)


def test_the_folder_gets_json_and_a_card(tmp_path: Path) -> None:
    report = measured(warnings=["layer 3: left as it is"])
    report.save(tmp_path)
    found = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
    assert set(found) == {f.name for f in dataclasses.fields(Report)}
    assert set(OLD) <= set(found), "keys of older versions stay"
    assert Report(**found) == report
    card = (tmp_path / CARD).read_text(encoding="utf-8")
    assert card.startswith("## Quantisation\n")
    for name, value in report.rows():
        assert (f"| {name} | {value} |" in card) == (name != "written to")
    assert "> layer 3: left as it is" in card


def test_every_field_is_explained() -> None:
    text = Report.__doc__ or ""
    for field in dataclasses.fields(Report):
        stem = field.name
        for end in ("_before", "_after", "_se", "_p99", "_ratio"):
            stem = stem.removesuffix(end)
        assert stem in text or f"{stem}_..." in text or stem in ("search_scale", "seconds", "prefill", "decode"), field.name


@pytest.mark.parametrize("linked", [False, True])
def test_folder_bytes_follow_links(tmp_path: Path, linked: bool) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "blob").write_bytes(b"x" * 1000)
    if linked:
        (folder / "a.safetensors").symlink_to(tmp_path / "blob")
    else:
        (folder / "a.safetensors").write_bytes(b"x" * 1000)
    (folder / "config.json").write_bytes(b"y" * 10)
    assert folder_bytes(folder) == 1010
