"""What a server does before a model is loaded: it takes the port and finds out what is wrong with keys and certificate. Imports no HTTP library, which takes long."""

from __future__ import annotations

import errno
import socket
import ssl
from typing import TYPE_CHECKING

from lmdeploy.engine.launching import Launched
from lmdeploy.errors import ConfigError
from lmdeploy.serving.keys import KeyRing
from lmdeploy.serving.options import ServerConfig
from lmdeploy.serving.tracing import check_endpoint

if TYPE_CHECKING:
    from lmdeploy.engine.supervisor import Supervision


def read_certificate(config: ServerConfig) -> ssl.SSLContext | None:
    """A context with the certificate and its key; None without --ssl. Raises ConfigError when they cannot be used."""
    if not config.ssl:
        return None
    for name, path in (("ssl_certfile", config.ssl_certfile), ("ssl_keyfile", config.ssl_keyfile)):
        try:
            with open(str(path), "rb"):
                pass
        except OSError as e:
            raise ConfigError(f"{name} {path} cannot be read: {e.strerror}") from e
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(str(config.ssl_certfile), config.ssl_keyfile, password=lambda: "")  # never asks the terminal
    except (OSError, ValueError) as e:  # an SSLError is an OSError
        what = "do not belong together" if "KEY_VALUES_MISMATCH" in str(e) else "are not a certificate and its key in PEM form without a password"
        raise ConfigError(f"ssl_certfile {config.ssl_certfile} and ssl_keyfile {config.ssl_keyfile} {what}") from e
    return context


def reserve_port(config: ServerConfig) -> socket.socket:
    """The listening socket. Raises ConfigError when the address cannot be had, or keys or certificate cannot be used."""
    KeyRing(config)
    read_certificate(config)
    check_endpoint(config.otlp_endpoint)
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


def supervision_of(config: ServerConfig, launched: Launched | None = None) -> Supervision:
    """When the engine counts as hung, and how often it is restarted; `launched`: its first process, where there is one."""
    from lmdeploy.engine.supervisor import Supervision  # the engine's own imports, which the port need not wait for

    return Supervision(config.engine_stall_seconds, config.max_engine_restarts, launched)
