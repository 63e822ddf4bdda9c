"""Prometheus figures of one app, in a registry of its own: counters and gauges read from the engine, histograms fed by answers.

Names are those of the system's public surface (prefix `lmdeploy:`, labels model_name and engine). The engine's figures are read
when /metrics is asked, so they are never stale and cost nothing otherwise. What is noted per increment is a bisection and two sums:
every token passes here.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from lmdeploy.frontend import Frontend
from lmdeploy.messages import EngineStats, Response
from lmdeploy.serving.admission import Admission
from lmdeploy.serving.call import Call

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LABELS = ("model_name", "engine")
_ENGINE = "0"
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


class Metrics:
    """The registry of one app."""

    def __init__(self, frontend: Frontend, model_name: str, admission: Admission) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        labels = self._labels = (model_name, _ENGINE)
        self.prompt_tokens = self._histogram("request_prompt_tokens", "prompt tokens of a request", _TOKENS)
        self.generation_tokens = self._histogram("request_generation_tokens", "generated tokens of an answer", _TOKENS)
        self.cached_tokens = self._histogram("request_cached_tokens", "prompt tokens found in the prefix cache", (0, *_TOKENS))
        self.hit_ratio = self._histogram("request_cache_hit_ratio", "share of a prompt that was found in the prefix cache", _SHARES)
        self.first_token = self._histogram("time_to_first_token_seconds", "from a request's arrival to its first token", _SECONDS)
        self.per_token = self._histogram("time_per_output_token_seconds", "mean time of an answer's further tokens", _TOKEN_SECONDS)
        self.latency = self._histogram("e2e_request_latency_seconds", "from a request's arrival to its end", _SECONDS)
        self.queue = self._histogram("request_queue_time_seconds", "waiting in the server and in the engine", _SECONDS)
        self.inference = self._histogram("request_inference_time_seconds", "from being started by the engine to the end", _SECONDS)
        self.prefill = self._histogram("request_prefill_time_seconds", "from being started to the first token", _SECONDS)
        self.decode = self._histogram("request_decode_time_seconds", "from the first token to the end", _SECONDS)
        self.between_tokens = TokenTimes("iter_token_latency", "time between two tokens of an answer (inter-token latency), in seconds", labels)
        self._routed = Gauge("lmdeploy:num_api_requests_routed", "requests that the server works on", LABELS, registry=self.registry).labels(*labels)
        self._finished = Counter("lmdeploy:request_success", "answers by how they ended", (*LABELS, "finished_reason"), registry=self.registry)
        self._answered = Counter(
            "lmdeploy:http_requests", "HTTP requests by route, status and name of the key", ("route", "status", "key"), registry=self.registry
        )
        self._failed = Counter("lmdeploy:http_requests_failed", "requests that were refused or failed, by the error's code", ("code",), registry=self.registry)
        for collector in (self.between_tokens, _EngineFigures(frontend, labels), _ServerFigures(admission, frontend, labels)):
            self.registry.register(collector)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"lmdeploy:{name}", help, LABELS, buckets=buckets, registry=self.registry).labels(*self._labels)

    def text(self) -> bytes:
        """The page of /metrics."""
        return generate_latest(self.registry)

    def request(self, call: Call | None = None) -> ObservedRequest:
        """Begin to watch one request: one prompt of the call and its answers."""
        self._routed.inc()
        return ObservedRequest(self, call)

    def request_ended(self) -> None:
        """A request that was watched is over."""
        self._routed.dec()

    def finished(self, reason: str) -> None:
        """Count one answer that ended."""
        self._finished.labels(*self._labels, reason).inc()

    def answered(self, call: Call) -> None:
        """Count one HTTP request. Every label is one of ours: routes of the app, names of known keys."""
        self._answered.labels(call.route, call.status, call.key).inc()
        if call.error is not None:
            self._failed.labels(call.error).inc()


class TokenTimes(Collector):
    """A histogram that takes one bisection per increment; on the event loop's thread only."""

    def __init__(self, name: str, help: str, labels: tuple[str, str]) -> None:
        self._name, self._help, self._labels = name, help, labels
        self._counts = [0] * (len(_TOKEN_SECONDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float, tokens: int) -> None:
        """`tokens` came after `seconds` together: each took its share."""
        self._counts[bisect_left(_TOKEN_SECONDS, seconds / tokens)] += tokens
        self._sum += seconds

    def collect(self) -> Iterator[Metric]:
        """The histogram as Prometheus wants it: counts that include the smaller buckets."""
        family = HistogramMetricFamily(f"lmdeploy:{self._name}", self._help, labels=LABELS)
        total, buckets = 0, []
        for bound, count in zip((*map(str, _TOKEN_SECONDS), "+Inf"), list(self._counts), strict=True):
            total += count
            buckets.append((bound, float(total)))
        family.add_metric(self._labels, buckets, self._sum)
        yield family


class ObservedRequest:
    """Times and counts of one prompt and all its answers; told to the call that it belongs to."""

    def __init__(self, metrics: Metrics, call: Call | None) -> None:
        self._metrics, self._call = metrics, call
        self._submitted = time.monotonic()
        self._begin = self._submitted if call is None else call.began  # the client's clock, waiting in the server included
        self._queued = self._submitted - self._begin
        self._first: float | None = None
        self._last: dict[int, tuple[float, int]] = {}  # answer -> when its last increment came, tokens so far

    def feed(self, response: Response) -> None:
        """One increment."""
        now = time.monotonic()
        before = self._last.get(response.index)
        if self._first is None:
            self._start(response, now)
        if before is not None and response.generate_token_len > before[1]:
            self._metrics.between_tokens.add(now - before[0], response.generate_token_len - before[1])
        self._last[response.index] = (now, response.generate_token_len)
        if response.finish_reason is not None:
            self._finish(response, now)

    def _start(self, response: Response, now: float) -> None:
        m, call, self._first = self._metrics, self._call, now
        self._queued += response.queue_seconds or 0.0
        m.first_token.observe(now - self._begin)
        m.queue.observe(self._queued)
        m.prefill.observe(max(now - self._begin - self._queued, 0.0))
        m.prompt_tokens.observe(response.input_token_len)
        m.cached_tokens.observe(response.cached_tokens)
        m.hit_ratio.observe(response.cached_tokens / max(response.input_token_len, 1))
        if call is not None:
            call.first_token, call.queue_seconds = call.first_token or now, max(call.queue_seconds, self._queued)
            call.prompt_tokens += response.input_token_len
            call.cached_tokens += response.cached_tokens

    def _finish(self, response: Response, now: float) -> None:
        assert self._first is not None and response.finish_reason is not None
        tokens = response.generate_token_len
        self._metrics.finished(response.finish_reason)
        self._metrics.generation_tokens.observe(tokens)
        if tokens > 1:
            self._metrics.per_token.observe((now - self._first) / (tokens - 1))
        if self._call is not None:
            self._call.finish_reasons.append(response.finish_reason)
            self._call.error = response.error_code or self._call.error

    def end(self) -> None:
        """The request is over, for whatever reason."""
        now, m = time.monotonic(), self._metrics
        m.request_ended()
        m.latency.observe(now - self._begin)
        if self._first is not None:
            m.inference.observe(max(now - self._begin - self._queued, 0.0))
            m.decode.observe(now - self._first)
        if self._call is not None:
            self._call.generated_tokens += sum(tokens for _, tokens in self._last.values())


class _ServerFigures(Collector):
    """What the server itself knows at the moment of asking."""

    def __init__(self, admission: Admission, frontend: Frontend, labels: tuple[str, str]) -> None:
        self._admission, self._frontend, self._labels = admission, frontend, labels

    def collect(self) -> Iterator[Metric]:
        """The queue before the engine's, and what the engine was started with."""
        waiting = GaugeMetricFamily("lmdeploy:num_api_requests_waiting", "requests that wait in the server for their turn", labels=LABELS)
        waiting.add_metric(self._labels, self._admission.waiting)
        yield waiting
        info = self._frontend.info
        facts = {"dtype": info.dtype, "session_len": str(info.session_len), "max_batch_size": str(info.max_batch_size), "kv_policy": info.memory.kv_policy}
        config = InfoMetricFamily("lmdeploy:backend_config", "how the engine was started", labels=LABELS)
        config.add_metric(self._labels, {"device": info.memory.device, **facts})
        yield config


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
        ("late_tokens", "tokens that came a step later because their grammar's mask was not ready", s.late_tokens),
        ("preemptions", "sequences put back for want of KV blocks", s.preemptions),
        ("requests_aborted", "requests given up by their clients", s.aborted),
    ]
