"""`lmdeploy check_env`: what a bug report needs: versions, hardware, and which kernel would run here and why not another.

Everything is read from the machine, nothing is assumed; a part that is missing is shown as missing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from lmdeploy.config import BACKENDS
from lmdeploy.errors import ConfigError
from lmdeploy.version import __version__

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "tokenizers",
    "sentencepiece",
    "tiktoken",
    "huggingface_hub",
    "fastapi",
    "uvicorn",
    "pydantic",
    "msgspec",
    "gradio",
    "transformers",
)
#: instruction sets that decide which CPU kernels are fast
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
DTYPES = ("float32", "bfloat16", "float16")


def add_check_env_flags(parser: argparse.ArgumentParser) -> None:
    """Where to write the report."""
    parser.add_argument("--dump-file", metavar="FILE.json", help="write the report to this JSON file, too")


def run_check_env(args: argparse.Namespace) -> int:
    """Print the report; write it when asked."""
    target = getattr(args, "dump_file", None)
    if target is not None and not target.endswith(".json"):
        raise ConfigError(f"--dump-file {target!r}: the report is JSON; use a name that ends in .json")
    report = collect()
    print_report(report)
    if target is not None:
        try:
            Path(target).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as e:
            raise ConfigError(f"--dump-file {target!r} cannot be written: {e.strerror}") from e
        print(f"written to {target}")
    return 0


def collect() -> dict[str, Any]:
    """The whole report as plain data."""
    return {
        "versions": versions(),
        "machine": machine(),
        "devices": devices(),
        "kernels": kernel_rows(),
    }


def versions() -> dict[str, str]:
    """lmdeploy, Python and the packages that matter; 'missing' is an answer."""
    found = {"lmdeploy": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    compiler = shutil.which("g++")
    found["g++"] = compiler or "missing (C++ kernels fall back to torch)"
    return found


def machine() -> dict[str, str]:
    """Operating system, CPU and memory as this process may use them."""
    import psutil

    memory = psutil.virtual_memory()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model, flags = cpu_facts()
    return {
        "system": platform.platform(),
        "cpu": model,
        "cpu features": ", ".join(f for f in CPU_FEATURES if f in flags) or "none of interest",
        "cores": f"{usable} usable of {os.cpu_count()}",
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available",
        "executable": sys.executable,
    }


def cpu_facts() -> tuple[str, set[str]]:
    """Name and instruction sets of the CPU; Linux tells them, elsewhere the name is all."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), set()
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return (name.group(1) if name else platform.machine()), set(flags.group(1).split() if flags else ())


def devices() -> list[dict[str, str]]:
    """CUDA devices, with what they have free now."""
    import torch

    if not torch.cuda.is_available():
        return []
    rows = []
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        rows.append(
            {
                "device": f"cuda:{i}",
                "name": facts.name,
                "capability": f"{facts.major}.{facts.minor}",
                "memory": f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free",
                "cuda": str(torch.version.cuda),
            }
        )
    return rows


def kernel_rows() -> list[dict[str, str]]:
    """What `kernels.select` would choose on this machine, and its reasons, by backend, device, type and operator."""
    import torch

    from lmdeploy.kernels.select import report

    kinds = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    rows = []
    for backend, device, dtype in itertools.product(BACKENDS, kinds, DTYPES):
        for op, kernel, others in report(backend, device, getattr(torch, dtype)):
            against = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in others)
            rows.append({"backend": backend, "device": device, "dtype": dtype, "op": op, "kernel": kernel, "against": against})
    return rows


def print_report(report: dict[str, Any]) -> None:
    """For people: short tables."""
    for name in ("versions", "machine"):
        width = max(map(len, report[name]))
        print(f"{name}:")
        print("\n".join(f"  {key:<{width}}  {value}" for key, value in report[name].items()))
    print("devices:")
    for row in report["devices"] or [{"device": "no CUDA device: everything runs on the CPU"}]:
        print("  " + ", ".join(row.values()))
    print_kernels(report["kernels"])


def print_kernels(rows: list[dict[str, str]]) -> None:
    """The kernel table; as wide as it needs to be when nobody looks (a pipe must not cut words)."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    table = Table("backend", "device", "dtype", "kernel", "operators", "why not another", title="kernels:", title_justify="left", box=None, pad_edge=False)
    same = ("backend", "device", "dtype", "kernel", "against")
    for key, group in itertools.groupby(sorted(rows, key=lambda r: [r[name] for name in same]), key=lambda r: [r[name] for name in same]):
        table.add_row(*key[:4], ", ".join(row["op"] for row in group), key[4])
    with console.capture() as text:  # rich ends the program when the reader of its output leaves; print() is handled by main
        console.print(table)
    print(text.get(), end="")
