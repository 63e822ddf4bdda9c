"""What the engine and the processes that follow its grammars say to each other. Imports no torch.

A frame is a 4-byte length and one msgpack message of a closed, tagged union, over a private pair of sockets of a parent and its child. Masks themselves are written
to memory that both share, see `Table`.
"""

from __future__ import annotations

import mmap
import socket
import struct
from typing import Any, Generic, TypeVar

import msgspec

from lmdeploy.errors import EngineError
from lmdeploy.grammar import Grammar

MAX_FRAME = 64 << 20
_LENGTH = struct.Struct("!I")
M = TypeVar("M")

#: what is known of an answer with the mask of its next token: it can go on; nothing may come behind its last token; no mask can be made
GOES_ON, STOPPED, BROKEN = 0, 1, 2
#: bits of a slot's status for that; those above are the turn that it is of
STATE_BITS = 2


class Compile(msgspec.Struct, tag=True, frozen=True):
    """Compile a grammar, which gets this number; answered with `Compiled`. Those of each owner in turn."""

    number: int
    grammar: Grammar
    owner: str


class Forget(msgspec.Struct, tag=True, frozen=True):
    """Nobody will take a slot with this grammar any more."""

    number: int


class Take(msgspec.Struct, tag=True, frozen=True):
    """A slot is for an answer with this grammar, which has so many tokens already (int32); make the mask of the next one."""

    turn: int
    slot: int
    number: int
    generated: bytes


class Advance(msgspec.Struct, tag=True, frozen=True):
    """Take in a token each of some slots (int32), of which the reader need not have all, and make the masks of the next ones. Where it is ~token, say first of all
    whether anything may come behind it; the mask is of the turn after."""

    turn: int
    slots: bytes
    tokens: bytes


class Leave(msgspec.Struct, tag=True, frozen=True):
    """Forget a slot; its status says when nothing is written there any more."""

    turn: int
    slot: int


class Opened(msgspec.Struct, tag=True, frozen=True):
    """The vocabulary is ready, or why it cannot be used."""

    eos_token_id: int = 0
    problem: str | None = None


class Forked(msgspec.Struct, tag=True, frozen=True):
    """There is one process more, as it was asked for under this number; or why there is none."""

    number: int
    pid: int
    problem: str | None = None


class Compiling(msgspec.Struct, tag=True, frozen=True):
    """It is this grammar's turn."""

    number: int


class Compiled(msgspec.Struct, tag=True, frozen=True):
    """It took so many seconds of processor time; or why a grammar cannot be compiled."""

    number: int
    seconds: float = 0.0
    problem: str | None = None


class Broken(msgspec.Struct, tag=True, frozen=True):
    """Why there is no mask of a turn; comes before the status says that."""

    turn: int
    slot: int
    reason: str


ToWorker = Compile | Forget | Take | Advance | Leave
FromWorker = Compiling | Compiled | Broken
FromRoot = Opened | Forked

_encode = msgspec.msgpack.Encoder().encode


def frame(message: Any) -> bytes:
    """A message as it is sent."""
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body


class Inbox(Generic[M]):
    """What comes in through a socket; for one thread."""

    def __init__(self, sock: socket.socket, incoming: Any) -> None:
        self._sock = sock
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(incoming)
        self._rest = b""

    def read(self, *, block: bool) -> list[M]:
        """All whole messages that are there; `block`: one at least. Raises EOFError when the peer is gone, EngineError for what is no message."""
        messages: list[M] = []
        while True:
            try:
                part = self._sock.recv(1 << 16, 0 if block and not messages else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return messages
            except OSError:  # reset by a peer that did not read all
                part = b""
            if not part:
                if messages:
                    return messages  # and then there is nothing but the end
                raise EOFError
            self._take_apart(self._rest + part if self._rest else part, messages)
            if messages and len(part) < 1 << 16:
                return messages

    def _take_apart(self, data: bytes, messages: list[M]) -> None:
        at = 0
        while len(data) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, at)
            if length > MAX_FRAME:
                raise EngineError(f"a message of {length} bytes was announced; the limit is {MAX_FRAME}")
            end = at + _LENGTH.size + length
            if end > len(data):
                break
            try:
                messages.append(self._decoder.decode(data[at + _LENGTH.size : end]))
            except msgspec.DecodeError as e:
                raise EngineError(f"an invalid message came in: {e}") from e
            at = end
        self._rest = data[at:]


class Table:
    """Memory that the engine shares with the processes: for each slot an int64 status, (turn << STATE_BITS) + state, and the int32 words of its mask."""

    def __init__(self, file: int, num_slots: int, width: int) -> None:
        """`file`: of memory that is long enough. `width`: words of a mask."""
        self.memory = mmap.mmap(file, self.size(num_slots, width))
        self.words_at, self.row_bytes = self._words_at(num_slots), width * 4

    @staticmethod
    def _words_at(num_slots: int) -> int:
        return -(-num_slots * 8 // mmap.PAGESIZE) * mmap.PAGESIZE

    @classmethod
    def size(cls, num_slots: int, width: int) -> int:
        """Bytes of it."""
        return cls._words_at(num_slots) + num_slots * width * 4
