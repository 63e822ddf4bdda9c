"""Server-sent events: the chunk formats, and a response whose end is the request's end (a client that goes away aborts it).

The fixed part of a chunk is encoded once per answer; a chunk then costs the encoding of its text only. A failure before the
first chunk is a real HTTP error; after it, an `error` event followed by [DONE].
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response as HttpResponse
from starlette.types import Receive, Scope, Send

from lmdeploy.log import get_logger
from lmdeploy.messages import Response
from lmdeploy.serving.aside import aside, size_of
from lmdeploy.serving.openai import convert
from lmdeploy.serving.openai.errors import HttpError, as_http_error, error_body, failed_answer, raise_if_failed
from lmdeploy.serving.service import Service, gone, unless_gone
from lmdeploy.text.tokenizer import Tokenizer

logger = get_logger(__name__)

DONE = b"data: [DONE]\n\n"
encode_json = _encode = msgspec.json.Encoder().encode


def event(payload: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(payload) + b"\n\n"


class Usage:
    """Counts the tokens of all answers of a stream."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._last: dict[int, Response] = {}  # of each answer: counts are running totals, so the last increment's stand
        self.reasoning: dict[int, int] = {}  # answer -> how many of its tokens are reasoning

    def feed(self, response: Response) -> None:
        """Take note of one increment."""
        self._last[response.index] = response

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        prompts = {index // self._n: (r.input_token_len, r.cached_tokens) for index, r in self._last.items()}
        prompt, cached = (sum(part) for part in zip(*prompts.values(), strict=True))
        return convert.usage(prompt, sum(r.generate_token_len for r in self._last.values()), cached, sum(self.reasoning.values()))


class Chunks:
    """Turns increments into the events of one protocol; `object_name` and `_choice` are what differs."""

    object_name = ""
    prefix = ""

    def __init__(self, model: str, n: int, *, include_usage: bool, tokenizer: Tokenizer, token_ids: bool = False) -> None:
        self.usage = Usage(n)
        self.tokenizer, self.token_ids = tokenizer, token_ids
        self._include_usage = include_usage
        self.continuous_usage = False  # every chunk tells the counts so far
        self._head = _encode({"id": convert.new_id(self.prefix), "object": self.object_name, "created": convert.now(), "model": model})[:-1]
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._starts: dict[int, bytes] = {}  # by answer: an event up to its text
        self._plain_end = b'},"finish_reason":null}' + self._tail

    def encode(self, response: Response) -> bytes:
        """The event(s) of one increment."""
        self.usage.feed(response)
        tail = b'],"usage":' + _encode(self.usage.as_dict()) + b"}\n\n" if self.continuous_usage else self._tail
        return b"".join(b"data: " + self._head + b',"choices":[' + choice + tail for choice in self.choices(response))

    def choices(self, response: Response) -> Iterator[bytes]:
        """JSON of the choice of each event."""
        raise NotImplementedError

    def last(self) -> bytes:
        """What comes after the last answer's end."""
        if not self._include_usage:
            return DONE
        return b"data: " + self._head + b',"choices":[],"usage":' + _encode(self.usage.as_dict()) + b"}\n\n" + DONE


class ChatChunks(Chunks):
    """chat.completion.chunk"""

    object_name = "chat.completion.chunk"
    prefix = "chatcmpl"
    top_logprobs = 0

    def encode(self, response: Response) -> bytes:
        """The event(s) of one increment; nearly all are text and nothing else."""
        if response.finish_reason is None and response.text and response.logprobs is None and not self.token_ids and not self.continuous_usage:
            self.usage.feed(response)
            start = self._starts.get(response.index)
            if start is None:
                start = self._starts[response.index] = b'data: %s,"choices":[{"index":%d,"delta":{"role":"assistant","content":' % (self._head, response.index)
            return start + _encode(response.text) + self._plain_end
        return super().encode(response)

    def choices(self, response: Response) -> Iterator[bytes]:
        """The text, and after the last text a chunk with the finish reason."""
        index = b'{"index":%d,"delta":{"role":"assistant","content":' % response.index
        if response.text or response.logprobs or (self.token_ids and response.token_ids):
            extra = b""
            if response.logprobs is not None:
                extra = b',"logprobs":' + _encode(convert.chat_logprobs(response.token_ids, response.logprobs, self.top_logprobs, self.tokenizer))
            if self.token_ids:
                extra += b',"token_ids":' + _encode(response.token_ids)
            yield index + _encode(response.text) + b"}" + extra + b',"finish_reason":null}'
        if response.finish_reason is not None:
            yield index + b'""},"finish_reason":"%s","stop_reason":%s}' % (response.finish_reason.encode(), _encode(response.stop_reason))


class EventStream(HttpResponse):
    """Sends what `chunks` yields; when the client goes away, `chunks` is closed at once. `held` is released at the end."""

    def __init__(self, chunks: AsyncGenerator[bytes, None], held: ExitStack, media_type: str = "text/event-stream") -> None:
        super().__init__(media_type=media_type, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._held = chunks, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run until the last chunk is sent or the client is gone."""
        pump = asyncio.ensure_future(self._pump(send))
        watch = asyncio.ensure_future(gone(receive))
        try:
            await asyncio.wait({pump, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (pump, watch):
                task.cancel()
            results = await asyncio.gather(pump, watch, return_exceptions=True)
            await self._chunks.aclose()
            self._held.close()
        if isinstance(results[0], Exception) and not isinstance(results[0], OSError):
            raise results[0]

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunk in self._chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def stream_answer(request: Request, service: Service, answers: AsyncGenerator[Response, None], chunks: Chunks, held: ExitStack) -> HttpResponse:
    """The event stream of an answer. The first increment is awaited here, so that early failures have a real status."""
    try:
        first = await unless_gone(request, anext(answers))
        raise_if_failed(first, service.frontend.failure)
    except BaseException:
        await answers.aclose()
        held.close()
        raise
    return EventStream(_events(service, first, answers, chunks, held), held)


async def _events(service: Service, first: Response, answers: AsyncGenerator[Response, None], chunks: Chunks, held: ExitStack) -> AsyncGenerator[bytes, None]:
    """All events. What is held is released before the last one, so that a client that has it may use the session again."""
    async with aclosing(answers):
        try:
            yield await aside(chunks.encode, first, size=size_of([first]))  # may have the log-probabilities of a whole prompt
            async for response in answers:
                if response.finish_reason == "error":
                    raise failed_answer(response, service.frontend.failure)
                yield chunks.encode(response) if response.prompt_logprobs is None else await aside(chunks.encode, response, size=size_of([response]))
            end = chunks.last()
        except HttpError as e:
            end = error_event(e) + DONE
        except Exception as e:
            logger.exception("a stream failed")
            end = error_event(e) + DONE
        held.close()
        yield end


def error_event(error: Exception) -> bytes:
    """An error in the middle of a stream."""
    e = as_http_error(error)
    return event(error_body(e.status, e.message, e.code, e.param))
