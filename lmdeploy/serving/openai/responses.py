"""POST /v1/responses: OpenAI's newer form of a chat. Nothing is kept: every request sends its whole conversation."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lmdeploy.serving.aside import aside, json_answer, size_of
from lmdeploy.serving.events import stream_turn
from lmdeploy.serving.openai import responses_convert as convert
from lmdeploy.serving.openai.errors import read_body
from lmdeploy.serving.openai.responses_events import ResponseEvents
from lmdeploy.serving.openai.responses_protocol import ResponsesRequest
from lmdeploy.serving.service import service_of
from lmdeploy.serving.turns import open_turn

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/responses", summary="Answer a conversation, as items")
async def responses(request: Request) -> Response:
    """`input` is a text or a list of items (messages, function calls and their outputs). `stream` sends events."""
    service = service_of(request)
    body = await read_body(request, ResponsesRequest)
    service.check_model(body.model)
    tokenizer = service.frontend.tokenizer
    with ExitStack() as held:
        call = await aside(convert.turn_call, body, service.defaults)
        turn = await open_turn(service, call)
        draft = convert.Draft(body, service.model_name, call.gen)
        logprobs = convert.TextLogprobs(body, tokenizer)
        if body.stream:
            return await stream_turn(request, turn, ResponseEvents(draft, logprobs), held.pop_all())
        (answer,) = await turn.whole(request)

    def ended() -> dict[str, Any]:
        items = convert.items_of(answer, logprobs.of(answer.content, answer.response, answer.reasoning_tokens))
        return draft.ended(items, answer.finish_reason, answer.response, answer.reasoning_tokens)

    return await json_answer(ended, size=size_of([answer.response]))
