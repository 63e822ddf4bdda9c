"""POST /v1/chat/interactive: a conversation whose history the server keeps, under a session id. At most `max_sessions` are kept.

The history is text; the engine's prefix cache makes repeating it cheap. A stream is one JSON object per line.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lmdeploy import messages
from lmdeploy.errors import RequestError
from lmdeploy.serving.openai import convert
from lmdeploy.serving.openai.errors import as_http_error, error_body, raise_if_failed, read_body
from lmdeploy.serving.openai.protocol import InteractiveRequest
from lmdeploy.serving.openai.stream import EventStream
from lmdeploy.serving.service import Service, admitted, caller, service_of, unless_gone

router = APIRouter(tags=["lmdeploy"])


#: whose session, and its number: two keys never meet under one number
SessionKey = tuple[str, int]


class Conversation:
    """One session: its messages, how many tokens they take, and whether its running answer is to stop."""

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []
        self.tokens = 0
        self.cancelled = False


class Conversations:
    """The sessions of one app, the most recently used last."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._sessions: dict[str, OrderedDict[int, Conversation]] = {}  # of each key, the most recently used last
        self._count = 0
        self._ids = itertools.count(1)

    def new_id(self) -> int:
        """A session id that is not in use."""
        return next(i for i in self._ids if self.find((caller(), i)) is None)

    def find(self, session: SessionKey) -> Conversation | None:
        """The session, if there is one."""
        key, number = session
        return self._sessions[key].get(number) if key in self._sessions else None

    def keep(self, session: SessionKey, conversation: Conversation) -> None:
        """Keep a session, as the most recently used one; the least recently used one of the key that has most makes room."""
        key, number = session
        own = self._sessions.setdefault(key, OrderedDict())
        self._count += number not in own
        own[number] = conversation
        own.move_to_end(number)
        if self._count > self._limit:
            # of keys that have equally many, the one that wants more
            most = max(self._sessions, key=lambda k: (len(self._sessions[k]), k == key))
            self.end((most, next(iter(self._sessions[most]))))

    def cancel(self, session: SessionKey) -> None:
        """Stop the running answer of a session."""
        if (conversation := self.find(session)) is not None:
            conversation.cancelled = True

    def end(self, session: SessionKey) -> None:
        """Forget a session."""
        key, number = session
        if self.find(session) is not None:
            self._count -= 1
            del self._sessions[key][number]
            if not self._sessions[key]:
                del self._sessions[key]


@router.post("/v1/chat/interactive", summary="Chat with a history kept by the server")
async def chat_interactive(request: Request) -> Response:
    """`interactive_mode` true keeps the session for the next turn; false ends it after the answer. `cancel` stops a running answer."""
    service = service_of(request)
    body = await read_body(request, InteractiveRequest)
    convert.refuse_unsupported(body)
    sessions = request.app.state.conversations
    assert isinstance(sessions, Conversations)
    given = body.session_id if body.session_id is not None and body.session_id >= 0 else None
    if body.cancel:
        return _cancel(sessions, given)
    if not body.prompt and body.request_output_len == 0 and given is not None:
        with service.session(given):
            sessions.end((caller(), given))
        return JSONResponse(_line("", 0, 0, 0, "stop"))
    await admitted()
    with ExitStack() as held:
        session_id = sessions.new_id() if given is None else given
        held.enter_context(service.session(session_id))
        turn = Turn(service, sessions, session_id, body)
        await turn.prepare()
        lines = turn.lines()
        if body.stream:
            try:
                first = await unless_gone(request, anext(lines))
            except BaseException:
                await lines.aclose()
                raise
            kept = held.pop_all()
            return EventStream(_chained(first, lines, kept), kept, media_type="application/x-ndjson")
        return JSONResponse(await unless_gone(request, turn.whole(lines)))


def _cancel(sessions: Conversations, session_id: int | None) -> Response:
    if session_id is None:
        raise RequestError("cancel needs a session_id", param="session_id")
    sessions.cancel((caller(), session_id))
    return JSONResponse(_line("", 0, 0, 0, "stop"))


class Turn:
    """One question and its answer within a session."""

    def __init__(self, service: Service, sessions: Conversations, session_id: int, body: InteractiveRequest) -> None:
        self._service, self._sessions, self._key, self._body = service, sessions, (caller(), session_id), body
        self._conversation = sessions.find(self._key) or Conversation()
        self._before = self._conversation.tokens

    async def prepare(self) -> None:
        """Check and tokenise the history with the new turn. A refused turn leaves the session as it was, and makes none."""
        body = self._body
        asked = [{"role": "user", "content": body.prompt}] if isinstance(body.prompt, str) else convert.messages_of(body.prompt)
        if not body.prompt:
            raise RequestError("the prompt is empty", param="prompt")
        self._asked = [*self._conversation.history, *asked]
        self._prepared = await self._service.prepare(self._asked, convert.interactive_config(body))
        self._conversation.cancelled = False
        self._sessions.keep(self._key, self._conversation)

    async def lines(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer's increments in the wire's form; keeps or ends the session after the last one."""
        texts: list[str] = []
        complete = False
        try:
            async with aclosing(self._service.increments(self._prepared)) as answers:
                async for response in answers:
                    raise_if_failed(response, self._service.frontend.failure)
                    texts.append(response.text)
                    stop = self._conversation.cancelled and response.finish_reason is None
                    complete = stop or response.finish_reason is not None
                    if complete:
                        self._keep("".join(texts), response)
                    yield self._increment(response, "stop" if stop else response.finish_reason)
                    if complete:
                        return
        finally:
            if not complete and not self._body.interactive_mode:
                self._sessions.end(self._key)

    async def whole(self, lines: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any]:
        """All increments as one."""
        texts, last = [], _line("", 0, 0, 0, "stop")
        async with aclosing(lines):
            async for last in lines:
                texts.append(last["text"])
        return {**last, "text": "".join(texts)}

    def _keep(self, text: str, response: messages.Response) -> None:
        """The turn becomes history; a session that is not interactive ends."""
        self._conversation.history = [*self._asked, {"role": "assistant", "content": text}]
        self._conversation.tokens = response.input_token_len + response.generate_token_len
        if not self._body.interactive_mode:
            self._sessions.end(self._key)

    def _increment(self, response: messages.Response, finish_reason: str | None) -> dict[str, Any]:
        new_tokens = max(response.input_token_len - self._before, 0)
        return _line(response.text, response.generate_token_len, new_tokens, self._before, finish_reason)


def _line(text: str, tokens: int, input_tokens: int, history_tokens: int, finish_reason: str | None) -> dict[str, Any]:
    return {"text": text, "tokens": tokens, "input_tokens": input_tokens, "history_tokens": history_tokens, "finish_reason": finish_reason}


async def _chained(first: dict[str, Any], rest: AsyncGenerator[dict[str, Any], None], held: ExitStack) -> AsyncGenerator[bytes, None]:
    """First and rest as lines; the session is released before the last one, so that the next turn may follow at once."""
    async with aclosing(rest):
        try:
            line = first
            while line["finish_reason"] is None:
                yield msgspec.json.encode(line) + b"\n"
                line = await anext(rest)
        except Exception as e:
            failed = as_http_error(e)
            line = error_body(failed.status, failed.message, failed.code, failed.param)
        held.close()
        yield msgspec.json.encode(line) + b"\n"
