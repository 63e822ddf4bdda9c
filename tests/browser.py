"""A real headless Chromium for tests of web pages, and the chat page as a reader uses it."""

from __future__ import annotations

import asyncio
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
#: the last bubble is the line of figures, or an error, and the buttons wait for the reader
ENDED = """() => {
  const last = [...document.querySelectorAll("#lm-chat .lm-note, #lm-chat .lm-error, #lm-chat [data-testid=user]")].pop();
  return last?.matches(".lm-note, .lm-error") && !last.innerText.startsWith("waiting for")
    && document.querySelector("[data-testid=submit-button]") && document.querySelector("#lm-retry:not([disabled])");
}"""
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@contextmanager
def open_browser() -> Iterator[Any]:
    """A browser; skips where there is none. Close it before other tests run: its event loop belongs to this thread."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[test]'")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install -y chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class RunningPage:
    """The chat page of a server, in a thread."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        from lmdeploy.serving.opening import reserve_port, url_of
        from lmdeploy.serving.options import ServerConfig
        from lmdeploy.serving.ui_chat import ChatServer
        from lmdeploy.serving.ui_server import build_page_server

        config = ServerConfig(server_port=0)
        self._sock = reserve_port(config)
        self.url = url_of(self._sock, config)
        self._server = build_page_server(ChatServer(url, api_key))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve(sockets=[self._sock])), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it."""
        self._server.should_exit = True
        self._thread.join(15)
        self._sock.close()


class Reader:
    """Somebody with a browser window of their own on the chat page."""

    def __init__(self, browser: Any, url: str, *, viewport: dict[str, int] = DESKTOP, **options: Any) -> None:
        self.context = browser.new_context(viewport=viewport, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.requests: list[str] = []
        self.dialogs: list[str] = []
        self.console: list[str] = []
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.on("dialog", lambda d: (self.dialogs.append(d.message), d.dismiss()))
        self.page.on("console", lambda m: self.console.append(m.text))
        self.page.goto(url)
        self.page.wait_for_selector("#lm-box textarea")
        self.page.locator(".lm-title span").filter(has_not_text="://").filter(has_text=re.compile(".")).wait_for()  # the model's name is known

    def send(self, text: str) -> None:
        """Type and press Enter; returns when the question is in sight."""
        before = self.page.locator("[data-testid=user]").count()
        self.page.fill("#lm-box textarea", text)
        self.page.press("#lm-box textarea", "Enter")
        self.page.locator("[data-testid=user]").nth(before).wait_for()

    def ask(self, text: str) -> str:
        """Type, Enter, wait for the end; the answer's text, without the line of figures."""
        self.send(text)
        return self.finished()

    def finished(self) -> str:
        """Wait until nothing runs; the last answer. The end is in the conversation first, in the buttons a moment later."""
        self.page.wait_for_function(ENDED)
        return self.answer()

    def answer(self) -> str:
        """The last answer as it is shown."""
        texts = [t for t in self.page.locator("[data-testid=bot]").all_inner_texts() if t.strip()]
        return texts[-2].strip() if len(texts) > 1 and self.note() in texts[-1] else "".join(texts[-1:]).strip()

    def note(self) -> str:
        """The line of figures under the last answer."""
        notes = self.page.locator(".lm-note").all_inner_texts()
        return notes[-1] if notes else ""

    def error(self) -> str:
        """The error under the last question."""
        return str(self.page.locator("#lm-chat .lm-error").last.inner_text())

    def questions(self) -> list[str]:
        """All questions in sight."""
        return [t.strip() for t in self.page.locator("[data-testid=user]").all_inner_texts()]

    def left(self, number: int) -> None:
        """Wait until this many questions are in sight."""
        self.page.locator("[data-testid=user]").nth(number).wait_for(state="detached")
        assert len(self.questions()) == number

    def press(self, button: str) -> None:
        """Retry, Undo or Clear."""
        self.page.click(f"#lm-{button.lower()}")

    def set(self, slider: str, value: float) -> None:
        """Type into a slider's number field."""
        field = self.page.locator(f"#lm-{slider} input[type=number]")
        field.fill(str(value))
        field.blur()

    def close(self) -> None:
        """Close the window."""
        self.context.close()
