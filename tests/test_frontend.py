"""The text side of the engine on the embedded model: requests are checked at one door, and none is left behind, however its reader goes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmdeploy.answer import merge_increments
from lmdeploy.config import GenerationConfig, TurbomindEngineConfig
from lmdeploy.errors import EngineError, RequestError
from lmdeploy.frontend import Frontend
from lmdeploy.messages import Response
from lmdeploy.pipeline import Pipeline

COUNT = "Count from 1 to 20."
ENDLESS = GenerationConfig(max_new_tokens=1800, ignore_eos=True)


@pytest.fixture
def frontend(pipe: Pipeline) -> Iterator[Frontend]:
    """The shared frontend; a test may leave no request and no used block behind."""
    yield pipe.frontend
    settled(pipe.frontend)


def settled(frontend: Frontend, seconds: float = 10) -> None:
    """Wait until aborts have arrived, then demand that nothing is left."""
    end = time.monotonic() + seconds
    while (frontend._sinks or frontend.stats().running or frontend.stats().used_blocks or frontend.stats().waiting) and time.monotonic() < end:
        time.sleep(0.01)
    assert not frontend._sinks
    assert frontend._in_flight == 0
    stats = frontend.stats()
    assert (stats.running, stats.waiting, stats.used_blocks) == (0, 0, 0)


# ---------------------------------------------------------------------- the door


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stop_token_ids": [5120]}, ["stop_token_ids", "5120"]),
        ({"bad_token_ids": [99999]}, ["bad_token_ids", "99999", "5120"]),
        ({"logit_bias": {5120: 1.0}}, ["logit_bias", "5120"]),
    ],
)
def test_ids_beyond_the_vocabulary_are_refused_at_the_door(frontend: Frontend, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RequestError) as error:
        frontend.prepare(COUNT, GenerationConfig(**options))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_every_request_gets_a_seed_of_its_own_and_the_config_is_never_written(frontend: Frontend) -> None:
    gen = GenerationConfig(temperature=1.0)
    seeds = {frontend.prepare(COUNT, gen).sampling.seed for _ in range(20)}
    assert len(seeds) == 20
    assert gen.random_seed is None
    assert gen == GenerationConfig(temperature=1.0)
    assert {frontend.prepare(COUNT, GenerationConfig(random_seed=2**63 - 1)).sampling.seed for _ in range(3)} == {2**63 - 1}
    answers = frontend.generate(frontend.prepare(COUNT, GenerationConfig(n=2, random_seed=2**63 - 1, temperature=1.0, max_new_tokens=3)))
    assert [a.finish_reason for a in answers] == ["length", "length"]


def test_a_prepared_request_is_a_copy(frontend: Frontend) -> None:
    gen = GenerationConfig(stop_words=["7"], logit_bias={5: 1.0})
    prepared = frontend.prepare(COUNT, gen)
    assert gen.stop_words is not None and gen.logit_bias is not None
    gen.stop_words.append("1")
    gen.logit_bias[5] = 99.0
    assert "1" not in prepared.stop_words
    assert prepared.sampling.logit_bias == {5: 1.0}


def test_ignore_eos_silences_the_templates_stops_but_not_the_callers_words(frontend: Frontend) -> None:
    answer = frontend.generate(frontend.prepare(COUNT, GenerationConfig(ignore_eos=True, stop_words=["4, 5"], max_new_tokens=60)))[0]
    assert answer.text.endswith("3, ")
    assert answer.stop_reason == "4, 5"


# ---------------------------------------------------------------------- readers that go


def test_a_generator_that_is_never_iterated_submits_nothing(frontend: Frontend) -> None:
    streams = [frontend.stream(frontend.prepare(COUNT, ENDLESS)), frontend.astream(frontend.prepare(COUNT, ENDLESS))]
    assert not frontend._sinks
    del streams
    gc.collect()


def test_a_forgotten_generator_aborts_when_it_is_collected(frontend: Frontend) -> None:
    stream = frontend.stream(frontend.prepare(COUNT, ENDLESS))
    next(stream)
    assert len(frontend._sinks) == 1
    del stream
    gc.collect()
    settled(frontend)


def test_an_async_reader_that_leaves_or_is_cancelled_aborts(frontend: Frontend) -> None:
    async def leave() -> None:
        async with contextlib.aclosing(frontend.astream(frontend.prepare(COUNT, ENDLESS))) as parts:
            async for _ in parts:
                break
        assert not frontend._sinks

    async def cancelled() -> None:
        task = asyncio.ensure_future(frontend.agenerate(frontend.prepare(COUNT, ENDLESS)))
        while not frontend._sinks:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not frontend._sinks

    asyncio.run(leave())
    asyncio.run(cancelled())


def test_a_slow_async_reader_gets_the_same_text_in_fewer_increments(frontend: Frontend) -> None:
    whole = frontend.generate(frontend.prepare(COUNT, GenerationConfig(max_new_tokens=60, ignore_eos=True, n=2)))

    async def read() -> list[Response]:
        parts = []
        async with contextlib.aclosing(frontend.astream(frontend.prepare(COUNT, GenerationConfig(max_new_tokens=60, ignore_eos=True, n=2)))) as stream:
            async for part in stream:
                parts.append(part)
                time.sleep(0.02)  # the event loop is busy: nothing is delivered meanwhile
        return parts

    parts = asyncio.run(read())
    assert len(parts) < 100, "2 x 60 tokens came"
    merged = merge_increments(parts, 2)
    assert [(a.text, a.token_ids, a.finish_reason) for a in merged] == [(a.text, a.token_ids, a.finish_reason) for a in whole]


def test_a_closed_event_loop_ends_its_requests(frontend: Frontend) -> None:
    loop = asyncio.new_event_loop()
    parts = frontend.astream(frontend.prepare(COUNT, ENDLESS))
    loop.run_until_complete(anext(parts))
    loop.close()
    settled(frontend, 5)  # long before its 1800 tokens


def test_an_error_of_the_reader_aborts_the_whole_batch(frontend: Frontend) -> None:
    requests = [frontend.prepare(COUNT, ENDLESS) for _ in range(5)]
    with pytest.raises(ZeroDivisionError):
        for _ in frontend.stream_many(requests):
            _ = 1 / 0
    settled(frontend)


def test_abort_all_ends_every_reader_with_abort(frontend: Frontend) -> None:
    found: list[str | None] = []
    readers = [threading.Thread(target=lambda: found.append(frontend.generate(frontend.prepare(COUNT, ENDLESS))[0].finish_reason)) for _ in range(4)]
    for reader in readers:
        reader.start()
    while len(frontend._sinks) < 4:
        time.sleep(0.01)
    frontend.abort_all()
    for reader in readers:
        reader.join(20)
    assert found == ["abort"] * 4


def test_a_stop_word_frees_the_blocks_at_once(frontend: Frontend) -> None:
    before = frontend.stats().generated_tokens
    answers = frontend.generate(frontend.prepare(COUNT, GenerationConfig(n=3, stop_words=["4, 5"], ignore_eos=True, max_new_tokens=1500)))
    assert [a.text.endswith("3, ") for a in answers] == [True] * 3
    settled(frontend)
    assert frontend.stats().generated_tokens - before < 200


# ---------------------------------------------------------------------- batches and life


def test_any_number_of_prompts_passes_a_small_queue(model_folder: Path) -> None:
    config = TurbomindEngineConfig(dtype="float32", max_batch_size=2, max_waiting=3, cache_max_entry_count=64, cpu_threads=1, max_prefill_token_num=256)
    with Frontend.open(str(model_folder), config) as small:
        gen = GenerationConfig(max_new_tokens=3)
        requests = [small.prepare(f"Count from 1 to {i}.", gen) for i in range(40)] + [small.prepare(COUNT, GenerationConfig(n=3, max_new_tokens=3))]
        ends = [r for r in small.stream_many(requests) if r.finish_reason is not None]
        assert len(ends) == 43
        assert {r.finish_reason for r in ends} <= {"stop", "length"}
        settled(small)

        failed: list[str | None] = []

        def ask() -> None:
            failed.extend(r.error_message for r in small.stream_many(requests[:15]) if r.finish_reason == "error")

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failed == []
        settled(small)


def test_closing_ends_running_readers_and_refuses_new_ones(model_folder: Path) -> None:
    config = TurbomindEngineConfig(dtype="float32", max_batch_size=2, cache_max_entry_count=64, cpu_threads=1, max_prefill_token_num=256)
    with Frontend.open(str(model_folder), config) as frontend:
        prepared = frontend.prepare(COUNT, ENDLESS)
        stream = frontend.stream(prepared)
        next(stream)
        frontend.close()
        last = list(stream)[-1]
        assert last.finish_reason in ("error", "abort")
        assert not frontend._sinks
        with pytest.raises(EngineError):
            frontend.generate(prepared)
        assert not frontend._sinks
        frontend.close()


def test_an_answer_that_a_stop_word_ended_is_not_computed_further(frontend: Frontend) -> None:
    before = frontend.stats().generated_tokens
    gen = GenerationConfig(n=3, temperature=1.0, random_seed=2, max_new_tokens=300, ignore_eos=True, stop_words=["happy"])
    ends = [part for part in frontend.stream(frontend.prepare("Tell me a story about a cat.", gen)) if part.finish_reason]
    lengths = sorted(part.generate_token_len for part in ends)
    assert lengths[0] + 100 < lengths[-1], "the answers are of unequal lengths"
    assert frontend.stats().generated_tokens - before <= sum(lengths) + 3 * 8, "a few steps pass until the engine has heard of it"
