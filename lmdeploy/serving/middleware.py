"""The gate before every route: keys, body size, concurrency, request id, access log. Plain ASGI, nothing is buffered.

Everything needs a key when keys are set, whatever the method, except what `_OPEN` lists: health, and the documentation page with its
files. Admin routes need the admin key, always. Prompts, keys and query strings are never logged.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Iterable
from typing import Any

from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmdeploy.log import get_logger
from lmdeploy.serving.keys import ADMIN, KeyRing
from lmdeploy.serving.metrics import Metrics
from lmdeploy.serving.openai.errors import HttpError, error_response
from lmdeploy.serving.options import ServerConfig

access = get_logger("lmdeploy.access")

_OPEN = ("/", "/health", "/ready", "/openapi.json")
_OPEN_FOLDER = "/static/"
#: paths that are asked every few seconds by machines; their lines would drown the others
_QUIET = ("/health", "/ready", "/metrics")
#: admin routes that a flag opens to ordinary clients, as the public surface has it: path -> option
ADMIN_FLAGS = {"/terminate": "allow_terminate_by_client", "/abort_request": "enable_abort_handling"}


class Gate:
    """ASGI middleware; one per app."""

    def __init__(self, app: ASGIApp, config: ServerConfig, metrics: Metrics, keys: KeyRing, admin_paths: Iterable[str] = ()) -> None:
        self._app, self._metrics, self._keys = app, metrics, keys
        # a spelling that differs in case or slashes needs the admin key too, whatever the router makes of it
        self._admin = [re.compile(compile_path(path)[0].pattern, re.IGNORECASE) for path in admin_paths if not _is_opened(path, config)]
        self._limit = config.max_body_mib << 20
        self._slots = asyncio.Semaphore(config.max_concurrent_requests) if config.max_concurrent_requests else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, then pass on with a counting `receive` and a watching `send`."""
        if scope["type"] != "http":
            return  # no websockets; a route that somebody adds must not be a way around the gate
        call = _Call(scope, receive, send, self._limit)
        try:
            self._check(scope)
            await self._run(scope, call)
        except HttpError as e:
            await error_response(e, scope["path"])(scope, receive, call.send)
        finally:
            call.log()

    def _check(self, scope: Scope) -> None:
        name = self._name_of_caller(scope)
        if self._is_admin(scope["path"]):
            self._check_admin(name)
        elif self._keys.needed and name is None and not _is_open(scope["path"]):
            raise HttpError(401, "Missing or wrong API key; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'", code="invalid_api_key")
        length = _header(scope, b"content-length")
        if length.isdigit() and int(length) > self._limit:
            raise _too_large(self._limit)

    def _is_admin(self, path: str) -> bool:
        plain = "/" + "/".join(part for part in path.split("/") if part)
        return any(pattern.match(plain) for pattern in self._admin)

    def _check_admin(self, name: str | None) -> None:
        if not self._keys.has_admin:
            raise HttpError(403, "this route needs the admin key, and the server was started without one (--admin-key)", code="admin_disabled")
        if name is None:
            raise HttpError(401, "Missing or wrong admin key; send it as 'Authorization: Bearer KEY'", code="invalid_api_key")
        if name != ADMIN:
            raise HttpError(403, "this route needs the admin key; an API key is not enough", code="admin_only")

    def _name_of_caller(self, scope: Scope) -> str | None:
        """The name of the key that was sent, OpenAI's way or Anthropic's; None without a known one."""
        kind, _, key = _header(scope, b"authorization").partition(b" ")
        for sent in (key.strip() if kind.lower() == b"bearer" else b"", _header(scope, b"x-api-key").strip()):
            if sent and (name := self._keys.find(sent)) is not None:
                return name
        return None

    async def _run(self, scope: Scope, call: _Call) -> None:
        if self._slots is None or scope["method"] != "POST":
            await self._app(scope, call.receive, call.send)
            return
        self._metrics.waiting.inc()
        try:
            await self._slots.acquire()
        finally:
            self._metrics.waiting.dec()
        try:
            await self._app(scope, call.receive, call.send)
        finally:
            self._slots.release()


class _Call:
    """One request on its way: counts the body, notes the status, knows how long it took."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        self._scope, self._receive, self._send, self._limit = scope, receive, send, limit
        self._begin = time.monotonic()
        self._size = 0
        self._status = 499  # unless an answer is sent
        self.request_id = uuid.uuid4().hex[:16]

    async def receive(self) -> Message:
        """The next part of the body; raises 413 as soon as there is too much of it."""
        message = await self._receive()
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            raise _too_large(self._limit)
        return message

    async def send(self, message: Message) -> None:
        """Pass on; the request id goes with the headers."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]}
        await self._send(message)

    def log(self) -> None:
        """One line."""
        if self._scope["path"] in _QUIET and self._status == 200:
            return
        host, port = (self._scope.get("client") or ("-", 0))[:2]
        path = self._scope.get("raw_path", b"").decode("ascii", "replace")[:200]
        access.info(
            '%s:%s "%s %s HTTP/%s" %d %.3fs %s',
            host,
            port,
            self._scope["method"],
            path,
            self._scope["http_version"],
            self._status,
            self._seconds,
            self.request_id,
        )

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._begin


def _too_large(limit: int) -> HttpError:
    return HttpError(413, f"the body is larger than {limit} bytes (max_body_mib={limit >> 20})", code="body_too_large")


def _is_open(path: str) -> bool:
    return path in _OPEN or path.startswith(_OPEN_FOLDER)


def _is_opened(path: str, config: ServerConfig) -> bool:
    return path in ADMIN_FLAGS and bool(getattr(config, ADMIN_FLAGS[path]))


def _header(scope: Scope, name: bytes) -> bytes:
    value: Any = next((v for k, v in scope["headers"] if k == name), b"")
    assert isinstance(value, bytes)
    return value
