"""How many characters a string may still have, as far as masks tell: the longest of some tokens that is allowed says it. A guess, of which nothing but time depends."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence

#: characters that a string may still have where a mask takes long: the library walks the tokens of the parts of the vocabulary that do not fit wholly, see SLICES
NEAR = range(1, 11)
#: a token that no string goes on behind, or of which nobody knows
OUTSIDE = 1 << 14
#: lengths in characters of the tokens that are looked up in a mask; up to LETTERS they are words, longer ones lines and spaces
LETTERS = 16
RUNGS = (*range(1, LETTERS + 1), 20, 24, 32, 48)
_ENDS = re.compile(rb'[\x00-\x1f"\\\x7f]')
_CONTINUES = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that no character begins with


class StringEnds:
    """Of a vocabulary; `pieces`: the bytes of each token."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        #: characters of each token; OUTSIDE for those with something that ends or escapes, and for empty ones
        self.lengths = array("H", [OUTSIDE if not piece or _ENDS.search(piece) else len(piece.translate(None, _CONTINUES)) for piece in pieces])
        rungs: list[tuple[int, int, int]] = []  # length; word and bit of a token
        for length in RUNGS:
            for token, piece in enumerate(pieces):
                if self.lengths[token] == length and piece.isascii() and (piece.isalpha() and piece.islower() if length <= LETTERS else len(set(piece)) == 1):
                    rungs.append((length, token >> 5, 1 << (token & 31)))
                    break
        self._rungs = rungs

    def left(self, words: Sequence[int]) -> int:
        """Of a mask's uint32 words; 0 outside of strings, and where the longest token of all is allowed, which tells nothing."""
        rungs = self._rungs
        if not rungs or not words[rungs[0][1]] & rungs[0][2] or words[rungs[-1][1]] & rungs[-1][2]:
            return 0
        return next(length for length, word, bit in reversed(rungs) if words[word] & bit)

    def near(self, left: int, token: int) -> bool:
        """Whether the mask behind this token may take long. left: before it."""
        return left - self.lengths[token] in NEAR
