"""The choice of kernels and its reasons, as `lmdeploy check_env` shows them."""

from __future__ import annotations

import logging
import subprocess
import sys
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


@pytest.mark.parametrize(("backend", "device"), [("pytorch", "cpu"), ("pytorch", "cuda")])
def test_the_pytorch_backend_is_plain_torch(backend: str, device: str, native_cache: Path) -> None:
    chosen = select(backend, device, torch.bfloat16, cache_dir=native_cache)
    assert set(chosen.names.values()) == {"torch"} and chosen.choose_experts is None
    assert all(getattr(chosen, operator) is getattr(REFERENCE, operator) for operator in OPERATORS if not operator.startswith("linear"))
    assert pads_rows(chosen) == (device == "cpu"), "16-bit products on CPU meet few shapes (row_buckets.py)"
    assert not pads_rows(select(backend, device, torch.float32, cache_dir=native_cache))


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that lacks it."""
    monkeypatch.delitem(sys.modules, "lmdeploy.kernels.triton_kernels.triton_set", raising=False)
    monkeypatch.delattr("lmdeploy.kernels.triton_kernels.triton_set", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith("lmdeploy.kernels.triton_kernels.")]:
        monkeypatch.delitem(sys.modules, name)


def test_turbomind_on_cuda_takes_triton_where_there_is_a_kernel() -> None:
    triton_set = pytest.importorskip("lmdeploy.kernels.triton_kernels.triton_set")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        chosen = select("turbomind", "cuda", dtype, head_dim=128)
        assert {name for name, kind in chosen.names.items() if kind == triton_set.NAME} == set(triton_set.OPERATORS)
        assert set(triton_set.OPERATORS) == set(OPERATORS), "nothing of a CUDA step is left to torch"
        assert chosen.choose_experts is triton_set.CHOOSE_EXPERTS and chosen.rope_attention is triton_set.ROPE_ATTENTION
        assert chosen.attention is triton_set.OPERATORS["attention"] and chosen.rms_norm is triton_set.OPERATORS["rms_norm"]
        assert not pads_rows(chosen)
        assert chosen.quarters is not None and chosen.quarters.kernels.attention is chosen.attention
        changed = [name for name in OPERATORS if getattr(chosen.quarters.kernels, name) is not getattr(chosen, name)]
        assert sorted(changed) == ["add_rms_norm", "linear_w4", "rms_norm", "silu_mul"]
        none = chosen.quarters.rows_served((torch.zeros(8, 64), torch.zeros(8, 1), torch.zeros(8, 1)), dtype)
        assert len(none) == len(chosen.quarters.rows_served((torch.zeros(8, 64),), dtype)) == 0


@pytest.mark.parametrize(("head_dim", "reason"), [(320, "head_dim=320 is above 256"), (33, "head_dim=33 is odd")])
def test_a_head_that_triton_cannot_hold_is_attended_by_torch(head_dim: int, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    triton_set = pytest.importorskip("lmdeploy.kernels.triton_kernels.triton_set")
    with caplog.at_level(logging.WARNING, logger="lmdeploy"):
        chosen = select("turbomind", "cuda", torch.bfloat16, head_dim=head_dim)
    assert chosen.attention is REFERENCE.attention and chosen.rope_write_kv is REFERENCE.rope_write_kv
    assert chosen.names["silu_mul"] == triton_set.NAME
    assert [r.message for r in caplog.records] == [f"rope_write_kv, attention: torch instead of the triton kernel: {reason}"]


def test_without_triton_cuda_runs_torch_and_says_why(without_triton: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="lmdeploy"):
        chosen = select("turbomind", "cuda", torch.bfloat16)
    assert set(chosen.names.values()) == {"torch"} and chosen.attention is REFERENCE.attention
    assert len(caplog.records) == 1 and "Triton cannot be imported" in caplog.records[0].message
    against = {name: reasons for name, _, others in report("turbomind", "cuda", torch.bfloat16) for other, reasons in others if other == "triton"}
    assert set(against) == set(OPERATORS) and all("Triton cannot be imported" in reasons[0] for reasons in against.values())


def test_no_compiler_is_a_reason_against_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    assert set(select("turbomind", "cuda", torch.bfloat16).names.values()) == {"torch"}
    rows = report("turbomind", "cuda", torch.bfloat16)
    reasons = next(reasons for name, _, others in rows if name == "attention" for other, reasons in others if other.startswith("triton"))
    assert reasons == ["Triton needs a C compiler: install gcc or clang, or name one by CC"]


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


def test_triton_is_not_imported_for_the_cpu() -> None:
    code = "import sys, torch; from lmdeploy.kernels.select import report; report('turbomind', 'cpu', torch.float32); print('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_the_report_names_the_choice_that_select_makes(native_cache: Path) -> None:
    for backend, device, dtype in (("turbomind", "cpu", torch.bfloat16), ("turbomind", "cuda", torch.bfloat16), ("pytorch", "cpu", torch.float32)):
        rows = report(backend, device, dtype, cache_dir=native_cache)
        assert {name: found for name, found, _ in rows} == select(backend, device, dtype, cache_dir=native_cache).names
        assert all(reasons for _, _, others in rows for _, reasons in others)


def test_reasons_name_the_backend_and_the_device(native_cache: Path) -> None:
    assert reasons_of(report("pytorch", "cpu", torch.float32, cache_dir=native_cache), "linear") == "backend='pytorch' means plain torch"
    assert reasons_of(report("turbomind", "cuda", torch.float32, cache_dir=native_cache), "linear") == "runs on cpu, not on cuda"
