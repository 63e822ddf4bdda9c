"""How the text side talks to an engine: `EngineClient`, and `EngineThread`, the engine in a thread of this process.

One thread owns the engine; every other thread only puts messages in its inbox. Whatever happens, each answer of each
submitted request gets exactly one final `EngineOutput` (`finish_reason` set), also when the loop dies or is closed.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from lmdeploy.engine.engine import Engine
from lmdeploy.errors import CheckpointError, ConfigError, EngineError, RequestError
from lmdeploy.log import get_logger
from lmdeploy.messages import EngineInfo, EngineOutput, EngineRequest, EngineStats, Order, StepOutputs

logger = get_logger(__name__)

Listener = Callable[[StepOutputs], None]


class EngineClient(Protocol):
    """A started engine, wherever it runs. All methods may be called from any thread.

    `listener` is called on the client's own thread, once per step with all outputs of the step; it must be quick and
    must not raise. Bad requests are answered through it too: an output with `finish_reason='error'` and `error_code`.
    """

    @property
    def info(self) -> EngineInfo:
        """Facts of the started engine."""
        ...

    @property
    def failure(self) -> str | None:
        """Why the engine does not work any more, or None while it does."""
        ...

    @property
    def trouble(self) -> str | None:
        """Why no request can be taken at the moment, or None; differs from `failure` while a failed engine is replaced."""
        ...

    def start(self, listener: Listener) -> None:
        """Begin to work; called once, before the first `submit`."""
        ...

    def submit(self, request: EngineRequest) -> None:
        """Hand over a request; raises EngineError when the engine has failed or is closed."""
        ...

    def abort(self, request_id: int, index: int | None = None) -> None:
        """End a request, or its answer `index` alone; unfinished answers get a last output 'abort'. Unknown or finished ids are ignored."""
        ...

    def obey(self, order: Order) -> Future[None]:
        """Carry out an order between steps; the future has its end. Requests that come meanwhile wait. ConfigError, CheckpointError: nothing has changed."""
        ...

    def stats(self) -> EngineStats:
        """Counters and gauges of now."""
        ...

    def close(self) -> None:
        """Stop, fail what is still running, free everything; may be called twice."""
        ...


def weak_listener(method: Listener) -> Listener:
    """Calls the bound method for as long as its object lives, without keeping it alive."""
    reference = weakref.WeakMethod(method)

    def listen(outputs: StepOutputs) -> None:
        if (call := reference()) is not None:
            call(outputs)

    return listen


class EngineThread:
    """An `EngineClient` whose engine lives in a thread of this process.

    `build` runs on that thread; the constructor waits for it and raises what it raised. Idle = blocked on the inbox.
    """

    def __init__(self, build: Callable[[], Engine]) -> None:
        # a request | what to abort | an order | None = close
        self._inbox: queue.SimpleQueue[EngineRequest | tuple[int, int | None] | _Pending | None] = queue.SimpleQueue()
        self._pending: deque[_Pending | EngineRequest] = deque()  # an order, and what came after it
        self._lock = threading.Lock()  # guards _open and _failure: nothing is accepted after the loop has ended
        self._open: dict[int, set[int]] = {}  # request id -> answers that still need a final output
        self._failure: str | None = None
        self._busy, self._beat = False, 0  # not waiting for work; times that the loop came round
        self._listener: Listener | None = None
        self._started = threading.Event()
        built: Future[Engine] = Future()
        self._thread = threading.Thread(target=self._run, args=(build, built), name="lmdeploy-engine", daemon=True)
        self._thread.start()
        try:
            self._engine = built.result()
        except Exception:
            self._thread.join()  # it still frees what it had; a program that ends meanwhile would be aborted within torch
            raise

    @property
    def info(self) -> EngineInfo:
        """Facts of the started engine."""
        return self._engine.info

    @property
    def failure(self) -> str | None:
        """Why the loop ended, or None while it runs."""
        return self._failure

    @property
    def trouble(self) -> str | None:
        """The same: a thread is not replaced."""
        return self._failure

    def start(self, listener: Listener) -> None:
        """Begin to work; outputs go to `listener` on the engine's thread."""
        assert self._listener is None, "start() is called once"
        self._listener = listener
        self._started.set()

    def submit(self, request: EngineRequest) -> None:
        """Queue a request; raises EngineError after a failure or `close`."""
        with self._lock:
            if self._failure is not None:
                raise EngineError(f"request {request.request_id}: {self._failure}")
            if request.request_id in self._open:
                raise RequestError(f"request_id={request.request_id} is still being answered; use a new one", param="request_id", code="duplicate_id")
            self._open[request.request_id] = set(range(max(1, request.n)))
            self._inbox.put(request)

    def abort(self, request_id: int, index: int | None = None) -> None:
        """Queue an abort; nothing happens when the request has ended."""
        self._inbox.put((request_id, index))

    def obey(self, order: Order) -> Future[None]:
        """Queue an order; see `EngineClient`."""
        pending = _Pending(order, Future(), time.monotonic() + order.drain_seconds)
        with self._lock:
            if self._failure is not None:
                raise EngineError(self._failure)
            self._inbox.put(pending)
        return pending.done

    def stats(self) -> EngineStats:
        """Counters and gauges of now; requests still in the inbox are not counted."""
        stats = self._engine.stats()
        stats.busy, stats.beat = self._busy, self._beat
        return stats

    def close(self) -> None:
        """End the loop after the step in flight, fail what is unfinished, close the engine, join."""
        self._inbox.put(None)
        self._started.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self, build: Callable[[], Engine], built: Future[Engine]) -> None:
        try:
            engine = build()
        except BaseException as e:  # raised by the constructor, in the caller's thread
            built.set_exception(_no_memory(e) or e)
            return
        built.set_result(engine)
        self._started.wait()
        reason, code = "the engine is closed", "engine_closed"
        try:
            self._loop(engine)
        except Exception as e:
            logger.exception("the engine loop failed")
            reason, code = f"the engine failed: {type(e).__name__}: {e}", "engine_failed"
        self._end(reason, code)
        engine.close()

    def _loop(self, engine: Engine) -> None:
        while True:
            refused: list[EngineOutput] = []
            if not self._drain_inbox(engine, refused):
                return
            if self._pending:
                self._proceed(engine, refused)
            outputs = engine.step() if engine.has_work else StepOutputs()
            outputs.others += refused
            self._beat += 1
            if outputs:
                self._deliver(outputs)
            del outputs  # the next step's numbers take the memory of these

    def _drain_inbox(self, engine: Engine, refused: list[EngineOutput]) -> bool:
        """Take in everything that has arrived, waiting only when there is nothing else to do; False = close."""
        block = not engine.has_work and not self._pending
        if block and logger.isEnabledFor(logging.DEBUG):
            engine.scheduler.check_integrity()
            stats = engine.stats()
            logger.debug("idle: blocks, slots and counts are in order, %d of %d blocks in use", stats.used_blocks, stats.num_blocks)
        while block and self._inbox.empty() and engine.prepare_ahead():
            self._busy, self._beat = False, self._beat + 1  # not a step that does not end
        while True:
            self._busy = not block
            try:
                message = self._inbox.get(block)
            except queue.Empty:
                return True
            self._busy = True
            if message is None:
                return False
            if isinstance(message, tuple):
                refused += self._abort(engine, *message)
            elif self._pending or isinstance(message, _Pending):
                self._pending.append(message)
            else:
                refused += self._add(engine, message)
            block = False

    def _abort(self, engine: Engine, request_id: int, index: int | None) -> list[EngineOutput]:
        """Abort in the engine, or a request that waits behind an order."""
        waits = next((r for r in self._pending if isinstance(r, EngineRequest) and r.request_id == request_id), None)
        if waits is None or index is not None:
            engine.abort(request_id, index)
            return []
        self._pending.remove(waits)
        return [EngineOutput(request_id=request_id, index=i, finish_reason="abort") for i in range(max(1, waits.n))]

    def _proceed(self, engine: Engine, refused: list[EngineOutput]) -> None:
        """Carry out the orders that can be, let in the requests behind them."""
        while self._pending:
            first = self._pending[0]
            if isinstance(first, EngineRequest):
                refused += self._add(engine, first)
            elif engine.has_work and first.order.action != "wake":  # an engine that works does not sleep: nobody need end for that
                if time.monotonic() >= first.deadline:
                    engine.abort_all()
                return
            else:
                first.carry_out(engine)
            self._pending.popleft()

    def _add(self, engine: Engine, request: EngineRequest) -> list[EngineOutput]:
        """Give the engine a request; when it is refused, the final outputs that say so."""
        try:
            engine.add(request)
        except RequestError as e:
            return [_error(request.request_id, i, str(e), e.code) for i in range(max(1, request.n))]
        return []

    def _deliver(self, outputs: StepOutputs) -> None:
        ended = [o for o in outputs.others if o.finish_reason is not None]
        if ended:
            with self._lock:
                self._forget(ended)
        assert self._listener is not None
        self._listener(outputs)

    def _forget(self, ended: list[EngineOutput]) -> None:
        for output in ended:
            indices = self._open[output.request_id]
            indices.remove(output.index)
            if not indices:
                del self._open[output.request_id]

    def _end(self, reason: str, code: str) -> None:
        """Refuse all that comes and give every unfinished answer its last output."""
        with self._lock:
            self._failure = reason
            outputs = [_error(request_id, i, reason, code) for request_id, indices in self._open.items() for i in sorted(indices)]
            self._open.clear()
        for pending in self._left_orders():
            pending.done.set_exception(EngineError(reason))
        if self._listener is not None and outputs:
            try:
                self._listener(StepOutputs(others=outputs))
            except Exception:
                logger.exception("the listener failed while %d answers were ended", len(outputs))

    def _left_orders(self) -> list[_Pending]:
        left = [p for p in self._pending if isinstance(p, _Pending)]
        while not self._inbox.empty():
            message = self._inbox.get()
            left += [message] if isinstance(message, _Pending) else []
        return [pending for pending in left if not pending.done.done()]


@dataclass(frozen=True, slots=True)
class _Pending:
    """An order that waits for running requests to end."""

    order: Order
    done: Future[None]
    deadline: float  # of time.monotonic(); then they are aborted

    def carry_out(self, engine: Engine) -> None:
        """Now. What leaves the engine broken is raised; what only could not be done is the future's alone."""
        try:
            engine.obey(self.order)
        except BaseException as e:
            self.done.set_exception(e)
            if not isinstance(e, (ConfigError, CheckpointError)):
                raise
        else:
            self.done.set_result(None)


def _no_memory(error: BaseException) -> ConfigError | None:
    """The line for a start that ran out of memory; torch's CPU allocator says so with a RuntimeError. None for any other error."""
    text = str(error)
    if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in text:
        return None
    asked = re.search(r"tried to allocate ([\d.]+ ?\w+)", text, re.IGNORECASE)
    return ConfigError(
        f"not enough memory to start: {asked[1] if asked else 'an allocation'} could not be had; "
        "use a smaller session_len, max_batch_size or max_prefill_token_num, or a smaller model"
    )


def _error(request_id: int, index: int, message: str, code: str) -> EngineOutput:
    return EngineOutput(request_id=request_id, index=index, finish_reason="error", error=message, error_code=code)
