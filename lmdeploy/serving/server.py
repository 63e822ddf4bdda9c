"""Runs the HTTP server: what can be wrong is told before a model is loaded, then uvicorn until a signal.

SIGTERM or Ctrl-C: the server drains. It still listens, but begins nothing new; when the running answers have ended, or after
`shutdown_seconds`, it goes, the engine is closed and its process is gone. A second signal ends it at once. SIGHUP: keys and
certificate are read again.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from lmdeploy import log
from lmdeploy.config import ChatTemplateConfig, EngineConfig
from lmdeploy.errors import ConfigError, EngineError
from lmdeploy.frontend import Frontend
from lmdeploy.log import get_logger
from lmdeploy.serving.app import create_app
from lmdeploy.serving.connections import ConnectionLimits, connection_class
from lmdeploy.serving.opening import read_certificate, reserve_port, supervision_of, url_of
from lmdeploy.serving.options import ServerConfig
from lmdeploy.serving.service import Service

logger = get_logger(__name__)
told = get_logger("lmdeploy.access")  # lines that are always shown, whatever the log level

Handler = Callable[[int, FrameType | None], None]

#: how long aborted answers may take to end before their connections are cut
ABORT_SECONDS = 3.0
#: and how long those whose connection was cut
CUT_SECONDS = 1.0
#: who presses Ctrl-C waits no longer than this
INTERRUPT_SECONDS = 5.0
#: open files that are not clients' connections: model, engine, libraries
SPARE_FILES = 128


class SignalServer(uvicorn.Server):
    """uvicorn that returns from `run` after a signal, instead of dying of it, so that what it used can be closed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Only the main thread can catch signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, handler) for number, handler in self.handlers().items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handlers(self) -> dict[int, Handler]:
        """What is done at which signal."""
        return {signal.SIGINT: self._stop, signal.SIGTERM: self._stop}

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.handle_exit(number, frame)


class HttpServer(SignalServer):
    """The API's server: drains after a signal, then returns from `run`."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self._reload = self._told = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on `sockets`. uvicorn's own does the same, but lets a TLS handshake take a minute; ours has the time that headers have."""

        def connect() -> asyncio.Protocol:
            protocol: asyncio.Protocol = self.config.http_protocol_class(config=self.config, server_state=self.server_state, app_state={})  # type: ignore[call-arg]
            return protocol

        seconds = self.service.config.receive_timeout if self.config.ssl else None
        loop, self.servers = asyncio.get_running_loop(), []
        for sock in sockets or ():
            self.servers.append(await loop.create_server(connect, sock=sock, ssl=self.config.ssl, backlog=self.config.backlog, ssl_handshake_timeout=seconds))
        self.started = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the server: it has drained, or the engine was given up."""
        lifecycle = self.service.lifecycle
        if self._reload:
            self._reload = False
            self._read_again()
        if lifecycle.draining and not self._told:
            self._told = True
            if lifecycle.active:
                told.info("shutting down; %d requests are being finished, a second signal ends them", lifecycle.active)
        self.should_exit = self.should_exit or lifecycle.over or self.service.frontend.failure is not None
        return await super().on_tick(counter)

    def _read_again(self) -> None:
        """After SIGHUP: keys and certificate. Both are read and checked before either is taken, so what is wrong with one leaves both as they were."""
        try:
            take_keys = self.service.keys.read_again()
            certificate = read_certificate(self.service.config)
        except ConfigError as e:
            told.error("SIGHUP: %s; nothing was changed", e)
            return
        if isinstance(self.config.ssl, ssl.SSLContext) and certificate is not None:
            # called at every handshake, whether or not the client names a server; loading into the context in use could fail half way
            self.config.ssl.sni_callback = lambda connection, _name, _context: setattr(connection, "context", certificate)
        told.info("SIGHUP: %d keys", take_keys())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, end what still runs (its readers get finish_reason 'abort'), and cut what does not end."""
        self.service.lifecycle.drain(0)
        for listener in [*self.servers, *(sockets or ())]:
            listener.close()
        self.service.admission.close()
        self.service.light_admission.close()
        self.service.frontend.abort_all()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await self._until_quiet(ABORT_SECONDS, unless_forced=True)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await self._until_quiet(CUT_SECONDS)  # what had a client finds it gone and ends itself
        for task in list(self.server_state.tasks):
            task.cancel()
        if self.service.tracing is not None:
            await asyncio.to_thread(self.service.tracing.close)

    async def _until_quiet(self, seconds: float, *, unless_forced: bool = False) -> None:
        deadline = time.monotonic() + seconds
        while (self.server_state.connections or self.server_state.tasks) and time.monotonic() < deadline and not (unless_forced and self.force_exit):
            await asyncio.sleep(0.02)

    def handlers(self) -> dict[int, Handler]:
        """SIGHUP too: on Windows there is none."""
        hang_up: dict[int, Handler] = {signal.SIGHUP: self._hang_up} if hasattr(signal, "SIGHUP") else {}
        return {**super().handlers(), **hang_up}

    def _stop(self, number: int, frame: FrameType | None) -> None:
        config = self.service.config
        if self.service.lifecycle.draining:
            self.should_exit = self.force_exit = True
        else:
            self.service.lifecycle.drain(min(config.shutdown_seconds, INTERRUPT_SECONDS) if number == signal.SIGINT else config.shutdown_seconds)

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        """With a file to read again SIGHUP asks for that; without one it is what it always was, the end of the terminal."""
        config = self.service.config
        if config.api_keys_file or config.admin_key_file or config.ssl:
            self._reload = True
        else:
            self._stop(number, frame)


def build_server(frontend: Frontend, config: ServerConfig) -> HttpServer:
    """A uvicorn server of the app, not yet running; `serve(sockets=[...])` or `run(sockets=[...])` starts it."""
    app = create_app(frontend, config)
    limits = ConnectionLimits(_affordable(config.max_connections), config.receive_timeout, config.send_timeout)
    uvicorn_config = uvicorn.Config(
        app,
        http=connection_class(limits),
        ws="none",
        log_level="warning",
        access_log=False,
        log_config=None,
        lifespan="off",
        proxy_headers=bool(config.forwarded_allow_ips),  # else any local program may say that it is somebody else
        forwarded_allow_ips=config.forwarded_allow_ips,
        timeout_keep_alive=round(config.keep_alive_seconds),
        ssl_keyfile=config.ssl_keyfile if config.ssl else None,
        ssl_certfile=config.ssl_certfile if config.ssl else None,
    )
    return HttpServer(uvicorn_config, app.state.service)


def _affordable(connections: int) -> int:
    """As many connections as asked for, or as the system lets this process open; its limit is raised as far as allowed."""
    if sys.platform == "win32":  # has no such limit
        return connections
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return connections
    logger.warning("max_connections=%d is more than the system allows (ulimit -n is %d); %d are used", connections, soft, max(soft - SPARE_FILES, 1))
    return max(soft - SPARE_FILES, 1)


def run_server(frontend: Frontend, config: ServerConfig, sock: socket.socket | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM; closes the frontend. `sock` comes from `reserve_port`, called before the model was loaded.

    Raises EngineError when the engine failed too often and was given up.
    """
    sock = sock or reserve_port(config)
    log.setup(config.log_level, config.log_format)
    logging.getLogger("lmdeploy.access").setLevel(logging.INFO)
    url = url_of(sock, config)
    try:
        server = build_server(frontend, config)
        announce(server.service, url)
        gc.freeze()  # what is loaded stays: looking through it for garbage would stop all streams for 0.2 s, now and then
        server.run(sockets=[sock])
        failure = frontend.failure
    finally:
        gc.unfreeze()
        frontend.close()
        sock.close()
    if failure:
        raise EngineError(f"the server has stopped: {failure}")


def announce(service: Service, url: str) -> None:
    """The lines that a user waits for; always shown, whatever the log level."""
    told.info("serving %s; open %s in a browser for the API, stop with Ctrl-C", service.model_name, url)
    if service.config.server_name in ("0.0.0.0", "::") and not service.keys.needed:
        told.warning("every machine of your network can use this server; --api-keys-file or --api-keys protects it, --server-name 127.0.0.1 hides it")


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
