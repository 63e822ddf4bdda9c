"""The engine thread: every answer gets exactly one end, whatever happens to the loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lmdeploy.engine.client import EngineClient, EngineThread
from lmdeploy.engine.engine import Engine
from lmdeploy.engine.plan import StepResult
from lmdeploy.errors import EngineError, RequestError
from lmdeploy.messages import EngineOutput, EngineRequest, SamplingParams
from tests.engine.fake_rank import FakeRank, expected_tokens


class GatedRank(FakeRank):
    """A rank whose steps wait for `gate`."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.fatal: BaseException | None = None
        self.steps = 0

    def result(self) -> StepResult:
        assert self.gate.wait(10)
        self.steps += 1
        if self.fatal is not None:
            raise self.fatal
        return super().result()


class Listener:
    """Collects outputs; `wait` blocks until so many answers have ended."""

    def __init__(self) -> None:
        self.outputs: list[EngineOutput] = []
        self.calls: list[int] = []
        self._changed = threading.Condition()

    def __call__(self, outputs: list[EngineOutput]) -> None:
        with self._changed:
            self.outputs += outputs
            self.calls.append(len(outputs))
            self._changed.notify_all()

    def ends(self) -> list[EngineOutput]:
        return [o for o in self.outputs if o.finish_reason is not None]

    def wait(self, ends: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.ends()) >= ends, 10), f"{len(self.ends())} of {ends} answers have ended"

    def tokens(self, request_id: int, index: int = 0) -> list[int]:
        return [t for o in self.outputs if (o.request_id, o.index) == (request_id, index) for t in o.token_ids]


def engine_of(rank: FakeRank) -> Callable[[], Engine]:
    return lambda: Engine(rank, max_prefill_token_num=64, max_waiting=8, enable_prefix_caching=True, rope_depends_on_length=False)


def request(request_id: int, prompt: list[int], *, n: int = 1, max_new_tokens: int = 5, **sampling: Any) -> EngineRequest:
    return EngineRequest(request_id=request_id, token_ids=prompt, n=n, sampling=SamplingParams(max_new_tokens=max_new_tokens, **sampling))


@pytest.fixture
def rank() -> GatedRank:
    return GatedRank()


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def client(rank: GatedRank, listener: Listener) -> Iterator[EngineThread]:
    thread = EngineThread(engine_of(rank))
    thread.start(listener)
    yield thread
    rank.gate.set()
    thread.close()


def test_an_engine_thread_is_an_engine_client(client: EngineThread, rank: GatedRank) -> None:
    protocol: EngineClient = client
    assert protocol.info is rank.info and protocol.failure is None and protocol.stats().num_blocks == 16


def test_requests_from_many_threads_are_all_answered(client: EngineThread, listener: Listener) -> None:
    # four at a time, as more than max_waiting may be refused
    for wave in range(4):
        threads = [threading.Thread(target=client.submit, args=(request(i, [i + 1, 2, 3]),)) for i in range(4 * wave, 4 * wave + 4)]
        for thread in threads:
            thread.start()
        listener.wait(4 * wave + 4)
    assert all(listener.tokens(i) == expected_tokens([i + 1, 2, 3], 5) for i in range(16))
    assert len(listener.ends()) == 16


def test_the_listener_is_called_once_a_step_with_all_outputs(client: EngineThread, listener: Listener, rank: GatedRank) -> None:
    rank.gate.clear()
    for i in range(3):
        client.submit(request(i, [i + 1, 2, 3]))
    rank.gate.set()
    listener.wait(3)
    assert len(listener.calls) == rank.steps and max(listener.calls) >= 2


def test_a_refused_request_is_answered_with_its_code(client: EngineThread, listener: Listener) -> None:
    client.submit(request(1, [1] * 100, n=2))
    client.submit(request(2, [1, 2]))
    listener.wait(3)
    refused = [o for o in listener.ends() if o.request_id == 1]
    assert [(o.index, o.finish_reason, o.error_code) for o in refused] == [(0, "error", "context_length_exceeded"), (1, "error", "context_length_exceeded")]
    assert "100 tokens" in str(refused[0].error) and listener.tokens(2) == expected_tokens([1, 2], 5)


def test_overload_is_answered_and_the_rest_goes_on(client: EngineThread, listener: Listener, rank: GatedRank) -> None:
    rank.gate.clear()
    for i in range(30):
        client.submit(request(i, [i + 1]))
    rank.gate.set()
    listener.wait(30)
    codes = [o.error_code for o in listener.ends() if o.finish_reason == "error"]
    assert codes and set(codes) == {"overloaded"} and len(listener.ends()) == 30


def test_an_id_in_use_is_refused_to_the_caller(client: EngineThread, listener: Listener, rank: GatedRank) -> None:
    rank.gate.clear()
    client.submit(request(1, [1, 2]))
    with pytest.raises(RequestError, match="request_id=1 is still being answered"):
        client.submit(request(1, [3, 4]))
    rank.gate.set()
    listener.wait(1)
    client.submit(request(1, [3, 4]))
    listener.wait(2)
    assert listener.tokens(1) == expected_tokens([1, 2], 5) + expected_tokens([3, 4], 5)


def test_abort_ends_all_answers_of_a_request(client: EngineThread, listener: Listener, rank: GatedRank) -> None:
    rank.gate.clear()
    client.submit(request(1, [1, 2, 3], n=3, max_new_tokens=40))
    client.submit(request(2, [4, 5]))
    client.abort(1)
    client.abort(77)
    rank.gate.set()
    listener.wait(4)
    assert sorted((o.index, o.finish_reason) for o in listener.ends() if o.request_id == 1) == [(0, "abort"), (1, "abort"), (2, "abort")]
    assert listener.tokens(2) == expected_tokens([4, 5], 5)


def test_a_lost_executor_fails_every_request_and_later_ones(client: EngineThread, listener: Listener, rank: GatedRank) -> None:
    rank.fatal = EngineError("the rank is gone")
    rank.gate.clear()
    client.submit(request(1, [1, 2], n=2))
    client.submit(request(2, [3]))
    rank.gate.set()
    listener.wait(3)
    assert {(o.finish_reason, o.error_code) for o in listener.ends()} == {("error", "engine_failed")}
    assert client.failure == "the engine failed: EngineError: the rank is gone" and listener.ends()[0].error == client.failure
    with pytest.raises(EngineError, match="request 3: the engine failed: EngineError: the rank is gone"):
        client.submit(request(3, [1]))
    client.abort(1)
    assert client.stats().num_blocks == 16


def test_a_listener_that_raises_stops_the_engine_loudly(rank: GatedRank) -> None:
    def broken(outputs: list[EngineOutput]) -> None:
        raise ValueError("listener bug")

    client = EngineThread(engine_of(rank))
    client.start(broken)
    client.submit(request(1, [1, 2]))
    client.close()
    assert client.failure in ("the engine failed: ValueError: listener bug", "the engine is closed") and rank.closed


def test_close_fails_what_is_unfinished_and_frees_the_engine(client: EngineThread, listener: Listener, rank: GatedRank) -> None:
    rank.gate.clear()
    client.submit(request(1, [1, 2, 3], max_new_tokens=40))
    time.sleep(0.05)
    closing = threading.Thread(target=client.close)
    closing.start()
    rank.gate.set()
    closing.join(10)
    assert not closing.is_alive() and rank.closed
    (end,) = listener.ends()
    assert (end.finish_reason, end.error, end.error_code) == ("error", "the engine is closed", "engine_closed")
    with pytest.raises(EngineError, match="the engine is closed"):
        client.submit(request(2, [1]))
    client.close()


def test_close_before_start_ends_the_thread(rank: GatedRank) -> None:
    client = EngineThread(engine_of(rank))
    client.close()
    assert rank.closed


def test_what_build_raises_is_raised_by_the_constructor() -> None:
    def build() -> Engine:
        raise EngineError("no memory for a single block")

    before = threading.active_count()
    with pytest.raises(EngineError, match="no memory for a single block"):
        EngineThread(build)
    time.sleep(0.05)
    assert threading.active_count() == before


def test_an_idle_engine_uses_no_processor(client: EngineThread, listener: Listener) -> None:
    client.submit(request(1, [1, 2]))
    listener.wait(1)
    start = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - start < 0.1
