"""What the three vocabulary formats have in common, so that `Tokenizer` and everything above it knows only one.

A codec turns text into ids and an id into the bytes it stands for. Text is always made from bytes (never from a library's
decode), which is what makes incremental decoding exact: bytes are concatenated, characters are cut from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Protocol


class Codec(Protocol):
    """One vocabulary. Implementations are immutable after construction, hence usable from any thread."""

    size: int  # highest id + 1
    special_ids: frozenset[int]  # left out of text by default
    strip_first_space: bool  # encoding puts a space in front of the text; decoding takes one away

    def encode(self, text: str, split_special: bool) -> list[int]:
        """Ids of the text, no BOS. `split_special`: special tokens written in the text become their single ids."""

    def encode_batch(self, texts: list[str], split_special: bool) -> list[list[int]]:
        """`encode` of each text."""

    def added_id(self, text: str) -> int | None:
        """Id of a special or added token, None for anything else."""

    def token_id(self, text: str) -> int | None:
        """Id of a piece as the vocabulary writes it."""

    def token_text(self, token_id: int) -> str:
        """The piece as the vocabulary writes it; '' for an id without a piece."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the piece adds to the text; b'' for an id without a piece."""


class SpecialSplitter:
    """Cuts text at the special tokens written in it; where several could begin, the longest is taken."""

    def __init__(self, tokens: dict[str, int]) -> None:
        self.tokens = tokens
        longest_first = sorted(tokens, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if tokens else None

    def split(self, text: str) -> list[str | int]:
        """Alternating text and ids, empty texts dropped."""
        if self._pattern is None:
            return [text] if text else []
        parts = self._pattern.split(text)
        return [self.tokens[part] if i % 2 else part for i, part in enumerate(parts) if part]


def byte_level_alphabet() -> dict[str, int]:
    """The byte-level BPE alphabet (GPT-2): printable Latin-1 characters stand for themselves, other bytes for U+0100 upwards."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable}
    others = (b for b in range(256) if b not in set(printable))
    table.update({chr(256 + i): b for i, b in enumerate(others)})
    return table


def join_ids(parts: Iterable[list[int]]) -> list[int]:
    """One flat list."""
    return [token_id for part in parts for token_id in part]
