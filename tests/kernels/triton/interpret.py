"""A process that runs test files in Triton's interpreter, one after another: their paths come on its input, and after each one's output a line with END and
the exit status. What takes longest, importing torch and Triton, is done once."""

from __future__ import annotations

import sys

import pytest

END = "--- this file ended with"

if __name__ == "__main__":
    for line in sys.stdin:
        status = pytest.main([line.strip(), "-q", "-p", "no:cacheprovider"])
        print(f"\n{END} {int(status)}", flush=True)
