"""One logger tree below `lmdeploy`; nothing happens at import.

`setup(level)` is called by the command line and by `pipeline()`. It touches only the `lmdeploy` logger, never the root,
so a user's own logging stays as it was.
"""

from __future__ import annotations

import json
import logging
import sys
import time

LEVELS = ("CRITICAL", "FATAL", "ERROR", "WARNING", "WARN", "INFO", "DEBUG", "NOTSET")

FORMATS = ("text", "json")


def get_logger(name: str) -> logging.Logger:
    """Logger of a module; call as `get_logger(__name__)`."""
    return logging.getLogger(name)


class _JsonLines(logging.Formatter):
    """One JSON object a line; a record's `fields` are members of it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        entry = {"time": when, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def form() -> str:
    """How lines are written now: one of FORMATS."""
    return "json" if any(isinstance(handler.formatter, _JsonLines) for handler in logging.getLogger("lmdeploy").handlers) else "text"


def setup(level: str = "WARNING", form: str | None = None) -> None:
    """Send `lmdeploy` records of `level` and above to stderr, one line each, with the time; `form` is one of FORMATS."""
    logger = logging.getLogger("lmdeploy")
    logger.setLevel(level.upper())
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.propagate = False
        form = form or "text"
    if form is not None:
        text = logging.Formatter("%(asctime)s - lmdeploy - %(levelname)s - %(message)s")
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:  # ours; a user's own stays as it is
                handler.setFormatter(_JsonLines() if form == "json" else text)
