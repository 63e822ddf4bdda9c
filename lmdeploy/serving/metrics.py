"""Prometheus figures of one app, in a registry of its own: counters and gauges read from the engine, histograms fed by answers.

Names are those of the system's public surface (prefix `lmdeploy:`, labels model_name and engine). The engine's figures are read
when /metrics is asked, so they are never stale and cost nothing otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lmdeploy.frontend import Frontend
from lmdeploy.messages import EngineStats, Response

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LABELS = ("model_name", "engine")
_ENGINE = "0"
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The registry of one app."""

    def __init__(self, frontend: Frontend, model_name: str) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        labels = (model_name, _ENGINE)
        self.prompt_tokens = self._histogram("request_prompt_tokens", "prompt tokens of a request", _TOKENS).labels(*labels)
        self.generation_tokens = self._histogram("request_generation_tokens", "generated tokens of an answer", _TOKENS).labels(*labels)
        self.cached_tokens = self._histogram("request_cached_tokens", "prompt tokens found in the prefix cache", (0, *_TOKENS)).labels(*labels)
        self.first_token = self._histogram("time_to_first_token_seconds", "from submission to the first token", _SECONDS).labels(*labels)
        self.per_token = self._histogram("time_per_output_token_seconds", "mean time of an answer's further tokens", _TOKEN_SECONDS).labels(*labels)
        self.latency = self._histogram("e2e_request_latency_seconds", "from submission to the end", _SECONDS).labels(*labels)
        routed = Gauge("lmdeploy:num_api_requests_routed", "requests that the server works on", LABELS, registry=self.registry)
        waiting = Gauge("lmdeploy:num_api_requests_waiting", "requests that wait for max_concurrent_requests", LABELS, registry=self.registry)
        self.routed, self.waiting = routed.labels(*labels), waiting.labels(*labels)
        self._finished = Counter("lmdeploy:request_success", "answers by how they ended", (*LABELS, "finished_reason"), registry=self.registry)
        self._labels = labels
        self.registry.register(_EngineFigures(frontend, labels))

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"lmdeploy:{name}", help, LABELS, buckets=buckets, registry=self.registry)

    def text(self) -> bytes:
        """The page of /metrics."""
        return generate_latest(self.registry)

    def request(self) -> ObservedRequest:
        """Begin to watch one request."""
        self.routed.inc()
        return ObservedRequest(self)

    def finished(self, reason: str) -> None:
        """Count one answer that ended."""
        self._finished.labels(*self._labels, reason).inc()


class ObservedRequest:
    """Times and counts of one request (all its answers)."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._begin = time.monotonic()
        self._first: float | None = None

    def feed(self, response: Response) -> None:
        """One increment."""
        if self._first is None:
            self._first = time.monotonic()
            self._metrics.first_token.observe(self._first - self._begin)
            self._metrics.prompt_tokens.observe(response.input_token_len)
            self._metrics.cached_tokens.observe(response.cached_tokens)
        if response.finish_reason is not None:
            self._metrics.finished(response.finish_reason)
            self._metrics.generation_tokens.observe(response.generate_token_len)
            if response.generate_token_len > 1:
                self._metrics.per_token.observe((time.monotonic() - self._first) / (response.generate_token_len - 1))

    def end(self) -> None:
        """The request is over, for whatever reason."""
        self._metrics.routed.dec()
        self._metrics.latency.observe(time.monotonic() - self._begin)


class _EngineFigures(Collector):
    """Reads the engine's own counters at the moment of asking."""

    def __init__(self, frontend: Frontend, labels: tuple[str, str]) -> None:
        self._frontend, self._labels = frontend, labels

    def collect(self) -> Iterator[Metric]:
        """All figures of the engine."""
        stats = self._frontend.stats()
        for name, help, value in _gauges(stats):
            gauge = GaugeMetricFamily(f"lmdeploy:{name}", help, labels=LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        for name, help, value in _counters(stats):
            counter = CounterMetricFamily(f"lmdeploy:{name}", help, labels=LABELS)
            counter.add_metric(self._labels, value)
            yield counter


def _gauges(s: EngineStats) -> list[tuple[str, str, float]]:
    return [
        ("num_requests_running", "sequences being computed", s.running),
        ("num_requests_waiting", "requests in the engine's queue", s.waiting),
        ("num_requests_succeeded", "answers that ended well", s.finished),
        ("num_requests_failed", "answers that ended with an error", s.failed),
        ("gpu_cache_usage_perc", "share of the KV blocks in use, 0 to 1 (of any device)", s.used_blocks / max(s.num_blocks, 1)),
        ("kv_blocks", "KV blocks of the pool", s.num_blocks),
        ("kv_blocks_used", "KV blocks of live sequences", s.used_blocks),
        ("kv_blocks_cached", "KV blocks kept for equal prompt beginnings", s.cached_blocks),
        ("prefix_cache_hit_rate", "share of the prompt tokens found in the prefix cache", s.cached_tokens / max(s.prompt_tokens, 1)),
        ("step_seconds", "duration of the last step", s.step_seconds),
    ]


def _counters(s: EngineStats) -> list[tuple[str, str, float]]:
    return [
        ("prompt_tokens", "prompt tokens", s.prompt_tokens),
        ("generation_tokens", "generated tokens", s.generated_tokens),
        ("cached_tokens", "prompt tokens found in the prefix cache", s.cached_tokens),
        ("steps", "steps of the engine", s.steps),
        ("engine_restarts", "failed engine processes that were replaced", s.restarts),
        ("preemptions", "sequences put back for want of KV blocks", s.preemptions),
        ("requests_aborted", "requests given up by their clients", s.aborted),
    ]
