"""`lmdeploy serve gradio`: the web chat, over a server that runs already or with a model of its own.

With a model, the API's server is started too, on a free loopback port with a random key: the page is the same client of it in both cases.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import socket
from typing import TYPE_CHECKING, Any

from lmdeploy import log
from lmdeploy.cli.flags import add_config_flags, add_engine_flags, add_template_flags, engine_config, template_config, truth
from lmdeploy.cli.startup import EMBEDDED, describe
from lmdeploy.errors import ConfigError
from lmdeploy.serving.options import ServerConfig

if TYPE_CHECKING:
    from lmdeploy.serving.local import LocalServer

DEFAULT_PORT = 6006
#: the first version whose page asks nothing of other machines, as far as we tried
GRADIO = (6, 31)
_ADDRESS = re.compile(r"https?://.+|[\w.-]+:\d{1,5}(/.*)?|\[[0-9a-fA-F:]+\]:\d{1,5}(/.*)?")
#: flags that mean something without a model, too
_PAGE_FLAGS = {"model_path_or_server", "server_name", "server_port", "share", "api_key", "log_level", "debug"}


def add_gradio_flags(parser: argparse.ArgumentParser) -> None:
    """Page, engine and template."""
    parser.add_argument(
        "model_path_or_server",
        nargs="?",
        default=None,
        metavar="MODEL_OR_URL",
        help="a model (folder or hub id), or the address of a server (http://HOST:PORT) (default: the embedded tiny-internlm2-chat)",
    )
    page = add_config_flags(parser, ServerConfig, title="Page", only=("server_name", "server_port"), defaults={"server_port": DEFAULT_PORT})
    page.add_argument(
        "--share", nargs="?", const=True, type=truth, metavar="True|False", help="also give the page a public address, through gradio.live (default: False)"
    )
    page.add_argument("--api-key", metavar="KEY", help="key of the server, with an address only")
    page.add_argument("--model-name", metavar="NAME", help="the model's name on the page; default: the path as given")
    add_engine_flags(parser)
    add_template_flags(parser)


def run_gradio(args: argparse.Namespace) -> int:
    """Take the page's port, start or find the server, serve the page until Ctrl-C or SIGTERM."""
    level = getattr(args, "log_level", "WARNING")
    log.setup(level)
    target = args.model_path_or_server
    remote = is_address(target)
    _check(args, remote=remote)
    config = ServerConfig(server_name=getattr(args, "server_name", "127.0.0.1"), server_port=getattr(args, "server_port", DEFAULT_PORT), log_level=level)
    _need_gradio()
    from lmdeploy.serving.opening import reserve_port
    from lmdeploy.serving.ui_chat import ChatServer

    with reserve_port(config) as sock:
        if remote:
            _serve(ChatServer(target, getattr(args, "api_key", None)), config, sock, share=getattr(args, "share", False))
        else:
            key = secrets.token_urlsafe(32)
            with _start(args, level, key) as local:
                _serve(ChatServer(local.url, key), config, sock, share=getattr(args, "share", False))
    return 0


def is_address(target: str | None) -> bool:
    """Whether `target` is a server's address: http(s)://..., or HOST:PORT where no such folder exists."""
    return target is not None and _ADDRESS.fullmatch(target) is not None and not os.path.exists(target)


def _check(args: argparse.Namespace, *, remote: bool) -> None:
    if remote:
        idle = sorted(name for name in vars(args) if name not in _PAGE_FLAGS)
        if idle:
            flags = ", ".join("--" + name.replace("_", "-") for name in idle)
            raise ConfigError(f"{flags}: no effect on the server at {args.model_path_or_server}; give it to `lmdeploy serve api_server` there")
    elif hasattr(args, "api_key"):
        raise ConfigError("--api-key is the key of a server; with a model the page needs none: leave it out")


def _need_gradio() -> None:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing is told to anybody
    os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", "1000000")  # no table of all events is made after each event, for a page that is not served
    try:
        import gradio
    except ImportError as e:
        raise ConfigError("the web page needs gradio: pip install 'lmdeploy[ui]'") from e
    if tuple(int(part) for part in re.findall(r"\d+", gradio.__version__)[:2]) < GRADIO:
        raise ConfigError(f"the web page needs gradio {GRADIO[0]}.{GRADIO[1]} or newer, not {gradio.__version__}: pip install -U 'lmdeploy[ui]'")


def _start(args: argparse.Namespace, level: str, key: str) -> LocalServer:
    """The API's server of the model, for this page alone."""
    engine, template = engine_config(args), template_config(args)
    from lmdeploy.frontend import Frontend
    from lmdeploy.serving.local import LocalServer
    from lmdeploy.serving.opening import reserve_port

    if args.model_path_or_server is None:
        print(EMBEDDED, flush=True)
    name = getattr(args, "model_name", None)
    inner = ServerConfig(server_port=0, model_name=name, api_keys=[key], disable_metrics=True, disable_fastapi_docs=True, log_level=level)
    sock = reserve_port(inner)
    try:
        frontend = Frontend.open(args.model_path_or_server, engine, template, separate_process=True, model_name=name)
    except BaseException:
        sock.close()
        raise
    print(describe(frontend, engine), flush=True)
    return LocalServer(frontend, inner, sock)


def _serve(chat: Any, config: ServerConfig, sock: socket.socket, *, share: bool) -> None:
    from lmdeploy.serving.opening import url_of
    from lmdeploy.serving.ui_server import build_page_server, share_page

    server = build_page_server(chat)
    print(f"open {url_of(sock, config)} in a browser; stop with Ctrl-C", flush=True)
    if share:
        print(f"open {share_page(sock)} anywhere: everybody who knows this address can use the page", flush=True)
    elif config.server_name in ("0.0.0.0", "::"):
        print("every machine of your network can use this page; --server-name 127.0.0.1 hides it", flush=True)
    server.run(sockets=[sock])
