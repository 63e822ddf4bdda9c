"""`LocalExecutor`: one rank in this process and thread.

A plan is computed when it is submitted; results wait in order. A failed step raises when its result is fetched.
"""

from __future__ import annotations

from collections import deque

import torch

from lmdeploy.engine.plan import StepPlan, StepResult
from lmdeploy.engine.runner import ModelRunner
from lmdeploy.errors import EngineError
from lmdeploy.messages import EngineInfo


class LocalExecutor:
    """See `executor.contract.Executor`. Owns the runner."""

    def __init__(self, runner: ModelRunner, info: EngineInfo) -> None:
        self._runner: ModelRunner | None = runner
        self._info = info
        self._done: deque[StepResult | Exception] = deque()

    @property
    def info(self) -> EngineInfo:
        """Facts of the loaded model and its memory."""
        return self._info

    def submit(self, plan: StepPlan) -> None:
        """Compute a plan; what goes wrong is raised by its `result`."""
        if self._runner is None:
            raise EngineError("the engine is closed")
        try:
            self._done.append(self._runner.run(plan))
        except Exception as error:
            self._done.append(error)

    def result(self) -> StepResult:
        """Result of the oldest plan that was not asked for yet."""
        if self._runner is None:
            raise EngineError("the engine is closed")
        done = self._done.popleft()
        if isinstance(done, torch.AcceleratorError):  # an illegal access, a failed assertion: no later call of this process works
            raise EngineError(f"the device is lost: {str(done).splitlines()[0]}") from done
        if isinstance(done, Exception):
            raise done
        return done

    def close(self) -> None:
        """Free weights and KV cache; may be called twice."""
        runner, self._runner = self._runner, None
        self._done.clear()
        if runner is not None:
            runner.close()
