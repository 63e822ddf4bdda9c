"""An engine in a process of its own, so that JSON, templates, tokenising and HTTP never delay a step.

`EngineProcess` is the parent's side: an `EngineClient` that sends messages (`wire`) over a private socket pair to `child.main`. The child
starts in a session of its own: Ctrl-C in the terminal reaches the parent only. Memory of a server = this child's; its
`EngineInfo.memory` says so. Every request that was submitted gets its last output, also when the child crashes or hangs.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from lmdeploy import errors, log
from lmdeploy.config import EngineConfig
from lmdeploy.engine import wire
from lmdeploy.engine.client import Listener
from lmdeploy.engine.launching import Launched, launch
from lmdeploy.errors import EngineError, LmdeployError, OverloadedError, RequestError
from lmdeploy.log import get_logger
from lmdeploy.messages import EngineInfo, EngineOutput, EngineRequest, EngineStats, FinishReason, Order, StepOutputs

logger = get_logger(__name__)

#: seconds between two looks at the child. Time is counted in looks, so that a suspended parent kills nobody
LOOK_SECONDS = 2.0
#: no sign of life for this long, or for this many of the largest steps as measured at start-up, whichever is more, means that the engine
#: hangs. A step at the end of a very long prompt takes up to ten times what the measured one takes, on a busy machine some times more
STALL_SECONDS, STALL_STEPS = 120.0, 50.0
#: how long `stats` waits for an answer before it returns the last known figures
STATS_SECONDS = 1.0
#: pings that may be under way; a child that hangs is not sent more
MAX_PINGS = 8
STOP_SECONDS = 5.0
#: an order, such as reading new weights, may take so long without a sign of life
ORDER_SECONDS = 900.0


class EngineProcess:
    """`EngineClient` whose engine is another process. Raises at construction what the engine's start raises there.

    `launched`: a child to use (the caller may kill it while we wait for it). `stall_seconds`: see STALL_SECONDS, its default.
    """

    def __init__(self, model_path: Path, config: EngineConfig, *, launched: Launched | None = None, stall_seconds: float | None = None) -> None:
        self._lock = threading.Lock()
        self._delivering = threading.Lock()  # nothing is delivered after the last outputs that a failure makes
        self._open: dict[int, set[int]] = {}  # request id -> answers that have not ended
        self._orders: dict[int, Future[None]] = {}
        self._order_numbers = itertools.count(1)
        self._pings = _Pings()
        self._last_stats = EngineStats()
        self._listener: Listener | None = None
        self._failure: str | None = None
        self._ready = False
        self._closing = threading.Event()
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        launched = launched or launch(config.device_type)
        self._child, self._channel = launched.process, launched.channel
        self._outbox: queue.SimpleQueue[wire.ToChild | None] = queue.SimpleQueue()
        try:
            self._thread(self._write, "engine-writer")
            self.info = self._wait_until_ready(model_path, config)
            self._ready = True
        except BaseException:
            self.close()
            raise
        self._limit = config.max_waiting + self.info.max_batch_size
        self._stall_seconds = stall_seconds if stall_seconds is not None else max(STALL_SECONDS, STALL_STEPS * self.info.step_seconds)

    # ------------------------------------------------------------------ EngineClient

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._child.pid

    @property
    def failure(self) -> str | None:
        """Why the engine is dead, or None."""
        return self._failure

    @property
    def trouble(self) -> str | None:
        """The same: see `supervisor` for one that is replaced."""
        return self._failure

    def start(self, listener: Listener) -> None:
        """Deliver outputs to `listener`, once per step, on a thread of this client."""
        assert self._listener is None, "start() is called once"
        self._listener = listener
        self._thread(self._read, "engine-reader")
        self._thread(self._watch, "engine-watch")

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. Raises EngineError when the engine is gone, OverloadedError when its queue is full."""
        if request.sampling.output_logits or request.sampling.output_last_hidden_state:
            raise RequestError(
                "output_logits and output_last_hidden_state need an engine in the same process (pipeline)", param="output_logits", code="unsupported"
            )
        with self._lock:
            if self._failure or self._closing.is_set():
                raise EngineError(f"the engine has stopped: {self._failure or 'it was closed'}")
            if len(self._open) >= self._limit:
                raise OverloadedError(
                    f"{len(self._open)} requests are running or waiting, the limit (max_waiting + max_batch_size) is {self._limit}; try again later"
                )
            self._open[request.request_id] = set(range(request.n))
        self._outbox.put(wire.Submit(request))

    def abort(self, request_id: int, index: int | None = None) -> None:
        """Stop a request, or its answer `index` alone; unknown and finished ids are ignored."""
        if request_id in self._open:
            self._outbox.put(wire.Abort(request_id, index))

    def obey(self, order: Order) -> Future[None]:
        """Hand over an order; see `EngineClient`."""
        done: Future[None] = Future()
        with self._lock:
            if self._failure or self._closing.is_set():
                raise EngineError(f"the engine has stopped: {self._failure or 'it was closed'}")
            ticket = next(self._order_numbers)
            self._orders[ticket] = done
        self._outbox.put(wire.Obey(ticket, order))
        return done

    def stats(self) -> EngineStats:
        """Figures of now; the last known ones when the engine has not answered for a second."""
        ticket = self._ping()
        self._pings.wait_for(ticket, STATS_SECONDS - self._pings.silence())
        return self._last_stats

    def wait(self) -> None:
        """Return when the engine has failed, its open requests ended, or it was closed."""
        self._ended.wait()

    def close(self) -> None:
        """Stop the child: asked first, killed after some seconds, or at once when it has failed or is still loading. Open requests end with 'abort'."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
        if self._failure is not None or not self._ready:
            self._child.kill()
        self._outbox.put(wire.Stop())
        try:
            self._child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._outbox.put(None)
        self._pings.end()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(STOP_SECONDS)
        self._channel.close()
        self._end_all("abort", None, None)

    # ------------------------------------------------------------------ inside

    def _thread(self, target: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _wait_until_ready(self, model_path: Path, config: EngineConfig) -> EngineInfo:
        level = logging.getLevelName(logging.getLogger("lmdeploy").getEffectiveLevel())
        options = {name: getattr(config, name) for name in sorted(config.given)}
        self._outbox.put(wire.Start(str(model_path), config.backend, options, level, log.form()))
        message = None
        with contextlib.suppress(OSError, wire.WireError):
            message = self._channel.receive()
        if isinstance(message, wire.Ready):
            return message.info
        if isinstance(message, wire.Failed):
            raise error_of(message)
        raise EngineError(f"the engine process ended while it was loading {model_path}: {self._cause_of_death()}")

    def _write(self) -> None:
        """Thread: everything for the child, so that one that does not read makes nobody wait."""
        while (message := self._outbox.get()) is not None:
            try:
                self._channel.send(message)
            except wire.WireError as e:
                assert isinstance(message, wire.Submit), "only requests can be too large"
                self._deliver(StepOutputs(others=[_failed(message.request.request_id, i, str(e), "invalid_value") for i in range(message.request.n)]))
            except (OSError, ValueError):
                return  # the child is gone; the reader sees that too

    def _ping(self) -> int:
        ticket, is_new = self._pings.next()
        if is_new:
            self._outbox.put(wire.GetStats(ticket))
        return ticket

    def _read(self) -> None:
        """Thread: everything that the child says, until it is gone."""
        reason = None
        try:
            while (message := self._channel.receive()) is not None:
                if isinstance(message, wire.Outputs):
                    self._deliver(message.outputs)
                elif isinstance(message, wire.Stats):
                    self._last_stats = message.stats
                    self._pings.answered(message.ticket)
                elif isinstance(message, wire.Done):
                    self._settle(message)
                elif isinstance(message, wire.Failed):
                    reason = message.message
        except wire.WireError as e:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(0.5)  # when it died in the middle of a message, that is the reason
            reason = str(e) if self._child.returncode is None else None
        except (OSError, ValueError):
            pass  # it died with something unread
        if not self._closing.is_set():
            self._fail(reason or f"the engine process ended: {self._cause_of_death()}")

    def _settle(self, message: wire.Done) -> None:
        with self._lock:
            done = self._orders.pop(message.ticket, None)
        if done is None:
            return  # it was ended by a failure, which was seen first
        if message.kind:
            done.set_exception(error_of(wire.Failed(message.kind, message.message)))
        else:
            done.set_result(None)

    def _watch(self) -> None:
        """Thread: a child whose loop computes on one step for ever, or that answers no ping, hangs; kill it, the reader does the rest."""
        seconds = min(LOOK_SECONDS, self._stall_seconds / 4)
        quiet, beat, what = 0.0, -1, "it answers no ping"
        while not self._closing.wait(seconds) and self._failure is None:
            if not self._pings.wait_for(self._ping(), seconds):
                quiet += 2 * seconds
            elif self._last_stats.busy and self._last_stats.beat == beat:
                quiet, what = quiet + seconds, "no step ends"
            else:
                quiet, beat, what = 0.0, self._last_stats.beat, "it answers no ping"
            if quiet >= (max(self._stall_seconds, ORDER_SECONDS) if self._orders else self._stall_seconds):
                self._fail(f"the engine process {self.pid} hung ({what} for {quiet:.0f} s) and was killed")
                self._child.kill()
                return

    def _deliver(self, outputs: StepOutputs) -> None:
        with self._delivering:
            if self._failure is not None:
                return
            for output in outputs.others:
                if output.finish_reason is not None:
                    with self._lock:
                        answers = self._open.get(output.request_id)
                        if answers is not None:
                            answers.discard(output.index)
                            if not answers:
                                del self._open[output.request_id]
            if self._listener is not None:
                self._listener(outputs)

    def _fail(self, reason: str) -> None:
        with self._delivering, self._lock:
            first = self._failure is None
            self._failure = self._failure or reason
        if first:
            logger.error("the engine has failed: %s", reason)
        self._pings.end()
        self._end_all("error", self._failure, "engine_failed")

    def _end_all(self, finish_reason: FinishReason, error: str | None, code: str | None) -> None:
        with self._lock:
            rest, self._open = self._open, {}
            orders, self._orders = self._orders, {}
        outputs = [
            EngineOutput(request_id=request_id, index=index, finish_reason=finish_reason, error=error, error_code=code)
            for request_id, indices in rest.items()
            for index in sorted(indices)
        ]
        if outputs and self._listener is not None:
            self._listener(StepOutputs(others=outputs))
        for done in orders.values():
            done.set_exception(EngineError(error or "the engine was closed", code="engine_failed"))
        self._ended.set()

    def _cause_of_death(self) -> str:
        try:
            code = self._child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        if code < 0:
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            return f"killed by signal {-code} {signal.strsignal(-code)}{hint}"
        return f"exit status {code}; its messages are above"


class _Pings:
    """Tickets of the pings that were sent, and which of them came back."""

    def __init__(self) -> None:
        self._tickets = itertools.count(1)
        self._sent = self._back = 0
        self._heard = time.monotonic()  # when the oldest ping that is under way was sent, or an older one came back
        self._changed = threading.Condition()
        self._over = False

    def next(self) -> tuple[int, bool]:
        """(ticket to wait for, whether it has to be sent)."""
        with self._changed:
            if self._sent - self._back >= MAX_PINGS:
                return self._sent, False
            if self._sent == self._back:
                self._heard = time.monotonic()
            self._sent = next(self._tickets)
            return self._sent, True

    def answered(self, ticket: int) -> None:
        """The child has answered."""
        with self._changed:
            self._back, self._heard = max(ticket, self._back), time.monotonic()
            self._changed.notify_all()

    def silence(self) -> float:
        """For how many seconds the child has owed an answer."""
        with self._changed:
            return time.monotonic() - self._heard if self._sent > self._back else 0.0

    def wait_for(self, ticket: int, seconds: float) -> bool:
        """Wait until the child has answered; False when it does not."""
        with self._changed:
            self._changed.wait_for(lambda: self._back >= ticket or self._over, max(seconds, 0))
            return self._back >= ticket

    def end(self) -> None:
        """Nobody will answer any more."""
        with self._changed:
            self._over = True
            self._changed.notify_all()


def error_of(failed: wire.Failed) -> LmdeployError:
    """The exception that the child met, as the same type; unknown kinds become EngineError."""
    kind = getattr(errors, failed.kind, None)
    if isinstance(kind, type) and issubclass(kind, LmdeployError):
        return kind(failed.message)
    return EngineError(f"{failed.kind}: {failed.message}")


def _failed(request_id: int, index: int, message: str, code: str) -> EngineOutput:
    return EngineOutput(request_id=request_id, index=index, finish_reason="error", error=message, error_code=code)
