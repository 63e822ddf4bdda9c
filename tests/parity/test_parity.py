"""Every family against transformers: the same checkpoint, float32, logits equal to 1e-4 however the tokens are cut into steps.

`Runner` is all that a test needs of the system under test, so the same tests can drive the model directly or a whole engine.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lmdeploy.models.names import MODELS
from tests.helpers import Harness, load_model, write_internlm2, write_llama
from tests.parity.families import COMMON, FAMILIES, make_reference, reference_logits

Tensor = torch.Tensor
TOLERANCE = 1e-4
Case = tuple[Harness, Callable[[list[int]], Tensor], bool]


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """(our model on a paged cache, transformers' logits, whether later tokens are rotated alike)."""
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp("model")
    reference = make_reference(family, folder)
    return Harness(load_model(folder)), reference_logits(reference), family.greedy


def prompt(length: int, seed: int = 0) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, COMMON["vocab_size"]) for _ in range(length)]


def assert_equal(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == torch.float32
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) < TOLERANCE


def test_logits_of_a_whole_prompt(case: Case) -> None:
    harness, reference, _ = case
    for length in (1, 2, 33):
        tokens = prompt(length, seed=length)
        assert_equal(harness.step([(0, tokens)])[0], reference(tokens))
        harness.drop(0)


def test_a_prompt_in_odd_chunks_gives_the_logits_of_the_whole(case: Case) -> None:
    harness, reference, _ = case
    tokens, rows, start = prompt(37), [], 0
    for size in (5, 1, 3, 13, 1, 7, 7):
        rows.append(harness.step([(0, tokens[start : start + size])], rope_length=len(tokens))[0])
        start += size
    harness.drop(0)
    assert_equal(torch.cat(rows), reference(tokens))


def test_a_batch_of_decode_and_prefill_rows_gives_each_sequence_its_own_logits(case: Case) -> None:
    harness, reference, same_rope = case
    steps = [{0: 11, 1: 5, 2: 1, 3: 26}, {0: 1, 1: 1, 2: 1, 4: 9}, {3: 1, 2: 6, 0: 1, 5: 3, 4: 2}]  # new tokens of each sequence
    lengths = {name: sum(step.get(name, 0) for step in steps) for name in range(6)}
    tokens = {name: prompt(length, seed=name) for name, length in lengths.items()}
    rows: dict[int, list[Tensor]] = {name: [] for name in tokens}
    done = dict.fromkeys(tokens, 0)
    for step in steps:
        new = [(name, tokens[name][done[name] : done[name] + count]) for name, count in step.items()]
        out = harness.step(new, rope_length=None if same_rope else 40)
        for name, count in step.items():
            rows[name].append(out[name])
            done[name] += count
    for name, parts in rows.items():
        if same_rope:
            assert_equal(torch.cat(parts), reference(tokens[name]))
        else:  # the base belongs to a length of 40: extend the reference's prompt to it; later tokens change nothing before them
            assert_equal(torch.cat(parts), reference(tokens[name] + prompt(40 - len(tokens[name])))[: lengths[name]])
        harness.drop(name)


def test_32_greedy_tokens_are_the_same(case: Case) -> None:
    harness, reference, same_rope = case
    if not same_rope:
        pytest.skip("transformers changes the base while it generates; surface 7.6 keeps it")
    tokens = prompt(9, seed=5)
    wanted = list(tokens)
    for _ in range(32):
        wanted.append(int(reference(wanted)[-1].argmax()))
    assert harness.greedy(tokens, 32) == wanted[len(tokens) :]


@pytest.mark.parametrize(
    "heads", [{}, {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 20}, {"num_key_value_heads": 4, "tie_word_embeddings": True}]
)
def test_internlm2_computes_what_the_same_weights_compute_as_llama(tmp_path: Path, heads: dict[str, int]) -> None:
    llama, internlm2 = (Harness(load_model(write(tmp_path / write.__name__, **heads))) for write in (write_llama, write_internlm2))
    for new in ([(0, prompt(13)), (1, prompt(4))], [(0, [5]), (1, prompt(6, seed=2))]):
        wanted, found = llama.step(new), internlm2.step(new)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_every_registered_model_is_compared() -> None:
    by_hand = {"InternLM2ForCausalLM", "InternLM3ForCausalLM", "InternLMForCausalLM"}  # not, or only in part, in transformers: tests/models/test_decoder.py
    types = {"".join(part.capitalize() for part in family.model_type.split("_")) + "ForCausalLM" for family in FAMILIES.values()}
    assert types | by_hand == set(MODELS)
