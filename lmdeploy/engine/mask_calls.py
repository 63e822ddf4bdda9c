"""Calls of the grammar library that fill masks while the host does something else, and a guess which masks will take long."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

#: characters that a string may still have where a mask takes long: the library walks the tokens of the parts of the vocabulary that do not fit wholly, see SLICES
NEAR = (1, 10)
#: a token that no string goes on behind, or of which nobody knows
OUTSIDE = 1 << 14
#: lengths in characters of the tokens that are looked up in a mask; up to LETTERS they are words, longer ones lines and spaces
LETTERS = 16
RUNGS = (*range(1, LETTERS + 1), 20, 24, 32, 48)


class MaskCall:
    """The masks of some slots, in the making."""

    def __init__(self, slots: list[int], matchers: list[Any], *, usual: bool) -> None:
        self.slots, self.matchers = slots, matchers
        self.usual = usual  # none of them was expected to take long
        self._begun = time.perf_counter()
        self.seconds = 0.0  # that it took
        self._over = threading.Event()
        self._error: Exception | None = None

    @property
    def over(self) -> bool:
        """Whether the masks are there, or never will be."""
        return self._over.is_set()

    @property
    def age(self) -> float:
        """Seconds since it was made."""
        return time.perf_counter() - self._begun

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it is over, after so many seconds at the latest. Raises RuntimeError where the library failed."""
        if not self._over.wait(seconds):
            return False
        if self._error is not None:
            raise self._error
        return True

    def run(self, fill: Callable[[], None]) -> None:
        """Call the library."""
        try:
            fill()
        except BaseException as e:  # a panic of the library is no Exception; whoever waits must hear of it
            self._error = RuntimeError(f"the grammar library failed: {type(e).__name__}: {e}")
        self.seconds, self.matchers = self.age, []  # they go when their slots do, and not when the thread or the slot has its next call
        self._over.set()


class _Caller:
    """A thread for one call at a time that gives the interpreter's lock up at once and is long: the library's own."""

    def __init__(self) -> None:
        self.call: MaskCall | None = None
        self._calls: queue.SimpleQueue[tuple[MaskCall, Callable[[], None]] | None] = queue.SimpleQueue()
        self._entered: queue.SimpleQueue[None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="grammar-masks", daemon=True).start()

    def begin(self, call: MaskCall, fill: Callable[[], None]) -> None:
        """Start a call. It is let in first: a thread that wakes up gets the lock from a busy one after 5 ms only."""
        self.call = call
        self._calls.put((call, fill))
        self._entered.get()

    def _run(self) -> None:
        while (todo := self._calls.get()) is not None:
            call, fill = todo
            self._entered.put(None)
            call.run(fill)
            del todo, call, fill  # not held while there is nothing to do

    def close(self) -> None:
        """End the thread."""
        self._calls.put(None)


class Callers:
    """Threads for so many calls at a time."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._threads: list[_Caller] = []

    def begin(self, call: MaskCall, fill: Callable[[], None]) -> bool:
        """Start a call; False when all threads are busy."""
        caller = next((t for t in self._threads if t.call is None or t.call.over), None)
        if caller is None:
            if len(self._threads) == self._most:
                return False
            caller = _Caller()
            self._threads.append(caller)
        caller.begin(call, fill)
        return True

    def close(self) -> None:
        """End the threads, each behind the call that it is in."""
        for caller in self._threads:
            caller.close()
        self._threads.clear()


class StringEnds:
    """How many characters a string may still have, as far as masks tell: the longest of some tokens that is allowed says it. A guess, of which nothing but the time depends."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        """`pieces`: the bytes of each token."""
        #: int64 [V] characters; OUTSIDE for tokens with something that ends or escapes, and for empty ones
        self.lengths: Ints = _lengths(pieces)
        rungs: dict[int, int] = {}
        for length in RUNGS:
            for token in np.flatnonzero(self.lengths == length).tolist():
                piece = pieces[token]
                if piece.isascii() and (piece.isalpha() and piece.islower() if length <= LETTERS else len(set(piece)) == 1):
                    rungs[length] = token
                    break
        tokens = np.array(list(rungs.values()), dtype=np.int64)
        self._rungs: Ints = np.array(list(rungs), dtype=np.int64)
        self._words, self._flags = tokens >> 5, np.uint32(1) << (tokens & 31).astype(np.uint32)

    def left(self, bits: NDArray[np.uint32], rows: Ints) -> Ints:
        """int64 [G], of these rows of bits [N, W]; 0 outside of strings, and where the longest token of all is allowed, which tells nothing."""
        found = np.zeros(rows.size, dtype=np.int64)
        if self._rungs.size:
            words, flags = self._words[:: self._rungs.size - 1 or 1], self._flags[:: self._rungs.size - 1 or 1]  # the shortest and the longest
            ends = bits[rows[:, None], words] & flags != 0
            inside = np.flatnonzero(ends[:, 0] & ~ends[:, -1])
            if inside.size:
                allowed = bits[rows[inside, None], self._words] & self._flags != 0
                found[inside] = (allowed * self._rungs).max(axis=1)
        return found

    def near(self, left: Ints, tokens: Ints) -> NDArray[np.bool_]:
        """bool [G]: the masks behind these tokens may take long. left: before them."""
        then = left - self.lengths[tokens]
        found: NDArray[np.bool_] = (then >= NEAR[0]) & (then <= NEAR[1])
        return found


def _lengths(pieces: Sequence[bytes]) -> Ints:
    sizes = np.array([len(piece) for piece in pieces], dtype=np.int64)
    octets, some = np.frombuffer(b"".join(pieces), dtype=np.uint8), sizes > 0
    found = np.full(sizes.size, OUTSIDE, dtype=np.int64)
    if octets.size:
        starts = (np.cumsum(sizes) - sizes)[some]
        outside = (octets < 32) | np.isin(octets, np.frombuffer(b'"\\\x7f', dtype=np.uint8))
        begins = (octets & 0xC0) != 0x80  # a character of UTF-8
        found[some] = np.where(np.logical_or.reduceat(outside, starts), OUTSIDE, np.add.reduceat(begins, starts, dtype=np.int64))
    return found
