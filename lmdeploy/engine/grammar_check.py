"""Is a grammar fit to be served? Found out before its request is accepted, in a process that may be killed.

The child (`main`) is started with the first grammar and kept. It compiles each grammar as the engine will and walks some steps; the parent waits
`CHECK_SECONDS` for a verdict, else it kills the child and the verdict is no. Verdicts are kept. A child whose parent is gone exits at once.
Requests and verdicts are lines of JSON over pipes.
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
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec

from lmdeploy.engine.grammar_text import invalid
from lmdeploy.errors import EngineError, OverloadedError, RequestError
from lmdeploy.grammar import Grammar, check_grammar
from lmdeploy.log import get_logger

logger = get_logger(__name__)

#: how long a grammar may take to be compiled and tried out
CHECK_SECONDS = 5.0
START_SECONDS = 120.0
MAX_VERDICTS = 1024
#: checks that may wait for the one that runs
MAX_WAITING = 64
#: of the child: address space, and the stack of its compiling thread, which is smaller than that of the engine's threads
CHILD_MEMORY = 6 << 30
CHILD_STACK = 4 << 20


class Verdict(msgspec.Struct):
    """What the child says: None = good."""

    problem: str | None = None


class GrammarChecker:
    """Checks grammars for one model folder, one after the other. May be called from any thread."""

    def __init__(self, folder: Path, vocab_size: int, stop_ids: Iterable[int], *, seconds: float = CHECK_SECONDS) -> None:
        self._arguments = ["--folder", str(folder), "--vocab-size", str(vocab_size), "--stop-ids", ",".join(map(str, stop_ids))]
        self._seconds = seconds
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        self._waiting: dict[bytes, Future[Verdict]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar-check")
        self._child: subprocess.Popen[bytes] | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Of the child, None while there is none."""
        return None if self._child is None else self._child.pid

    def check(self, grammar: Grammar) -> None:
        """Wait for the verdict; raises RequestError(code='invalid_grammar') with the reason, OverloadedError when too many wait."""
        _raise_if_bad(self._submit(grammar).result(), grammar)

    async def until_checked(self, grammar: Grammar) -> None:
        """`check` for an event loop; afterwards `check` knows the verdict."""
        # shielded: others may wait for the same verdict, so a client that goes away must not cancel it
        _raise_if_bad(await asyncio.shield(asyncio.wrap_future(self._submit(grammar))), grammar)

    def _submit(self, grammar: Grammar) -> Future[Verdict]:
        check_grammar(grammar, "response_format")
        key = hashlib.sha256(msgspec.msgpack.encode(grammar)).digest()
        with self._lock:
            if (known := self._verdicts.get(key)) is not None:
                self._verdicts.move_to_end(key)
                done: Future[Verdict] = Future()
                done.set_result(known)
                return done
            if (running := self._waiting.get(key)) is not None:
                return running
            if self._closed:
                raise EngineError("the engine is closed")
            if len(self._waiting) >= MAX_WAITING:
                raise OverloadedError(f"{len(self._waiting)} grammars wait to be checked; try again later", code="overloaded")
            future = self._waiting[key] = self._pool.submit(self._find, grammar, key)
            return future

    def close(self) -> None:
        """End the child; checks that run end with an error."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
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
        start = time.monotonic()
        try:
            child.stdin.write(msgspec.json.encode(grammar) + b"\n")
            child.stdin.flush()
            line = _read_line(child, self._seconds)
        except OSError:
            line = b""
        if line is None:
            logger.warning("a grammar of %d characters was refused: it was not compiled after %.1f s", len(grammar.text), time.monotonic() - start)
            self._kill()
            return Verdict(f"it takes longer than {self._seconds:g} s to compile; make it smaller or simpler")
        if not line:
            self._kill()
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
    options = parser.parse_args(arguments)
    os.nice(5)
    resource.setrlimit(resource.RLIMIT_AS, (CHILD_MEMORY, CHILD_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.stack_size(CHILD_STACK)
    stop_ids = tuple(int(i) for i in options.stop_ids.split(",") if i)
    threading.Thread(target=_answer, args=(inbox, options.folder, options.vocab_size, stop_ids), daemon=True).start()
    for line in sys.stdin.buffer:
        inbox.put(line)
    os._exit(0)  # the parent is gone: whatever is being compiled, nobody wants it


def _answer(inbox: queue.SimpleQueue[bytes], folder: Path, vocab_size: int, stop_ids: Iterable[int]) -> None:
    try:
        from lmdeploy.engine.grammar_compiler import GrammarCompiler

        compiler = GrammarCompiler.open(folder, vocab_size, stop_ids)
        _say(Verdict())
        while True:
            _say(Verdict(problem_of(compiler, msgspec.json.decode(inbox.get(), type=Grammar))))
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
