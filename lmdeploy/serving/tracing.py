"""OpenTelemetry traces: one span per request with the gen_ai attributes, children for queue, prefill and decode. The extra `otel`.

Spans are made when the request is over, from the times that the call has anyway: nothing is added to the path of a token. They are
sent by a thread of the OpenTelemetry package from a bounded queue; a collector that is away costs spans, never requests.
"""

from __future__ import annotations

import threading
from typing import Any
from urllib.parse import urlsplit

from starlette.types import Scope

from lmdeploy.errors import ConfigError
from lmdeploy.serving.call import Call
from lmdeploy.version import __version__

#: route -> gen_ai.operation.name; other routes have plain HTTP spans
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/chat/interactive": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/generate": "text_completion",
    "/v1/embeddings": "embeddings",
}
#: how long the last spans may take to be sent when the server ends
FLUSH_SECONDS = 2.0


def check_endpoint(endpoint: str | None) -> None:
    """Raise ConfigError when traces are asked for and cannot be sent."""
    if endpoint is None:
        return
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError(f"otlp_endpoint={endpoint!r} is not an http(s) address; an OTLP collector listens at http://HOST:4318")
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as e:
        raise ConfigError(f"--otlp-endpoint needs the OpenTelemetry packages ({e.name} is missing): pip install 'lmdeploy[otel]'") from e


class Tracing:
    """Turns calls into spans and sends them to `endpoint`, an OTLP collector over HTTP; a URL without a path gets `/v1/traces`."""

    def __init__(self, endpoint: str, model_name: str) -> None:
        check_endpoint(endpoint)
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        url = endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + "/v1/traces"
        self._provider = TracerProvider(resource=Resource.create({"service.name": "lmdeploy", "service.version": __version__}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=10), schedule_delay_millis=1000))
        self._tracer = self._provider.get_tracer("lmdeploy.serving", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._model_name = model_name

    def ended(self, call: Call, scope: Scope) -> None:
        """Make the spans of a call that is over; they belong to the trace of its `traceparent` header, if it has one."""
        from opentelemetry import trace

        parent = self._propagator.extract(_carrier(scope))
        end = call.began_ns + int(call.seconds * 1e9)
        operation = OPERATIONS.get(call.route)
        name = f"{operation} {self._model_name}" if operation else f"{call.method} {call.route}"
        span = self._tracer.start_span(name, context=parent, kind=trace.SpanKind.SERVER, start_time=call.began_ns, attributes=self._attributes(call, operation))
        if call.status >= 500 or call.error == "timeout":
            span.set_status(trace.StatusCode.ERROR, call.error or f"HTTP {call.status}")
        if call.first_token is not None:
            inside = trace.set_span_in_context(span, parent)
            started = min(call.began_ns + int(call.queue_seconds * 1e9), end)
            first = min(max(call.began_ns + int((call.first_token - call.began) * 1e9), started), end)
            for part, begin, until in (("queue", call.began_ns, started), ("prefill", started, first), ("decode", first, end)):
                self._tracer.start_span(part, context=inside, start_time=begin).end(until)
        span.end(end)

    def _attributes(self, call: Call, operation: str | None) -> dict[str, Any]:
        found: dict[str, Any] = {
            "http.request.method": call.method,
            "http.route": call.route,
            "http.response.status_code": call.status,
            "lmdeploy.request.id": call.id,
            "lmdeploy.key": call.key,
        }
        if call.error or call.status >= 500:
            found["error.type"] = call.error or str(call.status)
        if operation:
            found |= {"gen_ai.operation.name": operation, "gen_ai.provider.name": "lmdeploy", "gen_ai.request.model": self._model_name}
        if call.first_token is not None:
            found |= call.request | {
                "gen_ai.response.model": self._model_name,
                "gen_ai.usage.input_tokens": call.prompt_tokens,
                "gen_ai.usage.output_tokens": call.generated_tokens,
                "gen_ai.usage.cache_read.input_tokens": call.cached_tokens,
                "gen_ai.response.finish_reasons": call.finish_reasons[:8],
                "gen_ai.response.time_to_first_chunk": call.first_token - call.began,
            }
        return found

    def close(self) -> None:
        """Send what is left, but do not wait longer than FLUSH_SECONDS for a collector that does not answer."""
        flush = threading.Thread(target=self._provider.shutdown, name="otlp-flush", daemon=True)
        flush.start()
        flush.join(FLUSH_SECONDS)


def request_attributes(sampling: Any, n: int) -> dict[str, Any]:
    """The gen_ai.request attributes of a checked request."""
    return {
        "gen_ai.request.max_tokens": sampling.max_new_tokens,
        "gen_ai.request.temperature": float(sampling.temperature),
        "gen_ai.request.top_p": float(sampling.top_p),
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.presence_penalty": float(sampling.presence_penalty),
        "gen_ai.request.frequency_penalty": float(sampling.frequency_penalty),
        "gen_ai.request.choice.count": n,
    }


def _carrier(scope: Scope) -> dict[str, str]:
    """The headers of W3C's trace context, as text; a tracestate without a sane size is left out."""
    wanted = {b"traceparent": 128, b"tracestate": 2048}
    return {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if len(value) <= wanted.get(name, -1)}
