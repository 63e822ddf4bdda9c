"""What is begun for a CUDA device before torch is imported, with a driver and a torch that are not there."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmdeploy.engine import wake


class Driver:
    """Notes which of its functions are called; the one named `fails` returns an error."""

    def __init__(self, fails: str = "") -> None:
        self.called: list[str] = []
        self._fails = fails

    def __getattr__(self, name: str) -> Any:
        def function(*args: object) -> int:
            self.called.append(name)
            return 100 if name == self._fails else 0

        return function


@pytest.mark.parametrize(
    ("fails", "called"),
    [("", ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]), ("cuInit", ["cuInit"]), ("cuDeviceGet", ["cuInit", "cuDeviceGet"])],
)
def test_a_context_is_made_where_the_driver_has_a_device(fails: str, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(fails)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver if name == "libcuda.so.1" else pytest.fail(name))
    wake._make_context()
    assert driver.called == called


def test_no_driver_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    wake._make_context()


@pytest.mark.parametrize(("device_type", "cuda_build", "begun"), [("auto", True, True), ("cuda", True, True), ("cpu", True, False), ("auto", False, False)])
def test_nothing_is_begun_for_the_cpu_or_a_torch_without_cuda(
    device_type: str, cuda_build: bool, begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lib").mkdir()
    if cuda_build:
        (tmp_path / "lib" / "libtorch_cuda.so").touch()
    monkeypatch.setattr(wake.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    ran = {name: threading.Event() for name in ("_make_context", "_hash_triton", "_use_device")}
    for name, event in ran.items():
        monkeypatch.setattr(wake, name, event.set)
    wake.begin(device_type)
    wake.go_on(device_type)
    assert [event.wait(5 if begun else 0.05) for event in ran.values()] == [begun] * 3


def test_the_child_imports_no_torch_before_it_has_begun() -> None:
    code = "import sys, lmdeploy.engine.child; print([m for m in ('torch', 'numpy', 'triton', 'llguidance') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2], timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_command_imports_no_more_than_options_need_before_the_engine_is_launched() -> None:
    code = "import sys, lmdeploy.cli.main, lmdeploy.cli.serve; print([m for m in ('torch', 'numpy', 'fastapi', 'jinja2', 'httpx', 'lmdeploy.frontend') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2], timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
