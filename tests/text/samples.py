"""Where the tests of this part find tokenizers, and the texts that they all must carry unharmed."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from lmdeploy.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
#: vocabularies of other families lie beside the repository; without them their tests are skipped
SHARED = next((p for p in (ROOT / "shared", ROOT.parent / "shared") if p.is_dir()), ROOT / "shared")
TINY = ROOT / "lmdeploy" / "assets" / "tiny-internlm2-chat"
STORIES = SHARED / "models" / "stories260K-llama"
INTERNLM2, LLAMA2, LLAMA3, QWEN = (SHARED / "data" / "tokenizers" / name for name in ("internlm2", "llama2", "llama3", "qwen"))
FOLDERS = [TINY, STORIES, INTERNLM2, LLAMA2, LLAMA3, QWEN]

TEXTS = [
    "Hello, world!",
    " two  spaces   and\ttabs\r\n\r\nlines ",
    "请给我讲一个关于猫和老鼠的小故事。书生·浦语",
    "emoji 😀👩‍👩‍👧‍👦🇩🇪 and e\u0301 combining",
    "Grüße aus Köln, привет, مرحبا, हिन्दी, ไทย, 日本語",
    "1234567890 3.14159 0x7f (3+5)*2",
    "def f(x):\n    return {'a': [1, 2]}  # it's",
    "\u0000\u0001 control \u200b zero width \ufeff",
    "a",
]


@functools.cache
def _loaded(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


def tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, loaded once."""
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    return _loaded(folder)
