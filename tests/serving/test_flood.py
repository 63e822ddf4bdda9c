"""Far more than can be served: everybody gets an answer or a refusal with the time to come back, keys share, memory stays."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.serving.running import ServerProcess

BODY: dict[str, Any] = {"model": "tiny", "prompt": "Once upon a time", "ignore_eos": True, "temperature": 0, "max_tokens": 4}
CLIENTS, QUEUE = 120, 40


@pytest.fixture
def process(model_folder: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    keys = tmp_path / "keys"
    keys.write_text("noisy:kn\nquiet:kq\n")
    started = ServerProcess(model_folder, tmp_path / "log", api_keys_file=str(keys), max_queue=QUEUE, max_concurrent_requests=4, key="kq")
    yield started
    started.kill()


async def flood(url: str, seconds: float) -> tuple[Counter[int], list[float], set[str]]:
    """Statuses of CLIENTS clients of one key that never wait, seconds of each answer to a second key that asks one at a time, and Retry-After values."""
    statuses: Counter[int] = Counter()
    quiet: list[float] = []
    retry: set[str] = set()
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=CLIENTS + 1)
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, limits=limits) as client:

        async def noisy(number: int) -> None:
            while time.monotonic() < end:
                reply = await client.post("/v1/completions", json={**BODY, "stream": number % 2 == 0}, headers={"x-api-key": "kn"})
                statuses[reply.status_code] += 1
                if reply.status_code == 200:
                    assert reply.text.rstrip().endswith("[DONE]") if number % 2 == 0 else reply.json()["usage"]["completion_tokens"] == 4
                else:
                    retry.add(reply.headers["retry-after"])
                    await asyncio.sleep(0.02)

        async def patient() -> None:
            while time.monotonic() < end:
                began = time.monotonic()
                reply = await client.post("/v1/completions", json=BODY, headers={"x-api-key": "kq"})
                assert reply.status_code == 200, "a full queue makes room for the key that has less there"
                quiet.append(time.monotonic() - began)

        await asyncio.gather(patient(), *(noisy(i) for i in range(CLIENTS)))
    return statuses, quiet, retry


def test_a_flood_is_refused_in_order_and_leaves_nothing(process: ServerProcess) -> None:
    server = psutil.Process(process.popen.pid)
    asyncio.run(flood(process.url, 2))  # warm
    before = server.memory_info().rss
    statuses, quiet, retry = asyncio.run(flood(process.url, 5))
    after = server.memory_info().rss
    assert set(statuses) == {200, 503}, statuses
    assert statuses[503] > 20, "it was no flood"
    assert all(1 <= int(value) <= 60 for value in retry)
    assert len(quiet) >= 1, "the other key gets through"
    assert after - before < 32 << 20, f"{(after - before) >> 20} MiB more than before"
    assert process.http.get("/ready").status_code == 200
    figures = process.http.get("/metrics").text
    for gauge in ("num_api_requests_waiting", "num_api_requests_routed", "kv_blocks_used", "num_requests_running"):
        (line,) = [line for line in figures.splitlines() if line.startswith(f"lmdeploy:{gauge}{{")]
        assert float(line.split()[-1]) == 0, line
    refused = [line for line in figures.splitlines() if line.startswith("lmdeploy:http_requests_failed_total") and "overloaded" in line]
    assert float(refused[0].split()[-1]) >= statuses[503]
    print(f"\n{dict(statuses)}, other key: {len(quiet)} answers, median {sorted(quiet)[len(quiet) // 2]:.2f} s, memory {(after - before) / 2**20:+.1f} MiB")
