"""Fused sampling on a CUDA device: the CPU's tokens, in any batch, inside a CUDA graph, and without waiting for the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lmdeploy.engine.guided import StepMask
from tests.kernels.sampled import MIXTURE, PENALTIES, Rows, assert_follow, distribution, rows_of, with_known

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

VOCAB = 92544
EDITS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5}, {"logit_bias": {5: 4.0, 17: -100.0}}, {"bad_words": ((3,), (1, 9))}, {"frequency_penalty": 1.0, "presence_penalty": 0.5},
    {"min_new_tokens": 18, "stop_token_ids": (4, 7)}, {},
]  # fmt: skip


def normal(rows: int, scale: float, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows)) * scale


def tokens_on(device: str, rows: Rows, mask: StepMask | None = None) -> list[int]:
    sampler = rows.sampler(device)
    assert (sampler.kernel is not None) == (device == "cuda"), "on CUDA with Triton"
    return sampler.sample(rows.logits.to(device, copy=True), rows.slots, rows.lengths, mask).tolist()


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("count", [1, 7, 64, 256])
def test_tokens_are_those_of_the_cpu(count: int, scale: float) -> None:
    rows = rows_of([MIXTURE[(i + count) % len(MIXTURE)] for i in range(count)], normal(count, scale))
    found, wanted = tokens_on("cuda", rows), tokens_on("cpu", rows)
    assert sum(a != b for a, b in zip(found, wanted, strict=True)) <= 1 + count // 32, "other tokens at a border of the distribution only"
    assert all(rows.permitted(found))


def test_a_row_gives_the_same_token_alone_and_in_a_batch() -> None:
    rows = rows_of(MIXTURE * 4, normal(64, 2.0))
    together = tokens_on("cuda", rows)
    assert [tokens_on("cuda", rows.part(slice(i, i + 1)))[0] for i in range(64)] == together
    assert tokens_on("cuda", rows) == together


@pytest.mark.parametrize("vocab", [5120, 257, 31])
def test_ties_nan_and_rows_without_a_token(vocab: int) -> None:
    logits = (normal(32, 2.0, vocab) * 4).round() / 4
    logits[3, vocab - 1] = float("nan")
    logits[5] = float("-inf")
    logits[7] = 1.5
    logits[9, 1:] = float("-inf")
    rows = rows_of(MIXTURE * 2, logits)
    found = tokens_on("cuda", rows)
    assert all(rows.permitted(found)) and [i for i, token in enumerate(found) if token < 0] == [3, 5]
    assert sum(a != b for a, b in zip(found, tokens_on("cpu", rows), strict=True)) <= 1


@pytest.mark.parametrize("params", [{"top_k": 12, "min_p": 0.02}, {"top_p": 0.9}, {"top_k": 400, "top_p": 0.99}, {}], ids=str)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    logits, tokens = normal(1, 1.0, 500), []
    for part in range(8):
        rows = rows_of([{"temperature": 1.0, **params}] * 2500, logits.expand(2500, -1).contiguous(), first_seed=part)
        tokens += tokens_on("cuda", rows)
    assert_follow(tokens, *distribution(logits[0], rows.params[0]))


def guided(count: int, vocab: int) -> StepMask:
    """Masks for every other row."""
    words = torch.randint(-(2**31), 2**31, (count // 2, -(-vocab // 32)), generator=torch.Generator().manual_seed(1)).int()
    places = np.arange(0, count, 2)
    return StepMask(places, words.pin_memory())


def test_edits_and_masks_wait_for_nothing_and_give_the_tokens_of_the_cpu() -> None:
    rows = rows_of([{**MIXTURE[i % 7], **EDITS[i % 6]} for i in range(42)], normal(42, 3.0, 5120))
    mask = guided(42, 5120)
    tokens_on("cuda", rows, mask)  # kernels are compiled
    sampler, logits = rows.sampler("cuda"), rows.logits.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = sampler.sample(logits, rows.slots, rows.lengths, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.tolist() == tokens_on("cpu", rows, mask)


def test_a_graph_draws_anew_with_each_replay() -> None:
    """Logits, lengths and parameters are read when the graph runs; the token table is written; rows that fill up are greedy."""
    count, spare = 24, 3
    params = [MIXTURE[i % 7] for i in range(count)]
    rows = rows_of(params, normal(count, 2.0))
    sampler = rows.sampler("cuda")
    sampler.table.refresh()
    logits = torch.zeros(count + spare, VOCAB, device="cuda")
    slots = torch.tensor([*rows.slots, *[count] * spare], device="cuda")
    lengths = torch.ones(count + spare, dtype=torch.int64, device="cuda")
    tokens = torch.zeros(count + spare, dtype=torch.int64, device="cuda")
    sampler.choose(logits, slots, lengths, tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler.choose(logits, slots, lengths, tokens)
    for step in range(4):
        now = rows_of(params[step:] + params[:step], normal(count, 1.0 + step), first_seed=step)
        for slot, p in zip(now.slots.tolist(), now.params, strict=True):
            sampler.table.set(slot, p, 2)
        sampler.table.refresh()
        logits[:count] = now.logits.cuda()
        logits[count:] = logits[:spare]
        lengths[:count] = torch.from_numpy(now.lengths).cuda()
        graph.replay()
        assert tokens[:count].tolist() == tokens_on("cuda", now)
        assert tokens[count:].tolist() == now.logits[:spare].argmax(-1).tolist()
        assert sampler.tokens[slots[:count], lengths[:count]].tolist() == tokens[:count].tolist()


def penalised(count: int, vocab: int, width: int, scale: float, dtype: torch.dtype = torch.float32) -> Rows:
    params = [{**MIXTURE[(i + count) % len(MIXTURE)], **PENALTIES[i % len(PENALTIES)]} for i in range(count)]
    return with_known(rows_of(params, normal(count, scale, vocab).to(dtype)), width, width // 3, seed=count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("count", "vocab", "width", "scale"), [(1, VOCAB, 60, 3.0), (64, VOCAB, 700, 3.0), (256, VOCAB, 5000, 1.0), (64, 5121, 3000, 0.05), (64, 31, 300, 2.0)]
)
def test_tokens_with_penalties_are_those_of_the_cpu(count: int, vocab: int, width: int, scale: float, dtype: torch.dtype) -> None:
    """Again and again: nothing of a step is left to the next one."""
    rows = penalised(count, vocab, width, scale, dtype)
    sampler, wanted = rows.sampler("cuda"), tokens_on("cpu", rows)
    first = sampler.sample(rows.logits.cuda(), rows.slots, rows.lengths).tolist()
    assert sum(a != b for a, b in zip(first, wanted, strict=True)) <= 1 + count // 32, "other tokens at a border of the distribution only"
    assert all(rows.edited().permitted(first))
    for _ in range(50):
        assert sampler.sample(rows.logits.cuda(), rows.slots, rows.lengths).tolist() == first
    assert not sampler._edits.any()


def test_a_penalised_row_gives_the_same_token_alone_and_in_a_batch() -> None:
    rows = penalised(112, 5120, 200, 2.0)
    together = tokens_on("cuda", rows)
    assert [tokens_on("cuda", rows.part(slice(i, i + 1)))[0] for i in range(112)] == together


def test_a_graph_penalises_over_the_tokens_that_are_known_when_it_runs() -> None:
    """One launch for rows with penalties and without, the graph's own fillers among them; each replay finds the tokens of those before."""
    count, spare = 24, 3
    rows = penalised(count, VOCAB, 80, 2.0, torch.bfloat16)
    sampler, plain = rows.sampler("cuda"), rows.sampler("cpu")
    sampler.table.refresh()
    slots = torch.tensor([*rows.slots, *[count] * spare], device="cuda")
    lengths = torch.ones(count + spare, dtype=torch.int64, device="cuda")
    lengths[:count] = torch.from_numpy(rows.lengths)
    tokens, logits = torch.zeros(count + spare, dtype=torch.int64, device="cuda"), torch.cat([rows.logits, rows.logits[:spare]]).cuda()
    start = lengths.clone(), sampler.tokens.clone()
    sampler.choose(logits, slots, lengths, tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler.choose(logits, slots, lengths, tokens)
    lengths.copy_(start[0])
    sampler.tokens.copy_(start[1])
    now, known = rows.lengths.copy(), 0
    for _ in range(6):
        graph.replay()
        expected = plain.sample(rows.logits.clone(), rows.slots, now).tolist()
        assert tokens[:count].tolist() == expected and tokens[count:].tolist() == rows.logits[:spare].float().argmax(-1).tolist()
        known += sum(token in row[:length] for token, row, length in zip(expected, plain.tokens[rows.slots].tolist(), now.tolist(), strict=True))
        now += now < 79
        lengths[:count] = torch.from_numpy(now)
    assert known > 0 and not sampler._edits.any()


def test_penalties_wait_for_nothing() -> None:
    rows = penalised(64, VOCAB, 700, 3.0, torch.bfloat16)
    tokens_on("cuda", rows)  # kernels are compiled
    sampler, logits = rows.sampler("cuda"), rows.logits.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler.sample(logits, rows.slots, rows.lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(logits.cpu(), rows.logits), "there was nothing to edit"
