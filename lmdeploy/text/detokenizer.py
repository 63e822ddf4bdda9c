"""Token ids -> text as it grows, never half a character.

Pieces are bytes, so the state is a UTF-8 decoder with at most three pending bytes and a flag for the leading space that
some tokenizers add. A token costs one table look-up; nothing is decoded twice, and the text does not depend on how ids are cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from encodings import utf_8
from typing import Protocol


class Pieces(Protocol):
    """What detokenizing needs of a tokenizer."""

    special_ids: frozenset[int]
    strip_first_space: bool

    def token_bytes(self, token_id: int) -> bytes: ...


class IncrementalDetokenizer:
    """Text of one answer. All feeds and the flush together are decode(prompt + ids) without its first len(decode(prompt)) characters."""

    def __init__(
        self,
        tokenizer: Pieces,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        shown_special: frozenset[int] = frozenset(),
    ) -> None:
        self._pieces = tokenizer
        self._skip: frozenset[int] = tokenizer.special_ids - shown_special if skip_special_tokens else frozenset()
        self._tight = tokenizer.strip_first_space and not skip_special_tokens and not spaces_between_special_tokens
        self._decoder = utf_8.IncrementalDecoder("replace")
        self._strip_space = tokenizer.strip_first_space
        self._drop_first = False
        self._resume_after(prompt_ids)

    def _resume_after(self, prompt_ids: Sequence[int]) -> None:
        """Set the state as if the prompt had been fed: only its beginning and its last three bytes matter."""
        self._strip_space = self._strip_space and not any(self._bytes(i) for i in prompt_ids)
        tail = b""
        for token_id in reversed(prompt_ids):
            tail = self._bytes(token_id) + tail
            if len(tail) >= 3:
                break
        tail = tail[-3:]
        start = next((i for i in range(len(tail) - 1, -1, -1) if tail[i] & 0xC0 != 0x80), len(tail))
        self._decoder.decode(tail[start:])
        # decode(prompt) shows the unfinished character as one U+FFFD: what completes it is already counted
        self._drop_first = bool(self._decoder.getstate()[0])
        self._after_special = self._tight and bool(prompt_ids) and prompt_ids[-1] in self._pieces.special_ids

    def _bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._skip else self._pieces.token_bytes(token_id)

    def feed(self, token_ids: Iterable[int]) -> str:
        """The new text; an unfinished character waits for the next ids."""
        pieces = self._tight_pieces(token_ids) if self._tight else [self._pieces.token_bytes(i) for i in token_ids if i not in self._skip]
        return self._emit(b"".join(pieces), final=False)

    def _tight_pieces(self, token_ids: Iterable[int]) -> list[bytes]:
        """spaces_between_special_tokens=False: the space that encoding put after a special token is taken away."""
        pieces = []
        for token_id in token_ids:
            data = self._pieces.token_bytes(token_id)
            pieces.append(data[1:] if self._after_special and data[:1] == b" " else data)
            self._after_special = token_id in self._pieces.special_ids
        return pieces

    def _emit(self, data: bytes, final: bool) -> str:
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        decoder = self._decoder
        text = data.decode("ascii") if data.isascii() and not decoder.buffer else decoder.decode(data, final)  # the same, sooner
        if self._drop_first and text:
            self._drop_first = False
            return text[1:]
        return text

    @property
    def state(self) -> tuple[bytes, bool, bool, bool]:
        """All that depends on the ids so far; setting it undoes what was fed since."""
        return self._decoder.getstate()[0], self._strip_space, self._drop_first, self._after_special

    @state.setter
    def state(self, state: tuple[bytes, bool, bool, bool]) -> None:
        pending, self._strip_space, self._drop_first, self._after_special = state
        self._decoder.setstate((pending, 0))

    @property
    def pending(self) -> bytes:
        """The bytes of the unfinished character."""
        return self._decoder.getstate()[0]

    def flush(self) -> str:
        """The rest at the end of the answer: an unfinished character becomes U+FFFD."""
        return self._emit(b"", final=True)
