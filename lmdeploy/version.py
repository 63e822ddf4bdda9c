"""The one place of the version number: pyproject.toml, `lmdeploy --version` and the server's answers read it here."""

from __future__ import annotations

__version__ = "0.1.0"
version_info: tuple[int, ...] = tuple(int(part) for part in __version__.split("."))
