"""How a server ends, takes new keys and proves who it is: real processes, real signals, a real certificate."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lmdeploy.errors import ConfigError
from lmdeploy.serving.opening import reserve_port
from lmdeploy.serving.options import ServerConfig
from tests.serving.running import ServerProcess

LONG: dict[str, Any] = {"model": "tiny", "prompt": "Once upon a time", "ignore_eos": True, "temperature": 0}


@pytest.fixture
def start(model_folder: Path, tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts a server with options of ServerConfig."""
    started: list[ServerProcess] = []

    def begin(**options: Any) -> ServerProcess:
        started.append(ServerProcess(model_folder, tmp_path / f"log{len(started)}", **options))
        return started[-1]

    yield begin
    for process in started:
        process.kill()


def test_sigterm_finishes_what_runs_and_refuses_what_comes(start: Callable[..., ServerProcess]) -> None:
    process = start(shutdown_seconds=60)
    body = {**LONG, "max_tokens": 300, "stream": True, "stream_options": {"include_usage": True}}
    idle = socket.create_connection((httpx.URL(process.url).host, httpx.URL(process.url).port or 0))  # says nothing, and must not hold the end up
    with process.http.stream("POST", "/v1/completions", json=body) as reply:
        lines = reply.iter_lines()
        next(lines)
        process.popen.send_signal(signal.SIGTERM)
        process.told("shutting down")
        refused = process.http.post("/v1/completions", json=LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert refused.headers["connection"] == "close" and int(refused.headers["retry-after"]) >= 1
        ready = process.http.get("/ready")
        assert ready.status_code == 503 and "shutting down; 1 requests" in ready.json()["message"]
        assert process.http.get("/health").status_code == 200, "draining is not broken"
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 300, "finished, not cut"
    assert process.ended() == 0
    idle.close()
    assert "Traceback" not in process.log.read_text()


def test_after_shutdown_seconds_the_rest_is_told_and_cut(start: Callable[..., ServerProcess]) -> None:
    process = start(shutdown_seconds=0.5)
    replies: list[httpx.Response] = []
    with process.http.stream("POST", "/v1/completions", json={**LONG, "n": 4, "stream": True}) as reply:
        lines = reply.iter_lines()
        next(lines)
        whole = threading.Thread(target=lambda: replies.append(process.http.post("/v1/completions", json={**LONG, "prompt": "The sea"})))
        whole.start()
        time.sleep(0.2)
        began = time.monotonic()
        process.popen.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert process.ended() == 0
    assert time.monotonic() - began < 15
    whole.join()
    assert rest[-1] == "data: [DONE]" and '"finish_reason":"abort"' in "".join(rest), "the reader is told"
    assert replies and replies[0].status_code in (200, 503), "an answer that was cut short, or a refusal; never silence"
    assert "Traceback" not in process.log.read_text()


def test_a_second_signal_ends_at_once(start: Callable[..., ServerProcess]) -> None:
    process = start(shutdown_seconds=60)
    with process.http.stream("POST", "/v1/completions", json={**LONG, "n": 4, "stream": True}) as reply:
        pieces = reply.iter_bytes()
        next(pieces)
        process.popen.send_signal(signal.SIGTERM)
        process.told("shutting down")
        assert process.popen.poll() is None
        began = time.monotonic()
        process.popen.send_signal(signal.SIGTERM)
        with contextlib.suppress(httpx.TransportError):
            for _ in pieces:
                pass
    assert process.ended() == 0
    assert time.monotonic() - began < 10
    assert "Traceback" not in process.log.read_text()


def test_sigterm_under_load_ends_cleanly_and_answers_everybody(start: Callable[..., ServerProcess]) -> None:
    process = start(shutdown_seconds=3, max_queue=8)
    outcomes: list[str] = []

    def ask(number: int) -> None:
        try:
            with httpx.Client(base_url=process.url, timeout=60, trust_env=False) as client:
                reply = client.post("/v1/completions", json={**LONG, "prompt": f"Story {number}", "max_tokens": 120, "stream": bool(number % 2)})
            ended = reply.text.rstrip().endswith("[DONE]") if number % 2 and reply.status_code == 200 else reply.json() is not None
            outcomes.append(f"{reply.status_code} {'whole' if ended else 'cut'}")
        except httpx.HTTPError as e:
            outcomes.append(type(e).__name__)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    process.popen.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert process.ended() == 0
    assert len(outcomes) == 24
    allowed = {"200 whole", "503 whole", "ConnectError"}  # who came after the end found nobody
    assert set(outcomes) <= allowed, outcomes
    assert outcomes.count("200 whole") >= 1
    assert "Traceback" not in process.log.read_text()


def test_sighup_reads_the_keys_again(start: Callable[..., ServerProcess], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a:first\n")
    process = start(api_keys_file=str(keys), key="first")
    assert process.http.get("/v1/models").status_code == 200
    keys.write_text("a:second\nb:third\n")
    process.popen.send_signal(signal.SIGHUP)
    process.told("SIGHUP: 2 keys")
    statuses = {key: process.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code for key in ("first", "second", "third")}
    assert statuses == {"first": 401, "second": 200, "third": 200}
    keys.write_text("")
    process.popen.send_signal(signal.SIGHUP)
    process.told("nothing was changed")
    assert process.http.get("/v1/models", headers={"Authorization": "Bearer second"}).status_code == 200
    log = process.log.read_text()
    assert not any(key in log for key in ("first", "second", "third"))


# ---------------------------------------------------------------------- TLS

OPENSSL = shutil.which("openssl")
needs_openssl = pytest.mark.skipif(OPENSSL is None, reason="no openssl command")


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A key and a certificate of 127.0.0.1 that it signs itself."""
    key, cert = folder / f"{name}.key", folder / f"{name}.pem"
    command = [str(OPENSSL), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    command += ["-keyout", str(key), "-out", str(cert), "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    return key, cert


@needs_openssl
def test_https_with_a_certificate_that_is_renewed(start: Callable[..., ServerProcess], tmp_path: Path) -> None:
    key, cert = certificate(tmp_path, "old")
    process = start(ssl=True, ssl_keyfile=str(key), ssl_certfile=str(cert), ca=cert)
    assert process.url.startswith("https://") and process.url in process.log.read_text()
    reply = process.http.post("/v1/completions", json={**LONG, "max_tokens": 5, "stream": True})
    assert reply.status_code == 200 and reply.text.rstrip().endswith("[DONE]")
    with pytest.raises(httpx.ConnectError, match=r"(?i)certificate"):
        httpx.get(process.url + "/health", trust_env=False)
    with pytest.raises(httpx.HTTPError):
        httpx.get(process.url.replace("https", "http") + "/health", trust_env=False)
    new_key, new_cert = certificate(tmp_path, "new")
    os.replace(new_key, key)
    shutil.copy(new_cert, cert)
    process.popen.send_signal(signal.SIGHUP)
    process.told("SIGHUP: 0 keys")
    assert httpx.get(process.url + "/health", trust_env=False, verify=ssl.create_default_context(cafile=new_cert)).status_code == 200, (
        "new connections see the new one"
    )


@needs_openssl
def test_sighup_takes_keys_and_certificate_together_or_neither(start: Callable[..., ServerProcess], tmp_path: Path) -> None:
    key, cert = certificate(tmp_path, "old")
    trusted = tmp_path / "trusted.pem"
    shutil.copy(cert, trusted)
    keys = tmp_path / "keys"
    keys.write_text("a:first\n")
    process = start(ssl=True, ssl_keyfile=str(key), ssl_certfile=str(cert), api_keys_file=str(keys), ca=trusted, key="first")

    def statuses() -> dict[str, int]:
        verify = ssl.create_default_context(cafile=trusted)
        ask = {name: {"Authorization": f"Bearer {name}"} for name in ("first", "second")}
        return {name: httpx.get(f"{process.url}/v1/models", headers=headers, verify=verify, trust_env=False).status_code for name, headers in ask.items()}

    assert statuses() == {"first": 200, "second": 401}
    good_cert = cert.read_bytes()
    for broken in (b"no certificate", certificate(tmp_path, "other")[1].read_bytes()):  # no PEM; another key's
        keys.write_text("a:second\n")
        cert.write_bytes(broken)
        process.popen.send_signal(signal.SIGHUP)
        process.told("nothing was changed")
        assert statuses() == {"first": 200, "second": 401}, "neither the keys nor the certificate"
        process.log.write_text("")
    cert.write_bytes(good_cert)
    process.popen.send_signal(signal.SIGHUP)
    process.told("SIGHUP: 1 keys")
    assert statuses() == {"first": 401, "second": 200}


@needs_openssl
def test_a_handshake_that_does_not_come_is_closed_in_the_time_of_headers(start: Callable[..., ServerProcess], tmp_path: Path) -> None:
    key, cert = certificate(tmp_path, "own")
    process = start(ssl=True, ssl_keyfile=str(key), ssl_certfile=str(cert), ca=cert, receive_timeout=1)
    url = httpx.URL(process.url)
    with socket.create_connection((url.host, url.port or 0), timeout=30) as silent:  # asyncio itself would wait a minute
        assert silent.recv(1) == b""
    assert process.http.get("/health").status_code == 200


@needs_openssl
def test_files_that_cannot_be_used_are_one_line_before_the_model_is_loaded(tmp_path: Path) -> None:
    key, cert = certificate(tmp_path, "a")
    other, _ = certificate(tmp_path, "b")
    locked = tmp_path / "locked.key"
    subprocess.run([str(OPENSSL), "ec", "-in", str(key), "-aes256", "-passout", "pass:word", "-out", str(locked)], check=True, capture_output=True)
    (tmp_path / "text").write_text("no certificate")
    cases = {
        "cannot be read": (tmp_path / "missing", cert),
        "do not belong together": (other, cert),
        "without a password": (locked, cert),
        "in PEM form": (key, tmp_path / "text"),
    }
    for message, (keyfile, certfile) in cases.items():
        with pytest.raises(ConfigError, match=message) as caught:
            reserve_port(ServerConfig(server_port=0, ssl=True, ssl_keyfile=str(keyfile), ssl_certfile=str(certfile)))
        assert "\n" not in str(caught.value) and str(certfile) in str(caught.value) or str(keyfile) in str(caught.value)
