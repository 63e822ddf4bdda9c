"""Seconds from the start of a process to the first text of an answer: `python -m benchmark.startup [MODEL]`.

Starts `python -m lmdeploy chat` afresh each time, with a question on standard input, as a user in a terminal meets it: imports, weights, KV pool and kernels
included. The first run may compile the CPU kernels; it is shown apart.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from benchmark import common


def first_text(command: list[str]) -> tuple[float, float]:
    """(seconds to the first byte of the answer, seconds to the end of the process)."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"Count from 1 to 5.\n\n")
    process.stdin.close()
    if not process.stdout.read(1):
        raise SystemExit(f"no answer from: {' '.join(command)}")
    first = time.perf_counter() - start
    process.stdout.read()
    process.wait()
    return first, time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.startup", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="model folder or hub id; default: the embedded model")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    busy = common.wait_until_idle()
    command = [sys.executable, "-m", "lmdeploy", "chat", *([args.model] if args.model else [])]
    cold = first_text(command)
    warm = [first_text(command) for _ in range(args.repeat)]
    print(f"{common.machine()}; other processes kept {busy:.2f} cores busy at the start")
    seconds = sorted(first for first, _ in warm)
    print(f"first run {cold[0]:.2f} s to the first text; then median {statistics.median(seconds):.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f})")


if __name__ == "__main__":
    main()
