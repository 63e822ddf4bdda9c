"""What the warps of a program do to memory between two barriers (ptx_machine.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels.ptx_alu import WARP

Array = NDArray[Any]
#: Accesses: plain loads and stores; looks (volatile loads), changes (atomic additions and the like, which may come in any order) and exchanges.
READ, WRITE, LOOK, CHANGE, SWAP = range(5)
#: With which accesses of other warps each may not meet. Who looks while others exchange sees what was there or what is put there, whole, and has to be content.
AGAINST = {
    READ: (WRITE, CHANGE, SWAP),
    WRITE: (READ, WRITE, LOOK, CHANGE, SWAP),
    LOOK: (WRITE, CHANGE),
    CHANGE: (READ, WRITE, LOOK, SWAP),
    SWAP: (READ, WRITE, CHANGE),
}
MANY = -1


class Races:
    """What warps do to memory of so many words, the first of address `origin`, between two barriers. `copies`: several may store to a word with one instruction,
    for then all have the same."""

    def __init__(self, threads: int, words: int, origin: int, *, copies: bool) -> None:
        self.origin, self.copies = origin, copies
        self.warp, self.epoch, self.found = np.arange(threads) // WARP, 1, set[tuple[str, int]]()
        kinds = len(AGAINST)
        self.when, self.who, self.pending = np.zeros((kinds, words), np.int64), np.zeros((kinds, words), np.int64), np.zeros(words, np.int64)

    def _words(self, addresses: Array, size: int, live: Array) -> tuple[Array, Array]:
        words = (addresses[live].astype(np.int64)[..., None] + np.arange(0, size, 4)) // 4
        return words.reshape(-1), np.repeat(self.warp[live], words[0].size if len(words) else 0)

    def touch(self, what: str, addresses: Array, size: int, live: Array, kind: int) -> None:
        """Note the threads' accesses, and those that are not allowed."""
        words, warp = self._words(addresses, size, live)
        bad = self.pending[words] > 0
        for other in AGAINST[kind]:
            bad |= (self.when[other, words] == self.epoch) & (self.who[other, words] != warp)
        when, who = self.when[kind], self.who[kind]
        mine = np.where((when[words] != self.epoch) | (who[words] == warp), warp, MANY)
        when[words], who[words] = self.epoch, mine
        who[words[who[words] != mine]] = MANY  # several warps at once
        if kind == WRITE and not self.copies:
            bad |= who[words] == MANY
        self.found |= {(what, self.origin + 4 * word) for word in np.unique(words[bad]).tolist()}

    def begun(self, addresses: Array, size: int, live: Array) -> None:
        """cp.async may write there from now on."""
        self.touch("cp.async", addresses, size, live, WRITE)
        words, _ = self._words(addresses, size, live)
        self.pending[words] += 1
        self.when[WRITE, words] = 0

    def landed(self, addresses: Array, size: int, live: Array) -> None:
        """It has, as the threads that asked for it know."""
        words, warp = self._words(addresses, size, live)
        self.pending[words], self.when[WRITE, words], self.who[WRITE, words] = 0, self.epoch, warp
