"""`MaskPool`: grammars compiled and masks filled in processes of their own (`mask_worker.py`), so that a step of an engine on a GPU waits for none of it.

The library is Python's guest: while it takes in a token, nothing else of the process runs. With 64 answers that was a quarter of a millisecond a step of one and a half.
Here a step writes one message to each process that has answers, and looks at an array to see whose masks are there.
A process that ends, or from which nothing comes, is replaced; the answers that it had fail, and no others.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import threading
import time
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmdeploy.engine.grammar_compiler import MAX_KEPT, Wanted, most_lexers
from lmdeploy.engine.grammar_text import invalid
from lmdeploy.engine.mask_process import PATIENCE, Process, RootProcess
from lmdeploy.engine.mask_wire import (
    BROKEN,
    STATE_BITS,
    STOPPED,
    Advance,
    Broken,
    Compile,
    Compiled,
    Compiling,
    Forget,
    FromWorker,
    Inbox,
    Leave,
    Table,
    Take,
    frame,
)
from lmdeploy.engine.masks import Flags, Ints, Tensor, width_of
from lmdeploy.errors import EngineError, RequestError
from lmdeploy.grammar import Grammar
from lmdeploy.log import get_logger

logger = get_logger(__name__)

#: answers that a process is to have before another one is used; of many processes, each of which has to be woken in each step, and may want a core that others need
ROWS_EACH, FEW, MORE_ROWS_EACH = 4, 4, 8
#: processes at most; of many processors some are others'
MOST_PROCESSES = max(1, min(12, len(os.sched_getaffinity(0)) * 3 // 4))
#: seconds of processor time to compile a grammar from which on one process has all of its answers
CHEAP_SECONDS = 0.05
#: seconds in which a process has told why there is no mask, which it does before it says that there is none
TELL_SECONDS = 1.0
#: seconds; a process that ends so soon is replaced as much later
QUICKLY = 1.0
ENDED, CLOSED = "the process that followed its grammar ended", "the engine is closed"


def processes_for(answers: int) -> int:
    """How many processes so many answers of one grammar are worth."""
    return max(min(-(-answers // ROWS_EACH), FEW), -(-answers // MORE_ROWS_EACH))


@dataclass(eq=False)
class _Grammar(Wanted):
    """One that somebody wants, or that was wanted."""

    number: int = field(kw_only=True)
    grammar: Grammar = field(kw_only=True)
    at: list[Process] = field(default_factory=list)  # that have compiled it
    asked: list[Process] = field(default_factory=list)  # that are about to
    deaths: int = 0  # processes that ended while they compiled it


class MaskPool:
    """See `masks.Masks`, and `GrammarCompiler.prepare`. What is about slots may be called from one thread only, once there are `slots`."""

    def __init__(self, folder: Path, vocab_size: int, stop_ids: Iterable[int] = (), *, most: int = MOST_PROCESSES) -> None:
        """Starts the first process, which makes the vocabulary ready: see `opened`."""
        self.vocab_size, self.eos_token_id, self._most = vocab_size, -1, most
        self._root = RootProcess(folder, vocab_size, stop_ids)
        self._lock = threading.RLock()
        self._processes: list[Process] = []  # all that ever were
        self._numbers = itertools.count()
        self._by_grammar: weakref.WeakValueDictionary[Grammar, _Grammar] = weakref.WeakValueDictionary()
        self._by_number: weakref.WeakValueDictionary[int, _Grammar] = weakref.WeakValueDictionary()
        self._kept: OrderedDict[Grammar, _Grammar] = OrderedDict()
        self._busy: set[_Grammar] = set()  # that some process is about to have compiled
        self._gone: deque[int] = deque()  # numbers of grammars that nobody knows any more
        self._most_more = most_lexers()
        self._files: list[int] = []  # to be closed
        self._failure = ""  # why no grammar can be compiled any more
        self._pinned = 0  # where memory is that was registered with the driver

    def opened(self) -> None:
        """Wait until the vocabulary is ready. Raises RequestError or EngineError when it cannot be used."""
        if self.eos_token_id < 0:
            try:
                self.eos_token_id = self._root.opened()
            except BaseException:
                self.close()
                raise

    # -- processes ---------------------------------------------------------------------------------------------------

    def begin(self, num_slots: int, device: torch.device) -> MaskPool:
        """So many slots, for steps on this device; itself."""
        self.opened()
        width = width_of(self.vocab_size)
        self._shape = num_slots, width
        self._file = os.memfd_create("lmdeploy-masks")
        os.ftruncate(self._file, Table.size(num_slots, width))
        self._notified = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._files = [self._file, self._notified]
        self._table = Table(self._file, num_slots, width)
        self._status: Ints = np.frombuffer(self._table.memory, dtype=np.int64, count=num_slots)
        words = np.frombuffer(self._table.memory, dtype=np.int32, count=num_slots * width, offset=self._table.words_at)
        self.words: Tensor = torch.from_numpy(words).view(num_slots, width)
        if device.type == "cuda":
            self._pin()
        self._expected: Ints = np.zeros(num_slots, dtype=np.int64)  # the turn that each slot's status is to be of
        self._process_of: Ints = np.zeros(num_slots, dtype=np.int64)
        self._lost = np.zeros(64, dtype=bool)  # by number of a process
        self._any_lost = False
        self._deferred: dict[int, tuple[_Grammar, Process, bytes]] = {}  # slots in which who had them before may still be written to
        self._reasons: dict[int, tuple[int, str]] = {}  # by slot: of a turn
        self._since = np.zeros(num_slots)  # when that was asked for
        self._next_look = 0.0
        self._turn = 0
        with self._lock:
            for number in range(max(1, min(self._most, -(-num_slots // ROWS_EACH)))):
                self._fork(number)
        return self

    def _pin(self) -> None:
        """Copies to the device need not go through other memory, and do not wait."""
        error = torch.cuda.cudart().cudaHostRegister(self.words.data_ptr(), self.words.nbytes, 0)  # type: ignore[no-untyped-call]
        if int(error):
            logger.warning("masks are copied more slowly: their memory could not be registered with the driver (error %d)", int(error))
        else:
            self._pinned = self.words.data_ptr()

    def _fork(self, number: int) -> None:
        process = self._root.fork(number, self._shape, (self._file, self._notified))
        self._processes.append(process)
        if process.number >= self._lost.size:
            self._lost = np.pad(self._lost, (0, self._lost.size))
        threading.Thread(target=self._read, args=(process,), name="masks-reader", daemon=True).start()

    def _read(self, process: Process) -> None:
        """Thread: what a process has to say beside masks."""
        inbox: Inbox[FromWorker] = Inbox(process.sock, FromWorker)
        try:
            while True:
                for message in inbox.read(block=True):
                    if isinstance(message, Broken):
                        self._reasons[message.slot] = message.turn, message.reason
                    elif isinstance(message, Compiling):
                        process.compiling = message.number
                    else:
                        self._compiled(process, message)
        except EOFError:
            pass
        except Exception:
            logger.exception("process %d, which follows grammars, cannot be understood", process.pid)
            process.kill()
        self._end(process)

    def _end(self, process: Process) -> None:
        with self._lock:
            process.close()
            if self._failure == CLOSED:
                return
            self._lost[process.number] = self._any_lost = True
            os.eventfd_write(self._notified, 1)
            logger.warning("process %d, which followed grammars for %d answers, ended; another one takes its place", process.pid, process.slots)
            for compiled in list(self._by_number.values()):
                self._end_of(process, compiled)
        if time.monotonic() - process.born < QUICKLY:  # it may be so again
            time.sleep(QUICKLY)
        while not self._replaced():
            time.sleep(QUICKLY)

    def _replaced(self) -> bool:
        """Whether there is a process more, or never will be."""
        with self._lock:
            if self._failure == CLOSED:
                return True
            try:
                self._fork(len(self._processes))
            except EngineError as e:
                logger.error("%s", e)
                if self._root.is_running:
                    return False
                if not any(p.alive for p in self._processes):
                    self._failure = str(e)
            for compiled in list(self._busy):
                if not compiled.asked:  # nobody was there to compile it
                    self._spread(compiled, "")
            return True

    def _end_of(self, process: Process, compiled: _Grammar) -> None:
        """What the end of a process is to a grammar."""
        if process in compiled.at:
            compiled.at.remove(process)
        if process in compiled.asked:
            compiled.asked.remove(process)
            compiled.deaths += process.compiling == compiled.number
            if compiled.deaths > 1 and not compiled.at:
                self._refuse(compiled, invalid("it cannot be compiled within the limits of memory and depth"))
                return
            self._spread(compiled, "")
            self._resolve(compiled)

    # -- grammars ----------------------------------------------------------------------------------------------------

    @property
    def num_compiled(self) -> int:
        """Grammars that are compiled or are about to be."""
        return len(self._by_grammar)

    def prepare(self, grammar: Grammar, owner: str = "", answers: int = 1) -> Future[Any]:
        """Compile, the grammars of each owner in turn, in as many processes as so many more answers are worth; it stays compiled for as long as the future is held, and
        some time longer. Its exception is a RequestError(code='invalid_grammar')."""
        future: Future[Any] = Future()
        with self._lock:
            if self._failure:
                raise EngineError(self._failure)
            compiled = self._by_grammar.get(grammar)
            if compiled is None:
                compiled = self._by_grammar[grammar] = _Grammar(number=next(self._numbers), grammar=grammar)
                self._by_number[compiled.number] = compiled
                weakref.finalize(compiled, self._gone.append, compiled.number)
            compiled.users[future] = answers
            self._keep(compiled)
            self._spread(compiled, owner)
            if compiled.at and not compiled.asked:  # others have heard of it: thousands may hold one grammar
                future.set_result(compiled)
        return future

    def _spread(self, compiled: _Grammar, owner: str) -> None:
        """Have it compiled where it is worth it: once, and where that was cheap, once more for some answers each, as far as memory allows."""
        self._forget_gone()
        running = [p for p in self._processes if p.alive]
        if not running:
            self._busy.add(compiled)  # until there is one
            if self._failure:
                self._refuse(compiled, EngineError(self._failure))
            return
        wanted, have = 1, len(compiled.at) + len(compiled.asked)
        if compiled.at and compiled.seconds < CHEAP_SECONDS:
            wanted = processes_for(compiled.answers(len(running) * MORE_ROWS_EACH))
        if wanted <= have:
            return
        others = sum(len(c.at) + len(c.asked) - 1 for c in self._by_number.values() if c is not compiled and c.users and (c.at or c.asked))
        wanted = min(wanted, 1 + max(self._most_more - others, 0))
        grammars = Counter(p for c in self._by_number.values() for p in (*c.at, *c.asked))
        free = sorted((p for p in running if p not in compiled.at and p not in compiled.asked), key=lambda p: (p.slots, grammars[p]))
        for process in free[: max(wanted - have, 0)]:
            compiled.asked.append(process)
            self._busy.add(compiled)
            process.send(frame(Compile(compiled.number, compiled.grammar, owner)))

    def _compiled(self, process: Process, message: Compiled) -> None:
        with self._lock:
            compiled = self._by_number.get(message.number)
            if compiled is None or process not in compiled.asked:
                return
            compiled.asked.remove(process)
            if message.problem is not None:
                self._refuse(compiled, RequestError(message.problem, param="response_format", code="invalid_grammar"))
                return
            compiled.at.append(process)
            compiled.seconds = compiled.seconds or message.seconds
            self._spread(compiled, "")
            self._resolve(compiled)

    def _resolve(self, compiled: _Grammar) -> None:
        if compiled.at and not compiled.asked:
            self._busy.discard(compiled)
            for future in list(compiled.users):
                if not future.done():
                    future.set_result(compiled)

    def _refuse(self, compiled: _Grammar, error: Exception) -> None:
        self._kept.pop(compiled.grammar, None)
        self._by_grammar.pop(compiled.grammar, None)
        self._busy.discard(compiled)
        for future in list(compiled.users):
            if not future.done():
                future.set_exception(error)

    def _keep(self, compiled: _Grammar) -> None:
        """Those that were wanted last are kept, though nobody may want them any more; fewer where they are compiled often."""
        self._kept[compiled.grammar] = compiled
        self._kept.move_to_end(compiled.grammar)
        more = sum(max(len(c.at) - 1, 0) for c in self._by_number.values())
        for other in list(self._kept.values()):
            if len(self._kept) <= MAX_KEPT and more <= self._most_more:
                break
            if len(self._kept) > MAX_KEPT or not other.users:
                del self._kept[other.grammar]
                more -= 0 if other.users else max(len(other.at) - 1, 0)

    def _forget_gone(self) -> None:
        while self._gone:
            message = frame(Forget(self._gone.popleft()))
            for process in self._processes:
                if process.alive:
                    process.send(message)

    # -- slots -------------------------------------------------------------------------------------------------------

    def take(self, slot: int, grammar: Grammar, generated: list[int]) -> None:
        """See `Masks`."""
        with self._lock:
            compiled = self._by_grammar.get(grammar)
            at = [p for p in compiled.at if p.alive] if compiled is not None else []
        if compiled is None or not at:  # nobody prepared it, or the process that had it has ended
            try:
                compiled = self.prepare(grammar).result(PATIENCE)
            except TimeoutError as e:
                raise ValueError(f"the grammar was not compiled within {PATIENCE:g} s") from e
            at = [p for p in compiled.at if p.alive]
            if not at:
                raise ValueError(ENDED)
        process = min(at, key=lambda p: p.slots)
        process.slots += 1
        self._deferred[slot] = compiled, process, np.array(generated, dtype=np.int32).tobytes()
        self._begin_deferred()

    def _begin_deferred(self) -> None:
        for slot, (compiled, process, generated) in list(self._deferred.items()):
            former = self._processes[self._process_of[slot]]
            if former is process or not former.alive or self._status[slot] >> STATE_BITS >= self._expected[slot]:
                del self._deferred[slot]
                self._turn += 1
                self._process_of[slot], self._expected[slot], self._since[slot] = process.number, self._turn, time.monotonic()
                process.send(frame(Take(self._turn, slot, compiled.number, generated)))

    def leave(self, slot: int) -> None:
        """See `Masks`."""
        deferred = self._deferred.pop(slot, None)
        if deferred is not None:  # its process has never heard of it, and who had it before has left
            deferred[1].slots -= 1
            return
        process = self._processes[self._process_of[slot]]
        process.slots -= 1
        self._turn += 1
        self._expected[slot], self._since[slot] = self._turn, time.monotonic()
        process.send(frame(Leave(self._turn, slot)))

    def advance(self, slots: Ints, tokens: Ints, last: Flags, seconds: float) -> Flags:
        """See `Masks`."""
        turn, self._turn = self._turn + 1, self._turn + 2
        self._expected[slots], self._since[slots] = turn, time.monotonic()
        message = frame(Advance(turn, slots.astype(np.int32).tobytes(), np.where(last, ~tokens, tokens).astype(np.int32).tobytes()))
        for number in set(self._process_of[slots].tolist()):
            self._processes[number].send(message)
        complete: Flags = np.zeros(slots.size, dtype=bool)
        if last.any():
            ends, until = slots[last], time.monotonic() + seconds
            while not self.there(ends).all() and (left := until - time.monotonic()) > 0:
                self.wait(min(left, 1.0))
            complete[last] = self.there(ends) & (self.states(ends) == STOPPED)
            self._expected[ends] = turn + 1
        return complete

    def there(self, slots: Ints) -> Flags:
        """See `Masks`."""
        if self._deferred:
            self._begin_deferred()
        found: Flags = self._status[slots] >> STATE_BITS >= self._expected[slots]
        if self._any_lost:
            found |= self._lost[self._process_of[slots]]
        if self._deferred:
            found[[slot in self._deferred for slot in slots.tolist()]] = False
        return found

    def states(self, slots: Ints) -> Ints:
        """See `Masks`."""
        found: Ints = self._status[slots] & ((1 << STATE_BITS) - 1)
        if self._any_lost:
            found[self._lost[self._process_of[slots]]] = BROKEN
        return found

    def reason(self, slot: int) -> str:
        """See `Masks`."""
        until = time.monotonic() + TELL_SECONDS
        while not self._lost[self._process_of[slot]]:
            turn, reason = self._reasons.get(slot, (-1, ""))
            if turn == self._status[slot] >> STATE_BITS:
                return reason
            if time.monotonic() > until:
                break
            time.sleep(0.001)
        return ENDED

    def wait(self, seconds: float) -> None:
        """See `Masks`."""
        if select.select([self._notified], [], [], seconds)[0]:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._notified)
        elif (now := time.monotonic()) > self._next_look:
            self._next_look = now + 1.0
            hangs = (self._status >> STATE_BITS < self._expected) & (now - self._since > PATIENCE)
            for number in set(self._process_of[hangs].tolist()):
                if self._processes[number].alive:
                    logger.warning("process %d has brought no mask for %g s", self._processes[number].pid, PATIENCE)
                    self._processes[number].kill()

    # ----------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End all processes; whoever waits for a grammar hears of it."""
        with self._lock:
            if self._failure == CLOSED:
                return
            self._failure = CLOSED
            for compiled in list(self._by_number.values()):
                self._refuse(compiled, EngineError(CLOSED))
            for process in self._processes:
                process.kill()
            if self._pinned:
                with contextlib.suppress(RuntimeError):  # a device that is lost reads nothing any more
                    torch.cuda.synchronize()
                torch.cuda.cudart().cudaHostUnregister(self._pinned)  # type: ignore[no-untyped-call]
        self._root.end()
        for file in self._files:
            os.close(file)
