"""Latency and throughput of any OpenAI-compatible server: `python -m benchmark.serving --url http://127.0.0.1:23333`.

Streams the length mix of a chat service (--lengths: a file with `input` and `output`), token ids in, greedy, end-of-sequence ignored, as
Poisson arrivals (--rate), with a fixed number in flight (--in-flight), or all at once. Prints TTFT (request sent to first text), ITL
(between one event with text and the next of the same answer), TPOT (first to last text over the tokens between) and end-to-end times,
and checks that every answer has its tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import time
import urllib.request
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from benchmark import common, mix

_COUNT = re.compile(rb'"completion_tokens":\s*(\d+)')
#: the last event of an answer, and the event with its counts: no text in either
_NO_TEXT = (b"data: [DONE]", b'"choices":[]', b'"choices": []')


@dataclass(slots=True)
class Record:
    """What one request did, in seconds on one clock."""

    input_tokens: int
    output_tokens: int
    sent: float = 0.0
    texts: list[float] = field(default_factory=list)  # when each event with text came
    ended: float = 0.0
    counted: int = -1  # tokens as the server says
    problem: str = ""


class _Reader(asyncio.Protocol):
    """Cuts what arrives into events as it arrives; nothing is parsed before the end."""

    def __init__(self, record: Record, request: bytes) -> None:
        self._record, self._request = record, request
        self._rest, self._last = b"", b""
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._record.sent = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        *events, self._rest = (self._rest + data).split(b"\n\n")
        with_text = sum(not any(mark in event for mark in _NO_TEXT) for event in events)
        self._record.texts += [now] * with_text
        self._last = b"\n\n".join([self._last, *events])[-4096:]
        if self._last.endswith(b"data: [DONE]"):
            self._record.ended = now
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        seen = self._last + self._rest
        if counts := _COUNT.findall(seen):
            self._record.counted = int(counts[-1])
        if not self._record.ended:
            self._record.problem = f"the answer has no end: {seen[-300:].decode('utf-8', 'replace')!r} {error or ''}"
        elif self._record.counted != self._record.output_tokens:
            self._record.problem = f"{self._record.counted} tokens came, not {self._record.output_tokens}"
        if not self.over.done():
            self.over.set_result(None)


class Load:
    """Sends the requests and keeps their records."""

    def __init__(self, args: argparse.Namespace, model: str) -> None:
        self._args, self._model, self._at = args, model, urlsplit(args.url)
        self.records = [Record(i, o) for i, o in mix.lengths(args.lengths, args.requests, shrink=args.shrink)]

    async def run(self) -> float:
        """Seconds from the first request to the last end."""
        gate = asyncio.Semaphore(self._args.in_flight or len(self.records))
        start, due, rng = time.perf_counter(), 0.0, random.Random(mix.SEED)
        tasks = []
        for number, record in enumerate(self.records):
            await gate.acquire()
            if self._args.rate:
                await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
                due += rng.expovariate(self._args.rate)
            tasks.append(asyncio.ensure_future(self._ask(number, record)))
            tasks[-1].add_done_callback(lambda _: gate.release())
        await asyncio.gather(*tasks)
        return max(r.ended for r in self.records) - min(r.sent for r in self.records)

    async def _ask(self, number: int, record: Record) -> None:
        secure = self._at.scheme == "https"
        port = self._at.port or (443 if secure else 80)
        body = self._request(number, record)
        _, reader = await asyncio.get_running_loop().create_connection(lambda: _Reader(record, body), self._at.hostname, port, ssl=secure or None)
        await reader.over

    def _request(self, number: int, record: Record) -> bytes:
        ids = mix.prompt(number, record.input_tokens, self._args.top_id)
        common_fields = {"max_tokens": record.output_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        body: dict[str, object] = {"input_ids": ids, **common_fields}
        path = "/generate"
        if self._args.route == "completions":
            path, body = "/v1/completions", {"model": self._model, "prompt": ids, "stream_options": {"include_usage": True}, **common_fields}
        data = json.dumps(body).encode()
        key = f"Authorization: Bearer {self._args.api_key}\r\n" if self._args.api_key else ""
        head = f"POST {self._at.path.rstrip('/')}{path} HTTP/1.1\r\nHost: {self._at.netloc}\r\n{key}Content-Type: application/json\r\nConnection: close\r\n"
        return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def served_model(args: argparse.Namespace) -> str:
    """The first model that the server names."""
    request = urllib.request.Request(args.url.rstrip("/") + "/v1/models", headers={"Authorization": f"Bearer {args.api_key}"} if args.api_key else {})
    with urllib.request.urlopen(request, timeout=30) as reply:
        name: str = json.load(reply)["data"][0]["id"]
    return name


def summary(records: list[Record]) -> list[list[str]]:
    """A table of milliseconds."""
    rows = [["ms", "mean", "median", "p90", "p99", "max"]]
    gaps = [b - a for r in records for a, b in zip(r.texts, r.texts[1:], strict=False)]
    per_token = [(r.texts[-1] - r.texts[0]) / (r.output_tokens - 1) for r in records if r.output_tokens > 1]
    for name, values in (
        ("TTFT", [r.texts[0] - r.sent for r in records]),
        ("ITL", gaps),
        ("TPOT", per_token),
        ("end to end", [r.ended - r.sent for r in records]),
    ):
        ordered = sorted(values) or [0.0]
        at = [statistics.fmean(ordered), *(ordered[min(len(ordered) * p // 100, len(ordered) - 1)] for p in (50, 90, 99)), ordered[-1]]
        rows.append([name, *(f"{1e3 * v:.2f}" for v in at)])
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:23333", help="the server, without /v1")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--model", default="", help="model name; default: the first that the server names")
    parser.add_argument("--route", choices=("completions", "generate"), default="completions")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--lengths", help="JSON file with the lists `input` and `output`; default: drawn from the same distribution")
    parser.add_argument("--shrink", type=int, default=1, help="divide all lengths by this (a quick run)")
    parser.add_argument("--top-id", type=int, default=mix.TOP_ID, help="prompt ids are below this; it must not be more than the vocabulary")
    parser.add_argument("--rate", type=float, default=0.0, help="requests per second, Poisson arrivals; default: no waiting")
    parser.add_argument("--in-flight", type=int, default=0, help="most requests under way; default: all")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print; exit 1 when an answer was not what was asked for."""
    args = parse()
    load = Load(args, args.model or served_model(args))
    seconds = asyncio.run(load.run())
    good = [r for r in load.records if not r.problem]
    inputs, outputs = sum(r.input_tokens for r in good), sum(r.output_tokens for r in good)
    arrivals = f"Poisson {args.rate:g}/s" if args.rate else "at once"
    print(f"{common.machine()} (of the client)\n{len(load.records)} requests, {arrivals}, at most {args.in_flight or len(load.records)} in flight\n")
    if good:
        common.print_table(
            [
                ["requests", "input", "output", "seconds", "req/s", "output tok/s", "total tok/s"],
                [str(len(good)), str(inputs), str(outputs), f"{seconds:.2f}", f"{len(good) / seconds:.2f}", f"{outputs / seconds:.1f}"]
                + [f"{(inputs + outputs) / seconds:.1f}"],
            ]
        )
        print()
        common.print_table(summary(good))
    failed = [r.problem for r in load.records if r.problem]
    if failed:
        raise SystemExit(f"\n{len(failed)} of {len(load.records)} requests failed, the first: {failed[0]}")


if __name__ == "__main__":
    main()
