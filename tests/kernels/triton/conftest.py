"""Tests here run Triton's kernels in its interpreter, on CPU tensors. The interpreter must be asked for (TRITON_INTERPRET=1) before Triton is imported,
and then holds for the whole process; so each file runs in a process of its own, unless the variable is set already:
`TRITON_INTERPRET=1 pytest tests/kernels/triton -k ...` runs all in one, test by test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


class FileInAChild(pytest.File):
    """A test file whose tests are run by a child process."""

    def collect(self) -> Iterator[pytest.Item]:
        yield ChildRun.from_parent(self, name="in_the_interpreter")


class ChildRun(pytest.Item):
    """All tests of one file."""

    def runtest(self) -> None:
        if find_spec("triton") is None:
            pytest.skip("triton is not installed")
        command = [sys.executable, "-m", "pytest", str(self.path), "-q", "-p", "no:cacheprovider"]
        child = subprocess.run(command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        if child.returncode != 0:
            raise ChildFailed(child.stdout[-20000:] + child.stderr[-4000:])

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> str:  # type: ignore[override]
        return str(excinfo.value) if isinstance(excinfo.value, ChildFailed) else str(super().repr_failure(excinfo))

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"{self.path.name} in Triton's interpreter"


class ChildFailed(Exception):
    """The child's output."""


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Every file below this folder, unless this process interprets already."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return FileInAChild.from_parent(parent, path=module_path)
