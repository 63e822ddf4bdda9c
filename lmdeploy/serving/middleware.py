"""The gate before every route: keys, drain, admission, body size, time limit, request ids, access log. Plain ASGI, nothing is buffered.

Everything needs a key when keys are set, whatever the method, except what `_OPEN` lists: health, and the documentation page with its
files. Admin routes need the admin key, always. Without keys, web pages of elsewhere are refused (`origins`). Prompts, keys and query strings are never logged.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Iterable

from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmdeploy.log import get_logger
from lmdeploy.serving.admission import Place
from lmdeploy.serving.call import ANYBODY, CURRENT, Call, header
from lmdeploy.serving.connections import EXTENSION, Connection
from lmdeploy.serving.keys import ADMIN
from lmdeploy.serving.openai.errors import ClientGone, HttpError, as_http_error, error_response
from lmdeploy.serving.options import ServerConfig
from lmdeploy.serving.service import Service, admitted

logger = get_logger(__name__)
access = get_logger("lmdeploy.access")

_OPEN = ("/", "/health", "/ready", "/openapi.json")
_OPEN_FOLDER = "/static/"
#: paths that are asked every few seconds by machines; their lines would drown the others
_QUIET = ("/health", "/ready", "/metrics")
_ABORT, _INTERACTIVE = "/abort_request", "/v1/chat/interactive"
#: what ends a running answer must not wait for its end; nothing but a small body is such a request
_STOPS, SMALL_BODY = (_ABORT, _INTERACTIVE), 64 << 10
#: routes that compute nothing on the engine
_LIGHT = ("/tokenize", "/detokenize", "/v1/encode", "/v1/messages/count_tokens", "/anthropic/v1/messages/count_tokens")
#: admin routes that a flag opens to ordinary clients, as the public surface has it: path -> option
ADMIN_FLAGS = {"/terminate": "allow_terminate_by_client", _ABORT: "enable_abort_handling"}
#: an answer ends itself at its time limit; whatever does not is cut so many seconds later
_GRACE = 5.0


class Gate:
    """ASGI middleware; one per app."""

    def __init__(self, app: ASGIApp, service: Service, admin_paths: Iterable[str] = ()) -> None:
        self._app, self._service, self._keys = app, service, service.keys
        config = service.config
        # a spelling that differs in case or slashes needs the admin key too, whatever the router makes of it
        self._admin = [re.compile(compile_path(path)[0].pattern, re.IGNORECASE) for path in admin_paths if not _is_opened(path, config)]
        self._limit, self._seconds = config.max_body_mib << 20, config.request_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, then pass on with a counting `receive` and a watching `send`."""
        if scope["type"] != "http":
            return  # no websockets; a route that somebody adds must not be a way around the gate
        call = Call(scope, self._seconds)
        wire = _Wire(scope, call, receive, send, self._limit, self._service)
        quiet = scope["path"] in _QUIET
        token = CURRENT.set(call)
        self._service.lifecycle.active += not quiet
        try:
            await self._serve(scope, wire, call, quiet=quiet)
        except ClientGone:
            pass
        except Exception as e:
            await self._fail(scope, wire, call, e)
        finally:
            CURRENT.reset(token)
            self._service.lifecycle.active -= not quiet
            self._end(scope, call, quiet=quiet)

    # ------------------------------------------------------------------ what may pass

    async def _serve(self, scope: Scope, wire: _Wire, call: Call, *, quiet: bool) -> None:
        admin = self._is_admin(scope["path"])
        self._check(scope, call, admin=admin)
        if self._service.lifecycle.draining and not quiet:
            raise HttpError(503, "the server is shutting down", code="shutting_down")
        if admin:  # neither queue nor time limit: it may be told to wait for the others' end
            await self._app(scope, wire.receive, wire.send)
            return
        if call.method != "POST":
            await self._pass(scope, wire, call)
            return
        turn = call.owner
        path, service = scope["path"], self._service
        place = call.place = Place(service.light_admission if path in _LIGHT else service.admission, turn, call.deadline, wire.connection)
        if path in _STOPS and _is_small(scope):  # reading a small body costs nothing: the route itself waits if it is to compute
            wire.limit = SMALL_BODY
        else:
            await admitted()
        try:
            await self._pass(scope, wire, call)
        finally:
            place.give_back()

    async def _pass(self, scope: Scope, wire: _Wire, call: Call) -> None:
        """Run the app. Answers end themselves at the time limit; what does not is cancelled a little later."""
        timer = asyncio.get_running_loop().call_later(call.deadline + _GRACE - time.monotonic(), wire.give_up, asyncio.current_task())
        try:
            await self._app(scope, wire.receive, wire.send)
        except asyncio.CancelledError:
            if not wire.given_up:
                raise
            raise HttpError(504, f"the request was not finished within request_timeout={self._seconds:g} s", code="timeout") from None
        finally:
            timer.cancel()

    def _check(self, scope: Scope, call: Call, *, admin: bool) -> None:
        name = self._name_of_caller(scope)
        call.key = name or ANYBODY
        if admin:
            self._check_admin(name)
        elif self._keys.needed and name is None and not _is_open(scope["path"]):
            raise HttpError(401, "Missing or wrong API key; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'", code="invalid_api_key")
        origin = header(scope, b"origin")
        if not _is_open(scope["path"]) and not self._service.origins.may_call(origin, header(scope, b"host")):
            page = origin.decode("latin-1")[:80]
            raise HttpError(403, f"web pages of {page!r} may not call this server; --allow-origins lets them, API keys protect it", code="origin_not_allowed")
        length = header(scope, b"content-length")
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
        kind, _, key = header(scope, b"authorization").partition(b" ")
        for sent in (key.strip() if kind.lower() == b"bearer" else b"", header(scope, b"x-api-key").strip()):
            if sent and (name := self._keys.find(sent)) is not None:
                return name
        return None

    # ------------------------------------------------------------------ how it ends

    async def _fail(self, scope: Scope, wire: _Wire, call: Call, error: Exception) -> None:
        """Answer with the error; when the answer has begun already, all that can be done is to cut the connection."""
        call.error = as_http_error(error).code
        if not isinstance(error, HttpError):
            logger.error("request %s failed", call.id, exc_info=error)
        if not wire.started:
            await error_response(error, scope["path"])(scope, wire.receive, wire.send)
        elif wire.connection is not None:
            wire.connection.cut()

    def _end(self, scope: Scope, call: Call, *, quiet: bool) -> None:
        call.ended = time.monotonic()
        call.route = str(getattr(scope.get("route"), "path", "other"))
        self._service.metrics.answered(call)
        if self._service.tracing is not None and not quiet:
            self._service.tracing.ended(call, scope)
        if access.isEnabledFor(logging.INFO) and not (quiet and call.status == 200):
            access.info("%s", call.text(), extra={"fields": call.fields()})


class _Wire:
    """The way between app and client: counts the body, notes the status, adds ids."""

    def __init__(self, scope: Scope, call: Call, receive: Receive, send: Send, limit: int, service: Service) -> None:
        self._call, self._receive, self._send, self._service = call, receive, send, service
        self.limit = limit  # of the body, in bytes
        self._size = 0
        self.started = self.given_up = False
        connection = scope.get("extensions", {}).get(EXTENSION, {}).get("connection")
        self.connection = connection if isinstance(connection, Connection) else None

    def give_up(self, task: asyncio.Task[None] | None) -> None:
        """Too late: end the app's work."""
        assert task is not None
        self.given_up = True
        task.cancel()

    async def receive(self) -> Message:
        """The next part of the body; raises 413 as soon as there is too much of it."""
        message = await self._receive()
        self._size += len(message.get("body", b""))
        if self._size > self.limit:
            raise _too_large(self.limit)
        return message

    async def send(self, message: Message) -> None:
        """Pass on; ids and what a client needs to come back go with the headers."""
        if message["type"] == "http.response.start":
            self.started = True
            self._call.status = message["status"]
            message = {**message, "headers": self._headers(message)}
        await self._send(message)

    def _headers(self, message: Message) -> list[tuple[bytes, bytes]]:
        call, headers = self._call, list(message.get("headers", ()))
        headers += [(b"x-request-id", (call.client_id or call.id).encode()), (b"x-lmdeploy-id", call.id.encode())]
        if message["status"] in (429, 503):
            headers = [h for h in headers if h[0] != b"retry-after"] + [(b"retry-after", str(self._service.admission.retry_after()).encode())]
        if self._service.lifecycle.draining:
            headers.append((b"connection", b"close"))
        return headers


def _too_large(limit: int) -> HttpError:
    return HttpError(413, f"the body is larger than {limit} bytes (max_body_mib={limit >> 20})", code="body_too_large")


def _is_open(path: str) -> bool:
    return path in _OPEN or path.startswith(_OPEN_FOLDER)


def _is_small(scope: Scope) -> bool:
    """Whether the body is said to be small; one without a length may be anything."""
    length = header(scope, b"content-length")
    return length.isdigit() and int(length) <= SMALL_BODY


def _is_opened(path: str, config: ServerConfig) -> bool:
    return path in ADMIN_FLAGS and bool(getattr(config, ADMIN_FLAGS[path]))
