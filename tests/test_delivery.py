"""From a step to its readers: everyone gets all of their own, once, in order, whatever threads and event loops they are."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from lmdeploy.delivery import AsyncSink, Sink, ThreadSink, deliver, gathered
from lmdeploy.messages import EngineOutput, StepOutputs


def end(request_id: int, index: int = 0) -> EngineOutput:
    return EngineOutput(request_id=request_id, index=index, finish_reason="length")


def told(outputs: list[EngineOutput]) -> list[tuple[int, int, list[int], bool]]:
    return [(o.request_id, o.index, o.token_ids, o.finish_reason is not None) for o in outputs]


def test_a_step_read_as_a_sequence_is_all_of_its_outputs() -> None:
    step = StepOutputs([4, 5], [0, 1], [70, 71], [end(6)])
    assert len(step) == 3 and told(list(step)) == [(6, 0, [], True), (4, 0, [70], False), (5, 1, [71], False)]
    assert not StepOutputs()


def test_tokens_of_an_answer_are_joined_up_to_what_is_told_whole() -> None:
    first = EngineOutput(request_id=1, token_ids=[10], num_generated=1, num_prompt=3)
    steps = [
        StepOutputs(others=[first]),
        StepOutputs([1, 1], [0, 1], [11, 21]),
        StepOutputs([1, 1], [0, 1], [12, 22]),
        StepOutputs(others=[end(1)]),
    ]
    assert told(gathered(steps)) == [(1, 0, [10], False), (1, 0, [11, 12], False), (1, 1, [21, 22], False), (1, 0, [], True)]


def test_a_step_of_one_reader_is_handed_over_as_it_is_and_of_several_in_parts() -> None:
    one, other = ThreadSink(), ThreadSink()
    sinks: dict[int, tuple[Sink, int]] = {1: (one, 1), 2: (one, 1), 3: (other, 1)}
    deliver(StepOutputs([1, 2, 9], [0, 0, 0], [10, 20, 90]), sinks)
    assert told(one.take(2))[:2] == [(1, 0, [10], False), (2, 0, [20], False)]
    deliver(StepOutputs([1, 3, 9], [0, 0, 0], [11, 30, 91], [end(2), end(9)]), sinks)
    assert told(one.take(1)) == [(2, 0, [], True), (1, 0, [11], False)]
    assert told(other.take(1)) == [(3, 0, [30], False)]


def test_a_patient_reader_waits_for_more_but_not_when_all_has_ended() -> None:
    sink = ThreadSink(patience=5.0)
    sinks: dict[int, tuple[Sink, int]] = {1: (sink, 2)}
    deliver(StepOutputs([1], [0], [10]), sinks)

    def later() -> None:
        time.sleep(0.05)
        deliver(StepOutputs([1], [0], [11]), sinks)
        deliver(StepOutputs(others=[end(1, 0), end(1, 1)]), sinks)

    thread = threading.Thread(target=later)
    start = time.monotonic()
    thread.start()
    assert told(sink.take(2)) == [(1, 0, [10, 11], False), (1, 0, [], True), (1, 1, [], True)]
    thread.join()
    assert time.monotonic() - start < 4
    hasty = ThreadSink()
    deliver(StepOutputs([1], [0], [12]), {1: (hasty, 1)})
    assert told(hasty.take(1)) == [(1, 0, [12], False)]


def test_coroutines_get_their_tokens_joined_when_they_are_late() -> None:
    async def read() -> None:
        one, other, thread = AsyncSink(), AsyncSink(), ThreadSink()
        sinks: dict[int, tuple[Sink, int]] = {1: (one, 2), 2: (other, 1), 3: (thread, 1)}
        waiting = asyncio.ensure_future(one.take())
        await asyncio.sleep(0)
        deliver(StepOutputs([1, 2, 3], [0, 0, 0], [10, 20, 30]), sinks)
        deliver(StepOutputs([1, 2], [0, 0], [11, 21]), sinks)
        deliver(StepOutputs([1], [1], [19], [end(2)]), sinks)
        assert told(await waiting) == [(1, 0, [10, 11], False), (1, 1, [19], False)]
        assert told(await other.take()) == [(2, 0, [20, 21], False), (2, 0, [], True)]
        assert told(thread.take(1)) == [(3, 0, [30], False)]
        deliver(StepOutputs([1], [1], [18]), sinks)
        assert told(await one.take()) == [(1, 1, [18], False)], "what was taken does not grow"

    asyncio.run(read())


@pytest.mark.parametrize("whole", [True, False])
def test_requests_of_a_closed_loop_are_named(whole: bool) -> None:
    loop = asyncio.new_event_loop()

    async def make() -> AsyncSink:
        return AsyncSink()

    sinks: dict[int, tuple[Sink, int]] = {1: (loop.run_until_complete(make()), 1), 2: (ThreadSink(), 1)}
    loop.close()
    step = StepOutputs([], [], [], [end(1)]) if whole else StepOutputs([1, 2], [0, 0], [10, 20])
    assert deliver(step, sinks) == {1}
