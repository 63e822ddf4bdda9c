"""Grammars on a CUDA device: the same masks and the same answers as on the CPU."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lmdeploy.engine.mask_calls import MaskCall

from lmdeploy.config import PytorchEngineConfig, TurbomindEngineConfig
from lmdeploy.engine.engine import Engine
from lmdeploy.engine.guided import GuidedSlots, StepMask, forbid
from lmdeploy.engine.start import build_engine
from lmdeploy.grammar import Grammar
from lmdeploy.messages import EngineRequest, SamplingParams
from lmdeploy.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

#: bounded, so that no answer is cut off
PERSON = r'\{"name": "[a-z]{1,12}", "age": [1-9][0-9]?\}'
GRAMMAR = Grammar("regex", PERSON)


@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("vocabulary", [33, 5120, 128256])
def test_a_mask_forbids_the_same_tokens_on_the_device(rows: int, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    words = torch.randint(-(2**31), 2**31 - 1, (rows, -(-vocabulary // 32)), generator=generator, dtype=torch.int32)
    for places in (np.arange(rows), np.arange(1, rows + 1)):
        logits = torch.randn(int(places[-1]) + 1, vocabulary, generator=generator)
        device = logits.cuda()
        for target, source in ((logits, words), (device, words.pin_memory())):
            forbid(target, StepMask(places, source))
        assert torch.equal(device.cpu(), logits)


def answers(engine: Engine, params: list[SamplingParams]) -> list[list[int]]:
    for i, sampling in enumerate(params):
        engine.add(EngineRequest(request_id=i, token_ids=[1, 5119, *range(300, 320 + i)], sampling=sampling))
    found: list[list[int]] = [[] for _ in params]
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            found[output.request_id] += output.token_ids
    return found


def test_guided_answers_are_those_of_the_cpu_and_fit(model_folder: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    greedy = SamplingParams(max_new_tokens=60, grammar=GRAMMAR, stop_token_ids=(2, 5118))
    plain = SamplingParams(max_new_tokens=20, ignore_eos=True)
    found = {}
    for device in ("cpu", "cuda"):
        engine = build_engine(model_folder, PytorchEngineConfig(device_type=device, dtype="float32", max_batch_size=8, cache_max_entry_count=64))
        found[device] = answers(engine, [greedy, plain, greedy])
        engine.close()
    assert found["cuda"] == found["cpu"]
    tokenizer = Tokenizer(model_folder)
    for ids in (found["cuda"][0], found["cuda"][2]):
        assert re.fullmatch(PERSON, tokenizer.decode(ids))


def test_sampled_answers_in_a_full_batch_fit(model_folder: Path) -> None:
    engine = build_engine(model_folder, TurbomindEngineConfig(device_type="cuda", max_batch_size=64, cache_max_entry_count=512))
    params = [SamplingParams(max_new_tokens=60, temperature=1.0, top_p=0.9, seed=s, grammar=GRAMMAR, stop_token_ids=(2, 5118)) for s in range(64)]
    tokenizer = Tokenizer(model_folder)
    for ids in answers(engine, params):
        assert re.fullmatch(PERSON, tokenizer.decode(ids))
    engine.close()


def test_late_masks_change_no_answer(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of them take ten times as long as a step: their answers lose steps, the others none."""
    torch.backends.cuda.matmul.allow_tf32 = False
    fill = GuidedSlots._fill_words

    def slowly(self: GuidedSlots, call: MaskCall) -> None:
        if any(slot % 3 == 0 for slot in call.slots):
            time.sleep(0.03)
        fill(self, call)

    monkeypatch.setattr(GuidedSlots, "_fill_words", slowly)
    other = Grammar("regex", r"([a-z]{1,8} ){3,9}[a-z]{1,8}\.")
    params = [SamplingParams(max_new_tokens=40, grammar=GRAMMAR if i % 3 == 0 else other, stop_token_ids=(2, 5118)) for i in range(9)]
    params += [SamplingParams(max_new_tokens=30, ignore_eos=True), SamplingParams(max_new_tokens=30, ignore_eos=True, repetition_penalty=1.2)]
    found, late = {}, {}
    for device in ("cpu", "cuda"):
        engine = build_engine(model_folder, TurbomindEngineConfig(device_type=device, dtype="float32", max_batch_size=16, cache_max_entry_count=128))
        found[device] = answers(engine, params)
        late[device] = engine.stats().late_tokens
        engine.close()
    assert found["cuda"] == found["cpu"]
    assert late["cpu"] == 0 and late["cuda"] > 20


def test_log_probabilities_beside_grammars(model_folder: Path) -> None:
    engine = build_engine(model_folder, TurbomindEngineConfig(device_type="cuda", max_batch_size=16, cache_max_entry_count=128))
    params = [SamplingParams(max_new_tokens=60, temperature=1.0, seed=s, grammar=GRAMMAR, stop_token_ids=(2, 5118)) for s in range(8)]
    params += [SamplingParams(max_new_tokens=40, ignore_eos=True, logprobs=2)]
    tokenizer = Tokenizer(model_folder)
    for ids in answers(engine, params)[:8]:
        assert re.fullmatch(PERSON, tokenizer.decode(ids))
    engine.close()
