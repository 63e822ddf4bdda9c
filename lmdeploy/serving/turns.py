"""One turn of a conversation, whatever the protocol: a checked request becomes a prompt, and the model's text content, reasoning and tool calls.

Knows no wire format and no family of models. Each answer of a request has a reader of its own; without tools and reasoning there
is nothing to read (`Turn.is_plain`), and a route may pass the frontend's increments on as they are.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
from starlette.requests import Request

from lmdeploy.answer import Prepared
from lmdeploy.config import GenerationConfig
from lmdeploy.errors import RequestError
from lmdeploy.grammar import grammar_of
from lmdeploy.messages import Response
from lmdeploy.serving.openai.errors import raise_if_failed
from lmdeploy.serving.parsers.events import CallArguments, CallEnd, CallFailed, CallStart, Content, Event, Reasoning
from lmdeploy.serving.parsers.reasoning import ReasoningParser
from lmdeploy.serving.parsers.stop_zones import OutsideCalls
from lmdeploy.serving.parsers.tools import ToolParser
from lmdeploy.serving.service import Service
from lmdeploy.serving.tool_offer import ToolOffer, offer_of, with_code_prompt
from lmdeploy.serving.turn_call import TurnCall
from lmdeploy.text.tokenizer import Tokenizer

__all__ = ["Delta", "ToolCall", "ToolDelta", "Turn", "TurnAnswer", "TurnCall", "open_turn"]


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
    failed_call: bool = False  # the call that was told last is none, or breaks off: nobody may run it


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
    """Reads one answer: `Response` increments in, `Delta`s out. `own_stops`: the tokens and words with which the model itself ends an answer."""

    def __init__(
        self, reasoning: ReasoningParser | None, tools: ToolParser | None, tokenizer: Tokenizer, close: str, own_stops: frozenset[int | str] = frozenset()
    ) -> None:
        self._own_stops = own_stops
        self._reasoning, self._tools, self._tokenizer = reasoning, tools, tokenizer
        self._close = close.encode()  # the tag that ends the reasoning
        self._place = -1  # of the call that is being read
        self._good_calls = 0
        self._has_failed = False  # a call that had begun
        self._reasoning_tokens = 0

    def read(self, response: Response) -> Delta:
        """The meaning of one increment."""
        delta = Delta(response.index, "", "", [], response.finish_reason, response)
        for event in self._split(response):
            self._add(delta, event)
        if delta.finish_reason == "stop" and self._good_calls and not self._has_failed:
            delta.finish_reason = "tool_calls"
        delta.reasoning_tokens = self._reasoning_tokens
        return delta

    def _split(self, response: Response) -> list[Event]:
        over = response.finish_reason is not None
        events: list[Event] = [Content(response.text)] if response.text else []
        if self._reasoning is not None:
            was_thinking = not self._reasoning.has_content
            events = self._reasoning.feed(response.text)
            if was_thinking and self._reasoning.has_thought:
                self._count(response)
            if over:
                events += self._reasoning.finish()
        if self._tools is None:
            return events
        out: list[Event] = []
        for event in events:
            out += self._tools.feed(event.text) if isinstance(event, Content) else [event]
        return out + self._tools.finish(cut=self._is_cut(response)) if over else out

    def _is_cut(self, response: Response) -> bool:
        """Whether something else than the model, or the grammar that binds it, ended the answer: a limit, an abort, the caller's own stop word or token."""
        return response.finish_reason != "stop" or (response.stop_reason is not None and response.stop_reason not in self._own_stops)

    def _count(self, response: Response) -> None:
        """Reasoning tokens: all so far, less those behind the closing tag."""
        behind = 0
        if self._reasoning is not None and self._reasoning.has_content:
            pieces = [self._tokenizer.token_bytes(token) for token in response.token_ids]
            place = b"".join(pieces).find(self._close)
            end = place + len(self._close) if place >= 0 else 0
            for piece in pieces:
                behind += end <= 0
                end -= len(piece)
            behind = behind if place >= 0 else 0
        self._reasoning_tokens = response.generate_token_len - behind

    def _add(self, delta: Delta, event: Event) -> None:
        match event:
            case Content(text):
                delta.content += text
            case Reasoning(text):
                delta.reasoning += text
            case CallStart(name):
                self._place += 1
                delta.tools.append(ToolDelta(self._place, f"call_{uuid.uuid4().hex[:24]}", name, ""))
            case CallArguments(text):
                if not delta.tools or delta.tools[-1].place != self._place:
                    delta.tools.append(ToolDelta(self._place, None, None, ""))
                delta.tools[-1].arguments += text
            case CallEnd():
                self._good_calls += 1
            case CallFailed(text, at_end):
                self._has_failed = True
                gone_out = not any(tool.place == self._place and tool.id for tool in delta.tools)
                delta.failed_call = delta.failed_call or gone_out
                delta.tools = [tool for tool in delta.tools if tool.place != self._place]
                if not (gone_out and at_end):  # what breaks off is not told twice
                    delta.content += text


@dataclass(slots=True)
class Turn:
    """A request that is ready to be answered, once."""

    service: Service
    prepared: Prepared
    call: TurnCall
    offer: ToolOffer
    thinking: str = "no"  # 'open': the prompt ends within the reasoning; 'may': the answer may begin with it
    _readers: dict[int, TurnReader] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether the model's text is the content: nothing to read."""
        return not self.reads_tools and self.thinking == "no"

    @property
    def reads_tools(self) -> bool:
        """Whether calls are looked for."""
        return bool(self.offer.names) and self.service.tool_format is not None

    def read(self, response: Response) -> Delta:
        """The meaning of one increment of any of the answers."""
        if self.is_plain:
            return Delta(response.index, response.text, "", [], response.finish_reason, response)
        reader = self._readers.get(response.index)
        if reader is None:
            reader = self._readers[response.index] = self._reader()
        return reader.read(response)

    def _reader(self) -> TurnReader:
        tags, frontend = self.service.reasoning_format, self.service.frontend
        thoughts, tools = self._parsers()
        own_stops = frozenset[int | str]([*frontend.own_stop_ids, *frontend.template.stop_words])
        return TurnReader(thoughts, tools, frontend.tokenizer, tags.close if tags else "", own_stops)

    def stop_zones(self) -> OutsideCalls:
        """Where in one answer the caller's stop words count."""
        thoughts, tools = self._parsers()
        assert tools is not None
        return OutsideCalls(thoughts, tools, required=self.offer.required)

    def _parsers(self) -> tuple[ReasoningParser | None, ToolParser | None]:
        """Those of one answer."""
        notation, tags = self.service.tool_format, self.service.reasoning_format
        tools = None
        if notation is not None and self.reads_tools:
            tools = ToolParser(notation, self.offer.names, code=self.offer.code, one_call=not self.call.parallel_tool_calls)
        thoughts = None
        if tags is not None and self.thinking != "no":
            # a required call comes behind the closing tag: before it nothing is a call
            interrupts = notation.tags if notation is not None and tools is not None and not self.offer.required else ()
            thoughts = ReasoningParser(tags, opened=self.thinking == "open", interrupts=interrupts)
        return thoughts, tools

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
    messages = call.messages
    conversation = [m for m in messages if isinstance(m, dict)] if isinstance(messages, list) and call.templated else []
    if call.tools and not conversation and call.tool_choice != "none":
        raise RequestError("tools need messages that are a conversation, not a text or token ids", param="tools")
    offer = offer_of(call.tools, call.tool_choice, service.tool_format)
    if offer.code:
        messages = conversation = with_code_prompt(conversation)
    thinking = _thinking(service, conversation, call.template_kwargs) if conversation else "no"
    gen = await _guided(service, call, offer, thinking)
    prepared = await service.prepare(messages, gen, do_preprocess=call.templated, tools=offer.shown or None, template_kwargs=call.template_kwargs)
    turn = Turn(service, prepared, call, offer, thinking)
    if not turn.is_plain and service.tag_ids:
        turn.prepared = replace(prepared, shown_special=service.tag_ids)
    if turn.reads_tools and gen.stop_words:
        turn.prepared = replace(turn.prepared, stop_zones=turn.stop_zones)
    return turn


def _thinking(service: Service, conversation: list[dict[str, Any]], kwargs: dict[str, Any] | None) -> str:
    """Whether the answer begins with reasoning: what the template writes before it tells."""
    tags, template = service.reasoning_format, service.frontend.template
    if tags is None:
        return "no"
    content = conversation[-1].get("content")
    tail = content if isinstance(content, str) else ""
    if conversation[-1].get("role") != "assistant":
        tail = template.render([{"role": "user", "content": "-"}], template_kwargs=kwargs)
        if tail.rstrip().endswith(tags.close) or (kwargs or {}).get("enable_thinking") is False:
            return "no"
        return "open" if tail.rstrip().endswith(tags.open) else "may"
    return "open" if tail.rfind(tags.open) > tail.rfind(tags.close) else "no"


async def _guided(service: Service, call: TurnCall, offer: ToolOffer, thinking: str) -> GenerationConfig:
    """The generation config with the grammar that tools and reasoning ask for."""
    tags = service.reasoning_format
    wanted = call.gen.grammar or grammar_of(call.gen.response_format)
    if offer.names and service.guarantee is not None:
        if wanted is not None:
            raise RequestError("response_format and tools exclude each other; send one, or tool_choice 'none'", param="response_format")
        wanted = await service.guarantee.grammar(offer, parallel=call.parallel_tool_calls)
    if wanted is None:
        return call.gen
    if tags is not None and thinking != "no" and not wanted.after and (offer.required or not offer.names):  # optional calls bind themselves
        wanted = msgspec.structs.replace(wanted, after=tags.close, begin=tags.open if thinking == "may" else "")
    return call.gen.replace(grammar=wanted, response_format=None)
