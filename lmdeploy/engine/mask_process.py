"""The engine's side of the processes that follow grammars (`mask_worker.py`): how they are started, written to and ended."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from lmdeploy.engine.mask_wire import Forked, FromRoot, Inbox, Opened
from lmdeploy.engine.mask_worker import FORK
from lmdeploy.errors import EngineError, RequestError

#: seconds after which a process that takes no message, or brings no mask, is killed
PATIENCE = 30.0
START_SECONDS, FORK_SECONDS, STOP_SECONDS = 60.0, 5.0, 2.0


class Process:
    """One of them, as it is seen from here."""

    def __init__(self, number: int, pid: int, sock: socket.socket) -> None:
        self.number, self.pid, self.sock, self.born = number, pid, sock, time.monotonic()
        self.alive = True
        self.slots = 0  # that it has
        self.compiling = -1  # the grammar whose turn it was last
        self._sending = threading.Lock()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(PATIENCE), 0))

    def send(self, message: bytes) -> None:
        """Where it is gone, whoever reads from it finds out."""
        try:
            with self._sending:
                self.sock.sendall(message)
        except OSError:
            self.kill()

    def kill(self) -> None:
        """Whoever reads from it finds out."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """It has ended."""
        self.alive = False
        with self._sending:
            self.sock.close()


class RootProcess:
    """The process that makes the vocabulary ready, and that the others are forked from. To be used by one thread at a time."""

    def __init__(self, folder: Path, vocab_size: int, stop_ids: Iterable[int]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = ["--folder", str(folder), "--vocab-size", str(vocab_size), "--stop-ids", ",".join(map(str, stop_ids)), "--fd", str(theirs.fileno())]
        root = str(Path(__file__).resolve().parents[2])
        # the child imports the same package as we do, and nothing from the current folder
        code = f"import sys; r = {root!r}; sys.path[:1] = [] if r in sys.path[1:] else [r]; from lmdeploy.engine.mask_worker import main; main()"
        command = [sys.executable, "-c", code, *arguments]
        try:
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
        except BaseException:
            self._control.close()
            raise
        finally:
            theirs.close()
        self._asked = itertools.count()
        self._inbox: Inbox[FromRoot] = Inbox(self._control, FromRoot)

    def opened(self) -> int:
        """Wait until the vocabulary is ready; the token that ends answers. Raises RequestError or EngineError when it cannot be used."""
        said = self._wait(START_SECONDS)
        assert isinstance(said, Opened)
        if said.problem is not None:
            raise RequestError(said.problem, param="response_format", code="unsupported")
        return said.eos_token_id

    def fork(self, number: int, shape: tuple[int, int], files: tuple[int, int]) -> Process:
        """One process more. `shape`: slots, words of a mask; `files`: the table, and what is written to when masks are there. Raises EngineError."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                asked = next(self._asked)
                socket.send_fds(self._control, [FORK.pack(asked, *shape)], [theirs.fileno(), *files])
                said = self._wait(FORK_SECONDS)
                while isinstance(said, Forked) and said.number != asked:  # one that was given up: it ends, as nobody has its socket
                    said = self._wait(FORK_SECONDS)
            except (OSError, EngineError) as e:
                ours.close()
                raise EngineError("the process that makes grammars ready has ended, or does not answer") from e
        assert isinstance(said, Forked)
        if said.problem is not None:
            ours.close()
            raise EngineError(f"no process could be started to follow grammars: {said.problem}")
        return Process(number, said.pid, ours)

    def _wait(self, seconds: float) -> FromRoot:
        if select.select([self._control], [], [], seconds)[0]:
            with contextlib.suppress(EOFError):
                return self._inbox.read(block=True)[0]
        raise EngineError("the process that makes grammars ready has ended, or does not answer")

    @property
    def is_running(self) -> bool:
        """Whether it may still fork others."""
        return self.process.poll() is None

    def end(self) -> None:
        """It ends those that were forked from it first."""
        self._control.close()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
