"""An engine that computes nothing: a process that sends every running request one token per step, over the real wire.

`FakeEngine` is an `EngineClient` like `EngineProcess`: the frames, their decoding on a reader thread and the listener are the real
ones, so what a server spends on a token is all there. The tokens are those of a text, repeated. Steps come at a given rate, or, with
rate 0, as fast as the server takes them: the next one begins when the last one has passed the server's event loop.
"""

from __future__ import annotations

import argparse
import asyncio
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from lmdeploy.engine import wire
from lmdeploy.messages import EngineInfo, EngineOutput, EngineRequest, EngineStats, MemoryBill, StepOutputs

Listener = Callable[[StepOutputs], None]

#: passes of the event loop after the delivery of a step until its chunks are written: task wake-up, answer, a spare one

PASSES = 4


class FakeEngine:
    """The parent's side. Set `loop` to the server's event loop before the first request when the rate is 0."""

    def __init__(self, text_ids: list[int], vocab_size: int, *, rate: float = 0.0, session_len: int = 2048, slots: int = 1024) -> None:
        bill = MemoryBill(
            device="none", weights=0, kv_pool=0, workspace=0, other=0, total=0, free=0, num_blocks=slots * session_len // 64, block_size=64,
            bytes_per_token=0, session_len=session_len,
        )  # fmt: skip
        self.info = EngineInfo(session_len=session_len, vocab_size=vocab_size, max_batch_size=slots, memory=bill, kernels={}, dtype="none", start_seconds=0.0)
        self.failure: str | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self._listener: Listener | None = None
        ours, theirs = socket.socketpair()
        self._channel = wire.to_child(ours)
        command = [sys.executable, "-m", "benchmark.fake_engine", "--fd", str(theirs.fileno()), "--rate", str(rate)]
        self._child = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.PIPE)
        theirs.close()
        assert self._child.stdin is not None
        self._child.stdin.write(" ".join(map(str, text_ids)).encode())
        self._child.stdin.close()

    def start(self, listener: Listener) -> None:
        """Deliver outputs to `listener` on a thread of this client."""
        self._listener = listener
        threading.Thread(target=self._read, name="engine-reader", daemon=True).start()

    def submit(self, request: EngineRequest) -> None:
        """Answer this request from the next step on."""
        self._channel.send(wire.Submit(request))

    def abort(self, request_id: int, index: int | None = None) -> None:
        """End a request, or one of its answers."""
        self._channel.send(wire.Abort(request_id, index))

    def stats(self) -> EngineStats:
        """Nothing to tell."""
        return EngineStats()

    def close(self) -> None:
        """End the child."""
        self._child.terminate()
        self._child.wait()
        self._channel.close()

    def _read(self) -> None:
        try:
            while (message := self._channel.receive()) is not None:
                if isinstance(message, wire.Outputs) and self._listener is not None:
                    self._listener(message.outputs)
                    if self.loop is not None:
                        self.loop.call_soon_threadsafe(self._passed, PASSES)
        except (OSError, ValueError):
            pass

    def _passed(self, left: int) -> None:
        """On the event loop: tell the child that a step is through."""
        if left and self.loop is not None:
            self.loop.call_soon(self._passed, left - 1)
        else:
            self._channel.send(wire.GetStats(0))


@dataclass(slots=True)
class _Running:
    request: EngineRequest
    count: int = 0


class _Child:
    """The process: a reader thread and the loop of steps."""

    def __init__(self, channel: wire.Channel[wire.ToChild], text_ids: list[int], rate: float) -> None:
        self._channel, self._ids, self._rate = channel, text_ids, rate
        self._running: dict[tuple[int, int], _Running] = {}
        self._inbox: queue.SimpleQueue[wire.ToChild | None] = queue.SimpleQueue()
        self._credit = 1  # one step under way when the rate is 0: two would reach a reader together, as one chunk
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while (message := self._channel.receive()) is not None:
                self._inbox.put(message)
        finally:
            self._inbox.put(None)

    def run(self) -> None:
        """Until the parent is gone."""
        due = time.perf_counter()
        while True:
            outputs = StepOutputs()
            block = not self._running or (not self._rate and self._credit <= 0)
            while block or not self._inbox.empty():
                if not self._take(self._inbox.get(), outputs.others):
                    return
                block = False
            if self._rate:
                due = max(due + 1 / self._rate, time.perf_counter() - 1 / self._rate)
                time.sleep(max(0.0, due - time.perf_counter()))
            elif self._credit <= 0 and not outputs:
                continue
            self._step(outputs)
            if outputs:
                self._credit -= 1
                self._channel.send(wire.Outputs(outputs))

    def _take(self, message: wire.ToChild | None, outputs: list[EngineOutput]) -> bool:
        if isinstance(message, wire.Submit):
            for index in range(message.request.n):
                self._running[message.request.request_id, index] = _Running(message.request)
        elif isinstance(message, wire.Abort):
            for key in [k for k in self._running if k[0] == message.request_id and message.index in (None, k[1])]:
                del self._running[key]
                outputs.append(EngineOutput(request_id=key[0], index=key[1], finish_reason="abort"))
        elif isinstance(message, wire.GetStats):
            self._credit += 1
        return message is not None

    def _step(self, outputs: StepOutputs) -> None:
        """A token for each; as the scheduler does, first and last ones are told whole."""
        for (request_id, index), running in list(self._running.items()):
            token = self._ids[(running.count + request_id * 7) % len(self._ids)]
            running.count += 1
            last = running.count >= running.request.sampling.max_new_tokens
            if running.count > 1 and not last:
                outputs.add_token(request_id, index, token)
                continue
            outputs.others.append(
                EngineOutput(
                    request_id=request_id,
                    index=index,
                    token_ids=[token],
                    num_prompt=len(running.request.token_ids),
                    num_generated=running.count,
                    finish_reason="length" if last else None,
                )
            )
            if last:
                del self._running[request_id, index]


def main() -> None:
    """Entry of the child process; the text's ids come on standard input."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True, help="steps per second, 0 = as the server takes them")
    args = parser.parse_args()
    text_ids = [int(word) for word in sys.stdin.read().split()]
    _Child(wire.to_parent(socket.socket(fileno=args.fd)), text_ids, args.rate).run()


if __name__ == "__main__":
    main()
