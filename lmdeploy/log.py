"""One logger tree below `lmdeploy`; nothing happens at import.

`setup(level)` is called by the command line and by `pipeline()`. It touches only the `lmdeploy` logger, never the root,
so a user's own logging stays as it was.
"""

from __future__ import annotations

import logging
import sys

LEVELS = ("CRITICAL", "FATAL", "ERROR", "WARNING", "WARN", "INFO", "DEBUG", "NOTSET")


def get_logger(name: str) -> logging.Logger:
    """Logger of a module; call as `get_logger(__name__)`."""
    return logging.getLogger(name)


def setup(level: str = "WARNING") -> None:
    """Send `lmdeploy` records of `level` and above to stderr, one line each, with the time."""
    logger = logging.getLogger("lmdeploy")
    logger.setLevel(level.upper())
    if logger.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s - lmdeploy - %(levelname)s - %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
