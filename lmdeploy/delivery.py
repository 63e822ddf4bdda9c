"""From the engine's thread to those who wait: a `ThreadSink` for a thread, an `AsyncSink` for a coroutine; one wake-up per thread or event loop and step.

The engine's thread hands over a step as it is, parted by rows only where several threads or event loops read; taking it apart is the readers' work. Tokens that
come before their reader does are joined into one output of their answer.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Iterable, Mapping
from typing import cast

from lmdeploy.messages import EngineOutput, StepOutputs

#: seconds for which a reader of whole answers lets outputs gather: reading ten tokens at once costs little more than reading one
PATIENCE = 0.02


class ThreadSink:
    """Where the outputs of any number of requests wait for a thread."""

    __slots__ = ("_inbox", "_patience")

    def __init__(self, patience: float = 0.0) -> None:
        self._inbox: queue.SimpleQueue[StepOutputs] = queue.SimpleQueue()
        self._patience = patience

    @property
    def reader(self) -> ThreadSink:
        """Who takes a step apart."""
        return self

    def put(self, outputs: StepOutputs) -> None:
        """Add a step, from any thread; outputs of other readers in it are ignored."""
        self._inbox.put(outputs)

    def take(self, expected: int) -> list[EngineOutput]:
        """All outputs since the last call, at least one step's. Waits for more, as patience allows, until `expected` answers have ended."""
        steps = [self._inbox.get()]
        end = time.monotonic() + self._patience
        while True:
            expected -= sum(output.finish_reason is not None for output in steps[-1].others)
            left = end - time.monotonic()
            try:
                steps.append(self._inbox.get(expected > 0 and left > 0, left if left > 0 else None))
            except queue.Empty:
                return gathered(steps)


class AsyncSink:
    """Where the outputs of one async request wait for their reader, who is woken once, however many have come."""

    __slots__ = ("reader", "_outputs", "_waiter", "_open")

    def __init__(self) -> None:
        self.reader = asyncio.get_running_loop()  # takes a step apart
        self._outputs: list[EngineOutput] = []
        self._open: EngineOutput | None = None  # the last one, when a token may be added to it
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: EngineOutput) -> None:
        """Add one output; on the sink's event loop only."""
        self._open = None
        self._outputs.append(output)
        self._wake()

    def put_token(self, request_id: int, index: int, token: int) -> None:
        """Add one more token of an answer, of which there is nothing else to tell."""
        last = self._open
        if last is not None and last.index == index:
            last.token_ids.append(token)
            return
        self._open = EngineOutput(request_id=request_id, index=index, token_ids=[token])
        self._outputs.append(self._open)
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():  # done: its reader was cancelled
            waiter.set_result(None)

    async def take(self) -> list[EngineOutput]:
        """All outputs since the last call, at least one."""
        while not self._outputs:
            self._waiter = self.reader.create_future()
            await self._waiter
        outputs, self._outputs, self._open = self._outputs, [], None
        return outputs


Sink = ThreadSink | AsyncSink
#: of requests by their ids, with the number of answers
Sinks = Mapping[int, tuple[Sink, int]]


def deliver(outputs: StepOutputs, sinks: Sinks) -> set[int]:
    """Hand over a step, from any thread; the ids of requests whose event loop is closed: nobody waits for them."""
    lost: set[int] = set()
    for reader, part in _by_reader(outputs, sinks).items():
        if isinstance(reader, ThreadSink):
            reader.put(part)
            continue
        try:
            reader.call_soon_threadsafe(_spread, part, cast("Mapping[int, tuple[AsyncSink, int]]", sinks))
        except RuntimeError:
            lost.update(output.request_id for output in part)
    return lost


def _by_reader(outputs: StepOutputs, sinks: Sinks) -> dict[ThreadSink | asyncio.AbstractEventLoop, StepOutputs]:
    entries = [*map(sinks.get, outputs.request_ids), *[sinks.get(output.request_id) for output in outputs.others]]
    found = {entry[0].reader for entry in entries if entry is not None}
    if len(found) == 1:
        return {found.pop(): outputs}
    parts: dict[ThreadSink | asyncio.AbstractEventLoop, StepOutputs] = {reader: StepOutputs() for reader in found}
    rows = zip(outputs.request_ids, outputs.indices, outputs.token_ids, strict=True)
    for row, entry in zip(rows, entries, strict=False):
        if entry is not None:
            parts[entry[0].reader].add_token(*row)
    for output, entry in zip(outputs.others, entries[len(outputs.token_ids) :], strict=True):
        if entry is not None:
            parts[entry[0].reader].others.append(output)
    return parts


def _spread(outputs: StepOutputs, sinks: Mapping[int, tuple[AsyncSink, int]]) -> None:
    """On the event loop: to the sinks of its requests."""
    for output in outputs.others:
        if (entry := sinks.get(output.request_id)) is not None:
            entry[0].put(output)
    for request_id, index, token in zip(outputs.request_ids, outputs.indices, outputs.token_ids, strict=True):
        if (entry := sinks.get(request_id)) is not None:
            entry[0].put_token(request_id, index, token)


def gathered(steps: Iterable[StepOutputs]) -> list[EngineOutput]:
    """The outputs of some steps; tokens of an answer with nothing else between them are one output."""
    found: list[EngineOutput] = []
    growing: dict[tuple[int, int], EngineOutput] = {}
    for step in steps:
        for output in step.others:
            growing.pop((output.request_id, output.index), None)
            found.append(output)
        for request_id, index, token in zip(step.request_ids, step.indices, step.token_ids, strict=True):
            last = growing.get((request_id, index))
            if last is None:
                growing[request_id, index] = last = EngineOutput(request_id=request_id, index=index)
                found.append(last)
            last.token_ids.append(token)
    return found
