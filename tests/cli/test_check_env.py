"""check_env tells what is really there: versions, hardware, kernels with reasons; and writes it as JSON."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

from lmdeploy.cli.check_env import collect, cpu_facts
from lmdeploy.cli.main import main
from lmdeploy.kernels.reference import REFERENCE


def test_report_agrees_with_the_machine() -> None:
    report = collect()
    assert report["versions"]["torch"] == version("torch")
    assert report["machine"]["cores"].startswith(f"{len(os.sched_getaffinity(0))} usable")
    assert float(report["machine"]["memory"].split()[0]) == pytest.approx(psutil.virtual_memory().total / 2**30, abs=0.1)
    name, flags = cpu_facts()
    assert report["machine"]["cpu"] == name
    assert ("avx512f" in report["machine"]["cpu features"]) == ("avx512f" in flags)


def test_kernel_table_has_every_operator_with_a_reason_against_each_other_candidate() -> None:
    rows = [r for r in collect()["kernels"] if (r["backend"], r["device"]) == ("pytorch", "cpu")]
    assert {r["op"] for r in rows} == set(REFERENCE.names)
    assert {r["kernel"] for r in rows} == {"torch"}
    assert all("plain torch" in r["against"] for r in rows)


def test_dump_file_is_the_same_report_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "env.json"
    assert main(["check_env", "--dump-file", str(target)]) == 0
    report = json.loads(target.read_text())
    out = capsys.readouterr().out
    assert report["versions"]["torch"] in out
    assert set(report) == {"versions", "machine", "devices", "kernels"}
    assert str(target) in out
