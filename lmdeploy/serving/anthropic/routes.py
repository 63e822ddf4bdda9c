"""POST /v1/messages and /v1/messages/count_tokens, GET /anthropic/v1/models; all of them also below /anthropic, for clients' base URL."""

from __future__ import annotations

from contextlib import ExitStack
from datetime import datetime, timezone
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lmdeploy.serving.anthropic import convert
from lmdeploy.serving.anthropic.protocol import CountRequest, MessagesRequest
from lmdeploy.serving.anthropic.stream import MessageEvents
from lmdeploy.serving.aside import aside
from lmdeploy.serving.events import stream_turn
from lmdeploy.serving.openai.errors import read_body
from lmdeploy.serving.service import Service, service_of
from lmdeploy.serving.tool_offer import offer_of
from lmdeploy.serving.turns import open_turn

router = APIRouter(tags=["Anthropic"])


@router.post("/v1/messages", summary="Answer a conversation")
@router.post("/anthropic/v1/messages", include_in_schema=False)
async def messages(request: Request) -> Response:
    """Anthropic's Messages API: `max_tokens` is required, `stream` sends its events, `tools` are called with tool_use blocks."""
    service = service_of(request)
    body = await read_body(request, MessagesRequest)
    service.check_model(body.model)
    with ExitStack() as held:
        turn = await open_turn(service, await aside(convert.turn_call, body, service.defaults))
        if body.stream:
            return await stream_turn(request, turn, MessageEvents(service.model_name, body), held.pop_all())
        (answer,) = await turn.whole(request)
    stop = convert.stop_of(answer.finish_reason, answer.response, body)
    return JSONResponse(convert.message(service.model_name, convert.blocks_of(answer), convert.usage_of(answer.response), stop))


@router.post("/v1/messages/count_tokens", summary="Count the tokens of a conversation")
@router.post("/anthropic/v1/messages/count_tokens", include_in_schema=False)
async def count_tokens(request: Request) -> Response:
    """What /v1/messages would compute for the same messages, system text and tools; however long they are."""
    service = service_of(request)
    body = await read_body(request, CountRequest)
    service.check_model(body.model)
    call = await aside(convert.turn_call, body, {})
    shown = offer_of(call.tools, call.tool_choice, service.tool_format).shown or None
    ids = await service.encode(call.messages, tools=shown, template_kwargs=call.template_kwargs)
    return JSONResponse({"input_tokens": len(ids)})


@router.get("/anthropic/v1/models", summary="List the served models")
async def list_models(request: Request) -> Response:
    """The same as /v1/models, in Anthropic's form."""
    card = _card(service_of(request), request.app.state.created)
    return JSONResponse({"data": [card], "has_more": False, "first_id": card["id"], "last_id": card["id"]})


@router.get("/anthropic/v1/models/{name:path}", summary="Describe a served model")
async def get_model(request: Request, name: str) -> Response:
    """404 when the model is not served."""
    service = service_of(request)
    service.check_model(name)
    return JSONResponse(_card(service, request.app.state.created))


def _card(service: Service, created: int) -> dict[str, Any]:
    length = service.frontend.info.session_len
    return {
        "type": "model",
        "id": service.model_name,
        "display_name": service.model_name,
        "created_at": datetime.fromtimestamp(created, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "max_input_tokens": length,
        "max_tokens": length,
        "lifecycle": "active",
    }
