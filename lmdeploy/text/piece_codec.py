"""tokenizer.model of sentencepiece (InternLM2, Llama 2, Mistral v0.1): native, without a converted tokenizer.json.

Special tokens get their published ids: those of the folder's files, and for InternLM2, whose vocabulary file calls its six
chat tokens [UNUSED_TOKEN_141] to [UNUSED_TOKEN_146], the names that the models were trained with.
"""

from __future__ import annotations

from pathlib import Path

import sentencepiece

from lmdeploy.errors import CheckpointError
from lmdeploy.text.codec import SpecialSplitter
from lmdeploy.text.tokenizer_files import MAX_MODEL_BYTES, AddedToken, TokenTable, read_bounded

SPACE = "\u2581"
#: appended to a serialized ModelProto, merges into its normalizer_spec: add_dummy_prefix = false
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
INTERNLM2_CHAT_TOKENS = ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>")
INTERNLM2_FIRST_UNUSED = 141


class PieceCodec:
    """Vocabulary of a sentencepiece file."""

    def __init__(self, path: Path, table: TokenTable) -> None:
        data = read_bounded(path, MAX_MODEL_BYTES)
        self._processor = _load(path, data)
        self._pieces_size: int = self._processor.get_piece_size()
        self.strip_first_space = self._processor.encode("a", out_type=str)[:1] != ["a"]
        dummy_after_special = table.legacy is not False or not self.strip_first_space
        self._continuation = self._processor if dummy_after_special else _load(path, data + NO_DUMMY_PREFIX)
        self._contents, special = self._special_tokens(path, table)
        self.special_ids = frozenset(special)
        self.size = max(self._pieces_size, max(self._contents, default=-1) + 1)
        self._added = {content: token_id for token_id, content in self._contents.items()}
        self.splitter = SpecialSplitter(self._added)
        self._cache: dict[int, bytes] = {}

    def _special_tokens(self, path: Path, table: TokenTable) -> tuple[dict[int, str], set[int]]:
        """(id -> content of every token outside the trained pieces, ids of the special ones)."""
        sp = self._processor
        control = [i for i in range(self._pieces_size) if sp.is_control(i) or sp.is_unknown(i)]
        tokens = {i: AddedToken(sp.id_to_piece(i), True) for i in control}
        tokens.update(self._internlm2_tokens(table))
        tokens.update(table.added)
        known = {token.content: token_id for token_id, token in tokens.items()}
        for content in (*table.named.values(), *table.additional):
            if content not in known:
                found = sp.piece_to_id(content)
                token_id = found if found != sp.unk_id() else max(self._pieces_size, max(tokens, default=-1) + 1)
                tokens[token_id] = AddedToken(content, True)
                known[content] = token_id
        contents = {token_id: token.content for token_id, token in tokens.items()}
        if len(set(contents.values())) != len(contents):
            twice = sorted({c for c in contents.values() if list(contents.values()).count(c) > 1})
            raise CheckpointError(f"{path.parent}: special tokens with more than one id: {', '.join(twice)}")
        return contents, {token_id for token_id, token in tokens.items() if token.special}

    def _internlm2_tokens(self, table: TokenTable) -> dict[int, AddedToken]:
        wanted = not table.has_config or set(INTERNLM2_CHAT_TOKENS) & set(table.additional)
        names = [f"[UNUSED_TOKEN_{INTERNLM2_FIRST_UNUSED + i}]" for i in range(len(INTERNLM2_CHAT_TOKENS))]
        ids = [self._processor.piece_to_id(name) for name in names]
        if not wanted or self._processor.unk_id() in ids:
            return {}
        return {token_id: AddedToken(content, True) for token_id, content in zip(ids, INTERNLM2_CHAT_TOKENS, strict=True)}

    def named_tokens(self) -> dict[str, str]:
        """bos_token, eos_token, ... of the vocabulary file itself."""
        sp = self._processor
        ids = {"bos_token": sp.bos_id(), "eos_token": sp.eos_id(), "unk_token": sp.unk_id(), "pad_token": sp.pad_id()}
        return {name: self.token_text(token_id) for name, token_id in ids.items() if token_id >= 0}

    def encode(self, text: str, split_special: bool) -> list[int]:
        parts = self.splitter.split(text) if split_special else [self.splitter.unguard(text)]
        ids: list[int] = []
        for i, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += (self._processor if i == 0 else self._continuation).encode(part)
        return ids

    def encode_batch(self, texts: list[str], split_special: bool) -> list[list[int]]:
        return [self.encode(text, split_special) for text in texts]

    def added_id(self, text: str) -> int | None:
        return self._added.get(text)

    def token_id(self, text: str) -> int | None:
        if text in self._added:
            return self._added[text]
        found: int = self._processor.piece_to_id(text)
        return None if found == self._processor.unk_id() else found

    def token_text(self, token_id: int) -> str:
        if token_id in self._contents:
            return self._contents[token_id]
        return self._processor.id_to_piece(token_id) if 0 <= token_id < self._pieces_size else ""

    def token_bytes(self, token_id: int) -> bytes:
        data = self._cache.get(token_id)
        if data is None:
            data = self._bytes_of(token_id)
            if 0 <= token_id < self.size:
                self._cache[token_id] = data
        return data

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in self._contents:
            return self._contents[token_id].encode("utf-8")
        piece = self.token_text(token_id)
        if piece and self._processor.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode("utf-8")


def _load(path: Path, data: bytes) -> sentencepiece.SentencePieceProcessor:
    if not data:
        raise CheckpointError(f"{path} is not a usable sentencepiece model: the file is empty")
    sentencepiece.set_min_log_level(2)  # errors only: it warns on stderr about a piece that InternLM2 has always had
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=data)
    except Exception as e:  # the library raises RuntimeError and others, according to what is broken
        reason = str(e).strip() or type(e).__name__
        if sentencepiece.__version__ == "0.2.2" and "null character" in reason:
            reason += "; sentencepiece 0.2.2 refuses what every other version reads: pip install 'sentencepiece!=0.2.2'"
        raise CheckpointError(f"{path} is not a usable sentencepiece model: {reason}") from e
