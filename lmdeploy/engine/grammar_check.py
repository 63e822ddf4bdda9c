"""Is a grammar fit to be served? Found out before its request is accepted, in a process that may be killed.

The child (`main`) is started with the first grammar and kept. It compiles each grammar as the engine will and walks some steps. One that takes more than
`CHECK_SECONDS` of processor time, which a busy machine does not change, is the end of the child, and the verdict is no. Verdicts are kept; owners take
turns. A child whose parent is gone exits at once. Requests and verdicts are lines of JSON over pipes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import msgspec

from lmdeploy.engine.fair_pool import FairPool
from lmdeploy.engine.grammar_text import invalid
from lmdeploy.errors import EngineError, OverloadedError, RequestError
from lmdeploy.grammar import Grammar, check_grammar
from lmdeploy.log import get_logger

logger = get_logger(__name__)

#: processor time that a grammar may take to be compiled and tried out
CHECK_SECONDS = 5.0
#: times as long on the clock, and it is the machine that is too busy, not the grammar that is too slow
PATIENCE = 12.0
START_SECONDS = 120.0
MAX_VERDICTS = 1024
#: checks that may wait for the one that runs; those of one owner
MAX_WAITING, MAX_OF_ONE = 512, 16
#: needs no check, so that the commonest of all grammars never waits for one
KNOWN_GOOD = Grammar("json_object")
#: of the child: address space, and the stack of its compiling thread, which is smaller than that of the engine's threads
CHILD_MEMORY = 6 << 30
CHILD_STACK = 4 << 20


class Verdict(msgspec.Struct):
    """What the child says: None = good."""

    problem: str | None = None


class GrammarChecker:
    """Checks grammars for one model folder, one after the other, those of each `owner` (any text; '' = this program itself) in turn.

    May be called from any thread.
    """

    def __init__(self, folder: Path, vocab_size: int, stop_ids: Iterable[int], *, seconds: float = CHECK_SECONDS) -> None:
        self._arguments = ["--folder", str(folder), "--vocab-size", str(vocab_size), "--stop-ids", ",".join(map(str, stop_ids))]
        self._arguments += ["--seconds", str(seconds)]
        self._seconds = seconds
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        self._waiting: dict[bytes, Future[Verdict]] = {}
        self._pool = FairPool("a grammar to be checked", most=MAX_WAITING, most_of_one=MAX_OF_ONE)
        self._child: subprocess.Popen[bytes] | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Of the child, None while there is none."""
        return None if self._child is None else self._child.pid

    def check(self, grammar: Grammar, owner: str = "") -> None:
        """Wait for the verdict; raises RequestError(code='invalid_grammar') with the reason, OverloadedError when too many wait."""
        _raise_if_bad(self._submit(grammar, owner).result(), grammar)

    async def until_checked(self, grammar: Grammar, owner: str = "") -> None:
        """`check` for an event loop; afterwards `check` knows the verdict."""
        # shielded: others may wait for the same verdict, so a client that goes away must not cancel it
        _raise_if_bad(await asyncio.shield(asyncio.wrap_future(self._submit(grammar, owner))), grammar)

    def _submit(self, grammar: Grammar, owner: str) -> Future[Verdict]:
        check_grammar(grammar, "response_format")
        key = hashlib.sha256(msgspec.msgpack.encode(grammar)).digest()
        with self._lock:
            known = Verdict() if grammar == KNOWN_GOOD else self._verdicts.get(key)
            if known is None:
                future = self._waiting[key] = self._pool.submit(owner, partial(self._find, grammar, key), self._waiting.get(key))
                return future
            if key in self._verdicts:
                self._verdicts.move_to_end(key)
        done: Future[Verdict] = Future()
        done.set_result(known)
        return done

    def close(self) -> None:
        """End the child; checks that run end with an error."""
        with self._lock:
            self._closed = True
        self._pool.close()
        self._kill()

    def _find(self, grammar: Grammar, key: bytes) -> Verdict:
        verdict: Verdict | None = None
        try:
            # a child may have died before this grammar came: only who kills two of them is refused
            verdict = self._ask(grammar) or self._ask(grammar) or Verdict("it cannot be compiled within the limits of memory and depth")
            return verdict
        finally:
            with self._lock:
                self._waiting.pop(key, None)
                if verdict is not None:
                    self._verdicts[key] = verdict
                    while len(self._verdicts) > MAX_VERDICTS:
                        self._verdicts.popitem(last=False)

    def _ask(self, grammar: Grammar) -> Verdict | None:
        """None when the child died."""
        child = self._started()
        assert child.stdin is not None
        try:
            child.stdin.write(msgspec.json.encode(grammar) + b"\n")
            child.stdin.flush()
            line = _read_line(child, PATIENCE * self._seconds)
        except OSError:
            line = b""
        if line is None:
            self._kill()
            raise OverloadedError("the machine is too busy to check the grammar; try again later", code="overloaded")
        if not line:
            self._kill()
            if child.returncode == -signal.SIGPROF:
                logger.warning("a grammar of %d characters was refused: it was not compiled after %g s", len(grammar.text), self._seconds)
                return Verdict(f"it takes longer than {self._seconds:g} s of processor time to compile; make it smaller or simpler")
            if self._closed:
                raise EngineError("the engine is closed")
            logger.warning("the grammar checker ended while it compiled a grammar of %d characters", len(grammar.text))
            return None
        return msgspec.json.decode(line, type=Verdict)

    def _started(self) -> subprocess.Popen[bytes]:
        """The child, ready; a new one when the last was killed."""
        with self._lock:
            if self._closed:
                raise EngineError("the engine is closed")
            if self._child is not None and self._child.poll() is None:
                return self._child
            self._child = child = _spawn(self._arguments)
        line = _read_line(child, START_SECONDS)
        if not line:
            self._kill()
            raise EngineError("the process that checks grammars did not start; its messages are above")
        problem = msgspec.json.decode(line, type=Verdict).problem
        if problem is not None:
            raise RequestError(problem, param="response_format", code="unsupported")
        return child

    def _kill(self) -> None:
        with self._lock:
            child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()


def _raise_if_bad(verdict: Verdict, grammar: Grammar) -> None:
    if verdict.problem is not None:
        raise invalid(verdict.problem, grammar.kind)


def _spawn(arguments: list[str]) -> subprocess.Popen[bytes]:
    package_root = str(Path(__file__).resolve().parents[2])
    # the child imports the same package as we do, and nothing from the current folder
    code = f"import sys; r = {package_root!r}; sys.path[:1] = [] if r in sys.path[1:] else [r]; from lmdeploy.engine.grammar_check import main; main()"
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)


def _read_line(child: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """The next line of the child; None when it takes longer, b'' when the child is gone."""
    assert child.stdout is not None
    if not select.select([child.stdout], [], [], seconds)[0]:
        return None
    return child.stdout.readline()


# ---------------------------------------------------------------------- the child


def main(arguments: list[str] | None = None) -> None:
    """Entry of the child: a verdict for itself, then one for each grammar that comes in."""
    parser = argparse.ArgumentParser(prog="lmdeploy-grammar-check")
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--vocab-size", required=True, type=int)
    parser.add_argument("--stop-ids", default="")
    parser.add_argument("--seconds", type=float, default=CHECK_SECONDS)
    options = parser.parse_args(arguments)
    os.nice(5)
    resource.setrlimit(resource.RLIMIT_AS, (CHILD_MEMORY, CHILD_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the end of the process, also in the middle of the library
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.stack_size(CHILD_STACK)
    stop_ids = tuple(int(i) for i in options.stop_ids.split(",") if i)
    threading.Thread(target=_answer, args=(inbox, options.folder, options.vocab_size, stop_ids, options.seconds), daemon=True).start()
    for line in sys.stdin.buffer:
        inbox.put(line)
    os._exit(0)  # the parent is gone: whatever is being compiled, nobody wants it


def _answer(inbox: queue.SimpleQueue[bytes], folder: Path, vocab_size: int, stop_ids: Iterable[int], seconds: float) -> None:
    try:
        from lmdeploy.engine.grammar_compiler import GrammarCompiler

        compiler = GrammarCompiler.open(folder, vocab_size, stop_ids)
        _say(Verdict())
        while True:
            grammar = msgspec.json.decode(inbox.get(), type=Grammar)
            signal.setitimer(signal.ITIMER_PROF, seconds)
            verdict = Verdict(problem_of(compiler, grammar))
            signal.setitimer(signal.ITIMER_PROF, 0)
            _say(verdict)
    except Exception as e:
        _say(Verdict(f"grammars cannot be used with this model: {type(e).__name__}: {e}"))
        os._exit(1)


def problem_of(compiler: object, grammar: Grammar) -> str | None:
    """Why a grammar cannot be served, or None."""
    from lmdeploy.engine.grammar_compiler import GrammarCompiler, probe

    assert isinstance(compiler, GrammarCompiler)
    try:
        return probe(compiler.matcher(grammar), compiler.eos_token_id)
    except RequestError as e:
        return str(e).removeprefix("the grammar is refused: ")


def _say(verdict: Verdict) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(verdict) + b"\n")
    sys.stdout.buffer.flush()
