"""Where the masks of a rank's slots are filled: in this process (`MasksHere`), when they are needed, or in others while this one does something else (`mask_pool.py`)."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

import llguidance
import numpy as np
import torch
from numpy.typing import NDArray

from lmdeploy.engine.follower import Follower
from lmdeploy.engine.grammar_compiler import MASK_THREADS, GrammarCompiler, Lexer
from lmdeploy.engine.mask_wire import GOES_ON, STOPPED
from lmdeploy.grammar import Grammar

Tensor = torch.Tensor
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


def width_of(vocab_size: int) -> int:
    """Words of a mask."""
    return -(-vocab_size // 32)


class Masks(Protocol):
    """Each slot that was taken has the mask of its next token, or is about to have it. A slot's words may be written from `take` or `advance` until it is `there`."""

    @property
    def words(self) -> Tensor:
        """int32 [slots, W]; bit t % 32 of word t // 32 says that token t may come."""
        ...

    def take(self, slot: int, grammar: Grammar, generated: list[int]) -> None:
        """For an answer that has these tokens already. Raises ValueError (RequestError) for a grammar that cannot be used."""
        ...

    def leave(self, slot: int) -> None:
        """Forget a slot that was taken."""
        ...

    def advance(self, slots: Ints, tokens: Ints, last: Flags, seconds: float) -> Flags:
        """Take in a token each of slots whose masks are there. True where nothing may come behind it: of those that are `last`, if it is known within so many seconds,
        and of others, if it is known at once."""
        ...

    def there(self, slots: Ints) -> Flags:
        """Whose masks are there, or never will be."""
        ...

    def states(self, slots: Ints) -> Ints:
        """GOES_ON, STOPPED or BROKEN, of slots that are `there`."""
        ...

    def reason(self, slot: int) -> str:
        """Why a mask is BROKEN."""
        ...

    def wait(self, seconds: float) -> None:
        """Until there may be a mask more, or so long."""
        ...

    def close(self) -> None:
        """End what was begun; may be called twice."""
        ...


class MasksHere:
    """All in the calling thread, but that the library fills several masks at a time: `there` fills those that are not yet."""

    def __init__(self, compiler: GrammarCompiler, num_slots: int) -> None:
        self._compiler = compiler
        self.words = torch.zeros((num_slots, width_of(compiler.vocab_size)), dtype=torch.int32)
        self._followers: dict[int, Follower] = {}
        self._lexers: dict[int, tuple[Grammar, Lexer]] = {}
        self._users: dict[Grammar, Counter[Lexer]] = {}  # of grammars that slots have, how many each of its lexers has
        self._missing = np.zeros(num_slots, dtype=bool)
        self._states = np.full(num_slots, GOES_ON)
        self._executor = llguidance.LLExecutor(MASK_THREADS)

    def take(self, slot: int, grammar: Grammar, generated: list[int]) -> None:
        """See `Masks`."""
        users = self._users.get(grammar, Counter())
        lexer = self._compiler.lexer(grammar, users)
        self._followers[slot], self._lexers[slot] = Follower(lexer, generated), (grammar, lexer)
        users[lexer] += 1
        self._users[grammar] = users
        self._missing[slot] = True

    def leave(self, slot: int) -> None:
        """See `Masks`."""
        grammar, lexer = self._lexers.pop(slot)
        users = self._users[grammar]
        users -= Counter([lexer])  # and forget those that have none any more
        if not users.total():
            del self._users[grammar]
        del self._followers[slot]
        self._missing[slot] = False

    def advance(self, slots: Ints, tokens: Ints, last: Flags, seconds: float) -> Flags:
        """See `Masks`."""
        self._missing[slots] = True
        return np.array([self._followers[slot].advance(token) for slot, token in zip(slots.tolist(), tokens.tolist(), strict=True)])

    def there(self, slots: Ints) -> Flags:
        """See `Masks`."""
        missing = slots[self._missing[slots]]
        if missing.size:
            size = self.words.shape[1] * 4
            rows = [(follower.matcher, slot) for slot in missing.tolist() if (follower := self._followers[slot]).fits]
            if rows:
                self._executor.unsafe_compute_mask_ptr(rows, self.words.data_ptr(), size, self.words.shape[0])
            self._missing[missing] = False
            for slot in missing.tolist():
                follower = self._followers[slot]
                is_filled = follower.fits and not follower.matcher.is_error()
                self._states[slot] = (STOPPED if follower.stopped else GOES_ON) if is_filled else follower.fill(self.words[slot].data_ptr(), size)
        return np.ones(slots.size, dtype=bool)

    def states(self, slots: Ints) -> Ints:
        """See `Masks`."""
        found: Ints = self._states[slots]
        return found

    def reason(self, slot: int) -> str:
        """See `Masks`."""
        return self._followers[slot].reason

    def wait(self, seconds: float) -> None:
        """Nothing comes."""

    def close(self) -> None:
        """Nothing was begun."""
