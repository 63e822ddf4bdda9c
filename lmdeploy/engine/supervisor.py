"""An engine that comes back: `SupervisedEngine` replaces an `EngineProcess` that crashed or hung by a new one, for the same callers.

Answers that had begun end with an error at once, because nobody can say how they would have gone on. Requests of which nothing was delivered
are handed to the new process, once: one that takes the engine down is not given a third. New requests are refused while there is no engine;
clients that know `Retry-After` come back by themselves, and a balancer can ask another server. An engine that fails again and again is given up.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from lmdeploy.config import EngineConfig
from lmdeploy.engine.client import Listener
from lmdeploy.engine.launching import Launched, launch
from lmdeploy.engine.process import EngineProcess
from lmdeploy.errors import EngineError, LmdeployError
from lmdeploy.log import get_logger
from lmdeploy.messages import SLEEPING, EngineOutput, EngineRequest, EngineStats, FinishReason, Order, StepOutputs

logger = get_logger(__name__)

#: restarts are counted over so many seconds
WINDOW_SECONDS = 600.0
#: the first restart comes at once, the next ones after 1, 2, 4, ... seconds
MAX_DELAY_SECONDS = 30.0


#: a restart that takes so long, and so many times what the first start took, hangs
MIN_START_SECONDS, START_FACTOR = 300.0, 10.0


@dataclass(frozen=True, slots=True)
class Supervision:
    """`stall_seconds` without a sign of life = the engine hangs (None: see `process`); `max_restarts` in ten minutes, then it is given up.

    `launched`: the first process, where the caller has started it; he ends it when it was not taken over.
    """

    stall_seconds: float | None = None
    max_restarts: int = 5
    launched: Launched | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """Where the orders that were carried out have led: what a fresh engine must become."""

    weights: str | None = None  # folder of the newest weights, None: those of the start
    level: int = 1  # of the last sleep
    asleep: frozenset[str] = frozenset()

    def after(self, order: Order) -> Standing:
        """The same, one order later."""
        return Standing(
            order.path if order.action == "update_weights" else self.weights,
            order.level if order.action == "sleep" else self.level,
            order.sleeping_after(self.asleep),
        )

    def orders(self) -> list[Order]:
        """What leads a fresh engine there."""
        orders = [] if self.weights is None else [Order(action="update_weights", path=self.weights)]
        if self.asleep:
            orders.append(Order(action="sleep", level=self.level))
            if awake := tuple(part for part in SLEEPING if part not in self.asleep):
                orders.append(Order(action="wake", tags=awake))
        return orders


class SupervisedEngine:
    """An `EngineClient` over a succession of processes. The first start raises what goes wrong with it, as `EngineProcess` does."""

    def __init__(self, model_path: Path, config: EngineConfig, supervision: Supervision | None = None) -> None:
        self._model_path, self._supervision = model_path, supervision or Supervision()
        self._lock = threading.RLock()
        self._fresh: dict[int, EngineRequest] = {}  # of which nothing was delivered
        self._held: set[int] = set()  # those of them that wait for the next process
        self._replayed: set[int] = set()  # those of them that had been in one that failed
        self._listener: Listener | None = None
        self._failure: str | None = None
        self._restarts = 0
        self._times: deque[float] = deque()
        self._standing = Standing()
        self._closing = threading.Event()
        self._launched: Launched | None = None  # a process that does not serve yet
        self._engine = self._open(config, launched=self._supervision.launched)
        self._launched = None
        self.info = self._engine.info
        # the next process has the same geometry, or does not start: what callers were told stays true
        self._config = config.replace(cache_max_entry_count=self.info.memory.num_blocks, session_len=self.info.session_len)
        self._thread = threading.Thread(target=self._supervise, name="engine-supervisor", daemon=True)

    # ------------------------------------------------------------------ EngineClient

    @property
    def pid(self) -> int:
        """Process id of the engine of now."""
        return self._engine.pid

    @property
    def failure(self) -> str | None:
        """Why the engine was given up, or None."""
        return self._failure

    @property
    def trouble(self) -> str | None:
        """Why there is no engine at the moment, or None while one works."""
        return self._failure or self._engine.failure

    def start(self, listener: Listener) -> None:
        """Deliver outputs to `listener`, once per step."""
        assert self._listener is None, "start() is called once"
        self._listener = listener
        self._engine.start(self._on_outputs)
        self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. Raises EngineError while there is no engine, OverloadedError when its queue is full."""
        with self._lock:
            if self._closing.is_set() or self._failure:
                raise EngineError(f"the engine has stopped: {self._failure or 'it was closed'}", code="engine_failed")
            if self._engine.failure:
                raise EngineError(f"the engine is being restarted ({self._engine.failure}); try again in some seconds", code="engine_restarting")
            self._fresh[request.request_id] = request
        try:
            self._engine.submit(request)
        except BaseException:
            with self._lock:
                self._forget(request.request_id)
            raise

    def abort(self, request_id: int, index: int | None = None) -> None:
        """Stop a request, or its answer `index` alone; unknown and finished ids are ignored."""
        with self._lock:
            request = self._fresh.get(request_id) if request_id in self._held and index is None else None
            if request is not None:
                self._forget(request_id)
        if request is None:
            self._engine.abort(request_id, index)
        else:
            self._tell(StepOutputs(others=_ends(request, None)))

    def obey(self, order: Order) -> Future[None]:
        """Hand over an order; see `EngineClient`. What was carried out is so in the next process too."""
        with self._lock:
            if self.trouble:
                raise EngineError(f"there is no engine at the moment: {self.trouble}", code="engine_restarting")
            done = self._engine.obey(order)
            # under the lock: orders are noted in the order in which they were carried out
            done.add_done_callback(lambda d: None if d.exception() else self._note(order))
        return done

    def stats(self) -> EngineStats:
        """Figures of the engine of now, counters since its start; zeros while there is none."""
        stats = EngineStats(waiting=len(self._held)) if self.trouble else self._engine.stats()
        stats.restarts = self._restarts
        return stats

    def close(self) -> None:
        """Stop for good. Open requests end with 'abort'."""
        with self._lock:
            self._closing.set()
            engine, launched = self._engine, self._launched
        if launched is not None:
            launched.process.kill()  # it is loading
        engine.close()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        self._drop_held(None)

    # ------------------------------------------------------------------ inside

    def _open(self, config: EngineConfig, limit: float | None = None, launched: Launched | None = None) -> EngineProcess:
        """A process that has loaded the model, within `limit` seconds (how long the first start may take is its watcher's to judge)."""
        with self._lock:
            if self._closing.is_set():
                raise EngineError("the engine was closed")
            launched = self._launched = launched or launch(config.device_type)
        timer = threading.Timer(limit or 0, launched.process.kill)
        timer.daemon = True
        try:
            if limit is not None:
                timer.start()
            return EngineProcess(self._model_path, config, launched=launched, stall_seconds=self._supervision.stall_seconds)
        except BaseException:
            launched.process.kill()  # when not even the timer could be started
            raise
        finally:
            timer.cancel()

    def _note(self, order: Order) -> None:
        with self._lock:
            self._standing = self._standing.after(order)

    def _on_outputs(self, outputs: StepOutputs) -> None:
        """Listener of every process: ends that a failure made of requests that may be replayed are kept back."""
        if self._fresh and outputs.others:  # a first output is always told whole
            with self._lock:
                outputs.others = [output for output in outputs.others if not self._keeps(output)]
        self._tell(outputs)

    def _keeps(self, output: EngineOutput) -> bool:
        request_id = output.request_id
        if request_id not in self._fresh:
            return False
        if output.error_code == "engine_failed" and request_id not in self._replayed:
            self._held.add(request_id)
            return True
        self._forget(request_id)
        return False

    def _forget(self, request_id: int) -> None:
        self._fresh.pop(request_id, None)
        self._held.discard(request_id)
        self._replayed.discard(request_id)

    def _tell(self, outputs: StepOutputs) -> None:
        if outputs and self._listener is not None:
            self._listener(outputs)

    def _supervise(self) -> None:
        """Thread: replace every engine that ends. Should this fail itself, callers are told so; nobody waits for a thread that is dead."""
        try:
            while self._succeed():
                pass
        except Exception as e:
            logger.exception("the engine's supervisor failed")
            self._give_up(f"its supervisor failed: {type(e).__name__}: {e}")
            self._engine.close()

    def _succeed(self) -> bool:
        """Wait for the end of an engine, replace it; False when there is no more engine to wait for."""
        self._engine.wait()
        if self._closing.is_set():
            return False
        reason = self._engine.failure or "it was closed"
        self._engine.close()
        engine = self._replace(reason)
        if engine is None:
            return False
        with self._lock:
            self._restarts += 1
            self._engine, self._launched = engine, None
            self._replay(engine)
            closing = self._closing.is_set()
        if closing:  # and `close` did not see this one
            engine.close()
            return False
        logger.warning("the engine works again (process %d)", engine.pid)
        return True

    def _replace(self, reason: str) -> EngineProcess | None:
        """A new process, tried until one starts; None when the engine is closed or given up."""
        while not self._closing.is_set():
            now = time.monotonic()
            while self._times and self._times[0] < now - WINDOW_SECONDS:
                self._times.popleft()
            count = len(self._times)
            if count >= self._supervision.max_restarts:
                self._give_up(f"the engine was restarted {count} times within {WINDOW_SECONDS:.0f} s and has failed again: {reason}")
                return None
            if count and self._closing.wait(min(2.0 ** (count - 1), MAX_DELAY_SECONDS)):
                return None
            self._times.append(time.monotonic())
            logger.warning("the engine is started again (%d of at most %d times)", count + 1, self._supervision.max_restarts)
            try:
                return self._led(self._checked(self._open(self._config, max(MIN_START_SECONDS, START_FACTOR * self.info.start_seconds))))
            except Exception as e:  # no memory for a process, no thread, no descriptor: a later try may find some
                reason = str(e) if isinstance(e, LmdeployError) else f"{type(e).__name__}: {e}"
                if not self._closing.is_set():
                    logger.error("the engine could not be restarted: %s", reason)
        return None

    def _checked(self, engine: EngineProcess) -> EngineProcess:
        """Refuse an engine that is not what callers were told: the folder has changed."""
        facts = [(i.session_len, i.vocab_size, i.max_batch_size, i.memory.num_blocks, i.memory.block_size) for i in (self.info, engine.info)]
        if facts[0] != facts[1]:
            engine.close()
            raise EngineError(f"session_len, vocab_size, max_batch_size, num_blocks and block_size were {facts[0]} and are {facts[1]}; restart the server")
        return engine

    def _led(self, engine: EngineProcess) -> EngineProcess:
        """The engine in the state of the one before: with new weights, or asleep."""
        try:
            engine.start(self._on_outputs)
            for order in self._standing.orders():
                engine.obey(order).result()
        except BaseException:
            engine.close()
            raise
        return engine

    def _replay(self, engine: EngineProcess) -> None:
        """Hand over what was kept; the caller holds the lock."""
        for request_id in sorted(self._held):
            self._replayed.add(request_id)
            with contextlib.suppress(EngineError):  # it has failed already: they stay for the next one
                engine.submit(self._fresh[request_id])
                self._held.discard(request_id)

    def _give_up(self, reason: str) -> None:
        with self._lock:
            self._failure = reason
        logger.error("the engine is given up: %s", reason)
        self._drop_held(reason)

    def _drop_held(self, error: str | None) -> None:
        """End what waits for a next process."""
        with self._lock:
            requests = [self._fresh[request_id] for request_id in sorted(self._held)]
            for request in requests:
                self._forget(request.request_id)
        self._tell(StepOutputs(others=[output for request in requests for output in _ends(request, error)]))


def _ends(request: EngineRequest, error: str | None) -> list[EngineOutput]:
    """The last outputs of a request: errors, or 'abort' when `error` is None."""
    code = None if error is None else "engine_failed"
    reason: FinishReason = "abort" if error is None else "error"
    return [EngineOutput(request_id=request.request_id, index=i, finish_reason=reason, error=error, error_code=code) for i in range(request.n)]
