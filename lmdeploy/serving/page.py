"""The documentation page: OpenAPI with the bodies that the routes read themselves, and for each an example that works as it stands.

The page at `/` and everything it loads come from this package: it renders without a network.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles

from lmdeploy.config import GenerationConfig
from lmdeploy.serving.admin import AbortRequest, UpdateWeightsRequest
from lmdeploy.serving.anthropic.protocol import CountRequest, MessagesRequest
from lmdeploy.serving.openai.protocol import (
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
from lmdeploy.serving.openai.responses_protocol import ResponsesRequest
from lmdeploy.serving.service import Service

STATIC = Path(__file__).parent / "static"

#: fields of requests that GenerationConfig calls otherwise
_WIRE_NAMES = {
    "stop": "stop_words", "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "max_output_tokens": "max_new_tokens", "request_output_len": "max_new_tokens",
    "seed": "random_seed", "stop_sequences": "stop_words",
}  # fmt: skip

#: content type of a route's stream, where it is not server-sent events
_STREAMS = {"/v1/chat/interactive": "application/x-ndjson"}

BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/chat/interactive": InteractiveRequest,
    "/generate": GenerateRequest,
    "/v1/encode": EncodeRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/get_ppl": PerplexityRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountRequest,
    "/update_weights": UpdateWeightsRequest,
    "/abort_request": AbortRequest,
}

#: what the Swagger page offers to send: every example must get a 200 as it stands (MODEL is replaced by the served name)
EXAMPLES: dict[type[Body], dict[str, Any]] = {
    ChatRequest: {
        "model": "MODEL",
        "messages": [{"role": "user", "content": "Hello! Who are you?"}],
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 40,
        "n": 1,
        "max_tokens": None,
        "stop": None,
        "stream": False,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "user": "string",
        "repetition_penalty": 1.0,
        "session_id": -1,
        "ignore_eos": False,
        "skip_special_tokens": True,
    },
    CompletionRequest: {"model": "MODEL", "prompt": "The sky is", "max_tokens": 32, "temperature": 0.7, "top_p": 1.0, "stream": False},
    GenerateRequest: {"prompt": "The sky is", "max_tokens": 32, "stream": False},
    EncodeRequest: {"input": "The sky is", "do_preprocess": False, "add_bos": True},
    EmbeddingRequest: {"model": "MODEL", "input": ["The sky is blue.", "The sea is deep."], "encoding_format": "float"},
    TokenizeRequest: {"messages": [{"role": "user", "content": "Hello! Who are you?"}], "add_generation_prompt": True},
    DetokenizeRequest: {"tokens": [1, 2, 3]},
    PerplexityRequest: {"input": "The sky is blue."},
    InteractiveRequest: {"prompt": "Hello!", "session_id": -1, "interactive_mode": False, "stream": False},
    ResponsesRequest: {"model": "MODEL", "instructions": "You are a helpful assistant.", "input": "Hello! Who are you?", "max_output_tokens": 64},
    MessagesRequest: {"model": "MODEL", "max_tokens": 64, "system": "You are a helpful assistant.", "messages": [{"role": "user", "content": "Hello!"}]},
    CountRequest: {"model": "MODEL", "messages": [{"role": "user", "content": "Hello!"}]},
}


def add_docs(app: FastAPI, service: Service) -> None:
    """Add the page, its files and /openapi.json."""
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    schema: dict[str, Any] = {}

    async def openapi() -> Response:
        if not schema:
            schema.update(openapi_schema(app, service.shown_name, keys=service.keys.needed))
        return JSONResponse(schema)

    async def page() -> Response:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=f"lmdeploy: {service.shown_name}",
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
    for path, model in BODIES.items():
        body = _explained(model.model_json_schema(ref_template="#/components/schemas/{model}"))
        parts.update(body.pop("$defs", {}))
        parts[model.__name__] = body
        described: dict[str, Any] = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
        if model in EXAMPLES:
            described["example"] = {k: (model_name if v == "MODEL" else v) for k, v in EXAMPLES[model].items()}
        operation = schema["paths"][path]["post"]
        operation["requestBody"] = {"required": True, "content": {"application/json": described}}
        if "stream" in model.model_fields:
            operation["responses"]["200"]["content"][_STREAMS.get(path, "text/event-stream")] = {"schema": {}}
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
