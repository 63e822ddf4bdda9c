"""The web page in a real headless Chromium, over real servers of the embedded model and over one that is told what to say."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lmdeploy.errors import EngineError, RequestError
from lmdeploy.serving import ui_chat
from lmdeploy.serving.ui_chat import Exchange, Settings
from tests.browser import PHONE, Reader, RunningPage, open_browser
from tests.serving.running import RunningServer
from tests.serving.scripted import ScriptedServer

pytest.importorskip("gradio", reason="the web page needs gradio (extra `ui`)")

COUNT = "Count from 1 to 20."
TWENTY = ", ".join(map(str, range(1, 21)))
ENDLESS = "Tell me a very long story about a king, a fox and a dragon."
#: keeps every text that the answer had in window.seen
WATCH = """() => {
  window.seen = new Set();
  new MutationObserver(() => window.seen.add(document.querySelector("[data-testid=bot]")?.innerText.trim()))
    .observe(document.querySelector("#lm-chat"), {childList: true, subtree: true, characterData: true});
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(server: RunningServer) -> Iterator[RunningPage]:
    """The page of the embedded model."""
    running = RunningPage(server.url)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def scripted() -> Iterator[ScriptedServer]:
    cards = [{"id": "seer", "max_model_len": 4096, "input_modalities": ["text", "image"]}, {"id": "other"}]
    running = ScriptedServer(cards, {})
    yield running
    running.stop()


@pytest.fixture(scope="module")
def scripted_page(scripted: ScriptedServer) -> Iterator[RunningPage]:
    running = RunningPage(scripted.url)
    yield running
    running.stop()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Reader]]:
    """Opens windows; closes them."""
    readers: list[Reader] = []

    def open_window(page: RunningPage, **options: Any) -> Reader:
        readers.append(Reader(browser, page.url, **options))
        return readers[-1]

    yield open_window
    for reader in readers:
        reader.close()


Visit = Callable[..., Reader]


# ---------------------------------------------------------------------- a conversation with the embedded model


def test_an_answer_grows_in_sight_and_its_figures_are_told(page: RunningPage, visit: Visit, server: RunningServer) -> None:
    reader = visit(page)
    reader.set("temperature", 0.01)
    reader.page.evaluate(WATCH)
    assert TWENTY in reader.ask(COUNT)
    seen = [text for text in reader.page.evaluate("[...window.seen]") if text and TWENTY.startswith(text.removesuffix("."))]
    assert len(seen) > 2, "the text was seen while it grew"
    tokens, speed, first, context = reader.note().split(" · ")
    assert tokens.endswith(" tokens") and speed.endswith(" tokens/s") and first.startswith("first after ")
    count = int(tokens.split()[0])
    assert context.startswith("context ") and " of 2,048 (" in context and int(context.split()[1]) > count
    assert "tiny" in reader.page.inner_text("#lm-head")


def test_enter_sends_and_shift_enter_begins_a_line(page: RunningPage, visit: Visit) -> None:
    reader = visit(page)
    reader.page.click("#lm-box textarea")
    reader.page.keyboard.type("Count from")
    reader.page.keyboard.press("Shift+Enter")
    reader.page.keyboard.type("1 to 5.")
    assert reader.page.input_value("#lm-box textarea") == "Count from\n1 to 5."
    assert reader.questions() == []
    reader.page.keyboard.press("Enter")
    reader.finished()
    assert reader.questions() == ["Count from\n1 to 5."]
    assert reader.page.input_value("#lm-box textarea") == ""


def test_sliders_reach_the_model_and_the_past_is_remembered_as_far_as_asked(page: RunningPage, visit: Visit) -> None:
    reader = visit(page)
    reader.set("max-new-tokens", 5)
    reader.ask(COUNT)
    assert reader.note().startswith("5 tokens · ") and reader.note().endswith("cut at the length limit")
    reader.set("max-new-tokens", 100)
    reader.set("temperature", 0.01)
    reader.ask("My name is Ann.")
    assert "Ann" in reader.ask("What is my name?")
    reader.set("memory", 0)
    assert "Ann" not in reader.ask("What is my name?")


def test_retry_undo_and_clear(page: RunningPage, visit: Visit) -> None:
    reader = visit(page)
    assert reader.page.is_disabled("#lm-retry") and reader.page.is_disabled("#lm-undo") and reader.page.is_disabled("#lm-clear")
    reader.set("temperature", 1.5)
    reader.set("top-p", 1)
    reader.set("max-new-tokens", 60)
    reader.ask(COUNT)
    first = reader.ask("Tell me a story about a cat.")
    reader.press("retry")
    reader.page.wait_for_selector("#lm-box .stop-button")
    assert reader.finished() != first, "sampled anew"
    assert reader.questions() == [COUNT, "Tell me a story about a cat."]
    reader.press("undo")
    reader.left(1)
    assert reader.page.input_value("#lm-box textarea") == "Tell me a story about a cat.", "the question may be changed and sent again"
    reader.press("clear")
    reader.left(0)
    assert reader.page.is_disabled("#lm-retry")
    reader.page.fill("#lm-box textarea", "")
    reader.set("temperature", 0.01)
    assert "Ann" not in reader.ask("What is my name?")


def test_stop_ends_the_answer_on_the_server_and_keeps_what_there_is(page: RunningPage, visit: Visit, server: RunningServer) -> None:
    reader = visit(page)
    reader.set("max-new-tokens", 2048)
    aborted = server.frontend.stats().aborted
    stop_in_time(reader, server)
    server.until_idle(5)
    assert server.frontend.stats().aborted > aborted
    reader.finished()
    assert reader.note().startswith("stopped after ")
    kept = reader.answer()
    assert kept
    reader.set("max-new-tokens", 20)
    reader.ask(COUNT)
    assert kept[:20] in reader.page.inner_text("#lm-chat"), "what was said before the stop is still there"


def stop_in_time(reader: Reader, server: RunningServer) -> None:
    """Press Stop while an answer runs; a short answer may be over sooner, then ask again."""
    for _ in range(10):
        reader.send(ENDLESS)
        try:
            reader.page.click("#lm-box .stop-button", timeout=2000)
        except Exception:
            reader.finished()
            continue
        reader.finished()
        if reader.note().startswith("stopped"):
            return
    raise AssertionError("ten stories were all over before Stop was pressed")


def test_a_closed_tab_ends_the_answer_on_the_server(page: RunningPage, visit: Visit, server: RunningServer) -> None:
    reader = visit(page)
    reader.set("max-new-tokens", 2048)
    for _ in range(10):
        aborted = server.frontend.stats().aborted
        reader.send(ENDLESS)
        server.until_busy()
        reader.page.goto("about:blank")
        server.until_idle(10)
        if server.frontend.stats().aborted > aborted:
            return
        reader.close()
        reader = visit(page)
        reader.set("max-new-tokens", 2048)
    raise AssertionError("no request was aborted")


def test_two_readers_at_once_never_see_each_others_conversation(page: RunningPage, visit: Visit) -> None:
    names = ["Ann", "Tom"]
    readers = [visit(page) for _ in names]
    for reader in readers:
        reader.set("temperature", 0.01)
    for reader, name in zip(readers, names, strict=True):
        reader.send(f"My name is {name}.")
    for reader in readers:
        reader.finished()
    for reader in readers:
        reader.send("What is my name?")
    answers = [reader.finished() for reader in readers]
    for own, other, reader, answer in zip(names, reversed(names), readers, answers, strict=True):
        assert own in answer and other not in reader.page.inner_text("#lm-chat")


# ---------------------------------------------------------------------- errors, in words


def test_errors_are_told_in_the_page_and_retry_works_when_the_server_is_back(visit: Visit, scripted: ScriptedServer, scripted_page: RunningPage) -> None:
    reader = visit(scripted_page)
    scripted.failure = (503, {"message": "100 requests are waiting and max_waiting=100; try again later", "code": "overloaded"})
    reader.send("hello")
    reader.page.wait_for_selector("#lm-chat .lm-error")
    assert reader.error() == "The server is busy: 100 requests are waiting and max_waiting=100; try again later. Press Retry in a few seconds."
    scripted.failure = None
    reader.press("retry")
    reader.page.wait_for_selector(".lm-note")
    assert reader.finished() == "hello" and reader.questions() == ["hello"]
    assert reader.page.locator("#lm-chat .lm-error").count() == 0


def test_a_server_that_is_gone_is_named(visit: Visit, browser: Any) -> None:
    gone = ScriptedServer([{"id": "m"}], {})
    page = RunningPage(gone.url)
    try:
        reader = visit(page)
        gone.stop()
        reader.send("hello")
        reader.page.wait_for_selector("#lm-chat .lm-error")
        assert reader.error().startswith(f"The server at {gone.url} does not answer (") and "Is it running" in reader.error()
        assert reader.questions() == ["hello"], "the question is kept"
        again = browser.new_page()
        again.goto(page.url)
        again.wait_for_selector(".lm-down")
        assert "does not answer" in again.inner_text(".lm-down"), "a page that is opened now says so, too"
        again.close()
    finally:
        page.stop()


def test_a_wrong_key_is_told(visit: Visit, browser: Any, serve: Callable[..., RunningServer]) -> None:
    locked = serve(api_keys=["right"])
    for key, answers in (("wrong", False), ("right", True)):
        page = RunningPage(locked.url, key)
        try:
            if answers:
                reader = visit(page)
                reader.set("temperature", 0.01)
                assert TWENTY in reader.ask(COUNT)
            else:
                window = browser.new_page()
                window.goto(page.url)
                window.wait_for_selector(".lm-down")
                assert "does not accept this page's key" in window.inner_text(".lm-down") and "--api-key KEY" in window.inner_text(".lm-down")
                window.close()
        finally:
            page.stop()


def test_a_conversation_that_is_too_long_is_told_with_numbers(page: RunningPage, visit: Visit) -> None:
    reader = visit(page)
    reader.send("cat " * 3000)
    reader.page.wait_for_selector("#lm-chat .lm-error")
    assert "too long for the model" in reader.error() and "2048" in reader.error() and "Past turns sent" in reader.error()
    reader.page.fill("#lm-box textarea", "")
    reader.set("temperature", 0.01)
    reader.send(COUNT)
    reader.page.wait_for_selector(".lm-note")
    assert TWENTY in reader.finished(), "a question that failed is not sent again"


# ---------------------------------------------------------------------- what models say, and what the server is asked


def test_every_setting_is_in_the_request(visit: Visit, scripted: ScriptedServer, scripted_page: RunningPage) -> None:
    reader = visit(scripted_page)
    reader.page.fill("#lm-system textarea", "You are brief.")
    for slider, value in {"max-new-tokens": 77, "top-p": 0.5, "top-k": 7, "temperature": 1.2, "memory": 1}.items():
        reader.set(slider, value)
    reader.page.click("#lm-model input")
    reader.page.get_by_role("option", name="other").click()
    for question in ("one", "two", "three"):
        reader.ask(question)
    assert scripted.bodies[-1] == {
        "model": "other",
        "messages": [
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": "two"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"},
        ],
        "max_tokens": 77,
        "top_p": 0.5,
        "top_k": 7,
        "temperature": 1.2,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_the_page_is_ready_when_it_takes_the_next_question(
    monkeypatch: pytest.MonkeyPatch, visit: Visit, scripted: ScriptedServer, scripted_page: RunningPage
) -> None:
    """gradio ignores questions until the last one's event has ended, a moment after its answer: a busy machine lost the Enter of whoever was quicker."""
    from lmdeploy.serving import ui

    answer, ends = ui._answer, threading.Event()

    async def ends_late(*arguments: Any) -> AsyncIterator[Any]:
        async for picture in answer(*arguments):
            yield picture
        while not ends.is_set():
            await asyncio.sleep(0.01)

    monkeypatch.setattr(ui, "_answer", ends_late)
    reader, asked = visit(scripted_page), len(scripted.bodies)
    try:
        reader.send("one")
        reader.page.locator(".lm-note").filter(has_text="tokens").wait_for()
        reader.page.wait_for_timeout(300)
        assert reader.page.locator("#lm-box .stop-button").is_visible() and reader.page.is_disabled("#lm-retry")
    finally:
        ends.set()
    reader.finished()
    assert reader.ask("two") == "two"
    reader.press("retry")
    while len(scripted.bodies) < asked + 3:
        reader.page.wait_for_timeout(20)
    assert scripted.bodies[-1] == scripted.bodies[-2]


def test_enter_twice_asks_once(visit: Visit, scripted: ScriptedServer, scripted_page: RunningPage) -> None:
    reader, asked = visit(scripted_page), len(scripted.bodies)
    reader.page.fill("#lm-box textarea", "one")
    for _ in range(2):
        reader.page.keyboard.press("Enter")
    reader.page.locator("[data-testid=user]").first.wait_for()
    reader.finished()
    assert reader.ask("two") == "two"
    assert [body["messages"][-1]["content"] for body in scripted.bodies[asked:]] == ["one", "two"]
    assert reader.questions() == ["one", "two"]


def test_enter_while_an_answer_is_written_keeps_the_text(page: RunningPage, visit: Visit) -> None:
    reader = visit(page)
    reader.send(ENDLESS)
    reader.page.fill("#lm-box textarea", "and then?")
    reader.page.press("#lm-box textarea", "Enter")
    reader.page.wait_for_timeout(300)
    assert reader.questions() == [ENDLESS] and reader.page.input_value("#lm-box textarea") == "and then?"
    reader.page.click("#lm-box .stop-button")
    reader.finished()
    assert reader.questions() == [ENDLESS]


def test_html_in_an_answer_is_shown_and_does_nothing(visit: Visit, scripted: ScriptedServer, scripted_page: RunningPage) -> None:
    hostile = (
        "<script>alert(1)</script> <img src=x onerror=alert(2)> <svg onload=alert(3)> <iframe src='javascript:alert(4)'></iframe>\n\n"
        f"<div style='position:fixed;inset:0'>over all</div> [click](javascript:alert(5)) ![seen]({scripted.url}/spy.png)\n\n"
        "```html\n<script>alert(6)</script>\n```\n"
    )
    scripted.script["hostile"] = hostile
    reader = visit(scripted_page)
    reader.ask("hostile")
    bubble = reader.page.locator("[data-testid=bot]").first
    assert "<script>alert(1)</script> <img src=x onerror=alert(2)>" in bubble.inner_text(), "it is text"
    assert "<script>alert(6)</script>" in bubble.locator("code").inner_text()
    assert bubble.locator("script, iframe, img[onerror], [style*=fixed]").count() == 0
    bubble.get_by_text("click").click()
    reader.page.wait_for_timeout(300)
    assert reader.dialogs == []
    assert scripted.fetched == [], "pictures from elsewhere are not fetched: an answer can carry nothing out"


def test_the_policy_stops_scripts_that_get_past_the_sanitiser(visit: Visit, scripted_page: RunningPage) -> None:
    reader = visit(scripted_page)
    reader.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=alert(1)>')")
    reader.page.wait_for_timeout(300)
    assert reader.dialogs == []


def test_thoughts_are_folded_and_code_is_coloured(visit: Visit, scripted: ScriptedServer, scripted_page: RunningPage) -> None:
    scripted.script["think"] = [{"reasoning_content": "Two and "}, {"reasoning_content": "two."}, {"content": "Four:\n\n```python\nprint(2 + 2)\n```\n"}]
    reader = visit(scripted_page)
    reader.ask("think")
    assert reader.page.get_by_text("Thoughts").is_visible()
    reader.page.get_by_text("Two and two.").wait_for(state="hidden")
    reader.page.get_by_text("Thoughts").click()
    reader.page.get_by_text("Two and two.").wait_for()
    assert reader.page.locator("#lm-chat code .token").count() > 0
    reader.ask("and now")
    assert scripted.bodies[-1]["messages"][-2] == {"role": "assistant", "content": "Four:\n\n```python\nprint(2 + 2)\n```\n"}, "thoughts are not sent back"
    assert "context 1,024 of 4,096 (25%)" in reader.note()


PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


def test_pictures_are_for_models_that_see(visit: Visit, scripted: ScriptedServer, scripted_page: RunningPage, page: RunningPage, tmp_path: Path) -> None:
    assert visit(page).page.locator("[data-testid=upload-button], #lm-box input[type=file]").count() == 0
    assert httpx.post(page.url + "/gradio_api/upload", files={"files": ("a.png", PIXEL)}).status_code == 404
    (tmp_path / "pixel.png").write_bytes(PIXEL)
    reader = visit(scripted_page)
    reader.page.locator("#lm-box input[type=file]").first.set_input_files(str(tmp_path / "pixel.png"))
    reader.page.wait_for_selector("#lm-box .thumbnail-item, #lm-box .thumbnail-image")
    reader.ask("what is this")
    image, text = scripted.bodies[-1]["messages"][-1]["content"]
    assert text == {"type": "text", "text": "what is this"}
    assert image["image_url"]["url"] == "data:image/png;base64," + base64.b64encode(PIXEL).decode()
    assert reader.page.locator("#lm-chat img").count() == 1


# ---------------------------------------------------------------------- the page itself


def test_a_phone_needs_no_sideways_scrolling(visit: Visit, page: RunningPage) -> None:
    reader = visit(page, viewport=PHONE, is_mobile=True, has_touch=True)
    reader.page.wait_for_selector(".sidebar:not(.open)")
    reader.ask(COUNT)
    assert reader.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    box = reader.page.locator("#lm-box").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"] and box["y"] + box["height"] <= PHONE["height"]
    reader.page.click(".sidebar .toggle-button")
    reader.page.locator("#lm-temperature").wait_for()


def test_nothing_is_asked_of_any_other_machine_and_dark_is_kept(visit: Visit, page: RunningPage) -> None:
    reader = visit(page)
    reader.page.click("#lm-dark")
    assert reader.page.evaluate("document.body.classList.contains('dark')")
    reader.page.reload()
    reader.page.wait_for_selector("body.dark")
    assert {u.split("/")[2] for u in reader.requests if not u.startswith(("data:", "blob:"))} == {page.url.split("/")[2]}
    assert not [line for line in reader.console if "Content Security Policy" in line]


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/openapi.json",
        "/gradio_api/call/ask",
        "/monitoring",
        "/gradio_api/proxy=http://127.0.0.1",
        "/docs",
        "/login",
    ],
)
def test_what_the_page_does_not_need_is_not_there(page: RunningPage, path: str) -> None:
    assert httpx.get(page.url + path).status_code == 404
    assert httpx.post(page.url + path, json={"data": []}).status_code == 404


def test_an_event_that_is_too_large_is_refused(page: RunningPage) -> None:
    with pytest.raises(httpx.HTTPError):
        httpx.post(page.url + "/gradio_api/queue/join", content=b'{"data": ["' + b"x" * (5 << 20) + b'"]}', timeout=20).raise_for_status()


def test_the_queue_is_bounded_and_stop_does_not_wait_in_it(visit: Visit, scripted: ScriptedServer) -> None:
    page = RunningPage(scripted.url)
    reader = visit(page)
    scripted.pause = 60
    try:
        reader.send("stop me")
        parts = httpx.get(page.url + "/config").json()
        number = next(d["id"] for d in parts["dependencies"] if d["targets"] and d["targets"][0][1] == "submit")
        event = {"data": [{"text": "a", "files": []}, None, None, None, "", 5, 0.8, 40, 0.7, 0], "fn_index": number, "event_data": None}
        with httpx.Client(base_url=page.url, timeout=60) as visitors:
            statuses = [visitors.post("/gradio_api/queue/join", json={**event, "session_hash": f"visitor{i}"}).status_code for i in range(230)]
            assert set(statuses[:199]) == {200}, "100 are answered, 100 wait"
            assert statuses[-20:] == [503] * 20
        reader.page.click("#lm-box .stop-button")
        reader.finished()
        assert reader.note().startswith("stopped")
    finally:
        page.stop()
        scripted.pause = 0.02


# ---------------------------------------------------------------------- without a browser


def test_html_outside_code_becomes_text() -> None:
    told = ui_chat.bubbles([Exchange("<b>q</b> <i class=x>", answer="a <div> `<div>` b\n~~~\n<p>\n~~~\n<p> x < y\n```\n<open", state="failed", error="<e>")])
    assert told[0]["content"] == "<b>q</b> &lt;i class=x>"
    assert told[1]["content"] == "a &lt;div> `<div>` b\n~~~\n<p>\n~~~\n&lt;p> x < y\n```\n<open"
    assert told[2]["content"] == '<div class="lm-error">&lt;e&gt;</div>'


def test_spans_of_code_end_at_as_many_backticks_on_the_same_line() -> None:
    texts = {"`<p>`": "`<p>`", "``<p>` <p>``": "``<p>` <p>``", "`<p>``": "`&lt;p>``", "`<p>\n`": "`&lt;p>\n`", "` `` <p> `` <p> `": "` `` <p> `` <p> `"}
    texts |= {"`` ` <p> ```": "`` ` &lt;p> ```", "a`<p>` <p> `<p>`": "a`<p>` &lt;p> `<p>`", "```\n<p>\n```\n`<p>": "```\n<p>\n```\n`&lt;p>"}
    for text, shown in texts.items():
        assert ui_chat.bubbles([Exchange(text, state="done")])[0]["content"] == shown, text


def test_a_question_is_rendered_once_however_often_its_answer_is_painted(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[str] = []
    render = ui_chat._markdown
    monkeypatch.setattr(ui_chat, "_markdown", lambda text: rendered.append(text) or render(text))
    exchange = Exchange("<p>?", state="running")
    for answer in ("a", "ab", "abc"):
        exchange.answer = answer
        assert [b["content"] for b in ui_chat.bubbles([exchange])] == ["&lt;p>?", answer]
    assert rendered == ["<p>?", "a", "ab", "abc"]


RUNS = " ".join("`" * length for length in range(1, 700))  # no two of the same length


@pytest.mark.parametrize("text", [RUNS, "`" * 20000, "` " * 10000, "``` `` ` " * 3000, "<" * 20000, "~~~\n" * 5000])
def test_no_answer_makes_the_page_slow(text: str) -> None:
    began = time.process_time()  # whatever else runs
    ui_chat.bubbles([Exchange("q", answer=text)])
    assert time.process_time() - began < 0.5


def test_memory_counts_answered_exchanges() -> None:
    exchanges = [Exchange("a", answer="A"), Exchange("b", error="no"), Exchange("c", answer="C"), Exchange("d")]

    def sent(memory: int) -> list[str]:
        settings = Settings("m", "", 5, 0.8, 40, 0.7, memory)
        return [m["content"] for m in ui_chat.request_body(exchanges, settings)["messages"]]

    assert (sent(0), sent(1), sent(50)) == (["d"], ["c", "C", "d"], ["a", "A", "c", "C", "d"])


def test_a_tab_keeps_so_much_and_no_more() -> None:
    small = [Exchange(str(i), answer="x") for i in range(300)]
    assert [e.question for e in ui_chat.kept(small)] == [str(i) for i in range(100, 300)]
    large = [Exchange("q", answer="x" * (ui_chat.MAX_KEPT // 2 - 10)) for _ in range(5)]
    assert len(ui_chat.kept(large)) == 2
    assert len(ui_chat.kept([Exchange("q" * 2 * ui_chat.MAX_KEPT)])) == 1, "the question that is asked is there"


def test_errors_say_what_to_do() -> None:
    assert "--api-key KEY" in ui_chat.in_words(RequestError("no", code="http_401"))
    assert "Press Retry" in ui_chat.in_words(RequestError("slow down", code="http_429"))
    assert ui_chat.in_words(EngineError("the engine\nfailed")) == "the engine failed"
