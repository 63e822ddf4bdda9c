"""`lmdeploy serve api_server` and `serve api_client` as commands: a real server, a real terminal, signals and mistakes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pexpect
import psutil
import pytest

from lmdeploy.cli.flags import FlagParser, engine_config
from lmdeploy.cli.main import main
from lmdeploy.cli.serve import add_api_server_flags, server_config
from lmdeploy.cli.terminal import PROMPT
from lmdeploy.engine import launching
from lmdeploy.errors import ConfigError
from lmdeploy.serving.keys import KeyRing

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "LC_ALL": "C.UTF-8"}
LMDEPLOY = [sys.executable, "-m", "lmdeploy"]


class Server:
    """A started `api_server` on a free port; its output is in a file."""

    def __init__(self, log: Path, *flags: str) -> None:
        self.log = log
        command = [*LMDEPLOY, "serve", "api_server", "--server-port", "0", "--cache-max-entry-count", "100", "--max-prefill-token-num", "256", *flags]
        self.process = subprocess.Popen(command, stdout=log.open("wb"), stderr=subprocess.STDOUT, env=ENVIRONMENT, cwd=ROOT)
        deadline = time.monotonic() + 90
        while not (found := re.search(r"open (http://\S+) in a browser", log.read_text())):
            assert self.process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        self.url = found[1]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the exit code."""
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server with a key, for all tests of the client."""
    started = Server(tmp_path_factory.mktemp("server") / "log", "--api-keys", "sesame", "--model-name", "tiny", "--dtype", "float32")
    yield started
    started.stop()


def client(url: str, *flags: str, data: bytes = b"") -> subprocess.CompletedProcess[str]:
    """`api_client` with its input from a pipe."""
    done = subprocess.run([*LMDEPLOY, "serve", "api_client", url, *flags], input=data, capture_output=True, env=ENVIRONMENT, timeout=60, cwd=ROOT)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_start_tells_settings_memory_bill_and_url(server: Server) -> None:
    log = server.log.read_text()
    for word in ("embedded", "InternLM2ForCausalLM", "float32", "weights", "KV cache", "100 blocks", "total", server.url):
        assert word in log, word
    assert log.index("total") < log.index(server.url), "the URL is the last thing to read"


def test_piped_conversation_keeps_its_history(server: Server) -> None:
    done = client(server.url, "--api-key", "sesame", "--greedy", data=b"My name is Ann.\n\nWhat is my name?\n")
    assert done.returncode == 0, done.stderr
    assert "Ann" in done.stdout.splitlines()[-1]
    assert "talking with tiny" in done.stderr
    assert re.search(r"\[\d+ tokens, .*first after", done.stderr)


def test_terminal_conversation_is_the_same_as_chats(server: Server) -> None:
    child = pexpect.spawn(
        sys.executable,
        ["-m", "lmdeploy", "serve", "api_client", server.url, "--api-key", "sesame", "--ignore-eos", "--max-new-tokens", "1500"],
        env=ENVIRONMENT, encoding="utf-8", timeout=30, dimensions=(40, 160), cwd=str(ROOT),
    )  # fmt: skip
    child.expect_exact(PROMPT)
    child.send("Tell me a story about a dog.\r\r")
    child.expect_exact("dog.")
    child.expect(r"[a-z]+ [a-z]+ [a-z]+ [a-z]+")
    child.sendintr()
    child.expect(r"\[\d+ tokens.*stopped\]")
    child.expect_exact(PROMPT)
    child.send("exit\r")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_scheme_may_be_left_out(server: Server) -> None:
    done = client(server.url.removeprefix("http://"), "--api-key", "sesame", data=b"Count from 1 to 3.")
    assert done.returncode == 0, done.stderr
    assert server.url in done.stderr


@pytest.mark.parametrize(
    ("flags", "data", "part"),
    [([], b"Hi", "key"), (["--api-key", "wrong"], b"Hi", "key"), (["--api-key", "sesame"], b"word " * 4000, "session_len")],
    ids=["no key", "wrong key", "too long"],
)
def test_servers_refusal_is_told_in_its_words(server: Server, flags: list[str], data: bytes, part: str) -> None:
    done = client(server.url, *flags, data=data)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("lmdeploy: error: ")
    assert part in last


@pytest.mark.parametrize("url", ["127.0.0.1:1", "http://no-such-host.invalid", "http://[", "ftp://x"])
def test_a_server_that_is_not_there_is_one_line(url: str) -> None:
    done = client(url, data=b"Hi")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("lmdeploy: error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_stops_server_and_engine_process(number: signal.Signals, tmp_path: Path) -> None:
    server = Server(tmp_path / "log")
    family = psutil.Process(server.process.pid).children(recursive=True)
    assert family, "the engine has a process of its own"
    assert server.stop(number) == 0
    assert psutil.wait_procs(family, timeout=10)[1] == []
    assert "Traceback" not in server.log.read_text()


def test_a_used_port_is_one_line_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [*LMDEPLOY, "serve", "api_server", "/no/model", "--server-port", port], capture_output=True, text=True, env=ENVIRONMENT, timeout=60
        )
    assert done.returncode == 2
    assert "in use" in done.stderr.strip().splitlines()[-1]
    assert port in done.stderr


def parsed(*words: str) -> FlagParser:
    """Flags of api_server."""
    parser = FlagParser("lmdeploy serve api_server", "Serve.")
    add_api_server_flags(parser)
    return parser.parse_args(list(words))


def test_server_flags_make_both_configs() -> None:
    words = "MODEL --model-format hf --quant-policy 0 --server-name 0.0.0.0 --server-port 1234 --tp 1 --model-name NAME --backend turbomind --api-keys a b"
    args = parsed(*words.split())
    config = server_config(args)
    assert (config.server_name, config.server_port, config.model_name, config.api_keys) == ("0.0.0.0", 1234, "NAME", ["a", "b"])
    engine = engine_config(args)
    assert (engine.model_format, engine.model_name) == ("hf", None), "the served name chooses no template"


def test_ssl_needs_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSL_KEYFILE", "SSL_CERTFILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="SSL_KEYFILE"):
        server_config(parsed("--ssl"))
    monkeypatch.setenv("SSL_KEYFILE", "key")
    monkeypatch.setenv("SSL_CERTFILE", "cert")
    assert server_config(parsed("--ssl")).ssl_keyfile == "key"


def test_keys_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMDEPLOY_API_KEYS", "team-a:aaa,bbb")
    monkeypatch.setenv("LMDEPLOY_ADMIN_KEY", "root")
    config = server_config(parsed("--api-keys", "ccc"))
    ring = KeyRing(config)
    assert [ring.find(key) for key in (b"aaa", b"bbb", b"ccc", b"root", b"team-a")] == ["team-a", "key3", "key1", "admin", None]
    assert server_config(parsed("--admin-key", "other")).admin_key == "other", "the flag goes before the environment"
    assert server_config(parsed("--admin-key-file", "f")).admin_key is None
    for nothing in (" , ", ""):
        monkeypatch.setenv("LMDEPLOY_API_KEYS", nothing)
        with pytest.raises(ConfigError, match="LMDEPLOY_API_KEYS holds no key"):
            KeyRing(server_config(parsed()))
    monkeypatch.delenv("LMDEPLOY_API_KEYS")
    with pytest.raises(ConfigError, match="api_keys is given but holds no key"):
        server_config(parsed("--api-keys"))


def test_every_line_of_a_json_log_is_json(tmp_path: Path) -> None:
    server = Server(tmp_path / "log", "--log-format", "json", "--log-level", "DEBUG", "--model-name", "tiny")
    try:
        assert httpx.get(server.url + "/v1/models", trust_env=False).status_code == 200
    finally:
        server.stop()
    lines = [line for line in server.log.read_text().splitlines() if line.startswith("{")]
    entries = [json.loads(line) for line in lines]
    assert any(entry.get("path") == "/v1/models" and entry["status"] == 200 for entry in entries)
    assert " - lmdeploy - " not in server.log.read_text(), "neither the server nor its engine falls back to text"


@pytest.mark.parametrize("words", [["--proxy-url", "u"], ["--qos-config-path", "p"]])
def test_flags_that_cannot_be_obeyed_are_errors(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="not available"):
        server_config(parsed(*words))


@pytest.mark.parametrize(
    ("flags", "problem", "processes"),
    [(["/nonexistent"], "/nonexistent", 1), (["--cap", "python"], "capability", 1), (["--chat-template", "/nonexistent.json"], "/nonexistent.json", 0)],
)
def test_a_start_that_fails_leaves_no_engine(
    flags: list[str], problem: str, processes: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engine's process is started before the model is looked at, but not for options that are wrong in themselves."""
    started: list[launching.Launched] = []

    def launch(device_type: str) -> launching.Launched:
        started.append(launching.launch(device_type))
        return started[-1]

    monkeypatch.setattr("lmdeploy.cli.serve.launch", launch)
    assert main(["serve", "api_server", "--server-port", "0", *flags]) == 2
    assert problem in capsys.readouterr().err.splitlines()[-1]
    assert len(started) == processes
    assert not any(psutil.pid_exists(s.process.pid) for s in started)


def test_ctrl_c_does_not_wait_until_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[launching.Launched] = []

    def launch(device_type: str) -> launching.Launched:
        started.append(launching.launch(device_type))
        threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGINT]).start()
        return started[0]

    monkeypatch.setattr("lmdeploy.cli.serve.launch", launch)
    monkeypatch.setattr(launching, "child_command", lambda: [sys.executable, "-c", "import time; time.sleep(30)"])
    began = time.monotonic()
    assert main(["serve", "api_server", "--server-port", "0"]) == 130
    assert time.monotonic() - began < 15
    assert not psutil.pid_exists(started[0].process.pid)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
