"""What /metrics serves: the surface's names, true times, labels that clients cannot multiply, and every name of the dashboard."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lmdeploy.messages import Response
from lmdeploy.serving.metrics import TokenTimes
from tests.serving.running import RunningServer

DASHBOARD = Path(__file__).resolve().parents[2] / "docs" / "grafana.json"
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Count from 1 to 5."}], "temperature": 0, "max_tokens": 8}
LONG: dict[str, Any] = {"model": "tiny", "prompt": "Once upon a time", "ignore_eos": True, "temperature": 0}
#: names that tools made for this system ask for, of those that concern what this version does
SURFACE = [
    "num_requests_succeeded", "num_requests_failed", "num_api_requests_routed", "num_api_requests_waiting", "num_requests_running",
    "num_requests_waiting", "gpu_cache_usage_perc", "prefix_cache_hit_rate", "prompt_tokens_total", "generation_tokens_total", "cached_tokens_total",
    "request_success_total", "request_prompt_tokens_bucket", "request_generation_tokens_bucket", "request_cached_tokens_bucket",
    "request_cache_hit_ratio_bucket", "time_to_first_token_seconds_bucket", "time_per_output_token_seconds_bucket", "iter_token_latency_bucket",
    "e2e_request_latency_seconds_bucket", "request_queue_time_seconds_bucket", "request_inference_time_seconds_bucket",
    "request_prefill_time_seconds_bucket", "request_decode_time_seconds_bucket", "backend_config_info",
]  # fmt: skip


def samples(server: RunningServer) -> dict[str, list[tuple[dict[str, str], float]]]:
    """All samples of /metrics by their names, read with Prometheus' own parser."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(server.http.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def one(server: RunningServer, name: str) -> float:
    """The sum of a name's samples."""
    return sum(value for _, value in samples(server).get(f"lmdeploy:{name}", []))


def used(server: RunningServer) -> None:
    """Something of everything."""
    server.http.post("/v1/chat/completions", json=CHAT)
    server.http.post("/v1/completions", json={**LONG, "max_tokens": 5, "stream": True})


def test_the_surfaces_names_are_there(server: RunningServer) -> None:
    used(server)
    found = samples(server)
    assert [name for name in SURFACE if f"lmdeploy:{name}" not in found] == []
    assert "lmdeploy:late_tokens_total" in found
    labels = found["lmdeploy:num_requests_running"][0][0]
    assert labels == {"model_name": "tiny", "engine": "0"}


def test_every_panel_of_the_dashboard_asks_for_what_is_served(serve: Callable[..., RunningServer]) -> None:
    server = serve()
    used(server)
    server.http.get("/terminate")  # refused
    found = samples(server)
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels = [p for p in dashboard["panels"] if p["type"] != "row"]
    assert len(panels) >= 12 and len({p["id"] for p in dashboard["panels"]}) == len(dashboard["panels"])
    names = set()
    for panel in panels:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            asked = re.findall(r"lmdeploy:\w+", target["expr"])
            assert asked, target
            assert target["expr"].count("(") == target["expr"].count(")") and target["expr"].count("{") == target["expr"].count("}")
            assert [name for name in asked if name not in found] == [], panel["title"]
            by = re.search(r"sum by \((\w+)\)", target["expr"])
            assert by is None or any(by[1] in labels for labels, _ in found[asked[0]]), f"{asked[0]} has no label {by}"
            names.update(asked)
    places = [(g["x"], g["y"]) for g in (p["gridPos"] for p in panels)]
    assert len(set(places)) == len(places)
    for wanted in ("kv_blocks", "time_to_first_token_seconds_bucket", "iter_token_latency_bucket", "preemptions_total", "requests_aborted_total"):
        assert f"lmdeploy:{wanted}" in names


def test_times_are_those_of_a_stopwatch(serve: Callable[..., RunningServer]) -> None:
    server = serve()
    arrivals: list[float] = []
    began = time.monotonic()
    with server.http.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 40, "stream": True}) as reply:
        arrivals += [time.monotonic() for line in reply.iter_lines() if line.startswith("data: {")]
    whole = time.monotonic() - began
    while not one(server, "e2e_request_latency_seconds_count"):
        time.sleep(0.01)
    figures = {name: one(server, f"{name}_sum") for name in ("time_to_first_token_seconds", "iter_token_latency", "e2e_request_latency_seconds")}
    parts = {name: one(server, f"request_{name}_time_seconds_sum") for name in ("queue", "prefill", "decode", "inference")}
    assert 30 <= one(server, "iter_token_latency_count") <= 39, "between 40 tokens, of which a busy machine may deliver some together"
    assert figures["time_to_first_token_seconds"] <= arrivals[0] - began
    assert figures["e2e_request_latency_seconds"] <= whole
    assert abs(figures["time_to_first_token_seconds"] + figures["iter_token_latency"] - figures["e2e_request_latency_seconds"]) < 0.3 * whole
    assert abs(parts["queue"] + parts["inference"] - figures["e2e_request_latency_seconds"]) < 0.01
    assert abs(parts["prefill"] + parts["decode"] - parts["inference"]) < 0.01
    assert parts["queue"] < figures["time_to_first_token_seconds"]


def test_waiting_for_a_place_is_queue_time(serve: Callable[..., RunningServer]) -> None:
    server = serve(max_concurrent_requests=1)
    thread = threading.Thread(target=server.http.post, args=("/v1/completions",), kwargs={"json": {**LONG, "max_tokens": 150}})
    thread.start()
    server.until_busy()
    began = time.monotonic()
    server.http.post("/v1/completions", json={**LONG, "max_tokens": 1})
    waited = time.monotonic() - began
    thread.join()
    queue = one(server, "request_queue_time_seconds_sum")
    assert 0.3 * waited < queue <= waited + 1, (queue, waited)


def test_clients_cannot_multiply_labels(serve: Callable[..., RunningServer]) -> None:
    server = serve(api_key_lines=["team:sesame"])
    server.http.get("/v1/models", headers={"x-api-key": "sesame"})

    def labels() -> set[str]:
        return {json.dumps(labels, sort_keys=True) for name, found in samples(server).items() if "http_requests" in name for labels, _ in found}

    server.http.headers["x-api-key"] = "sesame"
    server.http.get("/nothing-0")
    before = labels()
    for i in range(30):
        server.http.get(f"/nothing-{i}")
        server.http.request("PUT", f"/v1/models?x={i}", headers={"x-api-key": f"guess-{i}"})
    after = labels()
    assert len(after - before) <= 4, after - before  # 401 and its reason, /metrics itself
    assert not any("guess" in text or "sesame" in text or "nothing" in text for text in after)
    assert any('"key": "team"' in text and '"route": "/v1/models"' in text for text in after)


def test_refusals_by_routes_are_counted_and_logged_by_their_code(serve: Callable[..., RunningServer], caplog: pytest.LogCaptureFixture) -> None:
    server = serve()
    too_long = {"model": "tiny", "prompt": "a b " * 40000}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    calls: dict[str, tuple[str, dict[str, Any]]] = {
        "invalid_value": ("/v1/chat/completions", {**CHAT, "temperature": "hot"}),
        "model_not_found": ("/v1/chat/completions", {**CHAT, "model": "other"}),
        "context_length_exceeded": ("/v1/completions", too_long),
        "invalid_grammar": ("/v1/chat/completions", {**CHAT, "response_format": schema}),
        "not_found": ("/nothing", {}),
    }
    with caplog.at_level(logging.INFO, "lmdeploy.access"):
        for path, body in calls.values():
            assert 400 <= server.http.post(path, json=body).status_code < 500
        deadline = time.monotonic() + 10
        while one(server, "http_requests_failed_total") < len(calls) and time.monotonic() < deadline:
            time.sleep(0.02)  # a request is counted when its answer has been sent
    counted = {labels["code"]: value for labels, value in samples(server)["lmdeploy:http_requests_failed_total"]}
    assert counted == dict.fromkeys(calls, 1.0)
    assert all(f"error={code} " in caplog.text for code in calls)


def test_metrics_may_be_asked_for_by_either_flag(serve: Callable[..., RunningServer]) -> None:
    assert serve(enable_metrics=False).http.get("/metrics").status_code == 404
    assert serve(disable_metrics=True).http.get("/metrics").status_code == 404


def test_an_increment_costs_little(server: RunningServer) -> None:
    """20,000 tokens a second pass here; at 5 us each that would be a tenth of a core. The bound is loose, for busy machines."""
    observed = server.app.state.service.metrics.request()
    response = Response(text="a", generate_token_len=0, input_token_len=5)
    best = 1.0
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(2000):
            response.generate_token_len += 1
            observed.feed(response)
        best = min(best, (time.perf_counter() - began) / 2000)
    observed.end()
    assert best < 10e-6, f"{best * 1e6:.2f} us an increment"


@pytest.mark.parametrize("seconds, tokens, bucket", [(0.0005, 1, "0.001"), (0.02, 2, "0.01"), (0.0101, 1, "0.025"), (9.0, 1, "+Inf")])
def test_tokens_that_came_together_share_their_time(seconds: float, tokens: int, bucket: str) -> None:
    times = TokenTimes("x", "x", ("m", "0"))
    times.add(seconds, tokens)
    (family,) = times.collect()
    counts = {s.labels["le"]: s.value for s in family.samples if s.name.endswith("_bucket")}
    first = next(le for le, count in counts.items() if count)
    assert (first, counts["+Inf"]) == (bucket, tokens)
    assert next(s.value for s in family.samples if s.name.endswith("_sum")) == pytest.approx(seconds)
