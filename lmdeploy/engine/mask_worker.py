"""The processes that follow grammars beside an engine on a GPU: one matcher a slot, told each token that was chosen, filling the mask of the next one. Imports no torch.

The first of them, the root, makes the vocabulary ready once and is forked for each of the others, which so share that memory. A process has one lexer a grammar: what
one answer finds out about it, the others need not. Masks that were quick to fill are filled first, and after each that takes long it is looked whether others are wanted.
Grammars are compiled in a thread of their own. A process whose engine is gone exits as soon as it looks for messages.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lmdeploy.engine.fair_pool import FairPool
from lmdeploy.engine.follower import Follower
from lmdeploy.engine.grammar_compiler import GrammarLibrary, Lexer
from lmdeploy.engine.mask_wire import (
    BROKEN,
    GOES_ON,
    STATE_BITS,
    STOPPED,
    Advance,
    Broken,
    Compile,
    Compiled,
    Compiling,
    Forked,
    FromWorker,
    Inbox,
    Leave,
    Opened,
    Table,
    Take,
    ToWorker,
    frame,
)
from lmdeploy.engine.string_ends import StringEnds
from lmdeploy.errors import RequestError

#: a number, num_slots, width: what a process is told when it is forked, beside three files: its socket, the table, and what it writes to when masks are there
FORK = struct.Struct("!QQQ")
#: seconds of work after which it is looked for messages, and told what is there
LOOK = 1e-4
#: seconds for which the thread that compiles may keep Python's lock while masks are wanted
SWITCH_INTERVAL = 2e-4
#: seconds to take in a token once more
TOKEN_SECONDS = 5e-6
#: that a mask near the end of a string may take
NEAR_SECONDS = 5e-4


class Worker:
    """One process."""

    def __init__(self, library: GrammarLibrary, ends: StringEnds, sock: socket.socket, table: Table, notify: int) -> None:
        self._library, self._ends, self._sock, self._table, self._notify = library, ends, sock, table, notify
        self._inbox: Inbox[ToWorker] = Inbox(sock, ToWorker)
        self._status = memoryview(table.memory)[: table.words_at].cast("q")
        self._words = memoryview(table.memory)[table.words_at :].cast("I")
        self._words_at = ctypes.addressof(ctypes.c_char.from_buffer(table.memory)) + table.words_at
        self._grammars: dict[int, Lexer | None] = {}  # by number; None: cannot be compiled
        self._waiting: set[int] = set()  # numbers of those that are to be compiled
        self._width = table.row_bytes // 4
        self._slots: dict[int, Follower | None] = {}  # None: about to begin
        self._seconds: dict[int, float] = {}  # that the next mask of a slot may take
        self._left: dict[int, int] = {}  # characters that a slot's string may still have, as its last mask tells
        self._todo: dict[int, tuple[int, int | Callable[[], Follower] | None]] = {}  # slot -> turn; its token, how it begins, or nothing new
        self._pool = FairPool("a grammar to be compiled")
        self._sending, self._naming, self._fence = threading.Lock(), threading.Lock(), threading.Lock()

    def run(self) -> None:
        """Until the engine is gone."""
        while True:
            try:
                messages = self._inbox.read(block=not self._todo)
            except EOFError:
                return
            for message in messages:
                self._obey(message)
            if self._todo:
                self._work()

    def _obey(self, message: ToWorker) -> None:
        if isinstance(message, Advance):
            slots, tokens = array("i", message.slots), array("i", message.tokens)
            mine = [(slot, token) for slot, token in zip(slots, tokens, strict=True) if slot in self._slots]
            for slot, token in mine:
                if token < 0:
                    self._say(slot, message.turn, self._take_in(slot, ~token))
                    os.eventfd_write(self._notify, 1)
                    self._todo[slot] = message.turn + 1, None
                else:
                    self._todo[slot] = message.turn, token
                    if self._ends.near(self._left[slot], token):
                        self._seconds[slot] += NEAR_SECONDS
        elif isinstance(message, Take):
            lexer, generated = self._grammars[message.number], array("i", message.generated).tolist()
            assert lexer is not None
            self._slots[message.slot], self._seconds[message.slot], self._left[message.slot] = None, len(generated) * TOKEN_SECONDS, 0
            self._todo[message.slot] = message.turn, partial(Follower, lexer, generated)
        elif isinstance(message, Leave):
            self._slots.pop(message.slot, None)
            self._todo.pop(message.slot, None)
            self._say(message.slot, message.turn, GOES_ON)
        elif isinstance(message, Compile):
            self._waiting.add(message.number)
            self._pool.submit(message.owner, partial(self._compile, message))
        else:
            self._forget(message.number)

    def _work(self) -> None:
        """Fill masks, as long as nobody need be heard."""
        start, seconds = time.perf_counter(), self._seconds
        for slot in sorted(self._todo, key=seconds.__getitem__) if len(self._todo) > 1 else list(self._todo):
            turn, given = self._todo.pop(slot)
            begun = time.perf_counter()
            self._say(slot, turn, self._fill(slot, turn, given))
            now = time.perf_counter()
            seconds[slot] = now - begun
            self._left[slot] = self._ends.left(self._words[slot * self._width : (slot + 1) * self._width])
            if now - start > LOOK:
                break
        os.eventfd_write(self._notify, 1)

    def _take_in(self, slot: int, token: int) -> int:
        try:
            follower = self._slots[slot]
            assert follower is not None
            return STOPPED if follower.advance(token) else GOES_ON
        except BaseException:  # of the library; `fill` begins anew, and says why if that fails, too
            return GOES_ON

    def _fill(self, slot: int, turn: int, given: int | Callable[[], Follower] | None) -> int:
        address = self._words_at + slot * self._table.row_bytes
        try:
            if isinstance(given, int):
                self._take_in(slot, given)
            elif given is not None:
                self._slots[slot] = given()
            follower = self._slots[slot]
            assert follower is not None
            state = follower.fill(address, self._table.row_bytes)
            if state == BROKEN:
                self._send(Broken(turn, slot, follower.reason))
            return state
        except BaseException as e:  # a panic of the library is no Exception
            self._send(Broken(turn, slot, f"the grammar library failed: {type(e).__name__}: {e}"))
            return BROKEN

    def _say(self, slot: int, turn: int, state: int) -> None:
        with self._fence:  # what was written before is seen before this, whatever the processor
            pass
        self._status[slot] = turn << STATE_BITS | state

    def _forget(self, number: int) -> None:
        with self._naming:
            self._waiting.discard(number)
            self._grammars.pop(number, None)  # not all are compiled here

    def _compile(self, message: Compile) -> None:
        """In the pool's thread."""
        if message.number not in self._waiting:
            return
        self._send(Compiling(message.number))
        start, lexer, problem = time.thread_time(), None, None
        try:
            lexer = Lexer(partial(self._library.compile, message.grammar))
        except RequestError as e:
            problem = str(e)
        except BaseException as e:
            problem = f"the grammar library failed: {type(e).__name__}: {e}"
        with self._naming:
            if message.number not in self._waiting:  # forgotten meanwhile
                return
            self._waiting.discard(message.number)
            self._grammars[message.number] = lexer
        self._send(Compiled(message.number, time.thread_time() - start, problem))

    def _send(self, message: FromWorker) -> None:
        with self._sending:
            try:
                self._sock.sendall(frame(message))
            except OSError:
                os._exit(0)  # the engine is gone


class Root:
    """The process that all others are forked from."""

    def __init__(self, library: GrammarLibrary, control: socket.socket) -> None:
        self._library, self._control, self._ends = library, control, StringEnds(library.pieces)
        self._children: set[int] = set()

    def run(self) -> None:
        """Fork when told to, until the engine is gone; then nobody wants the others, either."""
        while True:
            try:
                told, files, _, _ = socket.recv_fds(self._control, FORK.size, 3)
            except ConnectionResetError:  # it did not read all that it was told
                break
            if not told:
                break
            self._children -= {pid for pid in self._children if os.waitpid(pid, os.WNOHANG)[0]}
            with contextlib.suppress(BrokenPipeError):  # it is gone, as the next message says
                self._fork(files, *FORK.unpack(told))
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
        for pid in self._children:
            os.waitpid(pid, 0)

    def _fork(self, files: list[int], number: int, num_slots: int, width: int) -> None:
        try:
            pid = os.fork()
        except OSError as e:
            self._control.send(frame(Forked(number, 0, str(e))))
            return
        if pid:
            self._children.add(pid)
            for file in files:
                os.close(file)
            self._control.send(frame(Forked(number, pid)))
            return
        try:
            self._control.close()
            sys.setswitchinterval(SWITCH_INTERVAL)
            sock, table, notify = files
            Worker(self._library, self._ends, socket.socket(fileno=sock), Table(table, num_slots, width), notify).run()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)


def main(arguments: list[str] | None = None) -> None:
    """Entry of the root."""
    parser = argparse.ArgumentParser(prog="lmdeploy-masks")
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--vocab-size", required=True, type=int)
    parser.add_argument("--stop-ids", default="")
    parser.add_argument("--fd", required=True, type=int, help="our end of the pair")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    control = socket.socket(fileno=options.fd)
    try:
        library = GrammarLibrary.open(options.folder, options.vocab_size, tuple(int(i) for i in options.stop_ids.split(",") if i))
    except Exception as e:
        control.send(frame(Opened(problem=str(e) if isinstance(e, RequestError) else f"{type(e).__name__}: {e}")))
        return
    root = Root(library, control)
    gc.collect()
    gc.freeze()  # forked processes leave it where it is
    control.send(frame(Opened(library.eos_token_id)))
    root.run()
