"""Every weight format with every KV policy on a CUDA device: the greedy tokens of plain torch in float32 on the CPU, and in bfloat16 an answer that is right."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lmdeploy import GenerationConfig, PytorchEngineConfig, TurbomindEngineConfig, pipeline
from tests.formats.packing import quantised_folder, stored_folder
from tests.test_quantised import COUNT_TO_12, EMBEDDED, TWELVE, WAYS, with_tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FORMATS = ["as stored", "awq", "gptq", *WAYS]
POLICIES = [0, 8, "k8v4", 4, "fp8"]
GREEDY = GenerationConfig(max_new_tokens=40)
SMALL: dict[str, Any] = {"session_len": 256, "max_batch_size": 2, "max_prefill_token_num": 64, "cache_max_entry_count": 16}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats")


@cache
def folder(root: Path, way: str) -> Path:
    """The embedded model in one layout."""
    if way == "as stored":
        return EMBEDDED
    made = root / way
    made.mkdir()
    if way in WAYS:
        return with_tokenizer(stored_folder(EMBEDDED, made, *WAYS[way][1:])[0])
    return with_tokenizer(quantised_folder(EMBEDDED, made, way, 64)[0])


def answer(model: Path, config: PytorchEngineConfig | TurbomindEngineConfig) -> tuple[list[int], str]:
    with pipeline(str(model), config) as pipe:
        found = pipe(COUNT_TO_12, GREEDY)
        assert found.finish_reason == "stop", found
        return found.token_ids, found.text


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("way", FORMATS)
def test_greedy_tokens_are_those_of_float32_on_the_cpu(way: str, policy: int | str, root: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = folder(root, way)
    if policy == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 here")
    on_cpu = 0 if policy == "fp8" else policy  # a CPU has no float8 cache
    expected = answer(model, PytorchEngineConfig(device_type="cpu", dtype="float32", quant_policy=on_cpu, **SMALL))
    assert TWELVE in expected[1]
    assert answer(model, TurbomindEngineConfig(device_type="cuda", dtype="float32", quant_policy=policy, **SMALL)) == expected
    _, text = answer(model, TurbomindEngineConfig(device_type="cuda", dtype="bfloat16", quant_policy=policy, **SMALL))
    assert TWELVE in text
