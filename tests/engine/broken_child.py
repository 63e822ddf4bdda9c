"""The engine's child process with steps that go wrong: what happens is chosen by a token of the prompt.

Run as a program in place of `lmdeploy.engine.child.main`, so that no switch for tests is in the package.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
#: token ids of prompts that do harm
HANG, CRASH, NO_MEMORY, DEVICE_LOST, DEVICE_ASSERT = 5001, 5002, 5003, 5004, 5005


def command() -> list[str]:
    """In place of `launching.child_command`."""
    return [sys.executable, str(Path(__file__).resolve())]


def main() -> None:
    """The child, its steps wrapped."""
    sys.path[:1] = [ROOT]
    import torch

    from lmdeploy.engine import child, runner

    launch = runner.ModelRunner.launch

    def harm(self: runner.ModelRunner, plan: runner.StepPlan) -> Callable[[], runner.StepResult]:
        tokens = {token for new in plan.new for token in new.token_ids}
        if HANG in tokens:
            time.sleep(10_000)
        if CRASH in tokens:
            os.kill(os.getpid(), signal.SIGSEGV)
        if NO_MEMORY in tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if DEVICE_LOST in tokens:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        if DEVICE_ASSERT in tokens:  # really: an index beyond a table, found by the device itself
            torch.zeros(4, device=self.device).index_select(0, torch.tensor([1 << 20], device=self.device)).cpu()
        return launch(self, plan)

    runner.ModelRunner.launch = harm  # type: ignore[method-assign]
    child.main()


if __name__ == "__main__":
    main()
