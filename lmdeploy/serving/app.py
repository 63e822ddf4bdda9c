"""`create_app(frontend, config)`: the routes, the gate, and the error shapes. State lives on the app."""

from __future__ import annotations

import asyncio
import time
from http import HTTPStatus

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from lmdeploy.errors import LmdeployError
from lmdeploy.frontend import Frontend
from lmdeploy.serving import admin, encode, generate, interactive, ready
from lmdeploy.serving.anthropic import routes as anthropic
from lmdeploy.serving.call import CURRENT
from lmdeploy.serving.metrics import CONTENT_TYPE
from lmdeploy.serving.middleware import Gate
from lmdeploy.serving.openai import chat, completions, embeddings, models, responses
from lmdeploy.serving.openai.errors import RETRY_SECONDS, ClientGone, HttpError, as_http_error, error_response
from lmdeploy.serving.options import ServerConfig
from lmdeploy.serving.page import add_docs
from lmdeploy.serving.service import Service, service_of
from lmdeploy.version import __version__


def create_app(frontend: Frontend, config: ServerConfig | None = None) -> FastAPI:
    """The HTTP application of one model."""
    config = config or ServerConfig()
    app = FastAPI(title="lmdeploy", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    service = Service(frontend, config)
    app.state.service = service
    app.state.created = int(time.time())
    app.state.conversations = interactive.Conversations(config.max_sessions)
    for module in (models, chat, completions, embeddings, responses, anthropic, generate, encode, interactive, ready, admin):
        app.include_router(module.router)
    app.add_api_route("/health", health, methods=["HEAD"], include_in_schema=False)
    app.add_api_route("/health", health, methods=["GET"], tags=["server"], summary="200 unless the engine was given up: then restart the server")
    if config.enable_metrics and not config.disable_metrics:
        app.add_api_route("/metrics", metrics, methods=["GET"], tags=["server"], response_class=PlainTextResponse, summary="Prometheus figures")
    if not config.disable_fastapi_docs:
        add_docs(app, service)
    _add_errors(app)
    admin_paths = [route.path for route in admin.router.routes if isinstance(route, Route)]
    app.add_middleware(Gate, service=service, admin_paths=admin_paths)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=service.origins.listed,
        allow_origin_regex=service.origins.pattern,
        allow_methods=config.allow_methods,
        allow_headers=config.allow_headers,
        allow_credentials=config.allow_credentials,
        expose_headers=["X-Request-Id", "X-Lmdeploy-Id", "Retry-After"],
    )
    return app


async def health(request: Request) -> Response:
    """200 with status healthy, sleeping, or restarting while a failed engine is replaced: all is done that can be. 503 when it was given up."""
    frontend = service_of(request).frontend
    if frontend.failure:
        return JSONResponse({"status": "unhealthy", "message": frontend.failure}, status_code=503, headers={"Retry-After": RETRY_SECONDS})
    status = "restarting" if frontend.trouble else "sleeping" if frontend.asleep else "healthy"
    return JSONResponse({"status": status, "message": frontend.trouble or ""})


async def metrics(request: Request) -> Response:
    """Prometheus text format."""
    return Response(await asyncio.to_thread(service_of(request).metrics.text), media_type=CONTENT_TYPE)


def _add_errors(app: FastAPI) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):  # of a query
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"][1:])
            error = HttpError(400, f"{name}: {first['msg']} (got {str(first['input'])[:80]!r})", code="invalid_value", param=name)
        elif isinstance(error, HTTPException):
            error = HttpError(error.status_code, str(error.detail), code=HTTPStatus(error.status_code).phrase.lower().replace(" ", "_"))
        if (call := CURRENT.get()) is not None and not isinstance(error, ClientGone):
            call.error = as_http_error(error).code
        return error_response(error, request.url.path)

    for kind in (HttpError, LmdeployError, ClientGone, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, answer)
