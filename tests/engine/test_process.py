"""The engine in a process of its own: real children, really killed, stopped and orphaned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from lmdeploy.config import PytorchEngineConfig, TurbomindEngineConfig
from lmdeploy.engine import launching
from lmdeploy.engine.client import EngineThread
from lmdeploy.engine.process import EngineProcess
from lmdeploy.engine.start import build_engine
from lmdeploy.errors import CheckpointError, ConfigError, EngineError, OverloadedError, RequestError
from lmdeploy.messages import EngineOutput, EngineRequest, SamplingParams

CONFIG = TurbomindEngineConfig(dtype="float32", session_len=512, max_batch_size=4, cache_max_entry_count=64, cpu_threads=1, max_prefill_token_num=128)
PROMPT = [1, 20, 30, 40, 50, 60]


class Inbox:
    """Collects outputs; answers are waited for by request."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.last: dict[tuple[int, int], EngineOutput] = {}
        self.finals = 0
        self._changed = threading.Condition()

    def __call__(self, outputs: list[EngineOutput]) -> None:
        with self._changed:
            for output in outputs:
                key = (output.request_id, output.index)
                self.tokens.setdefault(key, []).extend(output.token_ids)
                if output.finish_reason is not None:
                    assert key not in self.last, "an answer ends once"
                    self.last[key] = output
                    self.finals += 1
            self._changed.notify_all()

    def wait(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, seconds), "nothing came in time"

    def final(self, request_id: int, index: int = 0) -> EngineOutput:
        self.wait(lambda: (request_id, index) in self.last)
        return self.last[request_id, index]


def request(request_id: int, max_new_tokens: int = 8, n: int = 1, **sampling: object) -> EngineRequest:
    return EngineRequest(request_id=request_id, token_ids=PROMPT, n=n, sampling=SamplingParams(max_new_tokens=max_new_tokens, **sampling))


def long_request(request_id: int, n: int = 1) -> EngineRequest:
    return request(request_id, max_new_tokens=500, n=n, ignore_eos=True)


def started(folder: Path, **options: object) -> tuple[EngineProcess, Inbox]:
    client, inbox = EngineProcess(folder, CONFIG, **options), Inbox()
    client.start(inbox)
    return client, inbox


@pytest.fixture(scope="module")
def engine(model_folder: Path) -> Iterator[tuple[EngineProcess, Inbox]]:
    client, inbox = started(model_folder)
    yield client, inbox
    client.close()


def is_gone(pid: int, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def left_behind(code: str) -> int:
    """Run a program that starts an engine process and prints its id, and kill the program; the id."""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    return pid


def test_the_process_gives_the_same_tokens_as_a_thread(engine: tuple[EngineProcess, Inbox], model_folder: Path) -> None:
    client, inbox = engine
    client.submit(request(1, max_new_tokens=16, ignore_eos=True))
    inbox.final(1)
    thread, other = EngineThread(lambda: build_engine(model_folder, CONFIG)), Inbox()
    thread.start(other)
    try:
        thread.submit(request(1, max_new_tokens=16, ignore_eos=True))
        other.final(1)
        assert client.info.session_len == thread.info.session_len == 512
    finally:
        thread.close()
    assert inbox.tokens[1, 0] == other.tokens[1, 0]
    assert len(inbox.tokens[1, 0]) == 16


def test_the_memory_bill_is_that_of_the_engine_process(engine: tuple[EngineProcess, Inbox]) -> None:
    client, _ = engine
    assert client.info.memory.total == pytest.approx(psutil.Process(client.pid).memory_info().rss, rel=0.05)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says how large the table is")
def test_the_process_has_room_for_its_files_from_the_start(engine: tuple[EngineProcess, Inbox]) -> None:
    """Widening the table later makes an `open` wait."""
    status = Path(f"/proc/{engine[0].pid}/status").read_text()
    assert int(status.split("FDSize:")[1].split()[0]) >= launching.FILES


def test_every_answer_of_a_request_ends(engine: tuple[EngineProcess, Inbox]) -> None:
    client, inbox = engine
    client.submit(request(10, n=3))
    assert {inbox.final(10, i).finish_reason for i in range(3)} <= {"stop", "length"}


def test_abort_frees_the_blocks(engine: tuple[EngineProcess, Inbox]) -> None:
    client, inbox = engine
    client.submit(long_request(20))
    inbox.wait(lambda: len(inbox.tokens.get((20, 0), ())) > 3)
    assert client.stats().used_blocks > 0
    client.abort(20)
    assert inbox.final(20).finish_reason == "abort"
    stats = client.stats()
    assert (stats.running, stats.used_blocks) == (0, 0)
    client.abort(20)
    client.abort(999_999)


def test_a_bad_request_fails_alone(engine: tuple[EngineProcess, Inbox]) -> None:
    client, inbox = engine
    client.submit(EngineRequest(request_id=30, token_ids=list(range(3, 2000)), sampling=SamplingParams(max_new_tokens=4)))
    refused = inbox.final(30)
    assert refused.finish_reason == "error"
    assert refused.error is not None and "512" in refused.error
    client.submit(request(31))
    assert inbox.final(31).finish_reason in ("stop", "length")
    assert client.failure is None


def test_tensors_are_refused_because_they_do_not_cross(engine: tuple[EngineProcess, Inbox]) -> None:
    with pytest.raises(RequestError, match="same process"):
        engine[0].submit(request(40, output_logits="all"))


def test_a_full_queue_refuses_at_once(model_folder: Path) -> None:
    client, inbox = EngineProcess(model_folder, CONFIG.replace(max_batch_size=1, max_waiting=1)), Inbox()
    client.start(inbox)
    try:
        client.submit(long_request(1))
        client.submit(long_request(2))
        with pytest.raises(OverloadedError, match="try again later"):
            for i in range(3, 6):
                client.submit(long_request(i))
    finally:
        client.close()
    assert all(output.finish_reason in ("abort", "error") for output in inbox.last.values())
    assert inbox.finals == len(inbox.last) >= 2


@pytest.mark.parametrize(
    "files, config, kind, text",
    [
        ({}, CONFIG, CheckpointError, "config.json"),
        ({"config.json": "{broken"}, CONFIG, CheckpointError, "JSON"),
        (None, CONFIG.replace(cache_max_entry_count=0.000001), ConfigError, "cache_max_entry_count"),
    ],
)
def test_errors_of_the_start_arrive_as_they_are(
    files: dict[str, str] | None, config: TurbomindEngineConfig, kind: type[Exception], text: str, model_folder: Path, tmp_path: Path
) -> None:
    for name, content in (files or {}).items():
        (tmp_path / name).write_text(content)
    with pytest.raises(kind, match=text) as caught:
        EngineProcess(model_folder if files is None else tmp_path, config)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_a_killed_engine_ends_every_answer_and_says_why(model_folder: Path) -> None:
    client, inbox = started(model_folder)
    client.submit(long_request(1, n=2))
    client.submit(long_request(2))
    inbox.wait(lambda: len(inbox.tokens) == 3)
    os.kill(client.pid, signal.SIGKILL)
    for key in ((1, 0), (1, 1), (2, 0)):
        output = inbox.final(*key)
        assert output.finish_reason == "error"
        assert "signal 9" in (output.error or "")
    assert client.failure is not None and "signal 9" in client.failure
    with pytest.raises(EngineError, match="signal 9"):
        client.submit(request(3))
    began = time.monotonic()
    client.stats()
    client.close()
    assert time.monotonic() - began < 3


def test_a_hung_engine_is_noticed_and_killed(model_folder: Path) -> None:
    client, inbox = started(model_folder, stall_seconds=1.0)
    client.submit(long_request(1))
    inbox.wait(lambda: (1, 0) in inbox.tokens)
    os.kill(client.pid, signal.SIGSTOP)
    output = inbox.final(1)
    assert output.finish_reason == "error"
    assert "answers no ping" in (client.failure or "")
    assert is_gone(client.pid)
    client.close()


def test_close_ends_the_process_and_leaves_no_descriptor(model_folder: Path) -> None:
    me = psutil.Process()
    client, inbox = started(model_folder)
    before_threads = threading.active_count()
    client.submit(long_request(1))
    began = time.monotonic()
    client.close()
    client.close()
    assert time.monotonic() - began < 5
    assert is_gone(client.pid, 0.1)
    assert inbox.final(1).finish_reason in ("abort", "error")
    assert threading.active_count() < before_threads
    with pytest.raises(EngineError, match="stopped"):
        client.submit(request(2))
    descriptors = me.num_fds()
    with pytest.raises(CheckpointError):
        EngineProcess(Path("/nonexistent"), CONFIG)
    assert me.num_fds() == descriptors


def test_an_orphaned_engine_exits_by_itself(model_folder: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom lmdeploy.config import TurbomindEngineConfig\nfrom lmdeploy.engine.process import EngineProcess\n"
        f"client = EngineProcess(Path({str(model_folder)!r}), TurbomindEngineConfig(session_len=256, max_batch_size=2, cache_max_entry_count=16))\n"
        "client.start(lambda outputs: None)\nprint(client.pid, flush=True)\ntime.sleep(60)\n"
    )
    assert is_gone(left_behind(code))


def test_ctrl_c_in_the_terminal_does_not_reach_the_engine(engine: tuple[EngineProcess, Inbox]) -> None:
    client, _ = engine
    assert os.getsid(client.pid) == client.pid != os.getsid(0)
    os.kill(client.pid, signal.SIGINT)
    time.sleep(0.3)
    assert client.failure is None
    assert client.stats().num_blocks > 0


def test_the_other_kernel_set_reaches_the_child(model_folder: Path) -> None:
    client = EngineProcess(model_folder, PytorchEngineConfig(dtype="float32", session_len=128, max_batch_size=2, cache_max_entry_count=8))
    try:
        assert "cpu" not in " ".join(client.info.kernels.values()).lower()
    finally:
        client.close()
