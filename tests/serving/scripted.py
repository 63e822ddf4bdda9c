"""An OpenAI-compatible server that says what a test tells it to, and remembers what it was asked: for answers that no real model can be made to give."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


class ScriptedServer:
    """`models` are the cards of /v1/models; `script` maps the last message's text to deltas (a text is one delta); what is not in it is repeated."""

    def __init__(self, models: list[dict[str, Any]], script: dict[str, list[dict[str, str]] | str]) -> None:
        self.models, self.script = models, script
        self.bodies: list[dict[str, Any]] = []
        self.fetched: list[str] = []
        self.pause = 0.02  # seconds after each delta
        self.usage = (1000, 24)  # tokens of prompt and answer
        self.failure: tuple[int, dict[str, str]] | None = None
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._sock.getsockname()[1]}"
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/{path:path}", self._else),
        ]
        self._server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="warning", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve(sockets=[self._sock])), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it."""
        self._server.should_exit = True
        self._thread.join(10)
        self._sock.close()

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": self.models})

    async def _else(self, request: Request) -> Response:
        self.fetched.append(request.url.path)
        return Response(status_code=404)

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if self.failure is not None:
            status, error = self.failure
            return JSONResponse({"error": error}, status_code=status)
        content = body["messages"][-1]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        return StreamingResponse(self._events(self.script.get(text, text)), media_type="text/event-stream")

    async def _events(self, answer: list[dict[str, str]] | str) -> AsyncIterator[str]:
        yield ": a comment, as some servers send\n\n"
        for delta in [{"content": answer}] if isinstance(answer, str) else answer:
            yield _event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            await asyncio.sleep(self.pause)
        yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        prompt, answered = self.usage
        yield _event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": answered, "total_tokens": prompt + answered}})
        yield "data: [DONE]\n\n"


def _event(payload: dict[str, Any]) -> str:
    return f"data: {json.dumps(payload)}\n\n"
