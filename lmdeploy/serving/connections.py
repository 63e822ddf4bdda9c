"""`Connection`: the HTTP protocol with limits, so that no client can hold memory or a place by being slow, silent or greedy.

Headers and bodies must come at a least pace, what is sent must be read, and the connections are counted.
All of it hangs on timers that run only while something is missing: a connection that is read and written costs nothing extra.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lmdeploy.log import get_logger
from lmdeploy.serving.http_protocol import BoundedHttpProtocol

logger = get_logger(__name__)

#: requests that a client may send ahead of the answers on one connection
MAX_PIPELINED = 16
#: the least pace of a body that we wait for, in bytes a second
MIN_BODY_RATE = 1024
#: where a request's scope has its connection
EXTENSION = "lmdeploy.connection"


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What a connection may do; seconds of silence that are waited for."""

    max_connections: int
    receive_seconds: float
    send_seconds: float


class Connection(BoundedHttpProtocol):
    """One connection of a client."""

    limits = ConnectionLimits(4096, 20.0, 30.0)
    on_lost: Callable[[], None] | None = None
    _timer: asyncio.TimerHandle | None = None  # for what the client should send
    _stall: asyncio.TimerHandle | None = None  # for what it should read
    _paced = 0  # bytes of the body since the timer was set
    _refused = False

    # ------------------------------------------------------------------ the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there; it is sent away when there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self._refuse("503 Service Unavailable", "too many connections; try again later", "retry-after: 5\r\n")
            return
        self._wait_for(self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone, or was sent away."""
        self._wait_for(None)
        self._unstall()
        lost, self.on_lost = self.on_lost, None
        super().connection_lost(exc)
        if lost is not None:
            lost()

    def cut(self) -> None:
        """End the connection without sending what is left."""
        self.transport.abort()

    def timeout_keep_alive_handler(self) -> None:
        """Nothing came for long: close, and do not wait for ever until the last bytes were read."""
        super().timeout_keep_alive_handler()
        self._stalls()

    # ------------------------------------------------------------------ what the client sends

    def data_received(self, data: bytes) -> None:
        """Bytes of one or more requests."""
        if not self._refused:
            super().data_received(data)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        if self._timer is None:
            self._wait_for(self._head_is_late)
        self.scope["extensions"] = {EXTENSION: {"connection": self}}

    def on_headers_complete(self) -> None:
        """The head is there; the app may start."""
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refused = True
            self.cut()
        else:
            self._paced = 0
            self._wait_for(self._body_is_late)
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        if not self._refused:
            self._paced += len(body)
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is there as a whole."""
        if not self._refused:
            self._wait_for(None)
            super().on_message_complete()

    def _wait_for(self, late: Callable[[], None] | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if late is None else self.loop.call_later(self.limits.receive_seconds, late)

    def _head_is_late(self) -> None:
        if self._received:
            self._refuse("408 Request Timeout", f"the request's headers did not come within {self.limits.receive_seconds:g} s (receive_timeout)")
        else:
            self._refused = True
            self.transport.close()

    def _body_is_late(self) -> None:
        """Go on waiting while the body makes progress, or while it is we who do not read it."""
        if self.flow.read_paused or self._paced >= MIN_BODY_RATE * self.limits.receive_seconds:
            self._paced = 0
            self._wait_for(self._body_is_late)
            return
        if self.cycle.response_started:
            self._refused = True
            self.cut()
            return
        self._refuse("408 Request Timeout", f"the body came more slowly than {MIN_BODY_RATE} bytes a second (receive_timeout)")

    def _refuse(self, status: str, message: str, extra: str = "") -> None:
        """Answer without the app, and close."""
        self._refused = True
        self._wait_for(None)
        body = f'{{"error":{{"message":"{message}","type":"invalid_request_error","param":null,"code":null}}}}'
        head = f"HTTP/1.1 {status}\r\n{extra}content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write((head + body).encode())
        self.transport.close()
        self._stalls()

    # ------------------------------------------------------------------ what the client reads

    def pause_writing(self) -> None:
        """The client has not read what was sent: it has `send_seconds` to begin."""
        super().pause_writing()
        self._stalls()

    def resume_writing(self) -> None:
        """It has."""
        super().resume_writing()
        self._unstall()

    def _stalls(self) -> None:
        self._unstall()
        self._stall = self.loop.call_later(self.limits.send_seconds, self._stalled)

    def _stalled(self) -> None:
        logger.info("%s read nothing for %g s (send_timeout); its connection was cut", self.client, self.limits.send_seconds)
        self.cut()

    def _unstall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None


def connection_class(limits: ConnectionLimits) -> Any:
    """A protocol class for one server; uvicorn makes an object of it per connection."""
    return type("Connection", (Connection,), {"limits": limits})
