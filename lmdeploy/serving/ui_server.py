"""Serves the web page: gradio's application behind a gate that lets through what the page needs and nothing else.

gradio comes with routes for uploads, files of this machine, proxies, monitoring and a public API; here they do not exist. The page's
Content-Security-Policy lets nothing be loaded from elsewhere, and no script run but its own, whatever a model answers.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import socket
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmdeploy.errors import EngineError
from lmdeploy.serving import ui
from lmdeploy.serving.server import SignalServer
from lmdeploy.serving.ui_chat import MAX_IMAGES, ChatServer

#: largest body of an event in bytes: a question and the settings; and largest picture
MAX_EVENT, MAX_IMAGE = 4 << 20, 16 << 20
#: tabs whose conversations are kept, the one used longest ago is forgotten; connections at a time
MAX_TABS, MAX_CONNECTIONS = 1000, 4000
#: seconds that streams get at shutdown
GRACE_SECONDS = 2
_SHOWN = ("/assets/", "/static/", "/svelte/")
_READ = {"/", "/config", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json", "/gradio_api/info", "/gradio_api/queue/data"}
_READ_BELOW = ("/gradio_api/heartbeat/",)
_WRITE = {"/gradio_api/queue/join": MAX_EVENT, "/gradio_api/run/predict": 1 << 16, "/gradio_api/cancel": 1 << 16, "/gradio_api/reset": 1 << 16}
#: where pictures come in and go out; there only for a model that sees
_UPLOAD, _FILE = "/gradio_api/upload", "/gradio_api/file="
_POLICY = (
    "default-src 'self'; script-src 'self' 'nonce-{nonce}'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; frame-src 'none'; object-src 'none'; base-uri 'self'; form-action 'none'; frame-ancestors 'self'"
)


class PageGate:
    """ASGI middleware: known paths only, bounded bodies, safe headers."""

    def __init__(self, app: ASGIApp, server: ChatServer) -> None:
        self._app, self._server = app, server
        #: set at shutdown: every reader then looks gone, so that streams end by themselves
        self.closing = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """404 for what is not the page's."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        limit = _limit(scope, sees=self._server.sees)
        if limit is None:
            await PlainTextResponse("not found", 404)(scope, receive, send)
            return
        answer = _Page(send) if scope["path"] == "/" else None
        if answer is not None:  # its text is looked at below, so it must come uncompressed
            scope = {**scope, "headers": [(k, v) for k, v in scope["headers"] if k != b"accept-encoding"]}
        await self._app(scope, self._bounded(receive, limit), answer.send if answer else send)

    def _bounded(self, receive: Receive, limit: int) -> Receive:
        """`receive`, to which a reader is gone when their body is larger than `limit`, or when all ends."""
        size = 0

        async def counted() -> Message:
            nonlocal size
            arrives, ends = asyncio.ensure_future(receive()), asyncio.ensure_future(self.closing.wait())
            try:
                await asyncio.wait({arrives, ends}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                ends.cancel()
                if not arrives.done():
                    arrives.cancel()
            if not arrives.done():
                return {"type": "http.disconnect"}
            message = arrives.result()
            size += len(message.get("body", b""))
            return message if size <= limit else {"type": "http.disconnect"}

        return counted


def _limit(scope: Scope, *, sees: bool) -> int | None:
    """Most bytes of a request's body; None when there is no such request."""
    if scope["type"] != "http":
        return None
    path: str = scope["path"]
    if scope["method"] == "POST":
        return MAX_IMAGES * MAX_IMAGE if sees and path == _UPLOAD else _WRITE.get(path)
    readable = path in _READ or path.startswith(_SHOWN + _READ_BELOW) or (sees and path.startswith(_FILE))
    return 0 if scope["method"] in ("GET", "HEAD") and readable else None


class _Page:
    """The page's HTML on its way out: its own scripts get the nonce that the policy asks for."""

    def __init__(self, send: Send) -> None:
        self._send, self._nonce = send, secrets.token_urlsafe(16)
        self._start: Message = {}
        self._body = b""

    async def send(self, message: Message) -> None:
        """Collect; pass on when whole."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        body = self._body.replace(b"</head>", b"<script>%s</script></head>" % ui.script().encode(), 1)
        body = re.sub(rb"<script(?=[\s>])", b'<script nonce="%s"' % self._nonce.encode(), body)
        headers = MutableHeaders(raw=list(self._start["headers"]))
        headers["content-length"] = str(len(body))
        headers["content-security-policy"] = _POLICY.format(nonce=self._nonce)
        headers["x-content-type-options"] = "nosniff"
        headers["referrer-policy"] = "no-referrer"
        await self._send({**self._start, "headers": headers.raw})
        await self._send({**message, "body": body})


class PageServer(SignalServer):
    """The page's uvicorn server; at its end all streams are told to end."""

    def __init__(self, config: uvicorn.Config, gate: PageGate) -> None:
        super().__init__(config)
        self._gate = gate

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, end the streams."""
        self._gate.closing.set()
        await super().shutdown(sockets)


def build_app(server: ChatServer) -> PageGate:
    """The page of a server as an ASGI application."""
    page = ui.build_page(server).queue(max_size=ui.QUEUE, api_open=False)
    page.state_session_capacity = MAX_TABS
    page._queue.max_thread_count = ui.QUEUE + 20  # of running events of all kinds; 40 unless `launch` says otherwise, which is not used here
    app: Any = gr.mount_gradio_app(
        FastAPI(openapi_url=None, docs_url=None, redoc_url=None),
        page,
        "/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=MAX_IMAGE,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=ui.theme(),
        css=ui.css(),
    )
    return PageGate(app, server)


def build_page_server(server: ChatServer) -> PageServer:
    """A uvicorn server of the page, not yet running."""
    gate = build_app(server)
    config = uvicorn.Config(
        gate,
        log_level="warning",
        access_log=False,
        log_config=None,
        lifespan="on",
        ws="none",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return PageServer(config, gate)


def share_page(sock: socket.socket) -> str:
    """A public address for the page, through the tunnel of gradio's makers. Raises EngineError when there is none to be had."""
    from gradio import networking

    host, port = sock.getsockname()[:2]
    try:
        return str(networking.setup_tunnel({"0.0.0.0": "127.0.0.1"}.get(host, host), port, secrets.token_urlsafe(32), None, None))
    except Exception as e:  # gradio raises bare exceptions here, of many kinds
        raise EngineError(f"no public address for the page: {e}; --share needs the internet, leave it out to do without") from e
