"""`ServerConfig`: every option of the HTTP server; command-line flags are made from it, like those of the engine.

Imports neither torch nor fastapi: `lmdeploy --help` reads it.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lmdeploy.checked import CheckedOptions, above, at_least, between, option, remembers_given
from lmdeploy.errors import ConfigError
from lmdeploy.log import FORMATS, LEVELS

DEFAULT_PORT = 23333
#: names in serving/parsers/registry.py
TOOL_PARSERS = ("none", "internlm", "intern-s1", "llama3", "llama3_1", "hermes", "qwen", "qwen2d5", "qwen3", "mistral", "json")
REASONING_PARSERS = ("none", "deepseek-r1", "qwen-qwq", "qwen3", "intern-s1")


def _secret(help: str, *, flag: bool = True) -> Any:
    """An option that is never shown."""
    return field(default=None, repr=False, metadata={"help": help, "check": None, "choices": None, "flag": flag})


def _words(help: str) -> Any:
    """An option that is a list and means everything when not given."""
    everything: Callable[[], list[str]] = lambda: ["*"]  # noqa: E731
    return field(default_factory=everything, metadata={"help": help, "check": None, "choices": None, "flag": True})


@remembers_given
@dataclass(frozen=True)
class ServerConfig(CheckedOptions):
    """How to serve one model over HTTP. Raises ConfigError naming option, value and limit."""

    server_name: str = option("127.0.0.1", "address to listen on; 0.0.0.0 = every network of this machine")
    server_port: int = option(DEFAULT_PORT, "port to listen on; 0 = any free one", check=between(0, 65535))
    allow_origins: list[str] | None = option(
        None, "web pages that may call the server (CORS), or *; default: with API keys every page, without keys those of this machine only"
    )
    allow_credentials: bool = option(False, "let those pages send cookies and keys")
    allow_methods: list[str] = _words("HTTP methods for those pages")
    allow_headers: list[str] = _words("HTTP headers for those pages")
    model_name: str | None = option(None, "the model's name in the API; default: the path as given")
    api_keys: list[str] | None = _secret("accepted keys (Authorization: Bearer KEY, or x-api-key: KEY); default: no key needed")
    api_keys_file: str | None = option(None, "file of more keys, one a line, as NAME:KEY or KEY; SIGHUP reads it again")
    admin_key: str | None = _secret("key of the admin routes (sleep, weights, terminate); default: nobody may call them")
    admin_key_file: str | None = option(None, "file that holds the admin key instead; SIGHUP reads it again")
    ssl: bool = option(False, "serve https; needs --ssl-keyfile and --ssl-certfile, or the environment variables SSL_KEYFILE and SSL_CERTFILE")
    ssl_keyfile: str | None = option(None, "private key of --ssl, PEM without a password")
    ssl_certfile: str | None = option(None, "certificate chain of --ssl, PEM")
    log_level: str = option("WARNING", "how much is logged", choices=LEVELS)
    log_format: str = option("text", "json: each line of the log is a JSON object", choices=FORMATS)
    max_log_len: int | None = option(
        None, "with --log-level INFO, log this many characters of each prompt; default: prompts are never logged", check=at_least(0)
    )
    disable_fastapi_docs: bool = option(False, "no Swagger page and no /openapi.json")
    enable_metrics: bool = option(True, "serve /metrics")
    disable_metrics: bool = option(False, "no /metrics")
    otlp_endpoint: str | None = option(None, "send traces to this OpenTelemetry collector, such as http://HOST:4318; needs lmdeploy[otel]")
    max_concurrent_requests: int | None = option(
        None, "requests worked on at a time; more wait in the server, keys taking turns; default: max_batch_size and a quarter", check=at_least(1)
    )
    max_queue: int = option(1024, "requests that may wait for their turn; one more is refused with 503", check=at_least(0))
    max_queue_seconds: float = option(120.0, "a request that has waited this long is refused with 503", check=above(0))
    max_concurrent_per_key: int | None = option(
        None, "requests of one API key (without keys: of one address) that run or wait; one more is refused with 429; default: no limit", check=at_least(1)
    )
    request_timeout: float = option(
        600.0, "seconds that a request may take, waiting included; then it ends with 504, a stream with an error event", check=above(0)
    )
    max_connections: int = option(4096, "open connections; one more is refused", check=at_least(1))
    receive_timeout: float = option(20.0, "seconds in which a request's headers must come; a body must bring 1 KiB a second", check=above(0))
    send_timeout: float = option(30.0, "seconds after which a client that does not read its answer is cut off", check=above(0))
    keep_alive_seconds: float = option(65.0, "an idle connection is closed after this; longer than load balancers' usual 60", check=above(0))
    forwarded_allow_ips: list[str] | None = option(
        None, "addresses or networks of reverse proxies whose X-Forwarded-For tells the client's address; default: nobody's header is believed"
    )
    allow_terminate_by_client: bool = option(False, "let clients without the admin key stop the server by GET /terminate")
    enable_abort_handling: bool = option(False, "let clients without the admin key stop requests by POST /abort_request")
    generation_config: str = option(
        "auto", "sampling defaults: auto = the model's generation_config.json, lmdeploy = the library's", choices=("auto", "lmdeploy")
    )
    tool_call_parser: str | None = option(
        None, f"how the model writes tool calls: {', '.join(TOOL_PARSERS)}; default: as its chat template says; none = calls stay text", choices=TOOL_PARSERS
    )
    reasoning_parser: str | None = option(
        None, f"how the model marks its reasoning: {', '.join(REASONING_PARSERS)}; default: as its chat template says", choices=REASONING_PARSERS
    )
    max_body_mib: int = option(16, "largest request body in MiB", check=between(1, 1024))
    allowed_media_domains: list[str] | None = option(None, "hosts, with their subdomains, that pictures may be fetched from; default: every public host")
    allowed_weights_path: str | None = option(None, "folder below which POST /update_weights may name new weights; default: none are taken")
    allowed_media_path: str | None = option(None, "folder below which requests may name pictures as file:// or paths; default: no local files")
    share_prefix_cache: bool = option(
        False, "let requests of different API keys share cached prompt beginnings; a client could then tell by the time it takes what others have sent"
    )
    max_sessions: int = option(1000, "conversations that /v1/chat/interactive keeps; the oldest is forgotten", check=at_least(1))
    engine_stall_seconds: float | None = option(
        None,
        "restart the engine when it computes on one step for so long, in seconds; default: 120, or 50 times the largest step measured at start-up if that is more",
        check=above(0),
    )
    max_engine_restarts: int = option(5, "restarts of a failed engine within ten minutes; then the server ends with an error", check=at_least(0))
    shutdown_seconds: float = option(25.0, "time that running requests get after SIGTERM; after Ctrl-C at most 5", check=above(0))
    api_key_lines: list[str] | None = _secret("lines as in api_keys_file, from the environment", flag=False)

    def __post_init__(self) -> None:
        self._check(lambda _, text: ConfigError(f"{type(self).__name__}: {text}"))
        if self.ssl and not (self.ssl_keyfile and self.ssl_certfile):
            raise ConfigError("ssl needs a key and a certificate: give --ssl-keyfile and --ssl-certfile, or set SSL_KEYFILE and SSL_CERTFILE")
        if self.api_keys is not None and not all(isinstance(k, str) and k for k in self.api_keys):
            raise ConfigError("api_keys must be non-empty strings")
        if self.api_keys is not None and not self.api_keys:
            raise ConfigError("api_keys is given but holds no key; leave it out to let everybody in")
        if self.admin_key == "":
            raise ConfigError("admin_key is empty; leave it out to have no admin routes")
        if self.admin_key and self.admin_key_file:
            raise ConfigError("admin_key and admin_key_file are both given; one is enough")
        for text in self.forwarded_allow_ips or ():
            try:
                ipaddress.ip_network(text)
            except ValueError as e:
                raise ConfigError(f"forwarded_allow_ips: {text!r} is no address and no network such as 10.0.0.0/8") from e
        for name in ("allowed_media_path", "allowed_weights_path"):
            folder = getattr(self, name)
            if folder is not None and not os.path.isdir(folder):
                raise ConfigError(f"{name} {folder} is no folder")
        if self.allow_credentials and "*" in (self.allow_origins or ["*"]):
            raise ConfigError("allow_credentials with allow_origins='*' would let any web page act for a user; name the origins")
