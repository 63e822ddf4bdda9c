"""The engine on a CUDA device: the same tokens as on the CPU, the pool's size, no growth. One command runs all: `pytest tests/gpu`."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lmdeploy.config import EngineConfig, PytorchEngineConfig, TurbomindEngineConfig
from lmdeploy.engine.engine import Engine
from lmdeploy.engine.start import build_engine
from lmdeploy.messages import EngineRequest, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PROMPTS = [[1, 5119, *range(300, 300 + n)] for n in (3, 17, 64, 65, 200, 1)]


def run(engine: Engine, sampling: list[SamplingParams], prompts: list[list[int]]) -> list[list[int]]:
    """Answers of a batch, in order."""
    for i, (ids, params) in enumerate(zip(prompts, sampling, strict=True)):
        engine.add(EngineRequest(request_id=i, token_ids=ids, sampling=params))
    answers: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            answers[output.request_id] += output.token_ids
    return answers


def engine_on(device: str, folder: Path, kind: type[EngineConfig] = TurbomindEngineConfig, **options: object) -> Engine:
    return build_engine(folder, kind(**{"device_type": device, "max_batch_size": 8, "cache_max_entry_count": 64, "dtype": "float32", **options}))


@pytest.fixture(scope="module")
def cpu(model_folder: Path) -> Iterator[Engine]:
    engine = engine_on("cpu", model_folder, PytorchEngineConfig)
    yield engine
    engine.close()


@pytest.mark.parametrize("kind", [TurbomindEngineConfig, PytorchEngineConfig])
def test_greedy_tokens_in_float32_are_those_of_the_cpu(kind: type[EngineConfig], cpu: Engine, model_folder: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    greedy = [SamplingParams(max_new_tokens=32, ignore_eos=True)] * len(PROMPTS)
    cuda = engine_on("cuda", model_folder, kind)
    assert run(cuda, greedy, PROMPTS) == run(cpu, greedy, PROMPTS)
    assert run(cuda, greedy, PROMPTS) == run(cpu, greedy, PROMPTS), "and again, from the prefix cache"
    cuda.close()


def test_a_seeded_request_gives_the_same_tokens_alone_and_in_a_batch(model_folder: Path) -> None:
    cuda = engine_on("cuda", model_folder)
    seeded = [SamplingParams(max_new_tokens=24, temperature=1.1, top_p=0.9, seed=s, ignore_eos=True) for s in range(len(PROMPTS))]
    together = run(cuda, seeded, PROMPTS)
    assert [run(cuda, [s], [p])[0] for s, p in zip(seeded, PROMPTS, strict=True)] == together
    cuda.close()


def test_bfloat16_runs_and_the_bill_covers_what_the_device_gave(model_folder: Path) -> None:
    first = engine_on("cuda", model_folder, dtype="bfloat16")  # libraries take their buffers and keep them
    run(first, [SamplingParams(max_new_tokens=8)] * 6, PROMPTS)
    first.close()
    del first
    before = torch.cuda.memory_allocated()
    cuda = engine_on("cuda", model_folder, dtype="bfloat16")
    bill = cuda.info.memory
    assert bill.weights + bill.kv_pool <= torch.cuda.memory_allocated() - before
    assert bill.total == pytest.approx(bill.weights + bill.kv_pool + bill.workspace + bill.other, rel=0.02)
    run(cuda, [SamplingParams(max_new_tokens=8)] * 6, PROMPTS)
    cuda.close()
    del cuda
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() - before < 2**20, "close() gives everything back"


MIXED = [
    SamplingParams(max_new_tokens=4),
    SamplingParams(max_new_tokens=6, temperature=0.9, top_p=0.9, seed=3),
    SamplingParams(max_new_tokens=5, repetition_penalty=1.2, logprobs=2),
    SamplingParams(max_new_tokens=3, temperature=1.0, top_k=7, seed=1, stop_token_ids=(2,), min_new_tokens=2),
]


def test_memory_does_not_grow_over_10_000_requests(model_folder: Path) -> None:
    cuda = engine_on("cuda", model_folder, dtype="bfloat16", max_batch_size=64, cache_max_entry_count=256)
    while cuda.prepare_ahead():
        pass

    def some(count: int, first: int) -> None:
        prompts = [[1, 7, *(9 + (first + i * k) % 5000 for k in range(1 + (first + i) % 40))] for i in range(count)]
        run(cuda, [MIXED[i % len(MIXED)] for i in range(count)], prompts)

    some(500, 0)
    torch.cuda.synchronize()
    reserved, host = torch.cuda.memory_reserved(), resident()
    for first in range(500, 10_500, 500):
        some(500, first)
    assert torch.cuda.memory_reserved() - reserved < 32 * 2**20
    assert resident() - host < 64 * 2**20
    cuda.scheduler.check_integrity()
    cuda.close()


def resident() -> int:
    """Bytes of this process in the host's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_flood_that_overfills_the_pool_is_answered_without_a_lack_of_memory(model_folder: Path) -> None:
    """More than three times as many tokens as the cache holds, all at once: answers are those that each request gets alone."""
    options = {"max_batch_size": 32, "cache_max_entry_count": 160, "cache_block_seq_len": 16, "enable_prefix_caching": False}
    cuda = engine_on("cuda", model_folder, **options)
    prompts = [[1, *range(300 + i, 360 + i + i % 90)] for i in range(64)]
    params = [SamplingParams(max_new_tokens=64, ignore_eos=True, temperature=float(i % 2), seed=i) for i in range(64)]
    alone = [run(cuda, [p], [ids])[0] for p, ids in zip(params[:8], prompts[:8], strict=True)]
    memory = cuda.info.memory
    assert 3 * memory.num_blocks * memory.block_size < sum(map(len, prompts)) + 64 * 64
    reserved = torch.cuda.memory_reserved()
    together = run(cuda, params, prompts)
    assert cuda.stats().preemptions > 0
    assert together[:8] == alone and all(len(answer) == 64 for answer in together)
    assert torch.cuda.memory_reserved() - reserved < 64 * 2**20
    cuda.scheduler.check_integrity()
    cuda.close()
