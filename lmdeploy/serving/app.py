"""`create_app(frontend, config)`: the routes, the gate, the error shapes and the documentation page. State lives on the app.

The page at `/` and everything it loads come from this package: it renders without a network.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from lmdeploy.config import GenerationConfig
from lmdeploy.errors import LmdeployError
from lmdeploy.frontend import Frontend
from lmdeploy.serving import admin, encode, generate, interactive
from lmdeploy.serving.metrics import CONTENT_TYPE
from lmdeploy.serving.middleware import Gate
from lmdeploy.serving.openai import chat, completions, embeddings, models
from lmdeploy.serving.openai.errors import ClientGone, HttpError, error_response
from lmdeploy.serving.openai.protocol import (
    EXAMPLES,
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    EncodeRequest,
    GenerateRequest,
    InteractiveRequest,
    PerplexityRequest,
    TokenizeRequest,
)
from lmdeploy.serving.options import ServerConfig
from lmdeploy.serving.service import Service, service_of
from lmdeploy.version import __version__

STATIC = Path(__file__).parent / "static"
#: with work to do, no step for this long means that the engine is stuck
STALL_SECONDS = 120.0

#: fields of requests that GenerationConfig calls otherwise
_WIRE_NAMES = {
    "stop": "stop_words", "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "request_output_len": "max_new_tokens",
    "seed": "random_seed",
}  # fmt: skip

_BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/chat/interactive": InteractiveRequest,
    "/generate": GenerateRequest,
    "/v1/encode": EncodeRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/get_ppl": PerplexityRequest,
}


def create_app(frontend: Frontend, config: ServerConfig | None = None) -> FastAPI:
    """The HTTP application of one model."""
    config = config or ServerConfig()
    app = FastAPI(title="lmdeploy", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    service = Service(frontend, config)
    app.state.service = service
    app.state.created = int(time.time())
    app.state.conversations = interactive.Conversations(config.max_sessions)
    for module in (models, chat, completions, embeddings, generate, encode, interactive, admin):
        app.include_router(module.router)
    app.add_api_route("/health", health, methods=["GET"], tags=["server"], summary="200 while the engine works, else 503")
    if not config.disable_metrics:
        app.add_api_route("/metrics", metrics, methods=["GET"], tags=["server"], summary="Prometheus figures")
    if not config.disable_fastapi_docs:
        _add_docs(app, service)
    _add_errors(app)
    admin_paths = [route.path for route in admin.router.routes if isinstance(route, Route)]
    app.add_middleware(Gate, config=config, metrics=service.metrics, keys=service.keys, admin_paths=admin_paths)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=config.allow_origins,
        allow_methods=config.allow_methods,
        allow_headers=config.allow_headers,
        allow_credentials=config.allow_credentials,
    )
    return app


async def health(request: Request) -> Response:
    """200 {"status": "healthy"} while the engine can answer; 503 with the reason when it failed or is stuck."""
    frontend = service_of(request).frontend
    problem = frontend.failure
    if problem is None:
        stats = await asyncio.to_thread(frontend.stats)
        age = time.monotonic() - stats.last_step_time
        if stats.running and stats.last_step_time and age > STALL_SECONDS:
            problem = f"no step for {age:.0f} s with {stats.running} sequences running"
        problem = frontend.failure or problem
    if problem:
        return JSONResponse({"status": "unhealthy", "message": problem}, status_code=503, headers={"Retry-After": "5"})
    return JSONResponse({"status": "healthy", "message": ""})


async def metrics(request: Request) -> Response:
    """Prometheus text format."""
    return Response(await asyncio.to_thread(service_of(request).metrics.text), media_type=CONTENT_TYPE)


def _add_errors(app: FastAPI) -> None:
    async def answer(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = HttpError(error.status_code, str(error.detail), code=str(error.detail).lower().replace(" ", "_"))
        return error_response(error)

    for kind in (HttpError, LmdeployError, ClientGone, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _add_docs(app: FastAPI, service: Service) -> None:
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    schema: dict[str, Any] = {}

    async def openapi() -> Response:
        if not schema:
            schema.update(openapi_schema(app, service.model_name, keys=service.keys.needed))
        return JSONResponse(schema)

    async def page() -> Response:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=f"lmdeploy: {service.model_name}",
            swagger_js_url="static/swagger-ui-bundle.js",
            swagger_css_url="static/swagger-ui.css",
            swagger_favicon_url="data:,",
        )

    app.add_api_route("/openapi.json", openapi, include_in_schema=False)
    app.add_api_route("/", page, include_in_schema=False)


def openapi_schema(app: FastAPI, model_name: str, *, keys: bool) -> dict[str, Any]:
    """OpenAPI of the app, with the bodies that the routes read themselves and examples that work as they stand."""
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    parts = schema.setdefault("components", {}).setdefault("schemas", {})
    for path, model in _BODIES.items():
        body = _explained(model.model_json_schema(ref_template="#/components/schemas/{model}"))
        parts.update(body.pop("$defs", {}))
        parts[model.__name__] = body
        example = {k: (model_name if v == "MODEL" else v) for k, v in EXAMPLES[model].items()}
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}, "example": example}}
        schema["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
    for operation in (operation for operations in schema["paths"].values() for operation in operations.values()):
        operation["responses"].pop("422", None)  # fastapi's own; ours have OpenAI's shape
        operation["responses"]["4XX"] = {"description": 'An error: `{"error": {"message", "type", "param", "code"}}`'}
    for name in ("HTTPValidationError", "ValidationError"):
        parts.pop(name, None)
    if keys:
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
    return schema


def _explained(body: dict[str, Any]) -> dict[str, Any]:
    """The schema of a request with the meaning of every field that GenerationConfig has, too."""
    helps = {f.name: f.metadata["help"] for f in dataclasses.fields(GenerationConfig) if f.name != "logprobs"}  # in a chat that is a switch
    for name, field in body["properties"].items():
        text = helps.get(_WIRE_NAMES.get(name, name))
        if text is not None:
            field["description"] = text.replace("None", "null")
    return body
