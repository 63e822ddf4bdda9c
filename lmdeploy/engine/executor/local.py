"""`LocalExecutor`: one rank in this process and thread.

A plan is computed when it is submitted; results wait in order. A failed step raises when its result is fetched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch

from lmdeploy.engine.kv_cache import KVLayout
from lmdeploy.engine.plan import StepPlan, StepResult
from lmdeploy.engine.runner import ModelRunner
from lmdeploy.engine.weights import Weights
from lmdeploy.errors import EngineError
from lmdeploy.messages import SLEEPING, EngineInfo, Order


class LocalExecutor:
    """See `executor.contract.Executor`. Owns the runner."""

    def __init__(self, runner: ModelRunner, info: EngineInfo, weights: Weights | None = None, layout: Callable[[], KVLayout] | None = None) -> None:
        self._runner: ModelRunner | None = runner
        self._weights, self._layout = weights, layout  # of the cache: its key centres follow from the weights
        self._sleeps = False  # the cache
        self._info = info
        self._done: deque[Callable[[], StepResult] | Exception] = deque()

    @property
    def info(self) -> EngineInfo:
        """Facts of the loaded model and its memory."""
        return self._info

    def submit(self, plan: StepPlan) -> None:
        """Compute a plan; what goes wrong is raised by its `result`."""
        if self._runner is None:
            raise EngineError("the engine is closed")
        try:
            self._done.append(self._runner.launch(plan))
        except Exception as error:
            self._done.append(error)

    def result(self) -> StepResult:
        """Result of the oldest plan that was not asked for yet."""
        if self._runner is None:
            raise EngineError("the engine is closed")
        done = self._done.popleft()
        if not isinstance(done, Exception):
            try:
                return done()
            except Exception as late:
                done = late
        if isinstance(done, torch.AcceleratorError):  # an illegal access, a failed assertion: no later call of this process works
            raise _lost(done) from done
        raise done

    def prepare_ahead(self) -> bool:
        """Capture the next graph."""
        if self._runner is None:
            return False
        try:
            return self._runner.prepare_ahead()
        except torch.AcceleratorError as e:
            raise _lost(e) from e

    def obey(self, order: Order) -> None:
        """See the contract."""
        if self._runner is None:
            raise EngineError("the engine is closed")
        assert self._weights is not None, "built without access to its weights"
        if order.action == "sleep":
            self._runner.drop_cache()
            self._runner.renew_graphs(awake=False)
            self._sleeps = True
            self._weights.sleep(order.level)
            torch.cuda.empty_cache()
            return
        tags = order.tags or SLEEPING
        if order.action == "update_weights":
            self._weights.update(Path(order.path))
        elif "weights" in tags:
            self._weights.wake()
        if order.action == "wake" and "kv_cache" in tags and self._sleeps:
            self._runner.make_cache()
            self._sleeps = False
        if order.action == "update_weights" and self._layout is not None:
            self._runner.set_layout(self._layout())
        self._runner.renew_graphs(awake=not (self._sleeps or self._weights.asleep))

    def close(self) -> None:
        """Free weights and KV cache; may be called twice."""
        runner, self._runner = self._runner, None
        self._weights = self._layout = None  # both know the model
        self._done.clear()
        if runner is not None:
            runner.close()


def _lost(error: torch.AcceleratorError) -> EngineError:
    """After an illegal access or a failed assertion no later call of this process works."""
    return EngineError(f"the device is lost: {str(error).splitlines()[0]}")
