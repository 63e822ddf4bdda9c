"""Traces as a collector sees them: a real exporter, and a collector on loopback that reads the protocol's own messages."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmdeploy.errors import ConfigError
from lmdeploy.serving.opening import reserve_port
from lmdeploy.serving.options import ServerConfig
from tests.serving.running import RunningServer, ServerProcess

pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest  # noqa: E402

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Count from 1 to 5."}], "temperature": 0, "max_tokens": 8}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Keeps the spans that are posted to /v1/traces."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.paths: set[str] = set()
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                import gzip

                body = self.rfile.read(int(self.headers["Content-Length"]))
                message = ExportTraceServiceRequest.FromString(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
                collector.paths.add(self.path)
                collector.spans += [s for r in message.resource_spans for scope in r.scope_spans for s in scope.spans]
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def until(self, count: int) -> list[Any]:
        """Wait for so many spans."""
        deadline = time.monotonic() + 20
        while len(self.spans) < count:
            assert time.monotonic() < deadline, f"{len(self.spans)} spans came"
            time.sleep(0.05)
        return self.spans

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    started = Collector()
    yield started
    started.close()


def attributes(span: Any) -> dict[str, Any]:
    def value(v: Any) -> Any:
        kind = v.WhichOneof("value")
        return [value(x) for x in v.array_value.values] if kind == "array_value" else getattr(v, kind)

    return {a.key: value(a.value) for a in span.attributes}


def test_a_chat_is_one_span_with_its_parts(collector: Collector, serve: Callable[..., RunningServer]) -> None:
    server = serve(otlp_endpoint=collector.url)
    before = time.time_ns()
    reply = server.http.post("/v1/chat/completions", json=CHAT, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    usage = reply.json()["usage"]
    spans = {s.name: s for s in collector.until(4)}
    after = time.time_ns()
    assert collector.paths == {"/v1/traces"}
    root = spans["chat tiny"]
    assert root.trace_id.hex() == TRACE and root.parent_span_id.hex() == PARENT, "W3C's traceparent is honoured"
    found = attributes(root)
    expected = {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "lmdeploy", "gen_ai.request.model": "tiny", "gen_ai.request.max_tokens": 8,
        "gen_ai.request.temperature": 0.0, "gen_ai.usage.input_tokens": usage["prompt_tokens"], "gen_ai.usage.output_tokens": 8,
        "gen_ai.response.finish_reasons": ["length"], "http.route": "/v1/chat/completions", "http.response.status_code": 200,
        "lmdeploy.request.id": reply.headers["x-lmdeploy-id"],
    }  # fmt: skip
    assert {k: found.get(k) for k in expected} == expected
    parts = [spans[name] for name in ("queue", "prefill", "decode")]
    assert all(p.parent_span_id == root.span_id and p.trace_id == root.trace_id for p in parts)
    times = [root.start_time_unix_nano, *(t for p in parts for t in (p.start_time_unix_nano, p.end_time_unix_nano)), root.end_time_unix_nano]
    assert times == sorted(times) and before <= times[0] and times[-1] <= after
    assert parts[2].end_time_unix_nano > parts[2].start_time_unix_nano
    assert "Count" not in str(spans), "no prompt"


def test_refusals_and_plain_routes_have_spans_too(collector: Collector, serve: Callable[..., RunningServer]) -> None:
    server = serve(otlp_endpoint=collector.url + "/own/path", api_key_lines=["team:sesame"], request_timeout=0.3)
    server.http.get("/v1/models", headers={"x-api-key": "wrong"})
    server.http.get("/health")
    late = server.http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "ignore_eos": True}, headers={"x-api-key": "sesame"})
    assert late.status_code == 504
    spans = {s.name: s for s in collector.until(5)}
    assert collector.paths == {"/own/path"}
    assert set(spans) == {"GET other", "text_completion tiny", "queue", "prefill", "decode"}, "what was refused has no route yet"
    slow = spans["text_completion tiny"]
    assert slow.status.code == 2 and attributes(slow)["error.type"] in ("timeout", "504") and attributes(slow)["lmdeploy.key"] == "team"
    assert "sesame" not in str(collector.spans) and "wrong" not in str(collector.spans)


@pytest.mark.parametrize("parent", ["", "00-zz-b7-01", "x" * 5000, f"00-{'0' * 32}-{PARENT}-01"])
def test_a_traceparent_that_is_none_begins_a_trace_of_its_own(parent: str, collector: Collector, serve: Callable[..., RunningServer]) -> None:
    server = serve(otlp_endpoint=collector.url)
    assert server.http.get("/v1/models", headers={"traceparent": parent}).status_code == 200
    (span,) = collector.until(1)
    assert span.parent_span_id == b"" and span.trace_id != bytes(16)


def test_a_collector_that_is_away_holds_up_neither_requests_nor_the_end(model_folder: Path, tmp_path: Path) -> None:
    process = ServerProcess(model_folder, tmp_path / "log", otlp_endpoint="http://127.0.0.1:9")
    try:
        assert process.http.post("/v1/chat/completions", json=CHAT).status_code == 200
        began = time.monotonic()
        process.popen.terminate()
        assert process.ended() == 0
        assert time.monotonic() - began < 15
    finally:
        process.kill()


@pytest.mark.parametrize("endpoint", ["collector:4318", "grpc://x:4317", "http://", "ftp://x"])
def test_an_endpoint_that_cannot_be_one_is_told_at_the_start(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        reserve_port(ServerConfig(server_port=0, otlp_endpoint=endpoint))


def test_without_the_packages_there_is_one_clear_line() -> None:
    code = (
        "import sys; sys.modules['opentelemetry.exporter'] = None\n"
        "from lmdeploy.serving.tracing import check_endpoint\n"
        "try: check_endpoint('http://127.0.0.1:4318')\n"
        "except Exception as e: print(type(e).__name__, e)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.startswith("ConfigError --otlp-endpoint needs") and "pip install 'lmdeploy[otel]'" in run.stdout
