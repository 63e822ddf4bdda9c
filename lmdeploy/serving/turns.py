"""One turn of a conversation, whatever the protocol: a checked request becomes a prompt, and the model's text content, reasoning and tool calls.

Knows no wire format and no family of models. Each answer of a request has a reader of its own; without tools and reasoning there
is nothing to read (`Turn.is_plain`), and a route may pass the frontend's increments on as they are.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from lmdeploy.answer import Prepared
from lmdeploy.config import GenerationConfig
from lmdeploy.messages import Response
from lmdeploy.serving.openai.errors import raise_if_failed
from lmdeploy.serving.service import Service


@dataclass(frozen=True, slots=True)
class TurnCall:
    """A checked request in a form that belongs to no protocol."""

    messages: list[dict[str, Any]] | str | list[int]  # OpenAI-shaped dicts (content is text), raw text, or token ids
    gen: GenerationConfig
    templated: bool = True
    tools: list[dict[str, Any]] | None = None  # OpenAI's shape {"type": "function", "function": {...}}
    tool_choice: str = "auto"  # 'none', 'auto', 'required', or 'function:NAME'
    parallel_tool_calls: bool = True
    template_kwargs: dict[str, Any] | None = None  # enable_thinking and other variables of the checkpoint's template


@dataclass(slots=True)
class ToolDelta:
    """A piece of a tool call; `id` and `name` come with the first piece of a call only."""

    place: int  # which call of the answer
    id: str | None
    name: str | None
    arguments: str


@dataclass(slots=True)
class Delta:
    """What one increment brought one answer. `response` has the counts, log-probabilities and token ids; its text is the raw one."""

    index: int
    content: str
    reasoning: str
    tools: list[ToolDelta]
    finish_reason: str | None  # also 'tool_calls'
    response: Response
    reasoning_tokens: int = 0  # so far


@dataclass(slots=True)
class ToolCall:
    """A complete call; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class TurnAnswer:
    """A complete answer."""

    index: int
    content: str
    reasoning: str
    tool_calls: list[ToolCall]
    finish_reason: str  # also 'tool_calls'
    response: Response
    reasoning_tokens: int = 0


class TurnReader:
    """Reads one answer: `Response` increments in, `Delta`s out."""

    def read(self, response: Response) -> Delta:
        """The meaning of one increment."""
        return Delta(response.index, response.text, "", [], response.finish_reason, response)


@dataclass(slots=True)
class Turn:
    """A request that is ready to be answered, once."""

    service: Service
    prepared: Prepared
    is_plain: bool = True  # the model's text is the content: nothing to parse
    _readers: dict[int, TurnReader] = field(default_factory=dict)

    def read(self, response: Response) -> Delta:
        """The meaning of one increment of any of the answers."""
        reader = self._readers.get(response.index)
        if reader is None:
            reader = self._readers[response.index] = TurnReader()
        return reader.read(response)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Increments as they come; closing it aborts the request. Raises HttpError when an answer fails."""
        async with aclosing(self.service.increments(self.prepared)) as responses:
            async for response in responses:
                raise_if_failed(response, self.service.frontend.failure)
                yield self.read(response)

    async def whole(self, request: Request) -> list[TurnAnswer]:
        """The n complete answers. Raises HttpError, and ClientGone when nobody waits any more."""
        responses = (await self.service.collect(request, [self.prepared]))[0]
        return [_answer(self.read(response)) for response in responses]


def _answer(delta: Delta) -> TurnAnswer:
    """A complete answer, read in one piece."""
    calls = [ToolCall(t.id or "", t.name or "", t.arguments) for t in delta.tools]
    return TurnAnswer(delta.index, delta.content, delta.reasoning, calls, delta.finish_reason or "abort", delta.response, delta.reasoning_tokens)


async def open_turn(service: Service, call: TurnCall) -> Turn:
    """Check and tokenise the request. Raises RequestError or HttpError."""
    prepared = await service.prepare(call.messages, call.gen, do_preprocess=call.templated, tools=call.tools, template_kwargs=call.template_kwargs)
    return Turn(service, prepared)
