"""Triton's choice of tokens in its interpreter, against the sampler's torch operations and the definition in float64."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.grammar import Grammar
from lmdeploy.kernels.select import TokenKernel
from lmdeploy.messages import SamplingParams
from tests.kernels.sampled import MIXTURE, PENALTIES, PROMPT, Rows, assert_follow, distribution, rows_of, with_known

sampling = pytest.importorskip("lmdeploy.kernels.triton_kernels.sampling", reason="triton is not installed")
KERNEL = TokenKernel(sampling.choose_tokens, sampling.scratch_width())


def normal(rows: int, vocab: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def chosen(rows: Rows, masks: tuple[torch.Tensor, torch.Tensor] | None = None) -> list[int]:
    """The kernel's tokens, which it also notes in the token table; logits stay."""
    sampler, before = rows.sampler("cpu", KERNEL), rows.logits.clone()
    tokens, table = torch.full((len(rows.params),), -7), sampler.tokens.clone()
    sampler.choose(rows.logits, torch.from_numpy(rows.slots), torch.from_numpy(rows.lengths), tokens, masks)
    assert torch.equal(rows.logits.view(torch.int32), before.view(torch.int32))
    table[rows.slots, rows.lengths] = tokens.clamp_min(0).int()
    assert torch.equal(sampler.tokens, table), "each token where it belongs, and nothing else"
    assert not sampler._edits.any()
    return tokens.tolist()


def defined(rows: Rows) -> list[int]:
    """The tokens of the sampler's torch operations."""
    return rows.sampler("cpu").sample(rows.logits.clone(), rows.slots, rows.lengths).tolist()


def agree(rows: Rows) -> int:
    """All tokens are permitted; how many are not the sampler's, for they lie at a border."""
    found, wanted = chosen(rows), defined(rows)
    bad = [i for i, good in enumerate(rows.permitted(found)) if not good]
    assert not bad, [(rows.params[i], found[i], wanted[i], rows.numbers[i]) for i in bad]
    return sum(a != b for a, b in zip(found, wanted, strict=True))


# Every size with flat and with steep rows; those between with all but the largest, which takes as long as the rest.
@pytest.mark.parametrize(
    ("vocab", "rows", "scale"),
    [(92544, 16, 0.5), (92544, 16, 6.0)] + [(v, n, scale) for v, n in ((5120, 16), (257, 32), (100, 32), (32, 16), (3, 16)) for scale in (0.5, 2.0, 6.0)],
)
def test_tokens_are_the_samplers(vocab: int, rows: int, scale: float) -> None:
    params = [MIXTURE[i % len(MIXTURE)] for i in range(rows)]
    differing = agree(rows_of(params, normal(rows, vocab, scale, vocab)))
    assert differing <= (1 if rows == 16 else 0), "other tokens at a border only, and hardly ever"


def test_the_places_of_the_next_step_are_left_where_a_sequence_has_the_slot() -> None:
    rows = rows_of([MIXTURE[i % len(MIXTURE)] for i in range(5)], normal(5, 32))
    sampler, other, tokens = rows.sampler("cpu", KERNEL), rows.sampler("cpu", KERNEL), torch.zeros(5, dtype=torch.int64)
    slots, lengths = torch.from_numpy(rows.slots), torch.from_numpy(rows.lengths)
    nobody = sampler.tokens.shape[0] - 1
    slots[3] = nobody
    given = lengths.clone(), torch.arange(5) + 40, torch.arange(5) + 90
    length, position, end = (part.clone() for part in given)
    lines, where = torch.full((2, 6), -7), torch.tensor([9, 6, 11, -1, 7])  # of two lines the second
    sampler.choose(rows.logits, slots, length, lines, goes_on=(position, end), where=where)
    assert where.tolist() == [3, 0, 5, -1, 1], "the first line is next"
    assert lines[0].tolist() == [-7] * 6 and lines[1, [2, 4]].tolist() == [-7, -7], "nothing else is written"
    tokens[[0, 1, 2, 4]] = lines[1, [3, 0, 5, 1]]
    expected = torch.zeros(5, dtype=torch.int64)
    other.choose(rows.logits, slots, lengths, expected)
    assert torch.equal(tokens[slots != nobody], expected[slots != nobody])
    tokens[3] = expected[3]
    more = (slots != nobody).long()
    assert more.sum() == 4
    for part, before in zip((length, position, end), given, strict=True):
        assert torch.equal(part, before + more)
    assert torch.equal(sampler.tokens[slots, given[0]], tokens.clamp_min(0).int())  # where the token of this step belongs


@pytest.mark.parametrize("step", [0.25, 1.0, 4.0])
def test_ties_go_by_the_smaller_id(step: float) -> None:
    logits = (normal(16, 2500, 2.0) / step).round() * step
    assert (logits == 0).any()
    logits[::2] *= torch.where(logits[::2] == 0, -1.0, 1.0)  # -0 is 0
    assert agree(rows_of(MIXTURE, logits)) == 0


@pytest.mark.parametrize("vocab", [1500, 97])
def test_rows_of_one_value_only(vocab: int) -> None:
    """More ties than there is room for candidates."""
    assert agree(rows_of(MIXTURE, torch.full((16, vocab), 3.0))) <= 1
    few = torch.full((16, vocab), -50.0)
    few[:, ::3] = 1.0
    assert agree(rows_of(MIXTURE, few, 11)) <= 1


@pytest.mark.parametrize("temperature", [1e-5, 0.01, 2.0])
def test_temperatures(temperature: float) -> None:
    params = [{**p, "temperature": temperature} for p in MIXTURE if p.get("temperature")]
    assert agree(rows_of(params, normal(len(params), 5120, 3.0))) == 0


def test_a_temperature_beyond_those_of_requests_flattens() -> None:
    """Logits over 100 are all but equal: borders lie close together, so that a last bit may decide."""
    params: list[dict[str, Any]] = [{"temperature": 100.0, **p} for p in ({}, {"top_k": 40}, {"top_p": 0.9}, {"top_k": 3000}, {"top_p": 0.3, "min_p": 0.9})]
    assert agree(rows_of(params * 3, normal(15, 5120, 3.0))) <= 2


def test_what_cannot_be_chosen_from_gives_no_token_and_leaves_its_mates_alone() -> None:
    for params in MIXTURE:
        logits = normal(6, 300, 2.0)
        logits[1, 299] = float("nan")
        logits[2] = float("-inf")
        logits[3, 7] = float("inf")
        logits[4, 0] = -float("nan")
        found = chosen(rows_of([params] * 6, logits))
        assert [t < 0 for t in found] == [False, True, True, True, True, False]
        assert found == defined(rows_of([params] * 6, logits))


@pytest.mark.parametrize("allowed", [1, 3, 60, 900])
def test_forbidden_tokens_never_come(allowed: int) -> None:
    logits = normal(16, 3000, 2.0)
    for row in logits:
        row[torch.randperm(3000, generator=torch.Generator().manual_seed(allowed))[allowed:]] = float("-inf")
    assert agree(rows_of(MIXTURE, logits)) == 0


@pytest.mark.parametrize("vocab", [3001, 64, 31])
def test_masks_forbid_what_minus_infinity_forbids(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    words = torch.randint(-(2**31), 2**31, (12, -(-vocab // 32)), generator=generator).int()
    words[0] = 0
    places = torch.full((32,), -1, dtype=torch.int32)
    places[torch.randperm(32, generator=generator)[:12]] = torch.arange(12, dtype=torch.int32)
    rows = rows_of(MIXTURE * 2, normal(32, vocab, 2.0))
    closed = rows.logits.clone()
    bits = (words[:, :, None] >> torch.arange(32)) & 1
    for row, place in enumerate(places.tolist()):
        if place >= 0:
            closed[row, bits[place].flatten()[:vocab] == 0] = float("-inf")
    found = chosen(rows, (words, places))
    assert found == chosen(Rows(rows.params, closed, rows.slots, rows.lengths))
    assert found[places.tolist().index(0)] == -1


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 2**63 - 1), kind=st.sampled_from(MIXTURE), mates=st.lists(st.sampled_from(MIXTURE), max_size=3), coarse=st.booleans())
def test_a_row_gives_the_same_token_alone_and_in_any_batch(seed: int, kind: dict[str, Any], mates: list[dict[str, Any]], coarse: bool) -> None:
    logits = normal(1 + len(mates), 700, 2.0, seed % 1000)
    if coarse:
        logits = (logits * 4).round() / 4
    row = {**kind, "seed": seed}
    alone = rows_of([row], logits[:1])
    batch = rows_of([*mates, row], logits.roll(-1, 0))
    batch.lengths[-1] = alone.lengths[0]
    assert chosen(batch)[-1] == chosen(alone)[0]


@pytest.mark.parametrize("params", [{"top_k": 12, "min_p": 0.02}, {"top_p": 0.9}, {}], ids=str)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    logits = normal(1, 16, 1.0, 3)
    rows = rows_of([{"temperature": 1.0, **params}] * 160, logits.expand(160, -1).contiguous())
    assert_follow(chosen(rows), *distribution(logits[0], rows.params[0]))


def test_sample_edits_masks_and_chooses_as_without_the_kernel() -> None:
    """Penalties, bias, bad words and a minimal length come before the kernel."""
    edits: list[dict[str, Any]] = [
        {"repetition_penalty": 1.5}, {"logit_bias": {5: 4.0, 17: -100.0}}, {"bad_words": ((3,), (1, 9))}, {"frequency_penalty": 1.0, "presence_penalty": 0.5},
        {"min_new_tokens": 18, "stop_token_ids": (4, 7)},
    ]  # fmt: skip
    params = [{**MIXTURE[i % 7], **edits[i % 5]} for i in range(35)]
    rows = rows_of(params, normal(35, 200, 3.0))
    found = rows.sampler("cpu", KERNEL).sample(rows.logits.clone(), rows.slots, rows.lengths).tolist()
    assert found == defined(rows)


def test_the_slot_that_no_sequence_has_is_greedy() -> None:
    rows = rows_of([{"temperature": 1.0}] * 3, normal(3, 500))
    sampler = rows.sampler("cpu", KERNEL)
    tokens = torch.zeros(3, dtype=torch.int64)
    sampler.choose(rows.logits, torch.tensor([0, 3, 3]), torch.tensor([4, 1, 1]), tokens)
    assert tokens[1:].tolist() == rows.logits[1:].argmax(-1).tolist()


@pytest.mark.parametrize("vocab", [3001, 64, 31])
def test_young_answers_do_not_end(vocab: int) -> None:
    """Up to `min_new_tokens`, of which each row has generated another number, no stop token comes; what comes is what torch chooses from edited logits."""
    params = [
        {**p, **([{"ignore_eos": True}, {"min_new_tokens": 7}, {}][i % 3]), "stop_token_ids": tuple(range(i % 4, vocab, 2 + i % 5))}
        for i, p in enumerate(MIXTURE * 2)
    ]
    rows = rows_of(params, normal(32, vocab, 2.0))
    found, wanted = chosen(rows), defined(rows)
    assert sum(a != b for a, b in zip(found, wanted, strict=True)) <= 1
    young = [p.ignore_eos or n - PROMPT < p.min_new_tokens for p, n in zip(rows.params, rows.lengths.tolist(), strict=True)]
    assert not any(is_young and token in p.stop_token_ids for is_young, token, p in zip(young, found, rows.params, strict=True))
    assert any(token in p.stop_token_ids for token, p in zip(found, rows.params, strict=True))


def test_a_mask_of_a_young_answer_is_all_that_counts() -> None:
    rows = rows_of([{"ignore_eos": True, "stop_token_ids": (5,)}] * 2, torch.zeros(2, 40))
    only_five = torch.tensor([[1 << 5, 0]], dtype=torch.int32)
    assert chosen(rows, (only_five, torch.tensor([0, -1], dtype=torch.int32))) == [5, 0]


def penalised(vocab: int, width: int, prompt: int, scale: float = 2.0, count: int = 16) -> Rows:
    params = [{**MIXTURE[i % len(MIXTURE)], **PENALTIES[i % len(PENALTIES)]} for i in range(count)]
    return with_known(rows_of(params, normal(count, vocab, scale)), width, prompt)


# Tokens that are looked at in one go and in several; rows whose candidates suffice and flat ones.
@pytest.mark.parametrize(("vocab", "width", "prompt", "scale"), [(257, 40, 7, 0.5), (3001, 700, 300, 2.0), (9000, 5000, 2500, 0.1)])
def test_penalties_are_the_samplers(vocab: int, width: int, prompt: int, scale: float) -> None:
    rows = penalised(vocab, width, prompt, scale)
    found, edited = chosen(rows), rows.edited()
    assert all(edited.permitted(found))
    assert sum(a != b for a, b in zip(found, defined(rows), strict=True)) <= 1
    assert found != defined(Rows(edited.params, rows.logits, rows.slots, rows.lengths, rows.known, prompt)), "they count"


def test_rows_with_penalties_are_those_whose_logits_have_them() -> None:
    """Whatever the logit: forbidden ones stay forbidden, 0 and -0 are no marks of anything, and what cannot be chosen from gives no token."""
    rows = penalised(40, 60, 20)
    assert rows.known is not None
    rows.logits[:, ::3] = float("-inf")
    rows.logits[:, 1::5] = 0.0
    rows.logits[1::2, 1::5] *= -1.0
    rows.logits[2, 4], rows.logits[3, 4], rows.logits[4] = float("nan"), float("inf"), float("-inf")
    rows.known[2:4, 3] = 4
    found = chosen(rows)
    assert found == chosen(rows.edited())
    assert [i for i, token in enumerate(found) if token < 0] == [2, 3, 4]
    assert not any(token % 3 == 0 for token in found if token >= 0)


def test_masks_and_young_answers_have_penalties_too() -> None:
    vocab, rows = 301, penalised(301, 50, 20)
    stops = [msgspec.structs.replace(p, min_new_tokens=19, stop_token_ids=tuple(range(i % 4, vocab, 3))) for i, p in enumerate(rows.params)]
    rows = Rows(stops, rows.logits, rows.slots, rows.lengths, rows.known, rows.prompt)
    words = torch.randint(-(2**31), 2**31, (4, -(-vocab // 32)), generator=torch.Generator().manual_seed(vocab)).int()
    masks = words, torch.tensor([i // 4 if i % 4 == 1 else -1 for i in range(16)], dtype=torch.int32)
    assert chosen(rows, masks) == chosen(rows.edited(), masks)


def test_a_row_with_penalties_changes_none_of_its_mates() -> None:
    """Which have none, or others; slots that nobody has neither."""
    rows = penalised(300, 60, 20)
    plain, found = rows.edited().params, chosen(rows)
    for i in (3, 10):
        assert rows.params[i] == plain[i]
        part = rows.part(slice(i, i + 1))
        assert chosen(part) == [found[i]]
    sampler, tokens = rows.sampler("cpu", KERNEL), torch.zeros(3, dtype=torch.int64)
    sampler.choose(rows.logits[:3], torch.tensor([16, 5, 16]), torch.tensor([1, 30, 1]), tokens)
    assert tokens[[0, 2]].tolist() == rows.logits[[0, 2]].argmax(-1).tolist()


def test_a_batch_of_penalised_rows_has_no_other_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits go to the kernel as the head gave them, and are penalised in float32."""
    rows, seen = penalised(300, 60, 20), []
    half = Rows(rows.params, rows.logits.bfloat16(), rows.slots, rows.lengths, rows.known, rows.prompt)
    sampler = half.sampler("cpu", KERNEL)
    monkeypatch.setattr(sampler, "choose", lambda logits, *rest, **options: seen.append(logits) or type(sampler).choose(sampler, logits, *rest, **options))
    monkeypatch.setattr(sampler, "_edit", None)
    assert sampler.sample(half.logits, rows.slots, rows.lengths).tolist() == defined(half.edited())
    assert seen[0] is half.logits


def test_an_answer_with_a_grammar_has_no_token_before_its_mask_is_there() -> None:
    """It is another launch that knows the mask; those beside it are chosen now."""
    rows = penalised(300, 60, 20)
    guided = [msgspec.structs.replace(p, grammar=Grammar("regex", "a*")) if i % 3 == 0 else p for i, p in enumerate(rows.params)]
    found, all_of_them = chosen(Rows(guided, rows.logits, rows.slots, rows.lengths, rows.known, rows.prompt)), chosen(rows)
    assert [token for i, token in enumerate(found) if i % 3] == [token for i, token in enumerate(all_of_them) if i % 3]
    assert set(found[::3]) == {-1}
    anything = torch.full((16, 10), -1, dtype=torch.int32)
    masks = anything, torch.arange(16, dtype=torch.int32)
    assert chosen(Rows(guided, rows.logits, rows.slots, rows.lengths, rows.known, rows.prompt), masks) == all_of_them


def test_rows_that_are_left_to_another_launch_have_no_token_whatever_they_want() -> None:
    rows = penalised(300, 60, 20)
    left = torch.tensor([-2 if i % 2 else -1 for i in range(16)], dtype=torch.int32)
    found, all_of_them = chosen(rows, (torch.zeros((1, 10), dtype=torch.int32), left)), chosen(rows)
    assert found == [-1 if i % 2 else token for i, token in enumerate(all_of_them)]


def test_rows_that_were_left_are_chosen_by_another_launch_as_if_they_had_not_been() -> None:
    """With penalties, while they are young, and from the same numbers."""
    vocab, rows = 301, penalised(301, 50, 20)
    stops = [msgspec.structs.replace(p, min_new_tokens=19, stop_token_ids=tuple(range(i % 4, vocab, 3))) for i, p in enumerate(rows.params)]
    rows = Rows(stops, rows.logits, rows.slots, rows.lengths, rows.known, rows.prompt)
    sampler, count = rows.sampler("cpu", KERNEL), len(rows.slots)
    slots, lengths, where = torch.from_numpy(rows.slots), torch.from_numpy(rows.lengths), torch.arange(count)
    places = lengths.clone(), torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    lines = torch.full((2, count), -7)
    nothing = torch.zeros((1, sampler.table.young_words.shape[1]), dtype=torch.int32)
    sampler.choose(rows.logits, slots, places[0], lines, (nothing, torch.full((count,), -2, dtype=torch.int32)), goes_on=places[1:], where=where.clone())
    assert lines[0].tolist() == [-1] * count and (places[0] == lengths + 1).all() and (places[1] == 1).all(), "the next step's places are left all the same"
    sampler.choose(rows.logits, slots, lengths, lines, (nothing, torch.full((count,), -1, dtype=torch.int32)), where=where)
    assert lines[0].tolist() == chosen(rows)
    assert sampler.tokens[slots, lengths].tolist() == lines[0].tolist() and not sampler._edits.any()


def test_who_gets_a_slot_may_stop_though_its_last_owner_might_not() -> None:
    rows = rows_of([{"ignore_eos": True, "stop_token_ids": (7,)}], torch.zeros(1, 40))
    rows.logits[0, 7] = 9.0
    sampler = rows.sampler("cpu", KERNEL)
    assert sampler.sample(rows.logits.clone(), rows.slots, rows.lengths).item() != 7
    sampler.table.set(int(rows.slots[0]), SamplingParams(max_new_tokens=9, logit_bias={3: 1.0}, stop_token_ids=(7,)), int(rows.lengths[0]))
    assert sampler.sample(rows.logits.clone(), rows.slots, rows.lengths).item() == 7
