"""An engine in a process of its own, so that JSON, templates, tokenising and HTTP never delay a step.

`EngineProcess` is the parent's side: an `EngineClient` that sends messages (`wire`) over a private socket pair. `main` is the
child: it builds the engine, forwards, and exits at once when the pair closes, so a dead parent leaves no orphan. The child
starts in a session of its own: Ctrl-C in the terminal reaches the parent only. Memory of a server = this child's; its
`EngineInfo.memory` says so. Every request that was submitted gets its last output, also when the child crashes or hangs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from lmdeploy import errors, log
from lmdeploy.config import EngineConfig, PytorchEngineConfig, TurbomindEngineConfig
from lmdeploy.engine import wire
from lmdeploy.engine.client import EngineThread
from lmdeploy.errors import EngineError, LmdeployError, OverloadedError, RequestError
from lmdeploy.log import get_logger
from lmdeploy.messages import EngineInfo, EngineOutput, EngineRequest, EngineStats, FinishReason

logger = get_logger(__name__)

Listener = Callable[[list[EngineOutput]], None]

#: seconds between two pings, and how many may stay unanswered; counted in pings so that a suspended parent kills nobody
PING_SECONDS = 2.0
MAX_UNANSWERED = 30
#: how long `stats` waits for an answer before it returns the last known figures
STATS_SECONDS = 1.0
STOP_SECONDS = 5.0


class EngineProcess:
    """`EngineClient` whose engine is another process. Raises at construction what the engine's start raises there."""

    def __init__(self, model_path: Path, config: EngineConfig, *, ping_seconds: float = PING_SECONDS, max_unanswered: int = MAX_UNANSWERED) -> None:
        self._ping_seconds, self._max_unanswered = ping_seconds, max_unanswered
        self._lock = threading.Lock()
        self._open: dict[int, set[int]] = {}  # request id -> answers that have not ended
        self._tickets = itertools.count(1)
        self._answered = 0  # highest ticket that came back
        self._new_stats = threading.Condition()
        self._last_stats = EngineStats()
        self._listener: Listener | None = None
        self._failure: str | None = None
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._child, self._channel = _spawn()
        try:
            self.info = self._wait_until_ready(model_path, config)
        except BaseException:
            self.close()
            raise
        self._limit = config.max_waiting + self.info.max_batch_size

    # ------------------------------------------------------------------ EngineClient

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._child.pid

    @property
    def failure(self) -> str | None:
        """Why the engine is dead, or None."""
        return self._failure

    def start(self, listener: Listener) -> None:
        """Deliver outputs to `listener`, once per step, on a thread of this client."""
        assert self._listener is None, "start() is called once"
        self._listener = listener
        for target, name in ((self._read, "engine-reader"), (self._watch, "engine-watch")):
            thread = threading.Thread(target=target, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

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
        try:
            self._channel.send(wire.Submit(request))
        except OSError:
            # The reader sees the end of the child too, and ends this request like all others.
            logger.warning("request %d was submitted to a dead engine", request.request_id)

    def abort(self, request_id: int, index: int | None = None) -> None:
        """Stop a request, or its answer `index` alone; unknown and finished ids are ignored."""
        if request_id in self._open:
            self._send(wire.Abort(request_id, index))

    def stats(self) -> EngineStats:
        """Figures of now; the last known ones when the engine does not answer within a second."""
        self._wait_for(self._ping(), STATS_SECONDS)
        return self._last_stats

    def close(self) -> None:
        """Stop the child: asked first, killed after some seconds. Open requests end with 'abort'."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
        self._send(wire.Stop())
        try:
            self._child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        with self._new_stats:
            self._new_stats.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(STOP_SECONDS)
        self._channel.close()
        self._end_all("abort", None, None)

    # ------------------------------------------------------------------ inside

    def _wait_until_ready(self, model_path: Path, config: EngineConfig) -> EngineInfo:
        level = logging.getLevelName(logging.getLogger("lmdeploy").getEffectiveLevel())
        options = {name: getattr(config, name) for name in sorted(config.given)}
        self._send(wire.Start(str(model_path), config.backend, options, level))
        message = self._channel.receive()
        if isinstance(message, wire.Ready):
            return message.info
        if isinstance(message, wire.Failed):
            raise error_of(message)
        raise EngineError(f"the engine process ended while it was loading {model_path}: {self._cause_of_death()}")

    def _send(self, message: wire.ToChild) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the socket was closed by close()
            self._channel.send(message)

    def _ping(self) -> int:
        with self._new_stats:
            ticket = next(self._tickets)
        self._send(wire.GetStats(ticket))
        return ticket

    def _wait_for(self, ticket: int, seconds: float) -> bool:
        """Wait until the child has answered the ping `ticket`; False when it does not."""
        with self._new_stats:
            over = self._new_stats.wait_for(lambda: self._answered >= ticket or self._failure is not None or self._closing.is_set(), seconds)
            return over and self._answered >= ticket

    def _read(self) -> None:
        """Thread: everything that the child says, until it is gone."""
        reason = None
        try:
            while (message := self._channel.receive()) is not None:
                if isinstance(message, wire.Outputs):
                    self._deliver(message.outputs)
                elif isinstance(message, wire.Stats):
                    with self._new_stats:
                        self._last_stats, self._answered = message.stats, max(message.ticket, self._answered)
                        self._new_stats.notify_all()
                elif isinstance(message, wire.Failed):
                    reason = message.message
        except (OSError, ValueError, EngineError) as e:
            reason = str(e)
        if not self._closing.is_set():
            self._fail(reason or f"the engine process ended: {self._cause_of_death()}")

    def _watch(self) -> None:
        """Thread: a child that answers no ping for long is stuck; kill it, the reader does the rest."""
        unanswered = 0
        while not self._closing.wait(self._ping_seconds):
            if self._failure is not None:
                return
            unanswered = 0 if self._wait_for(self._ping(), self._ping_seconds) else unanswered + 1
            if unanswered >= self._max_unanswered:
                self._fail(f"the engine process {self.pid} did not answer {unanswered} pings and was killed")
                self._child.kill()
                return

    def _deliver(self, outputs: list[EngineOutput]) -> None:
        for output in outputs:
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
        with self._lock:
            if self._failure is None:
                self._failure = reason
                logger.error("the engine has failed: %s", reason)
        with self._new_stats:
            self._new_stats.notify_all()
        self._end_all("error", self._failure, "engine_failed")

    def _end_all(self, finish_reason: FinishReason, error: str | None, code: str | None) -> None:
        with self._lock:
            rest, self._open = self._open, {}
        outputs = [
            EngineOutput(request_id=request_id, index=index, finish_reason=finish_reason, error=error, error_code=code)
            for request_id, indices in rest.items()
            for index in sorted(indices)
        ]
        if outputs and self._listener is not None:
            self._listener(outputs)

    def _cause_of_death(self) -> str:
        try:
            code = self._child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        if code < 0:
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            return f"killed by signal {-code} {signal.strsignal(-code)}{hint}"
        return f"exit status {code}; its messages are above"


def _spawn() -> tuple[subprocess.Popen[bytes], wire.Channel[wire.ToParent]]:
    ours, theirs = socket.socketpair()
    package_root = str(Path(__file__).resolve().parents[2])
    # the child imports the same package as we do, and nothing from the current folder
    code = f"import sys; r = {package_root!r}; sys.path[:1] = [] if r in sys.path[1:] else [r]; from lmdeploy.engine.process import main; main()"
    try:
        child = subprocess.Popen(
            [sys.executable, "-c", code, "--fd", str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return child, wire.to_child(ours)


def error_of(failed: wire.Failed) -> LmdeployError:
    """The exception that the child met, as the same type; unknown kinds become EngineError."""
    kind = getattr(errors, failed.kind, None)
    if isinstance(kind, type) and issubclass(kind, LmdeployError):
        return kind(failed.message)
    return EngineError(f"{failed.kind}: {failed.message}")


# ---------------------------------------------------------------------- the child


class _Child:
    """The engine's side. A reader thread fills the inbox from the start on, so that a dead parent is seen while loading too."""

    def __init__(self, channel: wire.Channel[wire.ToChild]) -> None:
        self._channel = channel
        self._inbox: queue.SimpleQueue[wire.ToChild] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="parent-reader", daemon=True).start()

    def run(self) -> None:
        """Load, announce, then serve until Stop. An error of the start goes to the parent as its class and its one line."""
        start = self._inbox.get()
        assert isinstance(start, wire.Start), "the first message is Start"
        log.setup(start.log_level)
        try:
            client = _load(start)
        except Exception as e:
            kind = type(e).__name__ if isinstance(e, LmdeployError) else "EngineError"
            logger.debug("the engine could not start", exc_info=True)
            self._channel.send(wire.Failed(kind, str(e) if isinstance(e, LmdeployError) else f"the engine could not start: {type(e).__name__}: {e}"))
            return
        try:
            client.start(self._forward)
            self._channel.send(wire.Ready(client.info))
            self._serve(client)
        finally:
            client.close()

    def _serve(self, client: EngineThread) -> None:
        while True:
            try:
                message = self._inbox.get(timeout=0.5)
            except queue.Empty:
                message = None
            if client.failure is not None:
                self._channel.send(wire.Failed("EngineError", client.failure))
                return
            if isinstance(message, wire.Submit):
                self._submit(client, message.request)
            elif isinstance(message, wire.Abort):
                client.abort(message.request_id, message.index)
            elif isinstance(message, wire.GetStats):
                self._channel.send(wire.Stats(message.ticket, client.stats()))
            elif isinstance(message, wire.Stop):
                return

    def _submit(self, client: EngineThread, request: EngineRequest) -> None:
        try:
            client.submit(request)
        except LmdeployError as e:
            self._forward([_refusal(request.request_id, i, e) for i in range(request.n)])

    def _read(self) -> None:
        try:
            while (message := self._channel.receive()) is not None:
                self._inbox.put(message)
        except (OSError, ValueError, EngineError) as e:
            logger.error("the engine process lost its parent: %s", e)
        os._exit(1)  # the parent is gone: whatever this process is doing, nobody wants it

    def _forward(self, outputs: list[EngineOutput]) -> None:
        try:
            self._channel.send(wire.Outputs(outputs))
        except OSError:
            os._exit(1)


def _refusal(request_id: int, index: int, error: LmdeployError) -> EngineOutput:
    code = error.code if isinstance(error, RequestError) else "engine_failed"
    return EngineOutput(request_id=request_id, index=index, finish_reason="error", error=str(error), error_code=code)


def _load(start: wire.Start) -> EngineThread:
    from lmdeploy.engine.start import build_engine

    config_class = PytorchEngineConfig if start.backend == "pytorch" else TurbomindEngineConfig
    config = config_class(**start.options)
    return EngineThread(lambda: build_engine(Path(start.model_path), config))


def main(arguments: list[str] | None = None) -> None:
    """Entry of the child process."""
    parser = argparse.ArgumentParser(prog="lmdeploy-engine")
    parser.add_argument("--fd", type=int, required=True, help="the child's end of the socket pair")
    fd = parser.parse_args(arguments).fd
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    _Child(wire.to_parent(socket.socket(fileno=fd))).run()


if __name__ == "__main__":
    main()
