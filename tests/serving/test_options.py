"""ServerConfig: defaults, checks, and that reading it is cheap."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from lmdeploy.errors import ConfigError
from lmdeploy.serving.options import ServerConfig


def test_the_default_is_this_machine_only() -> None:
    config = ServerConfig()
    assert (config.server_name, config.server_port, config.api_keys) == ("127.0.0.1", 23333, None)
    assert ServerConfig(server_port=1).given == {"server_port"}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"server_port": 65536}, "server_port.*65535"),
        ({"max_concurrent_requests": 0}, "max_concurrent_requests"),
        ({"log_level": "LOUD"}, "log_level.*DEBUG"),
        ({"ssl": True}, "SSL_KEYFILE"),
        ({"api_keys": [""]}, "api_keys"),
        ({"allow_credentials": True}, "allow_origins"),
        ({"server_prot": 1}, "server_port"),
        ({"max_body_mib": 0}, "max_body_mib"),
        ({"shutdown_seconds": 0}, "shutdown_seconds"),
        ({"forwarded_allow_ips": ["*"]}, "forwarded_allow_ips.*network"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ServerConfig(**options)


def test_reading_the_options_imports_no_server_and_no_torch() -> None:
    code = "import sys, lmdeploy.serving.options; print([m for m in ('torch', 'fastapi', 'uvicorn', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
