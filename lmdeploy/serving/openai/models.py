"""GET /v1/models: the one model that is served."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lmdeploy.serving.openai.convert import new_id
from lmdeploy.serving.openai.errors import HttpError
from lmdeploy.serving.service import Service, service_of

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models", summary="List the served models")
async def list_models(request: Request) -> Response:
    """The id is what requests give as `model`."""
    return JSONResponse({"object": "list", "data": [_card(service_of(request), request.app.state.created)]})


@router.get("/v1/models/{name:path}", summary="Describe a served model")
async def get_model(request: Request, name: str) -> Response:
    """404 when the model is not served."""
    service = service_of(request)
    if name not in service.served_names:
        raise HttpError(404, f"The model {name[:200]!r} does not exist. Served: {service.model_name!r}", code="model_not_found", param="model")
    return JSONResponse(_card(service, request.app.state.created))


def _card(service: Service, created: int) -> dict[str, object]:
    allowed = ("create_engine", "sampling", "logprobs", "search_indices", "view", "fine_tuning")
    permission = {
        "id": new_id("modelperm"),
        "object": "model_permission",
        "created": created,
        **{f"allow_{what}": what in ("sampling", "logprobs", "view") for what in allowed},
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": service.model_name,
        "object": "model",
        "created": created,
        "owned_by": "lmdeploy",
        "root": service.model_name,
        "parent": None,
        "permission": [permission],
        "max_model_len": service.frontend.info.session_len,
        "input_modalities": ["text", "image"] if service.frontend.sees else ["text"],
    }
