"""The engine's own process: it builds the engine, takes messages from its parent and sends what steps bring, until Stop.

It exits at once when the socket pair closes, so a dead parent leaves no orphan; Ctrl-C in the terminal reaches the parent only.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import queue
import signal
import socket
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from lmdeploy import log
from lmdeploy.engine import wake, wire
from lmdeploy.engine.launching import widen_file_table
from lmdeploy.errors import EngineError, LmdeployError, RequestError
from lmdeploy.log import get_logger
from lmdeploy.messages import EngineOutput, EngineRequest, StepOutputs

if TYPE_CHECKING:
    from lmdeploy.engine.client import EngineThread

logger = get_logger(__name__)

#: seconds for which a thread may keep Python's lock while others want it, during the start: the one that loads needs it a moment only, thousands of times, between
#: copies, and beside it one makes the vocabulary ready for grammars. With the usual 5 ms a 1.8B model on an H200 took 0.9 s longer
START_INTERVAL = 0.0005


class _Child:
    """The engine's side. A reader thread fills the inbox from the start on, so that a dead parent is seen while loading too."""

    def __init__(self, channel: wire.Channel[wire.ToChild], device_type: str) -> None:
        self._channel, self._device_type = channel, device_type
        self._inbox: queue.SimpleQueue[wire.ToChild] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="parent-reader", daemon=True).start()

    def run(self) -> None:
        """Load, announce, then serve until Stop. An error of the start goes to the parent as its class and its one line."""
        usual = sys.getswitchinterval()
        sys.setswitchinterval(START_INTERVAL)
        wake.begin(self._device_type)
        importlib.import_module("torch")  # takes long, and the parent has still to import and to find the model
        wake.go_on(self._device_type)
        importlib.import_module("lmdeploy.engine.start")
        gc.freeze()  # the modules' objects stay
        gc.enable()
        start = self._inbox.get()
        assert isinstance(start, wire.Start), "the first message is Start"
        log.setup(start.log_level, start.log_format)
        try:
            client = _load(start)
        except Exception as e:
            kind = type(e).__name__ if isinstance(e, LmdeployError) else "EngineError"
            logger.debug("the engine could not start", exc_info=True)
            self._channel.send(wire.Failed(kind, str(e) if isinstance(e, LmdeployError) else f"the engine could not start: {type(e).__name__}: {e}"))
            return
        sys.setswitchinterval(usual)
        gc.freeze()  # what is loaded stays: looking through it for garbage would hold up a step by 0.1 s, now and then
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
            elif isinstance(message, wire.Obey):
                self._obey(client, message)
            elif isinstance(message, wire.GetStats):
                self._channel.send(wire.Stats(message.ticket, client.stats()))
            elif isinstance(message, wire.Stop):
                return

    def _obey(self, client: EngineThread, message: wire.Obey) -> None:
        def tell(future: Future[None]) -> None:
            error = future.exception()
            text = "" if error is None else str(error) if isinstance(error, LmdeployError) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(OSError):
                self._channel.send(wire.Done(message.ticket, "" if error is None else type(error).__name__, text))

        with contextlib.suppress(EngineError):  # it has failed: the next look tells the parent
            client.obey(message.order).add_done_callback(tell)

    def _submit(self, client: EngineThread, request: EngineRequest) -> None:
        try:
            client.submit(request)
        except LmdeployError as e:
            self._forward(StepOutputs(others=[_refusal(request.request_id, i, e) for i in range(request.n)]))

    def _read(self) -> None:
        try:
            while (message := self._channel.receive()) is not None:
                self._inbox.put(message)
        except (OSError, ValueError, EngineError) as e:
            logger.error("the engine process lost its parent: %s", e)
        os._exit(1)  # the parent is gone: whatever this process is doing, nobody wants it

    def _forward(self, outputs: StepOutputs) -> None:
        try:
            self._channel.send(wire.Outputs(outputs))
        except OSError:
            os._exit(1)


def _refusal(request_id: int, index: int, error: LmdeployError) -> EngineOutput:
    code = error.code if isinstance(error, RequestError) else "engine_failed"
    return EngineOutput(request_id=request_id, index=index, finish_reason="error", error=str(error), error_code=code)


def _load(start: wire.Start) -> EngineThread:
    from lmdeploy.config import PytorchEngineConfig, TurbomindEngineConfig
    from lmdeploy.engine.client import EngineThread
    from lmdeploy.engine.start import build_engine

    config_class = PytorchEngineConfig if start.backend == "pytorch" else TurbomindEngineConfig
    config = config_class(**start.options)
    return EngineThread(lambda: build_engine(Path(start.model_path), config))


def main(arguments: list[str] | None = None) -> None:
    """Entry of the child process."""
    parser = argparse.ArgumentParser(prog="lmdeploy-engine")
    parser.add_argument("--fd", type=int, required=True, help="the child's end of the socket pair")
    parser.add_argument("--device", default="auto", help="which type of device to make ready")
    words = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    widen_file_table(words.fd)
    _Child(wire.to_parent(socket.socket(fileno=words.fd)), words.device).run()


if __name__ == "__main__":
    main()
