"""Make docs/ui-*.png: use a real `serve gradio` page in headless Chromium and photograph what it shows.

    python scripts/record_page.py        (needs the test extra, chromium, pillow)

The embedded model answers, but for the picture with code: 20 million parameters write none, so there a server says a prepared text.
Nothing is edited afterwards; run it again when the page's looks change.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402

from lmdeploy.config import TurbomindEngineConfig  # noqa: E402
from lmdeploy.frontend import Frontend  # noqa: E402
from lmdeploy.serving.options import ServerConfig  # noqa: E402
from tests.browser import PHONE, Reader, RunningPage, open_browser  # noqa: E402
from tests.serving.running import RunningServer  # noqa: E402
from tests.serving.scripted import ScriptedServer  # noqa: E402

QUESTION = "Write a Python function that merges two sorted lists, and say how long it takes."
THOUGHTS = "Two pointers are enough: compare the heads, take the smaller one, and append what is left of the other list."
CODE = """Compare the two heads, take the smaller, and go on:

```python
def merge(a: list[int], b: list[int]) -> list[int]:
    merged, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        if a[i] <= b[j]:
            merged.append(a[i])
            i += 1
        else:
            merged.append(b[j])
            j += 1
    return merged + a[i:] + b[j:]
```

Each element is looked at once, so `n` and `m` elements take time \\(O(n + m)\\).
"""


def save(name: str, reader: Reader) -> None:
    """One picture, with a palette: a page has few colours, and the file a third of the size."""
    reader.page.mouse.move(0, 0)
    reader.page.wait_for_timeout(700)
    shot = Image.open(io.BytesIO(reader.page.screenshot())).convert("RGB")
    path = ROOT / "docs" / f"ui-{name}.png"
    shot.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    sys.stdout.write(f"{path.name}: {path.stat().st_size >> 10} KiB\n")
    reader.close()


def talk(reader: Reader) -> None:
    """A conversation with the embedded model."""
    reader.set("temperature", 0.01)
    for text in ("My name is Ann. Count from 1 to 20.", "Tell me a story about a fox and a king."):
        reader.ask(text)


def main() -> None:
    """All pictures."""
    frontend = Frontend.open(None, TurbomindEngineConfig(), separate_process=True)
    server = RunningServer(frontend, ServerConfig(server_port=0, model_name="tiny-internlm2-chat"))
    scripted = ScriptedServer([{"id": "example", "max_model_len": 8192, "input_modalities": ["text", "image"]}, {"id": "another"}], {})
    scripted.script[QUESTION] = [{"reasoning_content": THOUGHTS}, *({"content": CODE[i : i + 12]} for i in range(0, len(CODE), 12))]
    scripted.usage = (41, len(scripted.script[QUESTION]))
    short = RunningServer(frontend, ServerConfig(server_port=0, model_name="tiny-internlm2-chat"))
    pages = [RunningPage(url) for url in (server.url, scripted.url, short.url)]
    try:
        with open_browser() as browser:
            photograph(browser, pages[0], pages[1])
            photograph_error(browser, pages[2], short)
    finally:
        for page in pages:
            page.stop()
        scripted.stop()
        server.stop()
        frontend.close()


def photograph(browser: Any, page: RunningPage, code_page: RunningPage) -> None:
    """Light, dark with code, a phone."""
    reader = Reader(browser, page.url)
    talk(reader)
    save("light", reader)
    reader = Reader(browser, code_page.url, color_scheme="dark")
    reader.ask(QUESTION)
    save("dark", reader)
    reader = Reader(browser, page.url, viewport=PHONE, is_mobile=True, has_touch=True, device_scale_factor=2)
    reader.page.wait_for_selector(".sidebar:not(.open)")
    reader.ask("Tell me a story about a fox and a king.")
    save("phone", reader)


def photograph_error(browser: Any, page: RunningPage, server: RunningServer) -> None:
    """A server that stops in the middle of a conversation."""
    reader = Reader(browser, page.url)
    reader.set("temperature", 0.01)
    reader.ask("Count from 1 to 20.")
    server.stop()
    reader.send("Tell me a story about a fox and a king.")
    reader.page.wait_for_selector("#lm-chat .lm-error")
    save("error", reader)


if __name__ == "__main__":
    main()
