"""POST /v1/chat/completions: wire -> prompt, answers -> wire; everything else is done elsewhere."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lmdeploy.serving.openai import convert
from lmdeploy.serving.openai.errors import read_body
from lmdeploy.serving.openai.protocol import ChatRequest, StreamOptions
from lmdeploy.serving.openai.stream import ChatChunks, stream_answer
from lmdeploy.serving.service import Service, service_of
from lmdeploy.serving.turns import TurnAnswer, TurnCall, open_turn
from lmdeploy.text.tokenizer import Tokenizer

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", summary="Answer a conversation")
async def chat_completions(request: Request) -> Response:
    """`messages` is a list of {role, content}, or a plain text that is used without a template. `stream` sends events."""
    service = service_of(request)
    body = await read_body(request, ChatRequest)
    service.check_model(body.model)
    convert.refuse_unsupported(body)
    with ExitStack() as held:
        held.enter_context(service.session(body.session_id))
        prompt, templated = convert.chat_prompt(body)
        gen = convert.chat_config(body, service.defaults)
        turn = await open_turn(service, TurnCall(prompt, gen, templated, template_kwargs=convert.template_kwargs(body)))
        if body.stream:
            options = body.stream_options or StreamOptions()
            chunks = ChatChunks(
                service.model_name,
                turn.prepared.n,
                include_usage=bool(options.include_usage),
                tokenizer=service.frontend.tokenizer,
                token_ids=bool(body.return_token_ids),
            )
            chunks.top_logprobs, chunks.continuous_usage = body.top_logprobs or 0, bool(options.continuous_usage_stats)
            return await stream_answer(request, service, service.increments(turn.prepared), chunks, held.pop_all())
        answers = await turn.whole(request)
    return JSONResponse(_completion(service, body, answers))


def _completion(service: Service, body: ChatRequest, answers: list[TurnAnswer]) -> dict[str, Any]:
    first = answers[0].response
    top, ids = body.top_logprobs or 0, bool(body.return_token_ids)
    return {
        "id": convert.new_id("chatcmpl"),
        "object": "chat.completion",
        "created": convert.now(),
        "model": service.model_name,
        "choices": [_choice(a, top, service.frontend.tokenizer, token_ids=ids) for a in answers],
        "usage": convert.usage(first.input_token_len, sum(a.response.generate_token_len for a in answers), first.cached_tokens),
        "service_tier": None,
    }


def _choice(answer: TurnAnswer, top: int, tokenizer: Tokenizer, *, token_ids: bool) -> dict[str, Any]:
    response = answer.response
    choice: dict[str, Any] = {
        "index": answer.index,
        "message": {"role": "assistant", "content": answer.content, "reasoning_content": None, "tool_calls": None},
        "logprobs": convert.chat_logprobs(response.token_ids, response.logprobs, top, tokenizer),
        "finish_reason": answer.finish_reason,
        "stop_reason": response.stop_reason,
    }
    if token_ids:
        choice["token_ids"] = response.token_ids
    return choice
