"""What a streamed token costs the server, measured with the benchmark's own parts: a fake engine, real sockets, a reader process."""

from __future__ import annotations

import argparse

import pytest

from benchmark.http_overhead import measure


def options(**changes: object) -> argparse.Namespace:
    values = {"rate": 0.0, "tokens": 120, "rounds": 2, "route": "chat", "http": "httptools", "loop": "auto", "profile": False, "answer": 4, "requests": 320}
    return argparse.Namespace(**{**values, **changes})


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_a_streamed_token_costs_less_than_a_20000th_second_of_the_servers_time(route: str) -> None:
    got = measure(options(route=route), floor=False, streams=50, clients=1)
    assert got["answers"] == 100
    assert got["events"] >= 120, "one event per token, and the end: this is what it costs without coalescing"
    assert got["cpu"] < 1 / 20000, f"{1e6 * got['cpu']:.1f} us of CPU time per token"


def test_answers_that_are_not_streamed_all_come() -> None:
    got = measure(options(), floor=False, streams=32, clients=2, whole=True)
    assert got["answers"] == 320
