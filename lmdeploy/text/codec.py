"""What the three vocabulary formats have in common, so that `Tokenizer` and everything above it knows only one.

A codec turns text into ids and an id into the bytes it stands for. Text is always made from bytes (never from a library's
decode), which is what makes incremental decoding exact: bytes are concatenated, characters are cut from them.
"""

from __future__ import annotations

import re
from typing import Protocol


class Codec(Protocol):
    """One vocabulary. Implementations are immutable after construction, hence usable from any thread."""

    size: int  # highest id + 1
    special_ids: frozenset[int]  # left out of text by default
    strip_first_space: bool  # encoding puts a space in front of the text; decoding takes one away

    splitter: SpecialSplitter

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


#: private-use characters that `guard` puts around a special token which is only text
GUARD = "\ue0f0", "\ue0f1"


class SpecialSplitter:
    """Finds the special tokens written in a text; where several could begin, the longest is taken.

    A token between GUARD characters counts as ordinary text (and the two characters as nothing): this is how the text of a
    user passes through a rendered template without becoming control tokens.
    """

    def __init__(self, tokens: dict[str, int]) -> None:
        self.tokens = tokens
        words = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
        self._pattern = re.compile(f"({GUARD[0]}(?:{words}){GUARD[1]}|{words})") if tokens else None
        self._words = re.compile(words) if tokens else None
        self._guarded = re.compile(f"{GUARD[0]}({words}){GUARD[1]}") if tokens else None

    def guard(self, text: str) -> str:
        """The text with every special token in it guarded; guards that were already written in it are undone first."""
        if self._words is None:
            return text
        return self._words.sub(lambda m: f"{GUARD[0]}{m.group()}{GUARD[1]}", self.unguard(text))

    def unguard(self, text: str) -> str:
        """The text without guards."""
        if self._guarded is None or GUARD[0] not in text:
            return text
        return self._guarded.sub(r"\1", text)

    def sections(self, text: str) -> list[tuple[str, bool]]:
        """(text, whether special tokens in it count), in order."""
        if self._guarded is None or GUARD[0] not in text:
            return [(text, True)]
        parts = self._guarded.split(text)
        return [(part, i % 2 == 0) for i, part in enumerate(parts) if part]

    def split(self, text: str) -> list[str | int]:
        """Text and ids in order, no empty texts, no two texts in a row."""
        if self._pattern is None:
            return [text] if text else []
        out: list[str | int] = []
        for i, part in enumerate(self._pattern.split(text)):
            if i % 2 and part in self.tokens:
                out.append(self.tokens[part])
            elif part:
                plain = part[1:-1] if i % 2 else part
                if out and isinstance(out[-1], str):
                    out[-1] += plain  # one run of text, as if nobody had looked
                else:
                    out.append(plain)
        return out


def byte_level_alphabet() -> dict[str, int]:
    """The byte-level BPE alphabet (GPT-2): printable Latin-1 characters stand for themselves, other bytes for U+0100 upwards."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable}
    others = (b for b in range(256) if b not in set(printable))
    table.update({chr(256 + i): b for i, b in enumerate(others)})
    return table
