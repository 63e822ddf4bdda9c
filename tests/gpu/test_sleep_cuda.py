"""Sleep, wake and new weights on a CUDA device, memory as the driver gave it; and an engine whose device is lost comes back."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from lmdeploy.config import EngineConfig, TurbomindEngineConfig
from lmdeploy.engine import launching
from lmdeploy.engine.engine import Engine
from lmdeploy.engine.start import build_engine
from lmdeploy.engine.supervisor import SupervisedEngine
from lmdeploy.messages import EngineRequest, Order, SamplingParams
from tests.engine import broken_child
from tests.engine.test_process import Inbox
from tests.helpers import write_llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PROMPT = [1, *range(20, 60)]
#: 0.6 GB in bfloat16, so that what the allocator keeps beside does not matter
SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128}


def used() -> int:
    """Of the device, by this process: others may use it too."""
    return torch.cuda.memory_reserved()


def answer(engine: Engine, request_id: int) -> list[int]:
    engine.add(EngineRequest(request_id=request_id, token_ids=PROMPT, sampling=SamplingParams(max_new_tokens=16, ignore_eos=True)))
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            tokens += output.token_ids
    return tokens


@pytest.fixture(scope="module")
def config() -> EngineConfig:
    return TurbomindEngineConfig(device_type="cuda", dtype="bfloat16", session_len=256, max_batch_size=4, max_prefill_token_num=256, cache_max_entry_count=4000)


def test_sleep_gives_device_memory_back_and_waking_is_quick(config: EngineConfig, tmp_path: Path) -> None:
    first, second = write_llama(tmp_path / "a", **SHAPE), write_llama(tmp_path / "b", seed=1, **SHAPE)
    engine, fresh = build_engine(first, config), build_engine(second, config)
    expected, others = answer(engine, 1), answer(fresh, 1)
    fresh.close()
    torch.cuda.empty_cache()
    bill = engine.info.memory
    for level in (1, 2):
        before = used()
        engine.obey(Order(action="sleep", level=level))
        assert before - used() > 0.95 * (bill.weights + bill.kv_pool), f"level {level}: {before - used()} of {bill.weights} + {bill.kv_pool} came back"
        began = time.monotonic()
        engine.obey(Order(action="wake"))
        torch.cuda.synchronize()
        took = time.monotonic() - began
        assert bill.weights + bill.kv_pool <= used() < 1.05 * before
        assert answer(engine, 10 + level) == expected
        assert level == 2 or took < 2, f"waking took {took:.2f} s"
    addresses = [t.data_ptr() for t in engine._executor._runner.model.tensors()]  # type: ignore[attr-defined]
    engine.obey(Order(action="update_weights", path=str(second)))
    assert [t.data_ptr() for t in engine._executor._runner.model.tensors()] == addresses  # type: ignore[attr-defined]
    assert answer(engine, 20) == others != expected
    engine.close()


def test_a_lost_device_is_seen_and_the_engine_replaced(config: EngineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "child_command", broken_child.command)
    folder = write_llama(tmp_path / "a", vocab_size=5200)
    engine, inbox = SupervisedEngine(folder, config.replace(cache_max_entry_count=64)), Inbox()
    engine.start(inbox)
    try:
        engine.submit(EngineRequest(request_id=1, token_ids=[*PROMPT, broken_child.DEVICE_ASSERT], sampling=SamplingParams(max_new_tokens=4)))
        inbox.wait(lambda: (1, 0) in inbox.last, 120)
        lost = inbox.last[1, 0]
        assert lost.error_code == "engine_failed" and "device is lost" in (lost.error or ""), lost
        deadline = time.monotonic() + 120
        while engine.stats().restarts < 2 or engine.trouble:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        engine.submit(EngineRequest(request_id=2, token_ids=PROMPT, sampling=SamplingParams(max_new_tokens=4)))
        inbox.wait(lambda: (2, 0) in inbox.last, 60)
        assert inbox.last[2, 0].error is None
    finally:
        engine.close()
