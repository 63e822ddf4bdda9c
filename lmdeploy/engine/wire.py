"""The messages between the server's process and the engine's process, and their framing.

A frame is a 4-byte big-endian length and one msgpack message of a closed, tagged union: the reader decodes into exactly these
types or raises `WireError`. Nothing is pickled, no frame may exceed `MAX_FRAME`, and the socket is a private pair of one
parent and one child, so neither end can be reached from outside.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import Any, Generic, TypeVar

import msgspec

from lmdeploy.errors import EngineError
from lmdeploy.messages import EngineInfo, EngineRequest, EngineStats, Order, StepOutputs

MAX_FRAME = 256 << 20
_LENGTH = struct.Struct("!I")
M = TypeVar("M")


class WireError(EngineError):
    """The peer sent something that is not a message, or closed in the middle of one."""


class Start(msgspec.Struct, tag=True, frozen=True):
    """First message to the child: what to load. `options` holds the options that the caller gave, the rest have their defaults."""

    model_path: str
    backend: str
    options: dict[str, Any]
    log_level: str
    log_format: str = "text"


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Answer this request."""

    request: EngineRequest


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Forget this request, or its answer `index` alone."""

    request_id: int
    index: int | None = None


class Obey(msgspec.Struct, tag=True, frozen=True):
    """Carry out this order; answered with `Done`."""

    ticket: int
    order: Order


class GetStats(msgspec.Struct, tag=True, frozen=True):
    """Answer with `Stats`; also the ping that shows that the child lives."""

    ticket: int


class Stop(msgspec.Struct, tag=True, frozen=True):
    """Close the engine and exit."""


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The engine is loaded."""

    info: EngineInfo


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The engine could not start (`kind` is the class of the error), or died later."""

    kind: str
    message: str


class Outputs(msgspec.Struct, tag=True, frozen=True):
    """What one step brought."""

    outputs: StepOutputs


class Stats(msgspec.Struct, tag=True, frozen=True):
    """Answer to `GetStats`."""

    ticket: int
    stats: EngineStats


class Done(msgspec.Struct, tag=True, frozen=True):
    """An order was carried out, or met an error of class `kind`."""

    ticket: int
    kind: str = ""
    message: str = ""


ToChild = Start | Submit | Abort | Obey | GetStats | Stop
ToParent = Ready | Failed | Outputs | Stats | Done


class Channel(Generic[M]):
    """One end of the pair: `send` from any thread, `receive` from one."""

    def __init__(self, sock: socket.socket, incoming: Any) -> None:
        self._sock = sock
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(incoming)
        self._encoder = msgspec.msgpack.Encoder()
        self._sending = threading.Lock()
        self._stream = sock.makefile("rb", buffering=1 << 16)

    def send(self, message: ToChild | ToParent) -> None:
        """Write one message; raises OSError when the peer is gone, WireError when the message is too large."""
        body = self._encoder.encode(message)
        if len(body) > MAX_FRAME:
            raise WireError(f"a {type(message).__name__} message of {len(body)} bytes exceeds the limit of {MAX_FRAME}")
        with self._sending:
            self._sock.sendall(_LENGTH.pack(len(body)) + body)

    def receive(self) -> M | None:
        """The next message; None when the peer closed between two messages."""
        head = self._stream.read(_LENGTH.size)
        if not head:
            return None
        if len(head) < _LENGTH.size:
            raise WireError("the peer closed in the middle of a message")
        (length,) = _LENGTH.unpack(head)
        if length > MAX_FRAME:
            raise WireError(f"the peer announced a message of {length} bytes; the limit is {MAX_FRAME}")
        body = self._stream.read(length)
        if len(body) < length:
            raise WireError(f"the peer closed after {len(body)} of {length} bytes of a message")
        try:
            return self._decoder.decode(body)
        except msgspec.DecodeError as e:
            raise WireError(f"the peer sent an invalid message: {e}") from e

    def close(self) -> None:
        """Close this end; the peer's `receive` returns None."""
        with contextlib.suppress(OSError):  # the peer was first
            self._sock.shutdown(socket.SHUT_RDWR)
        self._stream.close()
        self._sock.close()


def to_child(sock: socket.socket) -> Channel[ToParent]:
    """The parent's end."""
    return Channel(sock, ToParent)


def to_parent(sock: socket.socket) -> Channel[ToChild]:
    """The child's end."""
    return Channel(sock, ToChild)
