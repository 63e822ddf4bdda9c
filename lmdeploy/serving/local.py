"""`lmdeploy.serve` and `lmdeploy.client`: a server for as long as this Python program runs, and a client of any server.

The engine has a process of its own, the HTTP server a thread of this one; `close()` (or the end of a `with`) ends both.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence

from lmdeploy import log
from lmdeploy.config import BACKENDS, ChatTemplateConfig, EngineConfig, PytorchEngineConfig, TurbomindEngineConfig
from lmdeploy.errors import ConfigError
from lmdeploy.frontend import Frontend
from lmdeploy.serving.client import APIClient
from lmdeploy.serving.opening import reserve_port, url_of
from lmdeploy.serving.options import DEFAULT_PORT, ServerConfig
from lmdeploy.serving.server import build_server


class LocalServer(APIClient):
    """A running server and its client in one; close it to stop the server and free the model."""

    def __init__(self, frontend: Frontend, config: ServerConfig, sock: socket.socket) -> None:
        super().__init__(url_of(sock, config), config.api_keys[0] if config.api_keys else None)
        self._frontend, self._sock = frontend, sock
        self._server = build_server(frontend, config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [sock]}, name="lmdeploy-http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering, then stop the engine; may be called twice."""
        super().close()
        self._server.should_exit = True
        self._thread.join()
        self._frontend.close()
        self._sock.close()


def client(api_server_url: str = f"http://127.0.0.1:{DEFAULT_PORT}", api_key: str | None = None) -> APIClient:
    """A client of a running server."""
    return APIClient(api_server_url, api_key)


def serve(
    model_path: str | None = None,
    model_name: str | None = None,
    backend: str = "turbomind",
    backend_config: EngineConfig | None = None,
    chat_template_config: ChatTemplateConfig | None = None,
    *,
    server_name: str = "127.0.0.1",
    server_port: int = DEFAULT_PORT,
    log_level: str = "WARNING",
    api_keys: str | Sequence[str] | None = None,
    ssl: bool = False,
) -> LocalServer:
    """Start a server (as `lmdeploy serve api_server` does) and return a client of it that answers already.

    Raises ConfigError, CheckpointError or EngineError, one clear line each.
    """
    log.setup(log_level)
    if backend not in BACKENDS:
        raise ConfigError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if ssl:
        raise ConfigError("serve(ssl=True) is not available; `lmdeploy serve api_server --ssl` is")
    keys = [api_keys] if isinstance(api_keys, str) else list(api_keys) if api_keys else None
    config = ServerConfig(server_name=server_name, server_port=server_port, model_name=model_name, api_keys=keys, log_level=log_level.upper())
    engine = backend_config or (PytorchEngineConfig() if backend == "pytorch" else TurbomindEngineConfig())
    sock = reserve_port(config)
    try:
        frontend = Frontend.open(model_path, engine, chat_template_config, separate_process=True, model_name=model_name)
    except BaseException:
        sock.close()
        raise
    server = LocalServer(frontend, config, sock)
    try:
        server.health()
    except BaseException:
        server.close()
        raise
    return server
