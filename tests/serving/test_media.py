"""Pictures on every route that takes messages: nothing of this machine is read, errors name the client's own place, counts are those of chat."""

from __future__ import annotations

import base64
import io
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lmdeploy import PytorchEngineConfig
from lmdeploy.frontend import Frontend
from lmdeploy.serving.options import ServerConfig
from lmdeploy.serving.service import MAX_FETCHING
from tests.browser import Reader, RunningPage, open_browser
from tests.parity.test_vision_parity import picture
from tests.serving.running import RunningServer
from tests.vision.folders import write

Body = dict[str, Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A model that sees; of pictures the default options."""
    folder = tmp_path_factory.mktemp("models") / "llava-v1.5"
    write("llava 1.5", folder)
    config = PytorchEngineConfig(dtype="float32", cache_max_entry_count=100, cpu_threads=1)
    with Frontend.open(str(folder), config, separate_process=True) as frontend:
        running = RunningServer(frontend, ServerConfig(server_port=0, model_name="eyes", max_concurrent_requests=40))
        yield running
        running.stop()


def openai(url: str) -> list[Body]:
    """A conversation whose second message has a picture."""
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "system", "content": "Be short."}, {"role": "user", "content": parts}]


def anthropic(url: str) -> Body:
    """The same for Anthropic's routes, where the system text is no message."""
    kind, _, data = url.removeprefix("data:").partition(";base64,")
    source = {"type": "base64", "media_type": kind, "data": data} if data else {"type": "url", "url": url}
    content = [{"type": "text", "text": "What is this?"}, {"type": "image", "source": source}]
    return {"model": "eyes", "system": "Be short.", "messages": [{"role": "user", "content": content}]}


def responses(url: str) -> Body:
    """And as items."""
    content = [{"type": "input_text", "text": "What is this?"}, {"type": "input_image", "image_url": url}]
    return {"model": "eyes", "instructions": "Be short.", "input": [{"role": "user", "content": content}], "max_output_tokens": 1}


#: route -> (its body for a picture's URL, where the picture stands in it)
ROUTES: dict[str, tuple[Any, str]] = {
    "/v1/chat/completions": (lambda url: {"model": "eyes", "messages": openai(url), "max_tokens": 1}, "messages.1.content.1"),
    "/v1/messages": (lambda url: {**anthropic(url), "max_tokens": 1}, "messages.0.content.1"),
    "/anthropic/v1/messages": (lambda url: {**anthropic(url), "max_tokens": 1}, "messages.0.content.1"),
    "/v1/messages/count_tokens": (anthropic, "messages.0.content.1"),
    "/anthropic/v1/messages/count_tokens": (anthropic, "messages.0.content.1"),
    "/v1/responses": (responses, "input.0.content.1"),
    "/tokenize": (lambda url: {"messages": openai(url)}, "messages.1.content.1"),
    "/v1/chat/interactive": (lambda url: {"prompt": openai(url), "request_output_len": 1}, "messages.1.content.1"),
}


def data_url() -> str:
    out = io.BytesIO()
    picture(40, 30).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def test_every_route_whose_body_has_messages_is_tried_here(server: RunningServer) -> None:
    schema = server.http.get("/openapi.json").json()
    taking = set()
    for path, methods in schema["paths"].items():
        body = methods.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
        fields = schema["components"]["schemas"].get(body.get("$ref", "").rsplit("/", 1)[-1], {}).get("properties", {})
        if "image_url" in repr(fields) or {"messages", "instructions", "interactive_mode"} & set(fields):
            taking.add(path)
    assert len(taking) >= 6
    assert taking <= set(ROUTES)


@pytest.mark.parametrize("route", ROUTES)
def test_no_route_reads_a_file_or_asks_this_machine(route: str, server: RunningServer, tmp_path: Path) -> None:
    picture(40, 30).save(tmp_path / "secret.png")
    os.mkfifo(tmp_path / "pipe")
    make, place = ROUTES[route]
    urls = [str(tmp_path / "secret.png"), f"file://{tmp_path}/secret.png", "/nonexistent", "/dev/zero", str(tmp_path / "pipe"), "~/x", "http://127.0.0.1/a"]
    told = set()
    for url in urls:
        reply = server.http.post(route, json=make(url), timeout=10)
        error = reply.json()["error"]
        assert reply.status_code == 400 and place in error["message"], (url, reply.text)
        assert "messages" in route or (error["code"], error["param"]) == ("media_refused", place), (url, reply.text)
        told.add(error["message"])
    assert len(told) == 2, "whether a file exists is not told"
    assert server.http.post(route, json=make(data_url())).status_code == 200


def test_a_count_is_what_chat_computes_with_and_without_a_picture(server: RunningServer) -> None:
    plain = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is this?"}]
    counts = []
    for messages in (openai(data_url()), plain):
        body = {"model": "eyes", "messages": messages}
        counts.append(server.http.post("/v1/chat/completions", json={**body, "max_tokens": 1}).json()["usage"]["prompt_tokens"])
        answer = server.http.post("/tokenize", json=body).json()
        assert answer["count"] == len(answer["tokens"]) == counts[-1]
    assert counts[0] > counts[1] + 10
    assert server.http.post("/v1/messages/count_tokens", json=anthropic(data_url())).json() == {"input_tokens": counts[0]}


def test_pictures_that_are_slow_to_read_leave_the_other_routes_alone(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than are read at a time, by clients that leave: places are given back when the reading ends, not before."""
    at_once, most, free = 0, 0, threading.Event()
    counting = threading.Lock()

    def slow(source: Any, policy: Any) -> Any:
        nonlocal at_once, most
        with counting:
            at_once += 1
            most = max(most, at_once)
        free.wait(20)
        with counting:
            at_once -= 1
        return picture(40, 30)

    monkeypatch.setattr("lmdeploy.vision.prompt.load_image", slow)
    try:
        for route in ("/v1/messages/count_tokens", "/tokenize", *["/v1/chat/completions"] * 2) * 3:
            with pytest.raises(httpx.ReadTimeout):
                server.http.post(route, json=ROUTES[route][0](data_url()), timeout=0.2)
        assert server.http.post("/tokenize", json={"prompt": "x" * 100_000}, timeout=10).status_code == 200
    finally:
        free.set()
    assert most == MAX_FETCHING


def test_the_gradio_page_offers_the_upload_and_gets_an_answer(server: RunningServer, tmp_path: Path) -> None:
    """Row A18: `serve gradio URL` in Chromium, over a real model that sees."""
    pytest.importorskip("gradio", reason="the web page needs gradio (extra `ui`)")
    assert server.http.get("/v1/models").json()["data"][0]["input_modalities"] == ["text", "image"]
    picture(40, 30).save(tmp_path / "cat.png")
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "cat.png").read_bytes()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is this"}]
    expected, blind = (server.http.post("/tokenize", json={"messages": [{"role": "user", "content": c}]}).json()["count"] for c in (parts, "what is this"))
    page = RunningPage(server.url)
    try:
        with open_browser() as browser:
            reader = Reader(browser, page.url)
            reader.set("max-new-tokens", 8)
            reader.page.locator("#lm-box input[type=file]").first.set_input_files(str(tmp_path / "cat.png"))
            reader.page.wait_for_selector("#lm-box .thumbnail-item, #lm-box .thumbnail-image")
            reader.ask("what is this")
            assert reader.page.locator("#lm-chat img").count() == 1 and reader.page.locator("#lm-chat .lm-error").count() == 0
            told = re.search(r"^(\d+) tokens? .*context ([\d,]+) of ", reader.note())
            assert told, reader.note()
            tokens, context = int(told[1]), int(told[2].replace(",", ""))
            assert 1 <= tokens <= 8 and context - tokens == expected > blind, "the model was given the picture"
            reader.close()
    finally:
        page.stop()
