"""tokenizer.json: encoding by the `tokenizers` library, bytes of a piece by the file's own decoder steps.

Known decoders are byte-level (GPT-2 family) and metaspace with byte fallback (Llama family), which is what language models
with a tokenizer.json use; another one is refused at load rather than decoded wrongly.
"""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import tokenizers

from lmdeploy.errors import CheckpointError
from lmdeploy.log import get_logger
from lmdeploy.text.codec import GUARD, SpecialSplitter, byte_level_alphabet
from lmdeploy.text.tokenizer_files import MAX_TOKENIZER_JSON_BYTES, TokenTable, read_bounded

logger = get_logger(__name__)

CHUNK = 1 << 19
#: byte-level split patterns always cut between two words, before the space, and behind a line break that has no blanks around it
SAFE_CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])|(?<=\S)\n(?=\S)")


class JsonCodec:
    """Vocabulary of a tokenizer.json."""

    def __init__(self, path: Path, table: TokenTable) -> None:
        try:
            inner = tokenizers.Tokenizer.from_buffer(read_bounded(path, MAX_TOKENIZER_JSON_BYTES))
        except CheckpointError:
            raise
        except Exception as e:  # the library raises plain Exception
            raise CheckpointError(f"{path} is not a usable tokenizer.json: {e}") from e
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner
        self._add_tokens(path, table)
        added = inner.get_added_tokens_decoder()
        self._added = {token.content: token_id for token_id, token in added.items()}
        self.splitter = SpecialSplitter(self._added)
        names = {token.content for token in added.values() if token.special} | {t.content for t in table.added.values() if t.special}
        self.special_ids = frozenset(token_id for content, token_id in self._added.items() if content in names)
        self.size = max(max(inner.get_vocab(with_added_tokens=True).values(), default=-1), max(added, default=-1)) + 1
        self._pieces = _PieceBytes(inner.decoder, path)
        self.strip_first_space = self._pieces.strip_first_space
        self._may_cut = self._pieces.byte_level and _cuts_at_words(inner)
        self._cache: dict[int, bytes] = {}
        self._plain: Any = None  # a second library object that does not see special tokens, made when first asked for
        self._lock = threading.Lock()

    def _add_tokens(self, path: Path, table: TokenTable) -> None:
        """Tokens that only tokenizer_config.json knows. Where the two files disagree about an id, tokenizer.json wins, aloud."""
        known = {token.content for token in self._inner.get_added_tokens_decoder().values()}
        for token_id, token in sorted(table.added.items()):
            if token.content not in known:
                self._add(token.content, special=token.special)
            found = self._inner.token_to_id(token.content)
            if found != token_id:
                logger.warning("%s gives %r the id %s, tokenizer_config.json %s; the first is used", path, token.content, found, token_id)
        for content in (*table.named.values(), *table.additional):
            if content not in known and all(content != t.content for t in table.added.values()):
                self._add(content, special=True)

    def _add(self, content: str, special: bool) -> None:
        token = tokenizers.AddedToken(content, normalized=False, special=special)
        (self._inner.add_special_tokens if special else self._inner.add_tokens)([token])

    def first_added_id(self) -> int | None:
        """The id that the file's post-processor puts in front of every text (BOS), if it does."""
        ids = self._inner.encode("", add_special_tokens=True).ids
        return ids[0] if ids else None

    def encode(self, text: str, split_special: bool) -> list[int]:
        return self.encode_batch([text], split_special)[0]

    def encode_batch(self, texts: list[str], split_special: bool) -> list[list[int]]:
        if any(GUARD[0] in text for text in texts):
            return [self._encode_guarded(text, split_special) for text in texts]
        inner = self._inner if split_special else self._without_special()
        if all(len(text) <= CHUNK for text in texts):
            return [e.ids for e in inner.encode_batch_fast(texts, add_special_tokens=False)]
        return [self._encode_long(inner, text) for text in texts]

    def _encode_guarded(self, text: str, split_special: bool) -> list[int]:
        ids: list[int] = []
        for part, counts in self.splitter.sections(text):
            inner = self._inner if split_special and counts else self._without_special()
            ids += self._encode_long(inner, part)
        return ids

    def _encode_long(self, inner: Any, text: str) -> list[int]:
        """The library takes 130 bytes of memory a byte of text, so a long one is given to it in pieces, cut where no token can reach across."""
        ids: list[int] = []
        start = 0
        while start < len(text):
            cut = SAFE_CUT.search(text, start + CHUNK) if self._may_cut else None
            end = cut.end() if cut else len(text)
            ids += inner.encode_batch_fast([text[start:end]], add_special_tokens=False)[0].ids
            start = end
        return ids

    def _without_special(self) -> Any:
        """`encode_special_tokens` is state of the library's object, so the other setting needs an object of its own."""
        with self._lock:
            if self._plain is None:
                plain = tokenizers.Tokenizer.from_str(self._inner.to_str())
                plain.encode_special_tokens = True
                self._plain = plain
            return self._plain

    def added_id(self, text: str) -> int | None:
        return self._added.get(text)

    def token_id(self, text: str) -> int | None:
        found: int | None = self._inner.token_to_id(text)
        return found

    def token_text(self, token_id: int) -> str:
        return (self._inner.id_to_token(token_id) or "") if 0 <= token_id < self.size else ""

    def token_bytes(self, token_id: int) -> bytes:
        data = self._cache.get(token_id)
        if data is None:
            data = self._pieces.to_bytes(self.token_text(token_id))
            if 0 <= token_id < self.size:
                self._cache[token_id] = data
        return data


def _cuts_at_words(inner: Any) -> bool:
    """True when text is split by a pattern before merging and nothing is put in front of it."""
    states = [json.loads(part.__getstate__()) if part is not None else None for part in (inner.pre_tokenizer, inner.normalizer)]
    text = json.dumps(states)
    if any(re.search(r"\S\s+\S", token.content) for token in inner.get_added_tokens_decoder().values()):
        return False
    return states[0] is not None and not any(word in text for word in ('"add_prefix_space": true', "Prepend", "Metaspace", "Replace"))


class _PieceBytes:
    """The decoder of a tokenizer.json, reduced to a function of one piece."""

    def __init__(self, decoder: Any, path: Path) -> None:
        self.strip_first_space = False
        self.byte_level = self._byte_fallback = False
        self._replace: list[tuple[str, str]] = []
        self._alphabet = byte_level_alphabet()
        if decoder is None:
            raise CheckpointError(f"{path} has no decoder; lmdeploy knows byte-level and metaspace/byte-fallback tokenizers")
        for step in self._steps(json.loads(decoder.__getstate__())):
            if not self._take(step):
                raise CheckpointError(
                    f"{path}: decoder step {step.get('type')!r} is not known; lmdeploy knows byte-level and metaspace/byte-fallback tokenizers"
                )

    def _steps(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        return [s for inner in state["decoders"] for s in self._steps(inner)] if state.get("type") == "Sequence" else [state]

    def _take(self, step: dict[str, Any]) -> bool:
        """Note one step; False when its meaning is not known."""
        kind = step.get("type")
        if kind == "ByteLevel":
            self.byte_level = True
        elif kind == "ByteFallback":
            self._byte_fallback = True
        elif kind == "Replace" and "String" in step.get("pattern", {}):
            self._replace.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace":
            self._replace.append((step["replacement"], " "))
            self.strip_first_space = step.get("prepend_scheme", "always") != "never"
        elif kind == "Strip" and step.get("content") == " " and step.get("stop") == 0 and step.get("start") in (0, 1):
            self.strip_first_space = step["start"] == 1
        elif kind != "Fuse":
            return False
        return True

    def to_bytes(self, piece: str) -> bytes:
        """Bytes of one piece. A byte-level piece with a foreign character is an added token: its own UTF-8."""
        if self.byte_level:
            try:
                return bytes([self._alphabet[c] for c in piece])
            except KeyError:
                return piece.encode("utf-8")
        if self._byte_fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            try:
                return bytes([int(piece[3:5], 16)])
            except ValueError:
                pass
        for old, new in self._replace:
            piece = piece.replace(old, new)
        return piece.encode("utf-8")
