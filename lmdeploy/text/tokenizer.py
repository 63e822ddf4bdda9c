"""Text <-> token ids of one checkpoint, whatever its vocabulary file: tokenizer.json, sentencepiece or tiktoken ranks.

No remote code: the classes that a folder names are ignored, only its data is read. Immutable after construction, so every
method may be called from any thread. Special tokens written in the text become their ids, because chat templates are
rendered as text; `split_special=False` encodes them as ordinary characters instead.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lmdeploy.errors import CheckpointError, RequestError
from lmdeploy.text.codec import Codec
from lmdeploy.text.detokenizer import IncrementalDetokenizer
from lmdeploy.text.json_codec import JsonCodec
from lmdeploy.text.piece_codec import PieceCodec
from lmdeploy.text.rank_codec import RankCodec, is_rank_file
from lmdeploy.text.tokenizer_files import TokenTable, read_token_table

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "qwen.tiktoken")


@dataclass(slots=True)
class DetokenizeState:
    """Where `detokenize_incrementally` stopped. Make a new one for each answer."""

    ids_offset: int = 0
    detokenizer: IncrementalDetokenizer | None = None


class Tokenizer:
    """The tokenizer of the model folder `path`."""

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)
        table = read_token_table(self.folder)
        self.codec = _open_codec(self.folder, table)
        self.special_ids: frozenset[int] = self.codec.special_ids
        self.strip_first_space: bool = self.codec.strip_first_space
        self.vocab_size: int = self.codec.size
        self.named_tokens = _named_tokens(self.codec, table)
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        self.adds_bos = self._decide_bos(table)
        self._texts: list[str] | None = None
        self._lock = threading.Lock()

    def _id_of(self, name: str) -> int | None:
        content = self.named_tokens.get(name)
        return None if content is None else self.codec.token_id(content)

    def _decide_bos(self, table: TokenTable) -> bool:
        """tokenizer_config.json's `add_bos_token`, else what the vocabulary's own rules do."""
        first = self.codec.first_added_id() if isinstance(self.codec, JsonCodec) else None
        if self.bos_token_id is None:
            self.bos_token_id = first
        if self.bos_token_id is None or table.add_bos is not None:
            return bool(table.add_bos) and self.bos_token_id is not None
        return first == self.bos_token_id if isinstance(self.codec, JsonCodec) else True

    def encode(self, s: str, add_bos: bool = True, add_special_tokens: bool = True, *, split_special: bool = True) -> list[int]:
        """Ids of `s`. BOS comes first if the tokenizer adds one, both flags are set and the text does not begin with it already."""
        return self.encode_batch([s], add_bos, add_special_tokens, split_special=split_special)[0]

    def encode_batch(self, texts: Sequence[str], add_bos: bool = True, add_special_tokens: bool = True, *, split_special: bool = True) -> list[list[int]]:
        """`encode` of each text."""
        for text in texts:
            _check_text(text)
        batch = self.codec.encode_batch(list(texts), split_special)
        if add_bos and add_special_tokens and self.adds_bos:
            assert self.bos_token_id is not None
            batch = [ids if ids[:1] == [self.bos_token_id] else [self.bos_token_id, *ids] for ids in batch]
        return batch

    def decode(
        self,
        ids: Sequence[int],
        offset: int | None = None,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Text of the ids; with `offset`, of ids[offset:] as the continuation of those before."""
        start = offset or 0
        detokenizer = IncrementalDetokenizer(self, ids[:start], skip_special_tokens, spaces_between_special_tokens)
        return detokenizer.feed(ids[start:]) + detokenizer.flush()

    def detokenize_incrementally(
        self,
        all_ids: Sequence[int],
        state: DetokenizeState,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> tuple[str, DetokenizeState]:
        """New text since the last call with this state. A new state with `ids_offset` > 0 takes the ids before it as the prompt."""
        if state.detokenizer is None:
            prompt = all_ids[: state.ids_offset]
            state.detokenizer = IncrementalDetokenizer(self, prompt, skip_special_tokens, spaces_between_special_tokens)
        text = state.detokenizer.feed(all_ids[state.ids_offset :])
        state.ids_offset = len(all_ids)
        return text, state

    def indexes_containing_token(self, token: str) -> list[int]:
        """Ids whose text contains `token`; if they are more than five, only those whose text is exactly it."""
        with self._lock:
            if self._texts is None:
                self._texts = [self.token_bytes(i).decode("utf-8", "replace") for i in range(self.vocab_size)]
        added = self.codec.added_id(token)
        if added is not None:
            return [added]
        found = [i for i, text in enumerate(self._texts) if token in text] if token else []
        return found if len(found) <= 5 else [i for i in found if self._texts[i] == token]

    def guard(self, text: str) -> str:
        """The text, marked so that `encode` takes the special tokens written in it as ordinary text; text without them is returned as it is."""
        return self.codec.splitter.guard(text)

    def token_id(self, text: str) -> int | None:
        """Id of a piece as the vocabulary writes it (special tokens: as they are written), None if there is none."""
        return self.codec.token_id(text)

    def added_token_id(self, text: str) -> int | None:
        """Id of a special or added token such as <|im_end|>, None if `text` is not one."""
        return self.codec.added_id(text)

    def token_text(self, token_id: int) -> str:
        """The piece as the vocabulary writes it; '' for an id without a piece (padded vocabularies)."""
        return self.codec.token_text(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the id adds to a text; a piece may be half a character."""
        return self.codec.token_bytes(token_id)


def _open_codec(folder: Path, table: TokenTable) -> Codec:
    """The codec of the first vocabulary file that exists."""
    if (path := folder / "tokenizer.json").is_file():
        return JsonCodec(path, table)
    if (path := folder / "tokenizer.model").is_file():
        return RankCodec(path, table) if is_rank_file(path) else PieceCodec(path, table)
    if (path := folder / "qwen.tiktoken").is_file():
        return RankCodec(path, table)
    state = "has none of" if folder.is_dir() else "is not a folder; it should hold one of"
    raise CheckpointError(f"no tokenizer: {folder} {state} {', '.join(VOCABULARY_FILES)}")


def _named_tokens(codec: Codec, table: TokenTable) -> dict[str, str]:
    """bos_token, eos_token, ... as text: the folder's names, else the vocabulary's own."""
    own: dict[str, str] = {}
    if isinstance(codec, RankCodec):
        own = {"eos_token": codec.family.eos} | ({"bos_token": codec.family.bos} if codec.family.bos else {})
    elif isinstance(codec, PieceCodec):
        own = codec.named_tokens()
    return own | table.named


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise RequestError(f"text to encode must be a str, not {type(text).__name__}", param="text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise RequestError(f"text is not valid Unicode: a lone surrogate at position {e.start}", param="text") from e
