"""The sampler against a plain definition written row by row, and its promise that batch mates change nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.engine.sampler import Sampler, SamplingTable, uniforms
from lmdeploy.messages import SamplingParams

VOCAB = 97


def make(rows: list[dict[str, Any]], known: list[list[int]] | None = None, prompt_len: int = 2, vocab: int = VOCAB) -> tuple[Sampler, np.ndarray, np.ndarray]:
    """A sampler with one slot a row, the slots, and the number of known tokens of each."""
    known = known or [[1, 2]] * len(rows)
    tokens = torch.zeros(len(rows), 32, dtype=torch.int32)
    table = SamplingTable(len(rows), vocab, torch.device("cpu"))
    for slot, (params, ids) in enumerate(zip(rows, known, strict=True)):
        tokens[slot, : len(ids)] = torch.tensor(ids)
        table.set(slot, SamplingParams(**{"max_new_tokens": 20, **params}), prompt_len)
    return Sampler(table, tokens), np.arange(len(rows)), np.array([len(ids) for ids in known])


def draw(rows: list[dict[str, Any]], logits: torch.Tensor, known: list[list[int]] | None = None, **kwargs: Any) -> list[int]:
    """One token a row."""
    sampler, slots, lengths = make(rows, known, **kwargs)
    return sampler.sample(logits.clone(), slots, lengths).tolist()


def frequencies(params: dict[str, Any], logits: torch.Tensor, count: int = 4000) -> torch.Tensor:
    """Share of each token over many seeds."""
    tokens = draw([{**params, "seed": seed} for seed in range(count)], logits.expand(count, -1), vocab=len(logits))
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / count


def allowed(logits: torch.Tensor, params: SamplingParams) -> dict[int, float]:
    """The definition: which tokens may come, with which probability."""
    x = (logits.double() / params.temperature).tolist()
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if params.top_k:
        order = order[: params.top_k]
    weights = [math.exp(x[i] - x[order[0]]) for i in order]
    probs = [w / sum(weights) for w in weights]
    kept, before = {}, 0.0
    for i, p in zip(order, probs, strict=True):
        if not kept or (before <= params.top_p and p >= params.min_p * probs[0]):
            kept[i] = p
        before += p
    return {i: p / sum(kept.values()) for i, p in kept.items()}


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 0.9, "top_k": 12, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.0, "top_k": 9, "top_p": 0.95, "min_p": 0.1},
    ],
    ids=str,
)
def test_frequencies_follow_the_definition(params: dict[str, Any]) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2
    expected = allowed(logits, SamplingParams(max_new_tokens=1, **params))
    found = frequencies(params, logits)
    assert set(found.nonzero().flatten().tolist()) <= set(expected)
    for token, probability in expected.items():
        assert abs(found[token] - probability) < 5 * math.sqrt(probability / 4000) + 1e-3


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**63 - 1),
    top_k=st.sampled_from([0, 1, 3, 50, 97]),
    top_p=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05]),
    mates=st.lists(st.sampled_from([0, 2, 60, 97]), max_size=4),
    coarse=st.booleans(),
)
def test_a_row_gives_the_same_token_alone_and_in_any_batch(seed: int, top_k: int, top_p: float, min_p: float, mates: list[int], coarse: bool) -> None:
    logits = torch.randn(1 + len(mates), VOCAB, generator=torch.Generator().manual_seed(seed % 1000)) * 2
    if coarse:  # bfloat16 logits tie often
        logits = (logits * 2).round() / 2
    row = {"temperature": 0.8, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    alone = draw([row], logits[:1])
    others = [{"temperature": 1.1, "top_k": k, "top_p": 0.5 if k == 2 else 1.0, "repetition_penalty": 1.2, "seed": 5} for k in mates]
    assert draw([row, *others], logits)[0] == alone[0]
    assert draw([*others, row], logits.roll(-1, 0))[-1] == alone[0]
    assert alone[0] in allowed(logits[0], SamplingParams(max_new_tokens=1, temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p))


def test_ties_at_the_top_k_border_are_broken_by_the_smaller_id() -> None:
    logits = torch.zeros(VOCAB)
    found = frequencies({"temperature": 1.0, "top_k": 3}, logits, 300)
    assert found.nonzero().flatten().tolist() == [0, 1, 2]


def test_forbidden_tokens_do_not_make_top_k_look_at_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.full((5000,), float("-inf"))
    logits[[7, 4000, 4999]] = torch.tensor([1.0, 2.0, 1.5])
    widths: list[int] = []
    topk = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, count, dim=-1: widths.append(count) or topk(x, count, dim=dim))
    shares = frequencies({"temperature": 1.0, "top_k": 50}, logits, 2000)
    expected = torch.softmax(logits, dim=-1)
    assert torch.allclose(shares, expected, atol=0.04) and max(widths) < 200


def test_top_p_zero_and_top_k_one_and_temperature_zero_are_greedy() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    rows = [{"temperature": 1.0, "top_p": 0.0}, {"temperature": 1.0, "top_k": 1}, {"temperature": 0.0}]
    assert draw(rows, logits) == logits.argmax(-1).tolist()


def test_a_flat_distribution_needs_many_candidates_for_top_p_and_gets_them() -> None:
    logits = torch.linspace(0, 0.001, 3000)
    found = frequencies({"temperature": 1.0, "top_p": 0.5}, logits, 500)
    drawn = found.nonzero().flatten()
    assert drawn.min() >= 1495 and drawn.max() > 2950 and len(drawn) > 350


def test_the_uniform_numbers_are_uniform_and_depend_on_seed_and_counter() -> None:
    seeds = np.repeat(np.arange(100, dtype=np.uint64), 100)
    counters = np.tile(np.arange(100, dtype=np.uint64), 100)
    numbers = uniforms(seeds, counters)
    assert len(np.unique(numbers)) == 10_000 and numbers.min() >= 0 and numbers.max() < 1
    assert np.abs(np.histogram(numbers, 10)[0] - 1000).max() < 130
    assert uniforms(np.array([2**63 - 1], np.uint64), np.array([7], np.uint64))[0] == uniforms(np.array([2**63 - 1], np.uint64), np.array([7], np.uint64))[0]
    table = numbers.reshape(100, 100)
    assert abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]) < 0.05


def test_each_generated_token_has_a_draw_of_its_own() -> None:
    logits = torch.zeros(6, VOCAB)
    known = [[1, 2] + [3] * n for n in range(6)]
    tokens = draw([{"temperature": 1.0, "seed": 11}] * 6, logits, known)
    assert len(set(tokens)) > 3
    again = draw([{"temperature": 1.0, "seed": 11}], logits[:1], [known[4]])  # as after a pre-emption
    assert again == [tokens[4]]


def edited(params: dict[str, Any], logits: torch.Tensor, ids: list[int], prompt_len: int = 2) -> torch.Tensor:
    """The logits of one row after everything that comes before the temperature."""
    sampler, slots, lengths = make([params], [ids], prompt_len)
    out = logits.clone()[None]
    sampler.sample(out, slots, lengths)
    return out[0]


def test_repetition_penalty_counts_prompt_and_answer_once_a_token() -> None:
    logits = torch.linspace(-2, 2, VOCAB)
    found = edited({"repetition_penalty": 1.5}, logits, [5, 90, 90, 90, 6])
    expected = logits.clone()
    for token in {5, 90, 6}:
        expected[token] = logits[token] * 1.5 if logits[token] < 0 else logits[token] / 1.5
    torch.testing.assert_close(found, expected)


def test_presence_and_frequency_penalties_count_the_answer_only() -> None:
    logits = torch.linspace(-2, 2, VOCAB)
    found = edited({"presence_penalty": 0.5, "frequency_penalty": 0.25}, logits, [5, 90, 90, 90, 6])
    expected = logits.clone()
    expected[90] -= 0.5 + 2 * 0.25
    expected[6] -= 0.75
    torch.testing.assert_close(found, expected)


def test_only_rows_with_penalties_are_changed() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
    sampler, slots, lengths = make([{}, {"repetition_penalty": 2.0}, {}], [[1, 2], [3, 4, 5, 6], [7, 8, 9]])
    out = logits.clone()
    sampler.sample(out, slots, lengths)
    assert torch.equal(out[0], logits[0]) and torch.equal(out[2], logits[2])
    assert (out[1] != logits[1]).nonzero().flatten().tolist() == [3, 4, 5, 6]


def test_logit_bias_comes_before_everything() -> None:
    logits = torch.zeros(VOCAB)
    assert draw([{"logit_bias": {40: 3.0, 41: 2.0}}], logits[None]) == [40]
    assert edited({"logit_bias": {1: 4.0}, "repetition_penalty": 2.0}, logits, [1, 2])[1] == 2.0


def test_bad_words_of_one_token_never_come_and_of_several_only_after_their_beginning() -> None:
    logits = torch.zeros(VOCAB)
    logits[[10, 11, 12]] = torch.tensor([3.0, 2.0, 1.0])
    bad = {"bad_words": ((10,), (8, 9, 11), (4, 12))}
    assert draw([bad], logits[None], [[1, 9]]) == [11]
    assert draw([bad], logits[None], [[8, 9]]) == [12]
    assert draw([bad], logits[None], [[9]], prompt_len=1) == [11]  # shorter than the word
    assert draw([{"bad_words": ((8, 11), (9, 11))}], logits[None], [[1, 9]]) == [10]


def test_two_bad_words_with_the_same_end_both_work() -> None:
    logits = torch.zeros(VOCAB)
    logits[11] = 5.0
    for last in (8, 9):
        assert draw([{"bad_words": ((8, 11), (9, 11))}], logits[None], [[1, last]]) == [0]


def test_stop_ids_are_masked_below_min_new_tokens_and_with_ignore_eos() -> None:
    logits = torch.zeros(VOCAB)
    logits[[2, 7]] = torch.tensor([9.0, 8.0])
    stops = {"stop_token_ids": (2, 7, 5000)}
    assert draw([{**stops, "min_new_tokens": 2}], logits[None], [[1, 1, 4]]) == [0]
    assert draw([{**stops, "min_new_tokens": 2}], logits[None], [[1, 1, 4, 4]]) == [2]
    assert draw([{**stops, "ignore_eos": True}], logits[None], [[1, 1] + [4] * 19]) == [0]
    assert draw([stops], logits[None]) == [2]


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}, {"temperature": 1.0, "top_p": 0.5}], ids=str)
def test_a_row_of_nan_or_without_any_allowed_token_is_reported_and_its_mates_go_on(params: dict[str, Any]) -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(2))
    logits[1, 3] = float("nan")
    logits[2] = float("-inf")
    tokens = draw([{**params, "seed": 1}] * 4, logits)
    assert tokens[1] == tokens[2] == -1
    assert tokens[0] == draw([{**params, "seed": 1}], logits[:1])[0] and tokens[3] >= 0


def test_ids_outside_the_vocabulary_are_refused_before_anything_changes() -> None:
    table = SamplingTable(1, VOCAB, torch.device("cpu"))
    for params in ({"logit_bias": {VOCAB: 1.0}}, {"bad_words": ((1, VOCAB),)}):
        with pytest.raises(ValueError, match=f"token id {VOCAB}; this model's ids are 0 to {VOCAB - 1}"):
            table.set(0, SamplingParams(max_new_tokens=1, temperature=1.0, **params), 1)
    assert table.greedy[0] and table.params[0] is None


def test_a_slot_keeps_nothing_of_the_sequence_before() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 10] = 5.0
    sampler, slots, lengths = make([{"bad_words": ((10,), (2, 10)), "logit_bias": {5: 50.0}, "repetition_penalty": 3.0}])
    assert sampler.sample(logits.clone(), slots, lengths).tolist() == [5]
    sampler.table.set(0, SamplingParams(max_new_tokens=3), 2)
    assert sampler.sample(logits.clone(), slots, lengths).tolist() == [10]
