"""Stop words matched on text, also across token borders, with only as much text held back as a match could still need.

The word that is complete first wins; of those complete at the same character, the one that began first. So the result
does not depend on how the text was cut. An Aho-Corasick automaton makes it linear in the text, whatever the words are.
"""

from __future__ import annotations

import copy

from lmdeploy.errors import RequestError


class StopMatcher:
    """Matcher of one answer. `include` keeps the stop word in the text."""

    def __init__(self, stop_words: list[str], include: bool = False) -> None:
        if "" in stop_words:
            raise RequestError("a stop word is empty; leave it out", param="stop")
        self.matched: str | None = None
        self._include = include
        self._held = ""
        self._state = 0
        # per state: where each character leads, the state of the longest proper suffix, its depth, the word that ends here
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        self._depth = [0]
        self._word: list[str | None] = [None]
        for word in stop_words:
            self._insert(word)
        self._link()
        self._firsts = frozenset(self._next[0])

    @property
    def state(self) -> tuple[str, int]:
        """All that depends on the text so far, before a match; setting it undoes what came since."""
        return self._held, self._state

    @state.setter
    def state(self, state: tuple[str, int]) -> None:
        self.matched = None
        self._held, self._state = state

    def fresh(self) -> StopMatcher:
        """A matcher of another answer to the same words; the automaton is shared."""
        other = copy.copy(self)
        other.state = "", 0
        return other

    def _insert(self, word: str) -> None:
        state = 0
        for char in word:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._fail.append(0)
                self._depth.append(self._depth[state] + 1)
                self._word.append(None)
            state = self._next[state][char]
        self._word[state] = word

    def _link(self) -> None:
        """Breadth first: a state's fail state is shallower, hence already complete."""
        queue = list(self._next[0].values())
        for state in queue:
            for char, child in self._next[state].items():
                self._fail[child] = self._step(self._fail[state], char)
                if self._word[child] is None:
                    self._word[child] = self._word[self._fail[child]]
                queue.append(child)

    def _step(self, state: int, char: str) -> int:
        while state and char not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(char, 0)

    def feed(self, text: str, *, active: bool = True) -> str:
        """The text that is now sure to be part of the answer. After a match everything is dropped.

        While not `active`, words that become complete are ignored; those that have begun may still end later.
        """
        if self.matched is not None:
            return ""
        state = self._state
        if not state and self._firsts.isdisjoint(text):
            return text
        for end, char in enumerate(text, 1):
            state = self._step(state, char)
            word = self._word[state]
            if word is not None and active:
                return self._finish(self._held + text[:end], word)
        self._state = state
        if self._include:
            return text
        whole = self._held + text
        keep = len(whole) - self._depth[state]
        self._held = whole[keep:]
        return whole[:keep]

    def skip(self, text: str) -> str:
        """Text in which no stop word counts, nor one that began before it; all of it is part of the answer."""
        return "" if self.matched is not None else self.flush() + text

    def _finish(self, text: str, word: str) -> str:
        self.matched, self._held = word, ""
        return text if self._include else text[: len(text) - len(word)]

    def flush(self) -> str:
        """The held-back text at the end of the answer: no match came of it."""
        held, self._held, self._state = self._held, "", 0
        return held
