"""The web page's conversation, without the page: what is sent to a server, what comes back, and what a reader sees of it.

A conversation is a list of `Exchange`s that belongs to one browser tab. Only `/v1/models` and `/v1/chat/completions` are used, so any
OpenAI-compatible server will do; `max_model_len` and `input_modalities` of a model card are read where a server has them.
"""

from __future__ import annotations

import asyncio
import base64
import mimetypes
import re
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import httpx

from lmdeploy.errors import EngineError, LmdeployError, RequestError
from lmdeploy.serving.client import error_of, event_of, object_of

#: seconds between two pictures of a growing answer: text is not painted per token
PAINT_SECONDS = 0.08
#: seconds after which an unchanged answer is painted all the same: it shows the time that passes, and finds out that a reader has left
IDLE_SECONDS = 0.5
#: longest question in characters; what a model can take is said by its server, in tokens
MAX_QUESTION = 1 << 18
#: what a tab keeps, in exchanges and in characters; older ones are forgotten
MAX_EXCHANGES, MAX_KEPT = 200, 1 << 20
MAX_IMAGES = 8

#: fenced code of a Markdown text; an open block reaches to the end
_FENCED = re.compile(r"^[ \t]*(?P<fence>`{3,}|~{3,})[^\n]*(?:\n(?![ \t]*(?P=fence))[^\n]*)*(?:\n[^\n]*)?", re.MULTILINE)
#: what begins or ends a span of code, and what ends a line
_TICKS = re.compile(r"`+|\n")
#: a tag that is not mere typography: shown as the text that it is
_TAG = re.compile(r"<(?!/?(?:br|sub|sup|b|i|u|s|em|strong|kbd|details|summary)\s*/?>)(?=[a-zA-Z/!?])")


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the page must know about a served model; `session_len` in tokens, None where the server does not tell."""

    name: str
    session_len: int | None = None
    sees: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """How to answer. `memory` is the number of earlier exchanges that are sent with a question."""

    model: str
    system: str
    max_new_tokens: int
    top_p: float
    top_k: int
    temperature: float
    memory: int
    session_len: int | None = None


@dataclass(slots=True)
class Exchange:
    """A question with what was answered to it so far. `state`: waiting, running, done, stopped or failed."""

    question: str
    images: list[str] = field(default_factory=list)
    answer: str = ""
    reasoning: str = ""
    state: str = "waiting"
    error: str = ""
    finish_reason: str = ""
    usage: dict[str, int] = field(default_factory=dict)
    session_len: int | None = None
    began: float = field(default_factory=time.monotonic)
    first: float = 0.0
    last: float = 0.0
    task: asyncio.Future[None] | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    shown: list[dict[str, Any]] = field(default_factory=list)

    @property
    def open(self) -> bool:
        """Whether more may come."""
        return self.state in ("waiting", "running")

    def close(self, state: str) -> None:
        """The end, unless it ended before."""
        if self.open:
            self.state = state
            self.last = self.last or time.monotonic()

    def stop(self) -> None:
        """End the answer here and on the server; what there is of it stays."""
        if self.task is None:
            self.close("stopped")
        else:
            self.task.cancel()


class ChatServer:
    """The server that answers. Raises what `serving.client` raises, worded for the reader of a page by `in_words`."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # an answer may take long to begin; that a server is there must show at once
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(None, connect=5.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
            trust_env=False,
        )
        #: whether a model of this server takes pictures, as far as is known
        self.sees = False

    async def models(self) -> list[ModelCard]:
        """The served models."""
        try:
            reply = await self._http.get("/v1/models", timeout=10)
        except (httpx.HTTPError, httpx.InvalidURL) as e:
            raise self._unreachable(e) from e
        if reply.is_error:
            raise error_of(reply.status_code, reply.text)
        cards = object_of(reply.text).get("data") or []
        found = [_card(c) for c in cards if isinstance(c, dict) and isinstance(c.get("id"), str)]
        self.sees = any(c.sees for c in found)
        return found

    async def stream(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Events of an answer; closing this generator closes the connection, which ends the request on the server."""
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json=body) as reply:
                if reply.is_error:
                    raise error_of(reply.status_code, (await reply.aread()).decode("utf-8", "replace"))
                async for line in reply.aiter_lines():
                    event = event_of(line)
                    if event is not None:
                        yield event
        except httpx.HTTPError as e:
            raise self._unreachable(e) from e

    def _unreachable(self, error: Exception) -> EngineError:
        return EngineError(f"The server at {self.url} does not answer ({str(error) or type(error).__name__}). Is it running, and is the address right?")


def _card(card: dict[str, Any]) -> ModelCard:
    length = card.get("max_model_len")
    modalities = card.get("input_modalities") or (card.get("architecture") or {}).get("input_modalities") or ()
    return ModelCard(card["id"], length if isinstance(length, int) and length > 0 else None, "image" in modalities)


def in_words(error: Exception) -> str:
    """What a reader should know and do about an error."""
    text = " ".join(str(error).split())
    code = error.code if isinstance(error, RequestError) else None
    if code in ("invalid_api_key", "http_401", "http_403"):
        return f"The server does not accept this page's key: {text}. Start the page again with --api-key KEY."
    if code == "context_length_exceeded":
        return f"The conversation is too long for the model: {text}. Lower “Past turns sent”, or clear the conversation."
    if code in ("overloaded", "http_429", "queue_full", "rate_limit_exceeded"):
        return f"The server is busy: {text}. Press Retry in a few seconds."
    return text


def request_body(exchanges: list[Exchange], settings: Settings) -> dict[str, Any]:
    """The request for the last exchange, with as many earlier ones as `memory` says; those without an answer are left out."""
    *earlier, current = exchanges
    told = [e for e in earlier if e.answer]
    messages: list[dict[str, Any]] = [{"role": "system", "content": settings.system}] if settings.system.strip() else []
    for e in told[len(told) - min(settings.memory, len(told)) :]:
        messages += [{"role": "user", "content": _content(e)}, {"role": "assistant", "content": e.answer}]
    return {
        "model": settings.model,
        "messages": [*messages, {"role": "user", "content": _content(current)}],
        "max_tokens": settings.max_new_tokens,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "temperature": settings.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def kept(exchanges: list[Exchange]) -> list[Exchange]:
    """The latest of them, as many as a tab may keep; the last one always."""
    size, first = 0, len(exchanges)
    while first and len(exchanges) - first < MAX_EXCHANGES:
        e = exchanges[first - 1]
        size += len(e.question) + len(e.answer) + len(e.reasoning)
        if size > MAX_KEPT and first < len(exchanges):
            break
        first -= 1
    return exchanges[first:]


def _content(exchange: Exchange) -> str | list[dict[str, Any]]:
    if not exchange.images:
        return exchange.question
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": _data_url(path)}} for path in exchange.images]
    return [*parts, {"type": "text", "text": exchange.question}]


def _data_url(path: str) -> str:
    kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


async def answer(server: ChatServer, exchanges: list[Exchange], settings: Settings) -> AsyncGenerator[None, None]:
    """Fill the last exchange from the server; yields whenever the page should be painted again.

    Never raises for what a server does: errors become part of the exchange. Closing the generator stops the answer, as `Exchange.stop` does.
    """
    current = exchanges[-1]
    if not current.open:  # stopped before it began
        return
    current.began, current.session_len = time.monotonic(), settings.session_len
    pump = current.task = asyncio.ensure_future(_pump(server, exchanges, settings))
    painted, since, pause = ("", ""), 0.0, PAINT_SECONDS
    try:
        while not pump.done():
            await asyncio.wait({pump}, timeout=pause)
            shown, now = (current.answer, current.reasoning), time.monotonic()
            if shown != painted or now - since > IDLE_SECONDS:
                painted, since = shown, now
                yield
                # a long conversation, or many readers, take longer to paint: then less often
                pause = min(max(PAINT_SECONDS, 4 * (time.monotonic() - now)), 1.0)
    finally:
        pump.cancel()
        await asyncio.gather(pump, return_exceptions=True)
        current.task = None
        current.close("stopped")


async def _pump(server: ChatServer, exchanges: list[Exchange], settings: Settings) -> None:
    current = exchanges[-1]
    try:
        async with aclosing(server.stream(request_body(exchanges, settings))) as events:
            async for event in events:
                _take(current, event)
        if not current.finish_reason:
            raise EngineError("The server ended the answer before it was complete.")
        current.close("done")
    except (LmdeployError, OSError) as e:
        current.error = in_words(e)
        current.close("failed")


def _take(current: Exchange, event: dict[str, Any]) -> None:
    """One event of the stream."""
    usage = event.get("usage")
    if isinstance(usage, dict):
        current.usage = {k: v for k, v in usage.items() if isinstance(v, int)}
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        text, reasoning = delta.get("content") or "", delta.get("reasoning_content") or delta.get("reasoning") or ""
        if text or reasoning:
            current.last = time.monotonic()
            current.first = current.first or current.last
            current.state = "running"
            current.answer += text
            current.reasoning += reasoning
        current.finish_reason = choice.get("finish_reason") or current.finish_reason


# ---------------------------------------------------------------------- what a reader sees


def bubbles(exchanges: list[Exchange]) -> list[dict[str, Any]]:
    """The conversation as messages of a gradio Chatbot."""
    return [bubble for exchange in exchanges for bubble in exchange.shown or _bubbles(exchange)]


def _bubbles(e: Exchange) -> list[dict[str, Any]]:
    if not e.asked:  # the same in every picture of the answer
        e.asked += [{"role": "user", "content": {"path": path}} for path in e.images]
        e.asked += [{"role": "user", "content": _markdown(e.question)}] if e.question else []
    shown = list(e.asked)
    if e.reasoning:
        thinking = e.open and not e.answer
        title, status = ("Thinking …", "pending") if thinking else ("Thoughts", "done")
        shown.append({"role": "assistant", "content": _markdown(e.reasoning), "metadata": {"title": title, "status": status}})
    if e.answer:
        shown.append({"role": "assistant", "content": _markdown(e.answer)})
    if e.error:
        shown.append({"role": "assistant", "content": f'<div class="lm-error">{escape(e.error)}</div>'})
    note = _note(e)
    if note:
        shown.append({"role": "assistant", "content": f'<div class="lm-note">{escape(note)}</div>'})
    if not e.open:
        e.shown = shown  # it stays as it is
    return shown


def _markdown(text: str) -> str:
    """Markdown as it was written, its HTML outside code as visible text (gradio would drop or obey it)."""
    pieces, end = [], 0
    for begin, stop in _code(text):
        pieces += [_TAG.sub("&lt;", text[end:begin]), text[begin:stop]]
        end = stop
    return "".join([*pieces, _TAG.sub("&lt;", text[end:])])


def _code(text: str) -> Iterator[tuple[int, int]]:
    """Where code lies: (begin, end) of fenced blocks, and of spans between them."""
    end = 0
    for block in _FENCED.finditer(text):
        yield from _spans(text, end, block.start())
        yield block.span()
        end = block.end()
    yield from _spans(text, end, len(text))


def _spans(text: str, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Spans of code: a run of backticks up to the next run of the same length on its line. Takes time in proportion to the text, whatever it is."""
    runs = [(found.start(), found.end()) for found in _TICKS.finditer(text, begin, end)]
    partner: list[int | None] = []
    latest: dict[int, int] = {}  # length -> the nearest run behind, on this line
    for number in range(len(runs) - 1, -1, -1):
        start, stop = runs[number]
        if text[start] == "\n":
            latest.clear()
            partner.append(None)
        else:
            partner.append(latest.get(stop - start))
            latest[stop - start] = number
    partner.reverse()
    number = 0
    while number < len(runs):
        closing = partner[number]
        if closing is not None:
            yield runs[number][0], runs[closing][1]
            number = closing
        number += 1


def _note(e: Exchange) -> str:
    """The line under an answer: tokens, speed, context."""
    if e.state == "waiting":
        seconds = time.monotonic() - e.began
        return "waiting for the first token …" if seconds < 2 else f"waiting for the first token, {seconds:.0f} s …"
    if e.open or e.state == "failed":
        return ""
    if e.state == "stopped":
        return f"stopped after {e.last - e.began:.1f} s"
    count, prompt = e.usage.get("completion_tokens"), e.usage.get("prompt_tokens")
    if count is None:
        return f"{e.last - e.began:.1f} s"
    parts = [f"{count} token{'s' * (count != 1)}"]
    if count > 1 and e.last > e.first:
        parts.append(f"{(count - 1) / (e.last - e.first):,.1f} tokens/s")
    parts.append(f"first after {e.first - e.began:.2f} s" if e.first else "no text")
    if prompt is not None:
        used = prompt + count
        parts.append(f"context {used:,} of {e.session_len:,} ({used / e.session_len:.0%})" if e.session_len else f"context {used:,}")
    if e.finish_reason == "length":
        parts.append("cut at the length limit")
    return " · ".join(parts)
