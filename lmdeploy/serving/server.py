"""Runs the HTTP server: the port first (a used one must be told before a model is loaded), then uvicorn until a signal.

Ctrl-C or SIGTERM: no new connections, `shutdown_seconds` for running answers, then the engine is closed and its process is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

import uvicorn

from lmdeploy import log
from lmdeploy.config import ChatTemplateConfig, EngineConfig
from lmdeploy.engine.supervisor import Supervision
from lmdeploy.errors import ConfigError, EngineError
from lmdeploy.frontend import Frontend
from lmdeploy.log import get_logger
from lmdeploy.serving.app import create_app
from lmdeploy.serving.http_protocol import BoundedHttpProtocol
from lmdeploy.serving.options import ServerConfig

logger = get_logger(__name__)

#: how long aborted answers may take to end before their connections are cut
ABORT_SECONDS = 3


class SignalServer(uvicorn.Server):
    """uvicorn that returns from `run` after a signal, instead of dying of it, so that the engine can be closed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals stop the server; a second one stops it at once. Only the main thread can catch them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.handle_exit(number, frame)


class HttpServer(SignalServer):
    """The API's server. Answers that still run `shutdown_seconds` later are aborted: their readers get what there is, with finish_reason 'abort'."""

    def __init__(self, config: uvicorn.Config, frontend: Frontend, shutdown_seconds: float) -> None:
        super().__init__(config)
        self._frontend, self._shutdown_seconds = frontend, shutdown_seconds

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True stops the server: a signal came, or the engine was given up."""
        return await super().on_tick(counter) or self._frontend.failure is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, wait for the answers that run."""
        asyncio.get_running_loop().call_later(self._shutdown_seconds, self._frontend.abort_all)
        await super().shutdown(sockets)


def reserve_port(config: ServerConfig) -> socket.socket:
    """The listening socket. Raises ConfigError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in config.server_name else socket.AF_INET
    # asyncio turns Nagle's delay (40 ms a chunk) off only for sockets that say they are TCP
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((config.server_name, config.server_port))
        sock.listen(2048)
    except (OSError, UnicodeError) as e:
        sock.close()
        raise ConfigError(_cannot_listen(config, e)) from e
    return sock


def _cannot_listen(config: ServerConfig, error: Exception) -> str:
    where = f"{config.server_name}:{config.server_port}"
    number = getattr(error, "errno", None)
    if number == errno.EADDRINUSE:
        return f"port {config.server_port} of {config.server_name} is in use; stop the other program or choose another --server-port"
    if number == errno.EACCES:
        return f"no permission to listen on {where}; choose a --server-port above 1023"
    return f"cannot listen on {where}: {error}; check --server-name"


def url_of(sock: socket.socket, config: ServerConfig) -> str:
    """What to type into a browser on this machine."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{'https' if config.ssl else 'http'}://{host}:{port}"


def build_server(frontend: Frontend, config: ServerConfig) -> HttpServer:
    """A uvicorn server of the app, not yet running; `serve(sockets=[...])` or `run(sockets=[...])` starts it."""
    return HttpServer(
        uvicorn.Config(
            create_app(frontend, config),
            log_level="warning",
            access_log=False,
            log_config=None,
            lifespan="off",
            ws="none",
            timeout_keep_alive=5,
            timeout_graceful_shutdown=round(config.shutdown_seconds) + ABORT_SECONDS,
            ssl_keyfile=config.ssl_keyfile if config.ssl else None,
            ssl_certfile=config.ssl_certfile if config.ssl else None,
            http=BoundedHttpProtocol,
        ),
        frontend,
        config.shutdown_seconds,
    )


def supervision_of(config: ServerConfig) -> Supervision:
    """When the engine counts as hung, and how often it is restarted."""
    return Supervision(config.engine_stall_seconds, config.max_engine_restarts)


def run_server(frontend: Frontend, config: ServerConfig, sock: socket.socket | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM; closes the frontend. `sock` comes from `reserve_port`, called before the model was loaded.

    Raises EngineError when the engine failed too often and was given up.
    """
    sock = sock or reserve_port(config)
    log.setup(config.log_level)
    logging.getLogger("lmdeploy.access").setLevel(logging.INFO)
    url = url_of(sock, config)
    try:
        server = build_server(frontend, config)
        _tell(frontend, config, url)
        server.run(sockets=[sock])
        failure = frontend.failure
    finally:
        frontend.close()
        sock.close()
    if failure:
        raise EngineError(f"the server has stopped: {failure}")


def _tell(frontend: Frontend, config: ServerConfig, url: str) -> None:
    """The lines that a user waits for; always shown, whatever the log level."""
    told = logging.getLogger("lmdeploy.access")
    told.info("serving %s; open %s in a browser for the API, stop with Ctrl-C", config.model_name or frontend.model_name, url)
    if config.server_name in ("0.0.0.0", "::") and not config.api_keys:
        told.warning("every machine of your network can use this server; --api-keys protects it, --server-name 127.0.0.1 hides it")


def serve_model(
    model_path: str | None, engine_config: EngineConfig, server_config: ServerConfig, chat_template_config: ChatTemplateConfig | None = None
) -> None:
    """Port, model (in a process of its own), server: all of `lmdeploy serve api_server`."""
    sock = reserve_port(server_config)
    try:
        frontend = Frontend.open(
            model_path,
            engine_config,
            chat_template_config,
            separate_process=True,
            model_name=server_config.model_name,
            supervision=supervision_of(server_config),
        )
    except BaseException:
        sock.close()
        raise
    run_server(frontend, server_config, sock)
