"""tiktoken rank files: Llama 3's tokenizer.model and Qwen's qwen.tiktoken, with their published special tokens.

The file holds only byte strings and ranks; the split pattern and the special tokens belong to the family, which is known by
the number of ranks. An unknown number is refused: guessing a pattern would give wrong ids without a sign.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from lmdeploy.errors import CheckpointError
from lmdeploy.text.codec import SpecialSplitter
from lmdeploy.text.tokenizer_files import MAX_MODEL_BYTES, AddedToken, TokenTable, read_bounded

#: tiktoken's matching of the split pattern is recursive in runs and quadratic in long pieces: text is cut before it gets there
MAX_CHUNK, MAX_RUN = 400_000, 25_000
_LONG_RUN = re.compile(rf"\S{{{MAX_RUN}}}|\s{{{MAX_RUN}}}")
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n?")


def split_pattern(digits: str) -> str:
    """How text is cut before merging; families differ in how many digits stay together."""
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class RankFamily:
    """What a rank file leaves out."""

    pattern: str
    special: tuple[str, ...]  # from id `number of ranks` on
    bos: str | None
    eos: str


def _llama3_special() -> tuple[str, ...]:
    """Llama 3.1's 256: named ones among reserved ones, which are numbered by themselves."""
    named = {
        0: "begin_of_text",
        1: "end_of_text",
        4: "finetune_right_pad_id",
        6: "start_header_id",
        7: "end_header_id",
        8: "eom_id",
        9: "eot_id",
        10: "python_tag",
    }
    reserved = iter(range(256))
    return tuple(f"<|{named[i]}|>" if i in named else f"<|reserved_special_token_{next(reserved)}|>" for i in range(256))


FAMILIES: dict[int, RankFamily] = {
    128_000: RankFamily(split_pattern(r"\p{N}{1,3}"), _llama3_special(), "<|begin_of_text|>", "<|end_of_text|>"),
    151_643: RankFamily(
        split_pattern(r"\p{N}"), ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))), None, "<|endoftext|>"
    ),
}


def is_rank_file(path: Path) -> bool:
    """True when the first line is base64, a space and a number."""
    with path.open("rb") as f:
        return _LINE.fullmatch(f.readline(4096)) is not None


class RankCodec:
    """Vocabulary of a rank file."""

    strip_first_space = False

    def __init__(self, path: Path, table: TokenTable) -> None:
        ranks = _read_ranks(path)
        if len(ranks) not in FAMILIES:
            known = ", ".join(f"{n:,}" for n in FAMILIES)
            raise CheckpointError(
                f"{path} holds {len(ranks):,} ranks; known tiktoken vocabularies have {known}. A tokenizer.json beside it would be used instead"
            )
        self.family = FAMILIES[len(ranks)]
        tokens = {len(ranks) + i: AddedToken(content, True) for i, content in enumerate(self.family.special)}
        for token_id, token in table.added.items():
            if token_id < len(ranks):
                raise CheckpointError(f"{path.parent}: special token {token.content!r} has the id {token_id} of an ordinary piece (ids below {len(ranks)})")
        tokens.update(table.added)
        self._added = {token.content: token_id for token_id, token in sorted(tokens.items())}
        self._bytes = {rank: piece for piece, rank in ranks.items()} | {i: t.content.encode("utf-8") for i, t in tokens.items()}
        self._ranks = ranks
        self.special_ids = frozenset(i for i, token in tokens.items() if token.special)
        self.size = max(self._bytes) + 1
        self.splitter = SpecialSplitter(self._added)
        self._encoding = tiktoken.Encoding(path.name, pat_str=self.family.pattern, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str, split_special: bool) -> list[int]:
        ids: list[int] = []
        for part in self.splitter.split(text) if split_special else [self.splitter.unguard(text)]:
            if isinstance(part, int):
                ids.append(part)
                continue
            for chunk in _chunks(part):
                ids += self._encoding.encode_ordinary(chunk)
        return ids

    def encode_batch(self, texts: list[str], split_special: bool) -> list[list[int]]:
        return [self.encode(text, split_special) for text in texts]

    def added_id(self, text: str) -> int | None:
        return self._added.get(text)

    def token_id(self, text: str) -> int | None:
        return self._added.get(text, self._ranks.get(text.encode("utf-8")))

    def token_text(self, token_id: int) -> str:
        return self._bytes.get(token_id, b"").decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes.get(token_id, b"")


def _chunks(text: str) -> list[str]:
    """Pieces of at most MAX_CHUNK characters and MAX_RUN characters of one kind in a row; one piece for ordinary text."""
    if len(text) < MAX_RUN:
        return [text]
    cuts = sorted({m.end() for m in _LONG_RUN.finditer(text)} | set(range(MAX_CHUNK, len(text), MAX_CHUNK)) | {0, len(text)})
    return [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bounded(path, MAX_MODEL_BYTES).splitlines(), 1):
        try:
            if line:
                piece, rank = line.split()
                ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as e:
            raise CheckpointError(f"{path}: line {number} is not 'base64 rank': {e}") from e
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(f"{path}: the ranks of {len(ranks)} lines are not 0..{len(ranks) - 1}; the file is broken or cut short")
    return ranks
