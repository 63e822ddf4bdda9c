"""`GrammarLibrary`: what of a grammar is worked out by the library, with the limits under which everything here runs; `GrammarCompiler`: in this process. Imports no torch.

Used with the same limits in the process that checks grammars before a request is accepted (`grammar_check.py`, which also calls `probe`), in an engine on a CPU, and
in the processes beside an engine on a GPU (`mask_worker.py`). The limits are counted in work, not in seconds, so what the check let pass cannot hang a step.
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import llguidance

from lmdeploy.engine.fair_pool import FairPool
from lmdeploy.engine.grammar_text import SpecialTokens, compile_text, invalid
from lmdeploy.engine.host_memory import host_free
from lmdeploy.errors import RequestError
from lmdeploy.grammar import Grammar
from lmdeploy.text.tokenizer import Tokenizer

#: work and memory of one step and of one lexer, whose states take 1 to 2 kB each
LIMITS: dict[str, Any] = {
    "max_items_in_row": 2_000,
    "step_max_items": 10_000,
    "step_lexer_fuel": 200_000,
    "initial_lexer_fuel": 1_000_000,
    "max_lexer_states": 20_000,  # the longest string with a maxLength is of about as many characters
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
#: compiled grammars that are kept though no request needs them any more
MAX_KEPT = 64
PROBE_STEPS = 64
#: processor time of a step of the probe from which a grammar is too slow to be served
STEP_SECONDS = 0.1

#: Parts of the vocabulary whose masks are ready where all of their tokens may come: white space, and what JSON strings hold, by length. Near the end of a
#: string with a maxLength only the tokens of the longer parts are looked at one by one, node by node of a tree: with the library's own parts (10, 30) such a
#: mask takes up to 7 ms (vocabulary of 92,544), with a part of up to 4 characters beside them 0.3 to 0.6, with these 0.03 to 0.45. Of all such lists theirs
#: are about the fewest nodes on average (700,000 at 0 to 20 characters before the end, in all; the best list 683,000).
SLICES = [r"[\x20\x0A\x0D\x09]+", *(rf'[^"\\\x00-\x1F\x7F]{{1,{length}}}' for length in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 30)), r'[^"\\\x00-\x1F\x7F]+']

#: threads that fill masks; of many processors some are others'
MASK_THREADS = min(12, os.cpu_count() or 1)
#: users of a grammar that share a lexer, where its lexers are no more than threads
USERS_TOGETHER = 4
#: what compiling a grammar may take for another lexer
CHEAP_SECONDS = 0.01
#: what a lexer takes once it has found out about all that it may, and the share of the free memory that those beside the first of each grammar may take together
LEXER_BYTES, LEXERS_SHARE = 32 << 20, 1 / 8

_L = TypeVar("_L", bound="GrammarLibrary")


class Lexer:
    """A compiled grammar: the start of answers that share what they find out of it, until it is full.

    States are found out as masks are filled, and kept; there may be `max_lexer_states` of them. A string with a maxLength has three to four for each character that it
    may have, and other answers add others: what serves a grammar for long is full one day, and then of no more use to anybody.
    """

    def __init__(self, compile_now: Callable[[], Any]) -> None:
        self._compile = compile_now
        self.start: Any = compile_now()  # a matcher

    def other_start(self, full: Any) -> Any:
        """With other states than those of this one, which are too many."""
        if self.start is full:
            self.start = self._compile()
        return self.start


@dataclass(eq=False)
class Wanted:
    """A grammar, as far as it matters who wants it."""

    seconds: float = 0.0  # of processor time to compile it once
    users: weakref.WeakKeyDictionary[Future[Any], int] = field(default_factory=weakref.WeakKeyDictionary)  # futures that are held -> answers

    def answers(self, most: int = 1) -> int:
        """Of all users, counted up to so many: thousands may wait for one grammar."""
        count = 0
        for answers in self.users.values():
            count += answers
            if count >= most:
                break
        return min(count, most)


@dataclass(eq=False)
class _Compiled(Wanted):
    """Compiled once there is a lexer."""

    lexers: tuple[Lexer, ...] = ()


class GrammarLibrary:
    """The library with one vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Iterable[int] = ()) -> None:
        known = [i for i in dict.fromkeys((tokenizer.eos_token_id, *stop_ids)) if i is not None and 0 <= i < vocab_size]
        ends = known or sorted(i for i in tokenizer.special_ids if i < vocab_size)[-1:]
        if not ends:
            raise RequestError("response_format: this vocabulary has no token that ends an answer", param="response_format", code="unsupported")
        self.vocab_size, self.eos_token_id = vocab_size, ends[0]
        special = frozenset(i for i in tokenizer.special_ids if i < vocab_size)
        self._special = SpecialTokens(_Splitter(tokenizer, special), special - frozenset(ends))
        vocabulary: Any = _Vocabulary(tokenizer, vocab_size, self.eos_token_id, special)  # stands in for the library's TokenizerWrapper
        self.pieces: list[bytes] = vocabulary.tokens
        self._tokenizer = llguidance.LLTokenizer(vocabulary, n_vocab=vocab_size, eos_token=self.eos_token_id, slices=SLICES)
        self._limits = llguidance.LLParserLimits(**LIMITS)

    @classmethod
    def open(cls: type[_L], folder: Path, vocab_size: int, stop_ids: Iterable[int] = ()) -> _L:
        """For the tokenizer of a model folder."""
        return cls(Tokenizer(folder), vocab_size, stop_ids)

    def compile(self, grammar: Grammar) -> Any:
        """An `LLMatcher` at the start, whose copies share its lexer. Raises RequestError(code='invalid_grammar')."""
        matcher = llguidance.LLMatcher(self._tokenizer, compile_text(grammar, self._special), log_level=0, limits=self._limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # copies start with what the first mask has found out
        if matcher.is_error():
            raise invalid(reason_of(matcher.get_error()))
        return matcher


class GrammarCompiler(GrammarLibrary):
    """Matchers in this process. May be called from any thread.

    A grammar stays compiled for as long as somebody holds the future that `prepare` gave him, and some time longer. Some of its users share a lexer: each finds out
    its states once, so fewer lexers take less time together.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Iterable[int] = ()) -> None:
        super().__init__(tokenizer, vocab_size, stop_ids)
        self._most_more = most_lexers()
        self._lock = threading.Lock()
        self._kept: OrderedDict[Grammar, _Compiled] = OrderedDict()
        self._alive: weakref.WeakValueDictionary[Grammar, _Compiled] = weakref.WeakValueDictionary()  # those that anybody holds or waits for
        self._pool = FairPool("a grammar to be compiled")
        self._more = FairPool("another lexer")  # each takes CHEAP_SECONDS at most: who waits for one does not wait for others' grammars

    @property
    def num_compiled(self) -> int:
        """Grammars that are compiled or are about to be."""
        return len(self._alive)

    def prepare(self, grammar: Grammar, owner: str = "", answers: int = 1) -> Future[Any]:
        """Compile in a thread, the grammars of each owner in turn, and then see to it that there are lexers enough for so many more answers; they stay as long as the
        future is held. Its exception is a RequestError(code='invalid_grammar').

        Matchers with the same lexer share what it has found out, and its lock. A grammar has several lexers if that is cheap.
        """
        future: Future[Any] = Future()
        with self._lock:
            compiled = self._alive.get(grammar)
            if compiled is None:
                compiled = self._alive[grammar] = _Compiled()
            compiled.users[future] = answers
            if self._is_complete(compiled):
                self._keep(grammar, compiled)
                future.set_result(compiled)
                return future
            first = not compiled.lexers
        self._submit(first, owner, grammar, compiled, future)
        return future

    def _submit(self, first: bool, owner: str, grammar: Grammar, compiled: _Compiled, future: Future[Any]) -> None:
        whose = weakref.ref(future)  # who has left wants no lexers

        def failed(job: Future[Any]) -> None:
            if (error := job.exception()) is not None and (waiting := whose()) is not None:
                waiting.set_exception(error)

        (self._pool if first else self._more).submit(owner, partial(self._go_on, first, owner, grammar, compiled, whose)).add_done_callback(failed)

    def matcher(self, grammar: Grammar) -> Any:
        """A new `LLMatcher` at the start of the grammar, at once when it is compiled. Raises RequestError(code='invalid_grammar')."""
        return self.lexer(grammar, {}).start.deep_copy()

    def lexer(self, grammar: Grammar, users: Mapping[Lexer, int]) -> Lexer:
        """The one that has fewest users."""
        compiled = self._alive.get(grammar)
        if compiled is None or not compiled.lexers:
            compiled = self.prepare(grammar).result()
        found: Lexer = min(compiled.lexers, key=lambda lexer: users.get(lexer, 0))
        return found

    def _go_on(self, first: bool, owner: str, grammar: Grammar, compiled: _Compiled, whose: weakref.ref[Future[Any]]) -> None:
        """In a pool's thread: compile the grammar (`first`), or one lexer more, if that is still to be done; then it is the others' turn."""
        future = whose()
        if future is None:
            return
        with self._lock:
            complete = self._is_complete(compiled)
        if not complete and first != bool(compiled.lexers):
            start = time.thread_time()
            lexer = self._compile(grammar)
            with self._lock:
                compiled.seconds = compiled.seconds or time.thread_time() - start
                compiled.lexers += (lexer,)
                self._keep(grammar, compiled)
                self._bound_lexers()
                complete = self._is_complete(compiled)
        if complete:
            future.set_result(compiled)
        else:
            self._submit(False, owner, grammar, compiled, future)

    def _is_complete(self, compiled: _Compiled) -> bool:
        """Whether there are lexers enough for all users, as far as memory allows."""
        wanted = -(-compiled.answers(MASK_THREADS * USERS_TOGETHER) // USERS_TOGETHER)
        if len(compiled.lexers) >= max(wanted, 1):
            return True
        others = sum(len(c.lexers) - 1 for c in self._alive.values() if c is not compiled and c.lexers and c.answers())
        return len(compiled.lexers) > max(self._most_more - others, 0) or bool(compiled.lexers and compiled.seconds >= CHEAP_SECONDS)

    def _keep(self, grammar: Grammar, compiled: _Compiled) -> None:
        self._kept[grammar] = compiled
        self._kept.move_to_end(grammar)
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)

    def _bound_lexers(self) -> None:
        """Where all grammars have too many lexers together, those that nobody uses keep their first, from the one on that was wanted least recently."""
        more = sum(max(len(compiled.lexers) - 1, 0) for compiled in self._alive.values())
        for compiled in self._kept.values():
            if more <= self._most_more:
                break
            if not compiled.answers():
                more -= len(compiled.lexers) - 1
                compiled.lexers = compiled.lexers[:1]

    def close(self) -> None:
        """End the threads."""
        self._pool.close()
        self._more.close()

    def _compile(self, grammar: Grammar) -> Lexer:
        return Lexer(partial(self.compile, grammar))


def most_lexers() -> int:
    """How many lexers there may be beside the first of each grammar."""
    return int(host_free() * LEXERS_SHARE) // LEXER_BYTES


class _Splitter:
    """Cuts a text at special tokens; tokens that only were added to the vocabulary are text."""

    def __init__(self, tokenizer: Tokenizer, special: frozenset[int]) -> None:
        self._splitter, self._special, self._tokenizer = tokenizer.codec.splitter, special, tokenizer

    def __call__(self, text: str) -> list[str | int]:
        parts: list[str | int] = []
        for part in self._splitter.split(text):
            if isinstance(part, int) and part not in self._special:
                part = self._tokenizer.token_text(part)
            if isinstance(part, str) and parts and isinstance(parts[-1], str):
                parts[-1] += part
            elif part != "":
                parts.append(part)
        return parts


class _Vocabulary:
    """Our tokenizer as the library wants to see it: the bytes of each id. A padded vocabulary's last ids have none and are never allowed."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: int, special: frozenset[int]) -> None:
        self.eos_token_id = eos
        self.tokens = [tokenizer.token_bytes(i) if i < tokenizer.vocab_size else b"" for i in range(vocab_size)]
        self.special_token_ids = sorted(special | {eos})
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        """Only grammars that ask for forced tokens come here."""
        return self._encode(text, add_bos=False, split_special=False)


def reason_of(error: str) -> str:
    """The library's reason in one line, without the excerpt of a grammar that the user never wrote."""
    text = re.split(r"\n\s*\d+ \|", error.replace("<non-verbose/>", ""))[0]
    text = re.sub(r"^(?:at )?\d+\(\d+\): ", "", text.strip())
    text = text.removeprefix("failed to compile JSON schema: ")
    text = re.sub(r"^Unimplemented keys: \[(.*)\]", lambda m: "JSON schema keyword not supported: " + m[1].replace('"', ""), text)
    if text == "NoExtensionBias":
        return "no answer fits it"
    return " ".join(text.split())[:300] or "it cannot be compiled"


def probe(matcher: Any, eos_token_id: int) -> str | None:
    """Walk a matcher some steps in any direction; what is wrong with it (no answer fits, a step is too slow or too complex), or None."""
    choose = random.Random(0)
    for step in range(PROBE_STEPS):
        start = time.thread_time()
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            return reason_of(matcher.get_error())
        allowed = [token for token in _allowed(mask) if token != eos_token_id]
        if matcher.is_stopped() or not allowed:
            return None if matcher.is_accepting() else "no answer fits it"
        matcher.consume_token(choose.choice(allowed))
        if matcher.is_error():
            return reason_of(matcher.get_error())
        if (seconds := time.thread_time() - start) > STEP_SECONDS:
            return f"it is too complex: token {step} takes {seconds * 1000:.0f} ms; at most {STEP_SECONDS * 1000:.0f} are allowed"
    return None


def _allowed(mask: bytes) -> list[int]:
    """Some of the token ids whose bits are set: of a dense mask every hundredth byte is enough."""
    stride = max(1, (len(mask) - mask.count(0)) // 100)
    places = [i for i, byte in enumerate(mask) if byte][::stride]
    return [8 * i + bit for i in places for bit in range(8) if mask[i] >> bit & 1]
