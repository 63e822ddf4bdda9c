"""Every command and script that README and docs show is run here, in order, as a reader would."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """(language, options, code) of each fenced block, in order."""
    return [(m[1], m[2].strip(), m[3]) for m in BLOCK.finditer(page.read_text(encoding="utf-8"))]


@pytest.fixture
def folder(tmp_path: Path, page: Path, model_folder: Path, shallow_folder: Path) -> Path:
    """A reader's folder, with a model in ./my-model (two layers of it where the page quantises, which would take minutes); where the page asks for it, a
    (random) one that sees and a picture, too."""
    (tmp_path / "my-model").symlink_to(shallow_folder if "lmdeploy lite auto_" in page.read_text(encoding="utf-8") else model_folder)
    if "my-vision-model" in page.read_text(encoding="utf-8"):
        from PIL import Image

        from tests.vision.folders import write

        write("llava 1.5", tmp_path / "my-vision-model")
        Image.effect_noise((64, 48), 80).convert("RGB").save(tmp_path / "tiger.jpg")
    return tmp_path


def environment() -> dict[str, str]:
    """The reader's environment: this interpreter's commands first, and the checkout importable."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


def wait_for_port(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert server.poll() is None, "the server of the page stopped"
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"nothing listens on port {port} after 60 s")


@pytest.fixture
def servers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Servers that a page starts; stopped at its end."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for server in started:
        server.terminate()
        server.wait(20)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_of_the_page_works(page: Path, folder: Path, servers: list[subprocess.Popen[bytes]]) -> None:
    python: list[str] = []
    for language, options, code in blocks(page):
        if language == "python":
            python.append(code)
            continue
        if python:
            run_python("\n".join(python), folder)
            python = []
        if language == "sh" and options.startswith("server="):
            # the last word of the block is a server that runs on; `exec` makes it the process that we stop
            servers.append(subprocess.Popen(["bash", "-c", "exec " + code.strip()], cwd=folder, env=environment()))
            wait_for_port(int(options.removeprefix("server=")), servers[-1])
        elif language == "sh" and options != "not-run":
            run = subprocess.run(["bash", "-euo", "pipefail", "-c", code], cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
            assert run.returncode == 0, f"{code}\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
            assert '"error"' not in run.stdout, run.stdout
        else:
            assert language in ("sh", "text", "json", "diff", "console"), f"{page.name}: unknown block language {language!r}"
    if python:
        run_python("\n".join(python), folder)


def run_python(code: str, folder: Path) -> None:
    """One interpreter for the python blocks that follow each other."""
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, f"{code}\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}"


def test_blocks_that_are_not_run_are_run_by_ci() -> None:
    """A block marked `not-run` is one of the two commands that .ci/run takes from the README itself."""
    skipped = [(page.name, code) for page in PAGES for language, options, code in blocks(page) if options == "not-run"]
    assert {name for name, _ in skipped} <= {"README.md"}
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in script, ".ci/run must take its commands from the README"
