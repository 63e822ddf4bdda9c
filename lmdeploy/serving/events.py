"""Streams of named events (`event: NAME`, `data: JSON`), for the protocols that have them: Anthropic's Messages, OpenAI's Responses.

A protocol is a `TurnEvents`: deltas of a turn in, events out. A failure before the first delta is a real HTTP error; after it, an event.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from lmdeploy.log import get_logger
from lmdeploy.serving.openai.errors import HttpError, as_http_error
from lmdeploy.serving.openai.stream import EventStream
from lmdeploy.serving.service import unless_gone
from lmdeploy.serving.turns import Delta, Turn

logger = get_logger(__name__)

_encode = msgspec.json.Encoder().encode


def named(name: str, payload: dict[str, Any]) -> bytes:
    """One event; its name is also the payload's `type`."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), _encode({"type": name, **payload}))


class TurnEvents(ABC):
    """The events of one answer of one protocol."""

    @abstractmethod
    def first(self, delta: Delta) -> bytes:
        """What comes before the first delta; it has the counts of the prompt."""

    @abstractmethod
    def encode(self, delta: Delta) -> bytes:
        """The events of one delta; those that end the answer when it is the last one."""

    @abstractmethod
    def failed(self, error: HttpError) -> bytes:
        """What ends a stream that fails in the middle."""


async def stream_turn(request: Request, turn: Turn, events: TurnEvents, held: ExitStack) -> Response:
    """The event stream of a turn; what is `held` is released before its last event."""
    deltas = turn.deltas()
    try:
        first = await unless_gone(request, anext(deltas))
    except BaseException:
        await deltas.aclose()
        held.close()
        raise
    return EventStream(_events(first, deltas, events, held), held)


async def _events(first: Delta, deltas: AsyncGenerator[Delta, None], events: TurnEvents, held: ExitStack) -> AsyncGenerator[bytes, None]:
    async with aclosing(deltas):
        try:
            last = events.first(first) + events.encode(first)
            async for delta in deltas:
                yield last
                last = events.encode(delta)
        except Exception as e:
            error = as_http_error(e)
            if error.code == "internal_error":
                logger.exception("a stream failed")
            yield last
            last = events.failed(error)
        held.close()
        yield last
