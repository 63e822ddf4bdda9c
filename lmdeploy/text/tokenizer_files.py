"""What a checkpoint folder says about its tokenizer, read with bounds: special tokens, their ids, BOS rules.

The four places that name special tokens (tokenizer_config.json's keys and `added_tokens_decoder`, special_tokens_map.json,
added_tokens.json) are merged here once, so that the codecs see one `TokenTable`. Nothing of the folder is ever executed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmdeploy.errors import CheckpointError

MAX_JSON_BYTES = 64 << 20
MAX_TOKENIZER_JSON_BYTES = 256 << 20
MAX_MODEL_BYTES = 128 << 20
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that stands beside the trained vocabulary; `special` ones are left out of text by default."""

    content: str
    special: bool


@dataclass(frozen=True, slots=True)
class TokenTable:
    """The merged facts; everything may be empty when the folder has only a vocabulary file."""

    added: dict[int, AddedToken] = field(default_factory=dict)  # id -> token, where the id is published
    named: dict[str, str] = field(default_factory=dict)  # bos_token, eos_token, ... -> content
    additional: tuple[str, ...] = ()  # special by name, id to be found in the vocabulary
    add_bos: bool | None = None
    legacy: bool | None = None  # sentencepiece: a dummy space after each special token (None and True) or only at the start
    has_config: bool = False


def read_bounded(path: Path, limit: int) -> bytes:
    """The whole file, or CheckpointError naming it when it is unreadable or longer than `limit` bytes."""
    try:
        with path.open("rb") as f:
            data = f.read(limit + 1)
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror or e}") from e
    if len(data) > limit:
        raise CheckpointError(f"{path} is larger than {limit} bytes, the most that lmdeploy reads of such a file")
    return data


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in the file; {} when there is no such file."""
    if not path.exists():
        return {}
    data = read_bounded(path, limit)
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def read_token_table(folder: Path) -> TokenTable:
    """Merge the folder's files; the more specific file wins (added_tokens_decoder over added_tokens.json)."""
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path)
    special_map = read_json(folder / "special_tokens_map.json")
    plain_added = read_json(folder / "added_tokens.json")
    named = {name: content for source in (special_map, config) for name in NAMED if (content := _content(source.get(name)))}
    additional = _additional(special_map) + _additional(config)
    special_names = set(named.values()) | set(additional)
    added: dict[int, AddedToken] = {}
    for content, token_id in plain_added.items():
        _put(added, folder / "added_tokens.json", token_id, AddedToken(content, content in special_names))
    for key, value in _mapping(config, "added_tokens_decoder", config_path).items():
        content = _content(value)
        if content is None:
            raise CheckpointError(f"{config_path}: added_tokens_decoder[{key!r}] has no 'content'")
        special = content in special_names or (isinstance(value, dict) and value.get("special") is True)
        _put(added, config_path, key, AddedToken(content, special))
    return TokenTable(
        added=added,
        named=named,
        additional=tuple(dict.fromkeys(additional)),
        add_bos=_flag(config, "add_bos_token"),
        legacy=_flag(config, "legacy"),
        has_config=bool(config or special_map or plain_added),
    )


def _content(value: Any) -> str | None:
    """A token is written as a string or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _additional(source: dict[str, Any]) -> list[str]:
    values = source.get("additional_special_tokens") or source.get("extra_special_tokens") or []
    if isinstance(values, dict):
        values = list(values.values())
    return [content for value in values if (content := _content(value))] if isinstance(values, list) else []


def _mapping(source: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = source.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {key} must be an object, not {type(value).__name__}")
    return value


def _flag(source: dict[str, Any], key: str) -> bool | None:
    value = source.get(key)
    return value if isinstance(value, bool) else None


def _put(added: dict[int, AddedToken], path: Path, key: Any, token: AddedToken) -> None:
    """Ids beyond 2^24 would make the tables huge: no vocabulary is that large."""
    try:
        token_id = int(key)
    except (TypeError, ValueError):
        raise CheckpointError(f"{path}: token {token.content!r} has the id {key!r}, which is not a number") from None
    if isinstance(key, bool) or not 0 <= token_id < 1 << 24:
        raise CheckpointError(f"{path}: token {token.content!r} has the id {key!r}; ids must be in [0, {(1 << 24) - 1}]")
    added[token_id] = token
