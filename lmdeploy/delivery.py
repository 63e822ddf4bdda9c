"""From the engine's thread to those who wait: a queue for a thread, an `AsyncSink` for a coroutine, one wake-up per event loop and step."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Iterable

from lmdeploy.messages import EngineOutput


class AsyncSink:
    """Where the outputs of one async request wait for their reader, who is woken once, however many have come."""

    __slots__ = ("loop", "_outputs", "_waiter")

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._outputs: list[EngineOutput] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: EngineOutput) -> None:
        """Add one output; on the sink's event loop only."""
        self._outputs.append(output)
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():  # done: its reader was cancelled
            waiter.set_result(None)

    async def take(self) -> list[EngineOutput]:
        """All outputs since the last call, at least one."""
        while not self._outputs:
            self._waiter = self.loop.create_future()
            await self._waiter
        outputs, self._outputs = self._outputs, []
        return outputs


Sink = queue.SimpleQueue[EngineOutput] | AsyncSink


def deliver(addressed: Iterable[tuple[Sink, EngineOutput]]) -> set[int]:
    """Hand over the outputs of a step, from any thread; the ids of requests whose event loop is closed: nobody waits for them."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[AsyncSink, EngineOutput]]] = {}
    for sink, output in addressed:
        if isinstance(sink, AsyncSink):
            by_loop.setdefault(sink.loop, []).append((sink, output))
        else:
            sink.put(output)
    lost: set[int] = set()
    for loop, batch in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put_all, batch)
        except RuntimeError:
            lost.update(output.request_id for _, output in batch)
    return lost


def _put_all(batch: list[tuple[AsyncSink, EngineOutput]]) -> None:
    for sink, output in batch:
        sink.put(output)
