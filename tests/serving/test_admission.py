"""Who is worked on next: a bounded queue, turns for keys, and nobody lost whatever happens at the same moment."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

import pytest

from lmdeploy.serving.admission import MAX_RETRY, MIN_RETRY, UNKNOWN_RETRY, Admission
from lmdeploy.serving.openai.errors import HttpError


def admission(limit: int = 1, queue: int = 100, seconds: float = 60, per_key: int | None = None) -> Admission:
    return Admission(limit, queue, seconds, per_key)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))  # type: ignore[arg-type]


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def far() -> float:
    return time.monotonic() + 1000


def test_keys_take_turns_however_many_requests_one_sends() -> None:
    async def test() -> None:
        places, order = admission(), []

        async def ask(key: str, name: str) -> None:
            await places.enter(key, far())
            order.append(name)
            await asyncio.sleep(0)
            places.leave(key)

        tasks = [asyncio.create_task(ask("noisy", f"n{i}")) for i in range(50)]
        await settled()
        tasks += [asyncio.create_task(ask("a", "a0")), asyncio.create_task(ask("b", "b0")), asyncio.create_task(ask("a", "a1"))]
        at = len(order)
        await asyncio.gather(*tasks)
        assert sorted(order) == sorted([f"n{i}" for i in range(50)] + ["a0", "a1", "b0"])
        assert max(order.index("a0"), order.index("b0")) <= at + 4, order
        assert order.index("a1") <= at + 7, order
        assert [n for n in order if n[0] == "n"] == [f"n{i}" for i in range(50)], "one key's requests stay in order"

    run(test)


def test_one_more_than_the_queue_holds_is_503_and_one_more_than_the_keys_share_429() -> None:
    async def test() -> None:
        places = admission(limit=1, queue=2, per_key=2)
        await places.enter("a", far())
        waiting = [asyncio.create_task(places.enter(key, far())) for key in ("a", "b")]
        await settled()
        assert places.full and (places.running, places.waiting) == (1, 2)
        with pytest.raises(HttpError) as own:
            await places.enter("a", far())
        assert (own.value.status, own.value.code) == (429, "key_limit")
        with pytest.raises(HttpError) as full:
            await places.enter("c", far())
        assert (full.value.status, full.value.code) == (503, "overloaded")
        places.leave("a")
        await waiting[0]
        places.leave("a")
        await waiting[1]
        places.leave("b")
        assert (places.running, places.waiting, places.full) == (0, 0, False)
        await places.enter("a", far())

    run(test)


def test_a_key_that_fills_the_queue_gives_up_places_to_others() -> None:
    async def test() -> None:
        places = admission(limit=1, queue=4)
        await places.enter("noisy", far())
        noisy = [asyncio.create_task(places.enter("noisy", far())) for _ in range(4)]
        await settled()
        others = [asyncio.create_task(places.enter(key, far())) for key in ("a", "b", "a")]
        await settled()
        refused = [task for task in noisy if task.done()]
        assert refused == noisy[2:], "its last ones"
        assert all(getattr(task.exception(), "code", None) == "overloaded" for task in refused)
        assert others[2].done(), "a third key's second request is no better than the noisy one's second"
        assert places.waiting == 4
        for key in ("noisy", "noisy", "a", "b", "noisy"):  # who runs, and then in turn
            places.leave(key)
            await settled()
        assert (places.running, places.waiting) == (0, 0)

    run(test)


def test_who_waits_too_long_is_sent_away_and_takes_no_place() -> None:
    async def test() -> None:
        places = admission(seconds=0.05)
        await places.enter("a", far())
        for deadline in (far(), time.monotonic() + 0.01):
            with pytest.raises(HttpError) as late:
                await places.enter("b", deadline)
            assert (late.value.status, late.value.code) == (503, "queue_timeout")
        assert places.waiting == 0
        places.leave("a")
        await places.enter("c", far())

    run(test)


def test_close_sends_the_waiting_away() -> None:
    async def test() -> None:
        places = admission()
        await places.enter("a", far())
        waiting = [asyncio.create_task(places.enter("b", far())) for _ in range(3)]
        await settled()
        places.close()
        for task in waiting:
            with pytest.raises(HttpError, match="shutting down"):
                await task
        assert places.waiting == 0

    run(test)


@pytest.mark.parametrize("seed", range(5))
def test_no_place_is_lost_whoever_gives_up_when(seed: int) -> None:
    """Cancelled, late and lost requests at random moments; in the end all places are free and all who stayed were served."""

    async def test() -> None:
        rng = random.Random(seed)
        places = admission(limit=3, queue=1000, seconds=0.02)
        served = most = 0

        async def ask(key: str) -> None:
            nonlocal served, most
            await places.enter(key, far())
            most = max(most, places.running)
            try:
                await asyncio.sleep(rng.random() * 0.003)
            finally:
                served += 1
                places.leave(key)

        tasks = []
        for _ in range(400):
            tasks.append(asyncio.create_task(ask(rng.choice("abcd"))))
            if rng.random() < 0.4:
                rng.choice(tasks).cancel()
            if rng.random() < 0.3:
                await asyncio.sleep(rng.random() * 0.002)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(r is None or isinstance(r, (asyncio.CancelledError, HttpError)) for r in results)
        assert (places.running, places.waiting, places._queues, dict(places._in_flight)) == (0, 0, {}, {})
        assert served > 50 and most == 3

    run(test)


def test_retry_after_is_what_the_measured_rate_says() -> None:
    async def test() -> None:
        places = admission(limit=1, queue=10_000)
        assert places.retry_after() == UNKNOWN_RETRY
        now = time.monotonic()
        places._ends.extend(now - 8 + i for i in range(9))  # one a second
        assert places.retry_after() in (1, 2)
        await places.enter("a", far())
        waiting = [asyncio.create_task(places.enter("a", far())) for _ in range(19)]
        await settled()
        assert 19 <= places.retry_after() <= 22
        waiting += [asyncio.create_task(places.enter("a", far())) for _ in range(500)]
        await settled()
        assert places.retry_after() == MAX_RETRY
        places._ends.clear()
        places._ends.extend(now - 0.001 * i for i in range(60, 0, -1))
        places.close()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert places.retry_after() == MIN_RETRY

    run(test)
