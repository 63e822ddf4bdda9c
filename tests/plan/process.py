"""The memory bill of an engine in a process of its own, as `lmdeploy serve` has it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = """
import json, sys, msgspec
from pathlib import Path
from lmdeploy.config import TurbomindEngineConfig
from lmdeploy.engine.start import build_engine
engine = build_engine(Path(sys.argv[1]), TurbomindEngineConfig(device_type="cpu", dtype="bfloat16", cache_max_entry_count=20))
print(json.dumps(msgspec.to_builtins(engine.info.memory)))
engine.close()
"""


def bill_of_a_fresh_process(folder: Path) -> dict[str, Any]:
    """Start, read the bill, end."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, timeout=60, check=True)
    bill: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return bill
