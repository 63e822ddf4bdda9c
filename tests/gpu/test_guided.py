"""Grammars on a CUDA device: the same masks and the same answers as on the CPU."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lmdeploy.config import PytorchEngineConfig, TurbomindEngineConfig
from lmdeploy.engine.engine import Engine
from lmdeploy.engine.guided import StepMask, forbid
from lmdeploy.engine.mask_pool import MaskPool
from lmdeploy.engine.mask_process import Process
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


@contextlib.contextmanager
def held_up(pool: MaskPool, process: Process) -> Iterator[None]:
    """One of the processes stands still most of the time, for as long as some steps take."""
    over = threading.Event()

    def hold_up() -> None:
        while not over.wait(0.002):
            os.kill(process.pid, signal.SIGSTOP)
            over.wait(0.03)
            os.kill(process.pid, signal.SIGCONT)

    thread = threading.Thread(target=hold_up)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_late_masks_change_no_answer(model_folder: Path) -> None:
    """Those of one process take ten times as long as a step: its answers lose steps, the others none."""
    torch.backends.cuda.matmul.allow_tf32 = False
    other = Grammar("regex", r"([a-z]{1,8} ){3,9}[a-z]{1,8}\.")
    params = [SamplingParams(max_new_tokens=40, grammar=GRAMMAR if i % 3 == 0 else other, stop_token_ids=(2, 5118)) for i in range(9)]
    params += [SamplingParams(max_new_tokens=30, ignore_eos=True), SamplingParams(max_new_tokens=30, ignore_eos=True, repetition_penalty=1.2)]
    found, late = {}, {}
    for device in ("cpu", "cuda"):
        engine = build_engine(model_folder, TurbomindEngineConfig(device_type=device, dtype="float32", max_batch_size=16, cache_max_entry_count=128))
        pool = engine._grammars
        if isinstance(pool, MaskPool):
            held = pool.prepare(GRAMMAR)
            with held_up(pool, held.result(20).at[0]):
                found[device] = answers(engine, params)
        else:
            found[device] = answers(engine, params)
        late[device] = engine.stats().late_tokens
        engine.close()
    assert found["cuda"] == found["cpu"]
    assert late["cpu"] == 0 and late["cuda"] > 20


def test_an_answer_ends_with_the_last_token_of_its_grammar(model_folder: Path) -> None:
    """Though the step behind is under way by then; and so it is where that token is the last one that was asked for."""
    engine = build_engine(model_folder, TurbomindEngineConfig(device_type="cuda", max_batch_size=16, cache_max_entry_count=128))
    tokenizer = Tokenizer(model_folder)
    word = Grammar("choice", '["anything at all"]')
    params = [SamplingParams(max_new_tokens=40, grammar=word, ignore_eos=i % 2 > 0, stop_token_ids=(2, 5118)) for i in range(6)]
    params += [SamplingParams(max_new_tokens=50, ignore_eos=True)]
    found = answers(engine, params)
    assert {tokenizer.decode(ids) for ids in found[:6]} == {"anything at all"} and len(found[6]) == 50
    count = len(found[0])
    engine.add(EngineRequest(request_id=0, token_ids=[1, 5119, *range(300, 320)], sampling=SamplingParams(max_new_tokens=count, grammar=word)))
    outputs = []
    while engine.has_work:
        outputs += list(engine.step())
    assert outputs[-1].finish_reason == "stop" and outputs[-1].num_generated == count
    engine.close()


def test_answers_of_a_process_that_is_killed_fail_and_others_go_on(model_folder: Path) -> None:
    engine = build_engine(model_folder, TurbomindEngineConfig(device_type="cuda", max_batch_size=16, cache_max_entry_count=128))
    pool = engine._grammars
    assert isinstance(pool, MaskPool) and pool._pinned, "its memory is registered with the driver"
    words = [Grammar("regex", r"([a-z]{1,8} ){30}"), Grammar("regex", r"([a-z]{1,9} ){30}")]
    held = [pool.prepare(grammar, answers=0) for grammar in words]
    first, second = (future.result(20).at[0] for future in held)
    assert first is not second
    for i in range(8):
        params = SamplingParams(max_new_tokens=60, grammar=words[i % 2], stop_token_ids=(2, 5118), temperature=1.0, seed=i)
        engine.add(EngineRequest(request_id=i, token_ids=[1, 5119, *range(300, 320 + i)], sampling=params))
    found: dict[int, list[int]] = {i: [] for i in range(8)}
    errors: dict[int, str] = {}
    while engine.has_work:
        for output in engine.step():
            found[output.request_id] += output.token_ids
            if output.error:
                errors[output.request_id] = output.error
        if len(found[0]) == 10:
            os.kill(first.pid, signal.SIGKILL)
    assert sorted(errors) == [0, 2, 4, 6] and all("process that followed its grammar ended" in error for error in errors.values())
    assert all(len(found[i]) >= 30 for i in (1, 3, 5, 7)) and engine.stats().used_blocks == 0, "as many words"
    engine.close()


def test_log_probabilities_beside_grammars(model_folder: Path) -> None:
    engine = build_engine(model_folder, TurbomindEngineConfig(device_type="cuda", max_batch_size=16, cache_max_entry_count=128))
    params = [SamplingParams(max_new_tokens=60, temperature=1.0, seed=s, grammar=GRAMMAR, stop_token_ids=(2, 5118)) for s in range(8)]
    params += [SamplingParams(max_new_tokens=40, ignore_eos=True, logprobs=2)]
    tokenizer = Tokenizer(model_folder)
    for ids in answers(engine, params)[:8]:
        assert re.fullmatch(PERSON, tokenizer.decode(ids))
    engine.close()
