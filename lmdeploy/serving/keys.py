"""`KeyRing`: who may call the server. Keys have names; only the names are ever logged or counted.

A key is kept as its SHA-256 and compared in constant time with every known one. The file is read again on SIGHUP (`read_again`); a file
that has become unreadable, wrong or empty changes nothing, so a slip of the editor neither opens nor locks the server.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lmdeploy.errors import ConfigError
from lmdeploy.serving.options import ServerConfig

#: more keys than this are refused: each request is compared with all of them
MAX_KEYS = 1000
MAX_FILE_BYTES = 1 << 20
#: the name of the key of the admin routes
ADMIN = "admin"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class KeyRing:
    """The keys of one server. Without any, everybody may call the ordinary routes and nobody the admin routes."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._keys, self._admin = _read(config)

    @property
    def needed(self) -> bool:
        """Whether callers need a key."""
        return bool(self._keys)

    @property
    def has_admin(self) -> bool:
        """Whether there is a key for the admin routes."""
        return bool(self._admin)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all keys, the admin key's included."""
        return tuple(name for name, _ in (*self._keys, *self._admin))

    def find(self, key: bytes) -> str | None:
        """The name of a key, or None when it is unknown; the time taken does not depend on which key it is."""
        digest, found = _digest(key), None
        for name, known in (*self._keys, *self._admin):
            if hmac.compare_digest(digest, known):
                found = name
        return found

    def read_again(self) -> Callable[[], int]:
        """Read the files again; a function that takes the new keys and says how many there are. Raises ConfigError; until that call all stays as it was."""
        keys, admin = _read(self._config)

        def take() -> int:
            self._keys, self._admin = keys, admin
            return len(self.names)

        return take


def _read(config: ServerConfig) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]]:
    keys = [(f"key{i}", key) for i, key in enumerate(config.api_keys or (), 1)]
    if config.api_key_lines is not None:
        keys += _some(_parsed(config.api_key_lines, "LMDEPLOY_API_KEYS", len(keys)), "LMDEPLOY_API_KEYS")
    if config.api_keys_file is not None:
        keys += _some(_parsed(_lines(config.api_keys_file, "api_keys_file"), config.api_keys_file, len(keys)), f"api_keys_file {config.api_keys_file}")
    admin = [config.admin_key] if config.admin_key else []
    if config.admin_key_file is not None:
        lines = [line for _, line in _meaningful(_lines(config.admin_key_file, "admin_key_file"))]
        if len(lines) != 1:
            raise ConfigError(f"admin_key_file {config.admin_key_file} holds {len(lines)} keys; write exactly one")
        admin += lines
    if len(keys) > MAX_KEYS:
        raise ConfigError(f"there are {len(keys)} API keys; at most {MAX_KEYS} can be used")
    if twice := sorted({name for name in _names(keys) if _names(keys).count(name) > 1}):
        raise ConfigError(f"two API keys are named {twice[0]!r}; give each its own name")
    if set(admin) & {key for _, key in keys}:
        raise ConfigError("the admin key is also an API key; give the admin routes a key of their own")
    return [(name, _digest(key)) for name, key in keys], [(ADMIN, _digest(key)) for key in admin]


def _some(keys: list[tuple[str, str]], source: str) -> list[tuple[str, str]]:
    """Refuse a source of keys that holds none: it would open the server."""
    if not keys:
        raise ConfigError(f"{source} holds no key; write one a line, as NAME:KEY or KEY")
    return keys


def _names(keys: list[tuple[str, str]]) -> list[str]:
    return [name for name, _ in keys]


def _lines(path: str, option: str) -> list[str]:
    try:
        raw = Path(path).read_bytes()
        if len(raw) > MAX_FILE_BYTES:
            raise ConfigError(f"{option} {path} has {len(raw)} bytes; at most {MAX_FILE_BYTES} are read")
        return raw.decode("utf-8").splitlines()
    except OSError as e:
        raise ConfigError(f"{option} {path} cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{option} {path} is not a text file in UTF-8") from e


def _meaningful(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text and not text.startswith("#"):
            yield number, text


def _parsed(lines: Iterable[str], source: str, before: int) -> list[tuple[str, str]]:
    """(name, key) of each line. An error names the line, never what it holds."""
    keys: list[tuple[str, str]] = []
    for number, text in _meaningful(lines):
        name, colon, key = text.partition(":")
        name, key = (name.strip(), key.strip()) if colon else (f"key{before + len(keys) + 1}", text)
        if not _NAME.fullmatch(name) or name == ADMIN:
            raise ConfigError(f"{source}, line {number}: a key's name has 1 to 64 letters, digits or any of _.- and is not '{ADMIN}'")
        if not key or not key.isprintable() or " " in key:
            raise ConfigError(f"{source}, line {number}: the key is empty or has spaces or control characters in it")
        keys.append((name, key))
    return keys


def _digest(key: str | bytes) -> bytes:
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()
