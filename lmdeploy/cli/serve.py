"""`lmdeploy serve api_server` and `lmdeploy serve api_client`: one model over HTTP, and the terminal conversation with it.

The port is taken before the model is loaded, so a used one costs no waiting. The engine runs in a process of its own.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from lmdeploy import log
from lmdeploy.cli.chat import add_generation_flags, generation_config
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
from lmdeploy.cli.startup import EMBEDDED, describe
from lmdeploy.cli.terminal import Conversation, Message, open_reader, open_screen
from lmdeploy.errors import EngineError
from lmdeploy.messages import Response
from lmdeploy.serving.options import ServerConfig

if TYPE_CHECKING:
    from lmdeploy.serving.client import APIClient

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
    if keys := os.environ.get("LMDEPLOY_API_KEYS"):
        values["api_key_lines"] = keys.replace(",", "\n").splitlines()
    if "admin_key_file" not in values and (key := os.environ.get("LMDEPLOY_ADMIN_KEY")):
        values.setdefault("admin_key", key)
    return ServerConfig(**values)


def run_api_server(args: argparse.Namespace) -> int:
    """Take the port, load the model, tell what it takes, serve until Ctrl-C or SIGTERM."""
    server, engine, template = server_config(args), engine_config(args), template_config(args)
    log.setup(server.log_level, server.log_format)
    from lmdeploy.frontend import Frontend
    from lmdeploy.serving.server import reserve_port, run_server, supervision_of

    sock = reserve_port(server)
    try:
        if args.model_path is None:
            print(EMBEDDED, flush=True)
        frontend = Frontend.open(args.model_path, engine, template, separate_process=True, model_name=server.model_name, supervision=supervision_of(server))
    except BaseException:
        sock.close()
        raise
    print(describe(frontend, engine), flush=True)
    run_server(frontend, server, sock)
    return 0


def add_api_client_flags(parser: argparse.ArgumentParser) -> None:
    """Where the server is, and how it shall answer."""
    parser.add_argument("api_server_url", metavar="URL", help="address of the server; http:// may be left out")
    parser.add_argument("--api-key", metavar="KEY", help="sent as `Authorization: Bearer KEY`")
    parser.add_argument("--session-id", type=int, metavar="INT", help="no effect: the history is kept on this side and sent with each message")
    add_generation_flags(parser)
    parser.add_argument("--meta-instruction", metavar="TEXT", help="the system prompt (default: that of the server's template)")


def run_api_client(args: argparse.Namespace) -> int:
    """Talk until the end of input."""
    log.setup(getattr(args, "log_level", "WARNING"))
    generation = generation_config(args)
    screen = open_screen()
    from lmdeploy.serving.client import APIClient

    if "://" not in args.api_server_url:
        screen.note(f"using http://{args.api_server_url}")
    with APIClient(args.api_server_url, getattr(args, "api_key", None)) as client:
        models = client.available_models
        if not models:
            raise EngineError(f"{client.url} serves no model")
        screen.note(f"talking with {models[0]} at {client.url}")
        system = getattr(args, "meta_instruction", None)
        Conversation(RemoteModel(client, models[0], request_fields(generation), system), open_reader(screen), screen).run()
    return 0


def request_fields(generation: Any) -> dict[str, Any]:
    """The request's sampling fields for a GenerationConfig."""
    return {
        "max_tokens": generation.max_new_tokens,
        "temperature": generation.temperature if generation.samples else 0.0,
        "top_p": generation.top_p,
        "top_k": generation.top_k,
        "min_p": generation.min_p,
        "repetition_penalty": generation.repetition_penalty,
        "ignore_eos": generation.ignore_eos,
        "stop": generation.stop_words,
        "seed": generation.random_seed,
    }


class RemoteModel:
    """Answers with the model of a server."""

    def __init__(self, client: APIClient, model: str, fields: dict[str, Any], system: str | None) -> None:
        self._client, self._model, self._fields = client, model, fields
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    def __call__(self, messages: list[Message]) -> Generator[Response, None, None]:
        """Increments of the answer to the last message; the last one carries the server's own count of tokens."""
        events = self._client.chat_completions_v1(self._model, self._system + messages, stream=True, stream_options={"include_usage": True}, **self._fields)
        count, prompt, finish = 0, 0, None
        for event in events:
            choice = (event.get("choices") or [{}])[0]
            usage = event.get("usage") or {}
            text = (choice.get("delta") or {}).get("content") or ""
            count = usage.get("completion_tokens", count + bool(text))
            prompt, finish = usage.get("prompt_tokens", prompt), choice.get("finish_reason") or finish
            if text or finish or usage:
                yield Response(text=text, generate_token_len=count, input_token_len=prompt, finish_reason=finish)
