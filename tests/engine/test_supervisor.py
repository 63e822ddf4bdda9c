"""An engine that is replaced when it crashes or hangs: real processes, really killed and stopped, and steps that really hang."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import hypothesis.strategies as st
import psutil
import pytest
from hypothesis import given

from lmdeploy.config import TurbomindEngineConfig
from lmdeploy.engine import launching, wire
from lmdeploy.engine.process import EngineProcess
from lmdeploy.engine.supervisor import Standing, SupervisedEngine, Supervision
from lmdeploy.errors import CheckpointError, EngineError
from lmdeploy.messages import EngineRequest, Order, SamplingParams
from tests.engine import broken_child
from tests.engine.test_process import PROMPT, Inbox, is_gone, left_behind, long_request, request

CONFIG = TurbomindEngineConfig(dtype="float32", session_len=512, max_batch_size=4, cache_max_entry_count=16, cpu_threads=1, max_prefill_token_num=128)

Start = Callable[..., tuple[SupervisedEngine, Inbox]]


@pytest.fixture
def start(model_folder: Path) -> Iterator[Start]:
    engines = []

    def open_one(folder: Path = model_folder, config: TurbomindEngineConfig = CONFIG, **options: object) -> tuple[SupervisedEngine, Inbox]:
        engine, inbox = SupervisedEngine(folder, config, Supervision(**options)), Inbox()  # type: ignore[arg-type]
        engines.append(engine)
        engine.start(inbox)
        return engine, inbox

    yield open_one
    for engine in engines:
        engine.close()


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause before a second restart and later ones."""
    monkeypatch.setattr("lmdeploy.engine.supervisor.MAX_DELAY_SECONDS", 0.0)


@pytest.fixture
def broken(at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "child_command", broken_child.command)


def harmful(request_id: int, token: int) -> EngineRequest:
    return EngineRequest(request_id=request_id, token_ids=[*PROMPT, token], sampling=SamplingParams(max_new_tokens=4))


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def until_restarted(engine: SupervisedEngine, count: int = 1) -> None:
    until(lambda: engine.stats().restarts >= count and engine.trouble is None)


def test_a_killed_engine_comes_back_and_what_was_not_begun_is_answered(start: Start) -> None:
    engine, inbox = start()
    facts = engine.info
    engine.submit(request(1, max_new_tokens=12, ignore_eos=True))
    inbox.final(1)
    for number in (10, 11, 12, 13):  # four fill the batch
        engine.submit(long_request(number))
    inbox.wait(lambda: all(inbox.tokens.get((number, 0)) for number in (10, 11, 12, 13)))
    engine.submit(request(20, max_new_tokens=12, n=2, ignore_eos=True))  # waits, so nothing of it was delivered
    pid = engine.pid
    os.kill(pid, signal.SIGKILL)
    for number in (10, 11, 12, 13):
        output = inbox.final(number)
        assert (output.finish_reason, output.error_code) == ("error", "engine_failed")
        assert "signal 9" in (output.error or "")
    assert {inbox.final(20, i).finish_reason for i in (0, 1)} == {"length"}
    assert inbox.tokens[20, 0] == inbox.tokens[1, 0], "the replayed request gives what it would have given"
    assert engine.pid != pid and is_gone(pid)
    assert (engine.stats().restarts, engine.failure, engine.trouble, engine.info) == (1, None, None, facts)


def test_requests_are_refused_while_there_is_no_engine(start: Start) -> None:
    engine, inbox = start()
    os.kill(engine.pid, signal.SIGKILL)
    until(lambda: engine.trouble is not None)
    with pytest.raises(EngineError, match="restarted .*signal 9.*try again") as caught:
        engine.submit(request(1))
    assert caught.value.code == "engine_restarting"
    assert engine.stats().running == 0
    engine.abort(1)
    until_restarted(engine)
    engine.submit(request(1))
    assert inbox.final(1).finish_reason in ("stop", "length")


def test_a_request_that_waits_for_the_next_process_can_be_aborted(start: Start) -> None:
    engine, inbox = start()
    for number in range(1, 5):
        engine.submit(long_request(number))
    inbox.wait(lambda: len(inbox.tokens) == 4)
    engine.submit(request(9, n=2))
    os.kill(engine.pid, signal.SIGKILL)
    until(lambda: engine.trouble is not None and engine.stats().waiting == 1)
    engine.abort(9)
    assert [inbox.final(9, i).finish_reason for i in (0, 1)] == ["abort", "abort"]
    until_restarted(engine)
    engine.submit(request(10))
    assert inbox.final(10).finish_reason in ("stop", "length")


def test_a_stopped_process_is_replaced(start: Start) -> None:
    engine, inbox = start(stall_seconds=1.5)
    engine.submit(long_request(1))
    inbox.wait(lambda: (1, 0) in inbox.tokens)
    os.kill(engine.pid, signal.SIGSTOP)
    assert "no ping" in (inbox.final(1).error or "")
    until_restarted(engine)
    engine.submit(request(2))
    assert inbox.final(2).finish_reason in ("stop", "length")


def test_a_step_that_hangs_is_noticed_though_the_process_answers_pings(broken: None, start: Start) -> None:
    engine, inbox = start(stall_seconds=2)
    engine.submit(harmful(1, broken_child.HANG))
    output = inbox.final(1)  # after its one replay, which hangs too
    assert "no step ends" in (output.error or "")
    assert engine.stats().restarts == 1
    until_restarted(engine, 2)
    engine.submit(request(2))
    assert inbox.final(2).finish_reason in ("stop", "length")


def test_an_idle_engine_does_not_count_as_hung(start: Start) -> None:
    engine, inbox = start(stall_seconds=1.5)
    pid = engine.pid
    time.sleep(2.5)
    engine.submit(request(1))
    assert inbox.final(1).finish_reason in ("stop", "length")
    assert engine.pid == pid


def test_a_request_that_takes_the_engine_down_is_replayed_once(broken: None, start: Start) -> None:
    engine, inbox = start()
    engine.submit(harmful(1, broken_child.CRASH))
    output = inbox.final(1)
    assert (output.finish_reason, output.error_code) == ("error", "engine_failed")
    until_restarted(engine, 2)
    time.sleep(0.3)
    assert engine.stats().restarts == 2
    engine.submit(request(2))
    assert inbox.final(2).finish_reason in ("stop", "length")


def test_a_lost_device_restarts_the_engine_and_no_memory_in_a_step_fails_one_request(broken: None, start: Start) -> None:
    engine, inbox = start()
    pid = engine.pid
    engine.submit(long_request(1))
    engine.submit(harmful(2, broken_child.NO_MEMORY))
    refused = inbox.final(2)
    assert refused.finish_reason == "error" and "out of memory" in (refused.error or "")
    assert (inbox.final(1).finish_reason, engine.pid) == ("length", pid), "its neighbour never noticed"
    engine.submit(harmful(3, broken_child.DEVICE_LOST))
    lost = inbox.final(3)
    assert lost.error_code == "engine_failed" and "illegal memory access" in (lost.error or "")
    until_restarted(engine, 2)
    engine.submit(request(4))
    assert inbox.final(4).finish_reason in ("stop", "length")


def test_an_engine_that_fails_again_and_again_is_given_up(start: Start, model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    engine, inbox = start(folder, max_restarts=2)
    for number in range(1, 5):
        engine.submit(long_request(number))
    inbox.wait(lambda: len(inbox.tokens) == 4)
    engine.submit(request(5))
    (folder / "config.json").unlink()
    os.kill(engine.pid, signal.SIGKILL)
    ended = inbox.final(5)
    assert ended.finish_reason == "error" and "restarted 2 times" in (ended.error or "") and "config.json" in (ended.error or "")
    assert engine.failure == ended.error
    with pytest.raises(EngineError, match="has stopped"):
        engine.submit(request(6))


def test_a_restart_that_never_gets_ready_counts_as_failed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmdeploy.engine.supervisor.MIN_START_SECONDS", 1.0)
    monkeypatch.setattr("lmdeploy.engine.supervisor.START_FACTOR", 0.0)
    engine, inbox = start(max_restarts=1)
    monkeypatch.setattr(launching, "child_command", lambda: [sys.executable, "-c", "import time; time.sleep(600)"])
    os.kill(engine.pid, signal.SIGKILL)
    until(lambda: engine.failure is not None)
    assert "loading" in (engine.failure or "") and "signal 9" in (engine.failure or "")
    with pytest.raises(EngineError, match="has stopped"):
        engine.submit(request(1))


# ------------------------------------------------------------------ the state of the one before

PARTS = st.sampled_from([(), ("weights",), ("kv_cache",), ("weights", "kv_cache")])
ORDERS = st.one_of(
    st.builds(lambda level: Order(action="sleep", level=level), st.sampled_from([1, 2])),
    st.builds(lambda tags: Order(action="wake", tags=tags), PARTS),
    st.builds(lambda path: Order(action="update_weights", path=path), st.sampled_from(["/a", "/b"])),
)


class Machine:
    """What orders do to an engine, part by part, in the words of the manual and not in those of the package."""

    def __init__(self) -> None:
        self.served, self.loaded, self.cache = "start", True, True

    def obey(self, order: Order) -> None:
        if order.action == "sleep":
            self.loaded = self.cache = False
        elif order.action == "update_weights":
            self.served, self.loaded = order.path, True
        else:
            self.loaded = self.loaded or not order.tags or "weights" in order.tags
            self.cache = self.cache or not order.tags or "kv_cache" in order.tags


@given(st.lists(ORDERS, max_size=12))
def test_a_fresh_engine_is_led_to_the_state_of_the_one_before(orders: list[Order]) -> None:
    old, fresh, standing = Machine(), Machine(), Standing()
    for order in orders:
        old.obey(order)
        standing = standing.after(order)
    for order in standing.orders():
        fresh.obey(order)
    assert vars(fresh) == vars(old), standing.orders()
    slept = [order.level for order in orders if order.action == "sleep"]
    assert all(order.level == slept[-1] for order in standing.orders() if order.action == "sleep")
    assert len(standing.orders()) <= 3, "it does not grow"


def test_an_engine_that_took_new_weights_asleep_answers_after_a_crash(at_once: None, start: Start, model_folder: Path) -> None:
    """The order of things in reinforcement learning: sleep, new weights, then the cache."""
    engine, inbox = start()
    engine.obey(Order(action="sleep", level=2)).result(60)
    engine.obey(Order(action="update_weights", path=str(model_folder))).result(60)
    os.kill(engine.pid, signal.SIGKILL)
    until_restarted(engine, 1)
    engine.submit(request(1))
    assert "(kv_cache)" in (inbox.final(1).error or "")
    engine.obey(Order(action="wake", tags=("kv_cache",))).result(60)
    engine.submit(request(2))
    assert inbox.final(2).finish_reason in ("stop", "length")
    os.kill(engine.pid, signal.SIGKILL)
    until_restarted(engine, 2)
    engine.submit(request(3))
    assert inbox.final(3).finish_reason in ("stop", "length"), inbox.final(3).error


# ------------------------------------------------------------------ the supervisor itself


def test_a_process_that_cannot_be_made_counts_as_a_failed_start(at_once: None, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, inbox = start()
    real, failures = launching.launch, iter([OSError(12, "Cannot allocate memory"), RuntimeError("can't start new thread")])

    def sometimes(device_type: str) -> launching.Launched:
        for failure in failures:
            raise failure
        return real(device_type)

    monkeypatch.setattr("lmdeploy.engine.supervisor.launch", sometimes)
    os.kill(engine.pid, signal.SIGKILL)
    until_restarted(engine)
    assert len(engine._times) == 3, "two tries failed"
    engine.submit(request(1))
    assert inbox.final(1).finish_reason in ("stop", "length")


def test_when_no_process_can_be_made_at_all_what_waits_is_told(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(device_type: str) -> launching.Launched:
        raise OSError(12, "Cannot allocate memory")

    engine, inbox = start(max_restarts=2)
    for number in range(1, 5):
        engine.submit(long_request(number))
    inbox.wait(lambda: len(inbox.tokens) == 4)
    engine.submit(request(9))
    monkeypatch.setattr("lmdeploy.engine.supervisor.launch", never)
    os.kill(engine.pid, signal.SIGKILL)
    assert "Cannot allocate memory" in (inbox.final(9).error or "")
    assert "restarted 2 times" in (engine.failure or "")


def test_a_supervisor_that_fails_itself_gives_the_engine_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, inbox = start()
    for number in range(1, 5):
        engine.submit(long_request(number))
    inbox.wait(lambda: len(inbox.tokens) == 4)
    engine.submit(request(9))
    monkeypatch.setattr(engine, "_replace", lambda reason: 1 / 0)
    os.kill(engine.pid, signal.SIGKILL)
    assert "supervisor failed: ZeroDivisionError" in (inbox.final(9).error or "")
    assert engine.failure == engine.trouble == inbox.final(9).error
    with pytest.raises(EngineError, match="has stopped"):
        engine.submit(request(10))


def test_the_end_of_an_order_that_comes_after_a_failure_is_ignored(model_folder: Path) -> None:
    client, inbox = EngineProcess(model_folder, CONFIG), Inbox()
    client.start(inbox)
    os.kill(client.pid, signal.SIGSTOP)
    done: Future[None] = client.obey(Order(action="wake"))
    (ticket,) = client._orders
    client._fail("the watch says so")
    client._settle(wire.Done(ticket, "", ""))  # was on its way
    with pytest.raises(EngineError, match="the watch"):
        done.result(1)
    client.close()


def test_the_first_start_fails_as_ever(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        SupervisedEngine(tmp_path, CONFIG)


def test_closing_while_a_new_engine_loads_is_quick_and_leaves_no_process(start: Start) -> None:
    me = psutil.Process()
    others = set(me.children())  # servers of the other tests of this process
    engine, _ = start()
    before = threading.active_count()
    os.kill(engine.pid, signal.SIGKILL)
    until(lambda: engine._launched is not None)
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 5
    assert [child.pid for child in set(me.children()) - others if child.status() != psutil.STATUS_ZOMBIE] == []
    assert threading.active_count() < before


def test_a_dead_parent_leaves_no_engine_behind_also_after_a_restart(model_folder: Path) -> None:
    code = (
        "import os, signal, sys, time\nfrom pathlib import Path\nfrom lmdeploy.config import TurbomindEngineConfig\n"
        "from lmdeploy.engine.supervisor import SupervisedEngine\n"
        f"engine = SupervisedEngine(Path({str(model_folder)!r}), TurbomindEngineConfig(session_len=256, max_batch_size=2, cache_max_entry_count=16))\n"
        "engine.start(lambda outputs: None)\nos.kill(engine.pid, signal.SIGKILL)\n"
        "while engine.stats().restarts < 1:\n    time.sleep(0.05)\n"
        "print(engine.pid, flush=True)\ntime.sleep(60)\n"
    )
    assert is_gone(left_behind(code))


@pytest.mark.slow
def test_restarts_leak_neither_descriptors_nor_threads_nor_memory(at_once: None, start: Start) -> None:
    me = psutil.Process()
    others = set(me.children())  # servers of the other tests of this process

    def segments() -> set[str]:
        folder = Path("/dev/shm")
        return {path.name for path in folder.iterdir()} if folder.is_dir() else set()

    engine, inbox = start(max_restarts=20)

    def crash(count: int) -> None:
        engine.submit(long_request(count))
        inbox.wait(lambda: (count, 0) in inbox.last or bool(inbox.tokens.get((count, 0))))
        os.kill(engine.pid, signal.SIGKILL)
        inbox.final(count)
        until_restarted(engine, count)

    for count in (1, 2):
        crash(count)
    gc.collect()  # other tests' sockets
    before, shared = (me.num_fds(), threading.active_count()), segments()
    memory = me.memory_info().rss
    for count in range(3, 8):
        crash(count)
    assert me.num_fds() <= before[0] and threading.active_count() <= before[1]
    deadline = time.monotonic() + 20
    while (left := segments() - shared) and time.monotonic() < deadline:  # a browser of another test has some for a moment
        time.sleep(0.1)
    assert not left
    assert me.memory_info().rss - memory < 2 << 20
    assert len(set(me.children()) - others) == 1
