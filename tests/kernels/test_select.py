"""The choice of kernels and its reasons, as `lmdeploy check_env` shows them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from lmdeploy.kernels.build import NativeBuild
from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.kernels.select import OPERATORS, pads_rows, report, select


def reasons_of(rows: list[tuple[str, str, list[tuple[str, list[str]]]]], operator: str) -> str:
    return "; ".join(next(others[0][1] for name, _, others in rows if name == operator))


def test_turbomind_on_cpu_takes_the_native_kernels(best_build: NativeBuild, native_cache: Path) -> None:
    chosen = select("turbomind", "cpu", torch.float32, cache_dir=native_cache)
    assert set(chosen.names.values()) == {f"native {best_build.variant}"} and set(chosen.names) == set(OPERATORS)
    assert chosen.linear is not REFERENCE.linear


@pytest.mark.parametrize(("backend", "device"), [("pytorch", "cpu"), ("pytorch", "cuda"), ("turbomind", "cuda")])
def test_everything_else_is_plain_torch(backend: str, device: str, native_cache: Path) -> None:
    chosen = select(backend, device, torch.bfloat16, cache_dir=native_cache)
    assert set(chosen.names.values()) == {"torch"}
    assert all(getattr(chosen, operator) is getattr(REFERENCE, operator) for operator in OPERATORS if not operator.startswith("linear"))
    assert pads_rows(chosen) == (device == "cpu"), "16-bit products on CPU meet few shapes (row_buckets.py)"
    assert not pads_rows(select(backend, device, torch.float32, cache_dir=native_cache))


def test_float16_on_cpu_is_torch_and_says_what_to_do(best_build: NativeBuild, native_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="lmdeploy"):
        chosen = select("turbomind", "cpu", torch.float16, cache_dir=native_cache)
    assert set(chosen.names.values()) == {"torch"}
    assert [r.message for r in caplog.records] == [
        f"{', '.join(OPERATORS)}: torch instead of the native kernel: no float16 kernel; use bfloat16 or float32 on CPU"
    ]


def test_a_head_too_large_sends_only_attention_to_torch(best_build: NativeBuild, native_cache: Path) -> None:
    chosen = select("turbomind", "cpu", torch.float32, head_dim=512, cache_dir=native_cache)
    assert chosen.names["attention"] == "torch" and chosen.attention is REFERENCE.attention
    assert chosen.names["linear"].startswith("native")


def test_a_failed_build_is_logged_once_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "cache"
    with caplog.at_level(logging.WARNING, logger="lmdeploy"):
        chosen = select("turbomind", "cpu", torch.float32, cache_dir=folder)
    assert set(chosen.names.values()) == {"torch"} and len(caplog.records) == 1
    assert "fall back to torch" in caplog.records[0].message
    rows = report("turbomind", "cpu", torch.float32, cache_dir=folder)
    assert all(row[1] == "torch" for row in rows)
    assert reasons_of(rows, "attention") in caplog.records[0].message


def test_the_report_names_the_choice_that_select_makes(native_cache: Path) -> None:
    for backend, device, dtype in (("turbomind", "cpu", torch.bfloat16), ("turbomind", "cuda", torch.bfloat16), ("pytorch", "cpu", torch.float32)):
        rows = report(backend, device, dtype, cache_dir=native_cache)
        assert {name: found for name, found, _ in rows} == select(backend, device, dtype, cache_dir=native_cache).names
        assert all(reasons for _, _, others in rows for _, reasons in others)


def test_reasons_name_the_backend_and_the_device(native_cache: Path) -> None:
    assert reasons_of(report("pytorch", "cpu", torch.float32, cache_dir=native_cache), "linear") == "backend='pytorch' means plain torch"
    assert reasons_of(report("turbomind", "cuda", torch.float32, cache_dir=native_cache), "linear") == "runs on cpu, not on cuda"
