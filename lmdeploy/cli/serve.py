"""`lmdeploy serve api_server`: one model over HTTP.

The port is taken before the model is loaded, so a used one costs no waiting. The engine runs in a process of its own, which is started as soon as the
options are known to be right: it needs most of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import TYPE_CHECKING, Any

from lmdeploy import log
from lmdeploy.cli.flags import (
    add_config_flags,
    add_engine_flags,
    add_model_flag,
    add_template_flags,
    add_unsupported_flags,
    config_values,
    engine_config,
    refuse_unsupported,
    template_config,
)
from lmdeploy.cli.startup import EMBEDDED, advised, describe
from lmdeploy.config import ChatTemplateConfig, EngineConfig
from lmdeploy.engine.launching import Launched, launch, widen_file_table
from lmdeploy.serving.opening import reserve_port, supervision_of
from lmdeploy.serving.options import ServerConfig

if TYPE_CHECKING:
    from lmdeploy.frontend import Frontend

#: flags of the public surface that the server cannot obey yet: name -> its neutral values
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "qos_config_path": ("",), "proxy_url": (),
}  # fmt: skip


def add_api_server_flags(parser: argparse.ArgumentParser) -> None:
    """Server, engine and template."""
    add_model_flag(parser)
    group = add_config_flags(parser, ServerConfig, title="Server", skip=("log_level",))
    add_unsupported_flags(group, UNSUPPORTED)
    add_engine_flags(parser)
    add_template_flags(parser)


def server_config(args: argparse.Namespace) -> ServerConfig:
    """The ServerConfig of the flags; keys and certificates may come from the environment instead, where `ps` does not show them."""
    refuse_unsupported(args, UNSUPPORTED)
    values = config_values(args, ServerConfig)
    if values.get("ssl"):
        values = {"ssl_keyfile": os.environ.get("SSL_KEYFILE"), "ssl_certfile": os.environ.get("SSL_CERTFILE"), **values}
    if (keys := os.environ.get("LMDEPLOY_API_KEYS")) is not None:  # set and empty is a mistake, which must not open the server
        values["api_key_lines"] = keys.replace(",", "\n").splitlines()
    if "admin_key_file" not in values and (key := os.environ.get("LMDEPLOY_ADMIN_KEY")) is not None:
        values.setdefault("admin_key", key)
    return ServerConfig(**values)


def run_api_server(args: argparse.Namespace) -> int:
    """Take the port, load the model, tell what it takes, serve until Ctrl-C or SIGTERM."""
    server, engine, template = server_config(args), engine_config(args), template_config(args)
    log.setup(server.log_level, server.log_format)
    sock = reserve_port(server)
    widen_file_table(sock.fileno())  # for the connections
    try:
        launched = launch(engine.device_type)  # before all other imports, which are done while the child imports torch
        try:
            with _ended_by_ctrl_c(launched):
                frontend = _open(args.model_path, server, engine, template, launched)
        except BaseException:
            launched.end()
            raise
    except BaseException:
        sock.close()
        raise
    print(describe(frontend, engine), flush=True)
    from lmdeploy.serving.server import run_server

    run_server(frontend, server, sock)
    return 0


@contextlib.contextmanager
def _ended_by_ctrl_c(launched: Launched) -> Iterator[None]:
    """Ctrl-C does not wait until the model is loaded, which other threads do wait for: their process is gone first."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        launched.process.kill()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _open(model_path: str | None, server: ServerConfig, engine: EngineConfig, template: ChatTemplateConfig | None, launched: Launched) -> Frontend:
    from lmdeploy.frontend import Frontend

    if model_path is None:
        print(EMBEDDED, flush=True)
    supervision = supervision_of(server, launched)
    with ThreadPoolExecutor(1) as importer, advised(model_path, engine):
        importer.submit(importlib.import_module, "lmdeploy.serving.server")  # takes long, and so does the model
        return Frontend.open(model_path, engine, template, separate_process=True, model_name=server.model_name, supervision=supervision)
