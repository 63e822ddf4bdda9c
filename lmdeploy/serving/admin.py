"""Routes that act on the server itself. The gate lets only the admin key through to them (see `middleware.ADMIN_FLAGS`).

What an engine is told here it does between steps (`messages.Order`); the routes wait for it in a thread, so that nobody else does.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.serving.openai.errors import HttpError, read_body
from lmdeploy.serving.openai.protocol import Body
from lmdeploy.serving.service import Service, service_of

router = APIRouter(tags=["admin"])

MAX_DRAIN_SECONDS = 3600.0
Drain = Annotated[float, Query(ge=0, le=MAX_DRAIN_SECONDS, description="how long running requests may go on before they are aborted")]


class UpdateWeightsRequest(Body):
    """Where new weights are."""

    path: str = Field(min_length=1, max_length=4096, description="folder of safetensors files, below --allowed-weights-path")
    drain_seconds: float = Field(30.0, ge=0, le=MAX_DRAIN_SECONDS, description="how long running requests may go on before they are aborted")


class AbortRequest(Body):
    """Which requests end: exactly one field."""

    session_id: int | None = Field(None, description="those of this session")
    request_id: str | None = Field(None, max_length=128, description="the one whose answer has this X-Lmdeploy-Id header")
    abort_all: bool = Field(False, description="all; with an API key, all of that key")


@router.post("/sleep", summary="Give back memory: level 1 the KV cache, and weights to host memory; level 2 both")
async def sleep(request: Request, level: int = 1, drain_seconds: Drain = 30.0) -> Response:
    """New requests get 503 from now on; running ones may end within `drain_seconds`. On CPU, level 1 leaves the weights where they are."""
    service = service_of(request)
    return await _obeyed(service, partial(service.frontend.sleep, level, drain_seconds))


@router.post("/wakeup", summary="Take the memory again")
async def wakeup(request: Request, tags: Annotated[list[str] | None, Query(description="weights, kv_cache; default: both")] = None) -> Response:
    """Requests are taken when nothing sleeps any more."""
    service = service_of(request)
    return await _obeyed(service, partial(service.frontend.wakeup, tags or ()))


@router.get("/is_sleeping", summary="Whether the engine sleeps")
async def is_sleeping(request: Request) -> Response:
    """`asleep` lists what does."""
    return JSONResponse(_state(service_of(request)))


@router.post("/update_weights", summary="Serve other weights of the same model")
async def update_weights(request: Request) -> Response:
    """Body: {"path": FOLDER}. Everything is checked before anything is changed; a folder that does not fit is a 400, and the old weights go on serving."""
    service = service_of(request)
    body = await read_body(request, UpdateWeightsRequest)
    folder = await asyncio.to_thread(allowed_folder, service.config.allowed_weights_path, body.path)
    return await _obeyed(service, partial(service.frontend.update_weights, folder, body.drain_seconds))


@router.post("/abort_request", summary="End requests; their clients get what there is, with finish_reason abort")
async def abort_request(request: Request) -> Response:
    """Body: {"session_id": N}, {"request_id": ID} or {"abort_all": true}. An API key reaches its own requests only."""
    body = await read_body(request, AbortRequest)
    if (body.session_id is not None) + (body.request_id is not None) + body.abort_all != 1:
        raise HttpError(400, "give exactly one of session_id, request_id and abort_all", code="invalid_value")
    return JSONResponse({"success": True, "aborted": service_of(request).abort(body.session_id, body.request_id)})


@router.get("/terminate", summary="Stop the server as SIGTERM does: running answers are finished first")
async def terminate() -> Response:
    """Answers at once; the server ends when its running requests have."""
    os.kill(os.getpid(), signal.SIGTERM)
    return Response()


async def _obeyed(service: Service, order: Callable[[], None]) -> Response:
    began = time.monotonic()
    try:
        await asyncio.get_running_loop().run_in_executor(service.orders, order)
    except CheckpointError as e:
        raise HttpError(400, str(e), code="invalid_weights", param="path") from None
    except ConfigError as e:
        raise HttpError(503, str(e), code="no_memory") from None
    return JSONResponse({"success": True, **_state(service), "seconds": round(time.monotonic() - began, 3)})


def _state(service: Service) -> dict[str, object]:
    asleep = sorted(service.frontend.asleep)
    return {"is_sleeping": bool(asleep), "asleep": asleep}


def allowed_folder(allowed: str | None, path: str) -> Path:
    """The folder, when it and the files in it lie below the allowed one, links followed. Raises HttpError otherwise."""
    if allowed is None:
        raise HttpError(403, "new weights are not allowed: the server was started without --allowed-weights-path", code="updates_disabled")
    try:
        root = Path(allowed).resolve(strict=True)
        folder = (root / path).resolve(strict=True)
        inside = folder.is_relative_to(root) and all(file.resolve(strict=True).is_relative_to(root) for file in folder.glob("*"))
    except (OSError, ValueError):  # not there; a name that is none
        inside = False
    if not inside or not folder.is_dir():
        raise HttpError(400, f"path={path[:200]!r} is no folder below --allowed-weights-path", code="invalid_path", param="path")
    return folder
