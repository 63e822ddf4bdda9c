"""The serving benchmark asks for what it says, counts what comes, and tells when something else came."""

from __future__ import annotations

import asyncio

import pytest

from benchmark import mix
from benchmark.serving import Load, Record, parse, served_model, summary
from tests.serving.running import RunningServer


def load(server: RunningServer, *more: str) -> Load:
    args = parse(["--url", server.url, "--requests", "16", "--shrink", "16", "--top-id", "5000", *more])
    return Load(args, served_model(args))


@pytest.mark.parametrize("more", [["--in-flight", "4"], ["--rate", "40"], ["--route", "generate"]], ids=["in flight", "poisson", "generate"])
def test_every_request_gets_its_tokens_and_its_times(server: RunningServer, more: list[str]) -> None:
    loading = load(server, *more)
    before = server.frontend.stats().generated_tokens
    seconds = asyncio.run(loading.run())
    assert [r.problem for r in loading.records] == [""] * 16
    assert server.frontend.stats().generated_tokens - before == sum(r.output_tokens for r in loading.records)
    for record in loading.records:
        assert record.counted == record.output_tokens
        assert 1 <= len(record.texts) <= record.output_tokens + 1
        assert record.sent <= record.texts[0] <= record.texts[-1] <= record.ended
    assert max(r.ended - r.sent for r in loading.records) <= seconds
    if more[0] == "--in-flight":
        marks = sorted([(r.sent, 1) for r in loading.records] + [(r.ended, -1) for r in loading.records])
        running = [sum(step for _, step in marks[: i + 1]) for i in range(len(marks))]
        assert max(running) == 4


def test_refused_requests_are_told_not_counted(server: RunningServer) -> None:
    loading = load(server, "--requests", "2", "--top-id", "90000")
    asyncio.run(loading.run())
    assert all("token id" in r.problem for r in loading.records)


def test_prompts_depend_on_their_number_alone() -> None:
    assert mix.prompt(3, 5) == mix.prompt(3, 9)[:5] != mix.prompt(4, 5)
    assert mix.lengths(None, 512)[:3] == mix.lengths(None, 512)[:3]


def test_the_table_has_the_percentiles() -> None:
    records = [Record(1, 3, sent=0.0, texts=[0.1 * i, 0.1 * i + 0.01, 0.1 * i + 0.03], ended=0.1 * i + 0.04) for i in range(1, 101)]
    table = {row[0]: row[1:] for row in summary(records)}
    assert table["TTFT"] == ["5050.00", "5100.00", "9100.00", "10000.00", "10000.00"]
    assert table["ITL"][:2] == ["15.00", "20.00"]
    assert table["TPOT"][0] == "15.00"
