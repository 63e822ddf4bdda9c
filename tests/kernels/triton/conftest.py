"""Tests here run Triton's kernels in its interpreter, on CPU tensors. The interpreter must be asked for (TRITON_INTERPRET=1) before Triton is imported,
and then holds for the whole process; so all files run in another process, one item each here, unless the variable is set already:
`TRITON_INTERPRET=1 pytest tests/kernels/triton -k ...` runs them test by test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.triton.interpret import END

ROOT = Path(__file__).resolve().parents[3]


class FileInAChild(pytest.File):
    """A test file whose tests are run by a child process."""

    def collect(self) -> Iterator[pytest.Item]:
        yield ChildRun.from_parent(self, name="in_the_interpreter")


class Child:
    """The process that interprets, started when it is needed first (tests/kernels/triton/interpret.py)."""

    process: subprocess.Popen[str] | None = None

    def run(self, path: Path) -> None:
        """Run one file's tests; raises ChildFailed."""
        if self.process is None:
            inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # it is no worker of xdist's
            environment = {**inherited, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
            command = [sys.executable, "-m", "tests.kernels.triton.interpret"]
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        output: list[str] = []
        try:
            self.process.stdin.write(f"{path}\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                output.append(line)
                if line.startswith(END):
                    break
        except BaseException:  # a time limit, Ctrl-C: it would go on with this file
            self.stop()
            raise
        if not output or not output[-1].startswith(END):
            self.stop()
            output.append("the interpreting process ended\n")
        if output[-1] != f"{END} 0\n":
            raise ChildFailed("".join(output)[-24000:])

    def stop(self) -> None:
        """End it; the next file gets another one."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


CHILD = Child()


def pytest_sessionfinish() -> None:
    CHILD.stop()


class ChildRun(pytest.Item):
    """All tests of one file."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_marker(pytest.mark.timeout(1800))  # a file's, whose tests have each their own limit: a busy machine takes minutes for one

    def runtest(self) -> None:
        if find_spec("triton") is None:
            pytest.skip("triton is not installed")
        CHILD.run(self.path)

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
