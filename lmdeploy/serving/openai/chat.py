"""POST /v1/chat/completions: wire -> prompt, answers -> wire; everything else is done elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lmdeploy import messages
from lmdeploy.serving.aside import aside, json_answer, size_of
from lmdeploy.serving.openai import convert
from lmdeploy.serving.openai.errors import read_body
from lmdeploy.serving.openai.protocol import ChatRequest, StreamOptions
from lmdeploy.serving.openai.stream import ChatChunks, Chunks, encode_json, stream_answer
from lmdeploy.serving.service import Service, service_of
from lmdeploy.serving.turns import Delta, ToolDelta, Turn, TurnAnswer, open_turn
from lmdeploy.text.tokenizer import Tokenizer

router = APIRouter(tags=["OpenAI"])


class TurnChunks(Chunks):
    """chat.completion.chunk of answers that have reasoning or tool calls."""

    object_name, prefix = ChatChunks.object_name, ChatChunks.prefix
    top_logprobs = 0
    turn: Turn

    def choices(self, response: messages.Response) -> Iterator[bytes]:
        """What the increment means, if anything yet, and after the last one a chunk with the finish reason."""
        delta = self.turn.read(response)
        if delta.reasoning_tokens:
            self.usage.reasoning[response.index] = delta.reasoning_tokens
        fields = _delta_fields(delta)
        if fields or response.logprobs or (self.token_ids and response.token_ids):
            choice: dict[str, Any] = {"index": response.index, "delta": {"role": "assistant", **(fields or {"content": ""})}}
            if response.logprobs is not None:
                choice["logprobs"] = convert.chat_logprobs(response.token_ids, response.logprobs, self.top_logprobs, self.tokenizer)
            if self.token_ids:
                choice["token_ids"] = response.token_ids
            yield encode_json({**choice, "finish_reason": None})
        if delta.finish_reason is not None:
            end = {"index": response.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": delta.finish_reason}
            yield encode_json({**end, "stop_reason": response.stop_reason})


def _delta_fields(delta: Delta) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if delta.reasoning:
        fields["reasoning_content"] = delta.reasoning
    if delta.content:
        fields["content"] = delta.content
    if delta.tools:
        fields["tool_calls"] = [_tool_delta(tool) for tool in delta.tools]
    return fields


def _tool_delta(tool: ToolDelta) -> dict[str, Any]:
    if tool.id is None:
        return {"index": tool.place, "function": {"arguments": tool.arguments}}
    return {"index": tool.place, "id": tool.id, "type": "function", "function": {"name": tool.name, "arguments": tool.arguments}}


@router.post("/v1/chat/completions", summary="Answer a conversation")
async def chat_completions(request: Request) -> Response:
    """`messages` is a list of {role, content}, or a plain text that is used without a template. `stream` sends events."""
    service = service_of(request)
    body = await read_body(request, ChatRequest)
    service.check_model(body.model)
    convert.refuse_unsupported(body)
    with ExitStack() as held:
        held.enter_context(service.session(body.session_id))
        turn = await open_turn(service, await aside(convert.turn_call, body, service.defaults))
        if body.stream:
            options = body.stream_options or StreamOptions()
            chunks: ChatChunks | TurnChunks = (ChatChunks if turn.is_plain else TurnChunks)(
                service.model_name,
                turn.prepared.n,
                include_usage=bool(options.include_usage),
                tokenizer=service.frontend.tokenizer,
                token_ids=bool(body.return_token_ids),
            )
            chunks.top_logprobs, chunks.continuous_usage = body.top_logprobs or 0, bool(options.continuous_usage_stats)
            if isinstance(chunks, TurnChunks):
                chunks.turn = turn
            return await stream_answer(request, service, service.increments(turn.prepared), chunks, held.pop_all())
        answers = await turn.whole(request)
    return await json_answer(_completion, service, body, answers, size=size_of(a.response for a in answers))


def _completion(service: Service, body: ChatRequest, answers: list[TurnAnswer]) -> dict[str, Any]:
    first = answers[0].response
    top, ids = body.top_logprobs or 0, bool(body.return_token_ids)
    return {
        "id": convert.new_id("chatcmpl"),
        "object": "chat.completion",
        "created": convert.now(),
        "model": service.model_name,
        "choices": [_choice(a, top, service.frontend.tokenizer, token_ids=ids) for a in answers],
        "usage": convert.usage(
            first.input_token_len, sum(a.response.generate_token_len for a in answers), first.cached_tokens, sum(a.reasoning_tokens for a in answers)
        ),
        "service_tier": None,
    }


def _choice(answer: TurnAnswer, top: int, tokenizer: Tokenizer, *, token_ids: bool) -> dict[str, Any]:
    response = answer.response
    choice: dict[str, Any] = {
        "index": answer.index,
        "message": {
            "role": "assistant",
            "content": answer.content if answer.content or not answer.tool_calls else None,
            "reasoning_content": answer.reasoning or None,
            "tool_calls": [{"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in answer.tool_calls] or None,
        },
        "logprobs": convert.chat_logprobs(response.token_ids, response.logprobs, top, tokenizer),
        "finish_reason": answer.finish_reason,
        "stop_reason": response.stop_reason,
    }
    if token_ids:
        choice["token_ids"] = response.token_ids
    return choice
