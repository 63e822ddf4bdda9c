"""Rows of the acceptance list that people use in a browser, each as they do it: the users' commands as processes, a real headless Chromium."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lmdeploy.pipeline import Pipeline
from tests.acceptance.commands import ROOT, Server, free_port
from tests.browser import Reader, open_browser

gr = pytest.importorskip("gradio", reason="web pages need gradio (extra `ui`)")

COUNT = "Count from 1 to 20."
TWENTY = ", ".join(map(str, range(1, 21)))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


def test_a8_a_web_chat_of_a_running_server(browser: Any, model_folder: Path, tmp_path: Path) -> None:
    server = Server(tmp_path / "server", str(model_folder), "--model-name", "internlm2", "--cache-max-entry-count", "100")
    page = Server(tmp_path / "page", f"http://localhost:{server.port}", "--server-name", "0.0.0.0", command="gradio", ready="/")
    try:
        reader = Reader(browser, page.url)
        assert "internlm2" in reader.page.inner_text("#lm-head")
        for slider, limits in {"max-new-tokens": ("1", "2048"), "top-p": ("0.01", "1"), "top-k": ("1", "100"), "temperature": ("0.01", "1.5")}.items():
            field = reader.page.locator(f"#lm-{slider} input[type=range]")
            assert (field.get_attribute("min"), field.get_attribute("max")) == limits
        reader.set("temperature", 0.01)
        assert TWENTY in reader.ask(COUNT)
        reader.set("max-new-tokens", 5)
        reader.press("retry")
        reader.page.get_by_text("5 tokens · ").wait_for()
        reader.finished()
        reader.press("undo")
        reader.left(0)
        reader.ask(COUNT)
        reader.press("clear")
        reader.left(0)
        server.stop()
        reader.send("Are you there?")
        reader.page.wait_for_selector("#lm-chat .lm-error")
        assert f"The server at http://localhost:{server.port} does not answer" in reader.error()
        assert reader.questions() == ["Are you there?"]
        reader.close()
        log = page.log.read_text()
        assert f"open {page.url} in a browser" in log and "every machine of your network" in log
    finally:
        server.stop()
        page.stop()
    assert page.process.returncode == 0


def test_a9_a_web_chat_with_the_quantised_model_inside_and_ctrl_c_ends_all_of_it(browser: Any, four_bit_folder: Path, tmp_path: Path) -> None:
    flags = [
        "--backend",
        "turbomind",
        "--model-format",
        "awq",
        "--tp",
        "1",
        "--cache-max-entry-count",
        "0.04",
        "--quant-policy",
        "0",
        "--server-name",
        "0.0.0.0",
    ]
    page = Server(tmp_path / "page", str(four_bit_folder), *flags, command="gradio", ready="/")
    try:
        reader = Reader(browser, page.url)
        reader.set("temperature", 0.01)
        assert TWENTY in reader.ask(COUNT)
        reader.set("max-new-tokens", 2048)
        reader.send("Tell me a very long story.")  # may still run when all ends
        family = psutil.Process(page.process.pid).children(recursive=True)
        assert family, "the engine has a process of its own"
        page.process.send_signal(signal.SIGINT)
        assert page.process.wait(20) == 0, page.log.read_text()
        assert psutil.wait_procs(family, timeout=5)[1] == [], "no orphan"
        reader.close()
    finally:
        if page.process.poll() is None:
            page.process.kill()
    log = page.log.read_text()
    assert "KV cache" in log and f"open {page.url} in a browser" in log and "Traceback" not in log


def test_a18_a_page_of_the_users_own_around_pipe_says_with_numbers_why_it_cannot_answer(browser: Any, pipe: Pipeline) -> None:
    def model(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}, {"role": "assistant", "content": pipe(text).text}]

    demo = gr.Interface(fn=model, inputs=[gr.Textbox(elem_id="text", max_length=1 << 20)], outputs=gr.Chatbot(elem_id="answer"), analytics_enabled=False)
    _, url, _ = demo.launch(server_name="127.0.0.1", server_port=free_port(), prevent_thread_lock=True, quiet=True, show_error=True)
    try:
        page = browser.new_page()
        page.goto(url)
        page.fill("#text textarea", COUNT)
        page.click("text=Submit")
        page.locator("#answer [data-testid=bot]").filter(has_text="1, 2, 3").wait_for()
        page.fill("#text textarea", "cat " * 3000)
        page.click("text=Submit")
        toast = page.locator(".toast-wrap").filter(has_text="tokens")
        toast.wait_for()
        told = toast.inner_text()
        assert "(session_len) is 2048" in told and "the prompt has 3" in told, told
        page.close()
    finally:
        demo.close()


def test_a20_retry_undo_and_clear_of_a_demo_of_the_users_own_by_two_at_once(browser: Any, pipe: Pipeline) -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from web_demo import build
    finally:
        sys.path.pop(0)
    demo = build(pipe).queue(max_size=100, default_concurrency_limit=8)
    _, url, _ = demo.launch(server_name="127.0.0.1", server_port=free_port(), prevent_thread_lock=True, quiet=True)
    names = ["Ann", "Tom"]
    try:
        pages = [browser.new_context().new_page() for _ in names]
        for page in pages:
            page.goto(url)
            page.get_by_label("Your message").wait_for()
        for texts in ([f"My name is {name}." for name in names], ["What is my name?"] * 2):
            for page, text in zip(pages, texts, strict=True):
                page.get_by_label("Your message").fill(text)
                page.get_by_role("button", name="Send").click()
            settle(pages)
        for page in pages:
            page.get_by_role("button", name="Retry").click()
        settle(pages)
        for page, own, other in zip(pages, names, reversed(names), strict=True):
            said = page.locator("[data-testid=user], [data-testid=bot]").all_inner_texts()
            assert len(said) == 4 and own in said[-1] and not any(other in text for text in said)
        pages[0].get_by_role("button", name="Undo").click()
        pages[1].get_by_role("button", name="Clear", exact=True).last.click()
        pages[0].locator("[data-testid=user]").nth(1).wait_for(state="detached")
        pages[1].locator("[data-testid=user]").first.wait_for(state="detached")
        assert pages[0].locator("[data-testid=user]").all_inner_texts() == ["My name is Ann."], "the other's Clear is not mine"
        for page in pages:
            page.context.close()
    finally:
        demo.close()


def settle(pages: list[Any]) -> None:
    """Wait until no page has an event that runs."""
    for page in pages:
        page.wait_for_timeout(300)
        page.locator(".generating, .progress-text").first.wait_for(state="detached")
        page.wait_for_timeout(200)
