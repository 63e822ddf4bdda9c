"""Whole engines, both kernel sets, against transformers on every family; and the native kernels' promise of equal bits.

An answer is checked by one pass of the reference over prompt and answer: greedy means that each token is the likeliest after those before
it. Families that rotate by length are asked with one explicit length, to which the reference's input is padded; later tokens change nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from lmdeploy.config import EngineConfig, PytorchEngineConfig, TurbomindEngineConfig
from lmdeploy.engine.engine import Engine
from lmdeploy.engine.start import build_engine
from lmdeploy.messages import EngineRequest, SamplingParams
from tests.helpers import write_llama
from tests.parity.families import COMMON, FAMILIES, make_reference, reference_logits

Tensor = torch.Tensor
TOLERANCE = 1e-4
COUNT = 32  # tokens of an answer
LENGTH = 128  # of the longest session, and what fixes the base of length-dependent ropes
CONFIGS = {"turbomind": TurbomindEngineConfig, "pytorch": PytorchEngineConfig}


@dataclass
class Answer:
    """What an engine said to one prompt."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    cached: int = 0

    @property
    def rows(self) -> Tensor:
        """Logits of all rows that were handed out."""
        return torch.cat(self.logits)


@dataclass
class Case:
    """A checkpoint, an engine maker for one kernel set, and the outside opinion."""

    folder: Path
    reference: Callable[[list[int]], Tensor]
    rope_length: int  # for every request; 0 where it does not matter
    config: type[EngineConfig]

    def engine(self, **options: Any) -> Engine:
        return start(self.folder, self.config, **options)

    def ask(self, engine: Engine, prompts: list[list[int]], *, logits: Literal["all"] | None = None, at_once: int | None = None) -> list[Answer]:
        return ask(engine, prompts, logits=logits, rope_length=self.rope_length, at_once=at_once)

    def check(self, answer: Answer) -> None:
        """Every token is the reference's likeliest; the logits are the reference's."""
        sequence, first = answer.prompt + answer.tokens, len(answer.prompt) - 1
        wanted = self.reference(sequence + [5] * (self.rope_length - len(sequence)))[: len(sequence) - 1]
        assert answer.tokens == wanted[first:].argmax(-1).tolist()
        assert len(answer.tokens) == COUNT
        if answer.logits:
            assert answer.rows.dtype == torch.float32 and answer.rows.shape == wanted.shape
            assert float((answer.rows - wanted).abs().max()) < TOLERANCE


def start(folder: Path, config: type[EngineConfig], **options: Any) -> Engine:
    """A real engine on the CPU; its session is shorter than its pool unless the test says otherwise."""
    common = {"dtype": "float32", "device_type": "cpu", "session_len": LENGTH, "max_batch_size": 4, "cpu_threads": 1}
    common |= {"cache_block_seq_len": 16, "cache_max_entry_count": 64, "max_prefill_token_num": 256}
    return build_engine(folder, config(**{**common, **options}))


def ask(
    engine: Engine, prompts: list[list[int]], *, logits: Literal["all"] | None = None, rope_length: int = 0, at_once: int | None = None, count: int = COUNT
) -> list[Answer]:
    """Greedy answers; `at_once` prompts are there from the start, one more comes with each step. Leaves the engine empty."""
    answers, waiting = [Answer(prompt) for prompt in prompts], list(enumerate(prompts))
    sampling = SamplingParams(max_new_tokens=count, output_logits=logits)
    arriving = len(prompts) if at_once is None else at_once
    while waiting or engine.has_work:
        for number, prompt in waiting[:arriving]:
            engine.add(EngineRequest(request_id=number, token_ids=prompt, sampling=sampling, rope_length=rope_length))
        waiting, arriving = waiting[arriving:], 1
        for output in engine.step():
            assert output.error is None
            answer = answers[output.request_id]
            answer.tokens += output.token_ids
            answer.cached = output.num_cached
            if output.logits is not None:
                answer.logits.append(output.logits)
        engine.scheduler.check_integrity()
    assert engine.stats().used_blocks == 0
    return answers


def prompt(length: int, seed: int = 0) -> list[int]:
    source = random.Random(1000 * seed + length)
    return [source.randrange(3, COMMON["vocab_size"]) for _ in range(length)]


UNEQUAL = [prompt(length) for length in (23, 1, 70, 2, 39, 16, 64)]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[list[int]], Tensor], int]:
    """(checkpoint, the reference's logits, rope length of all requests)."""
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp("model")
    return folder, reference_logits(make_reference(family, folder)), 0 if family.greedy else LENGTH


@pytest.fixture
def case(request: pytest.FixtureRequest, family: tuple[Path, Callable[[list[int]], Tensor], int]) -> Case:
    return Case(*family, CONFIGS[request.param])


# ------------------------------------------------------------------ against transformers
# Every family with both kernel sets. The native ones take each test's two settings; plain torch gathers its cache through one index whatever the block size
# (tests/kernels/test_reference.py), and so takes the harder one.


@pytest.mark.parametrize(("case", "block"), [("turbomind", 64), ("turbomind", 16), ("pytorch", 16)], indirect=["case"])
def test_a_cold_prompt_has_the_references_answer_and_logits(case: Case, block: int) -> None:
    engine = case.engine(cache_block_seq_len=block)
    for tokens in (prompt(70), prompt(1), prompt(17)):
        (answer,) = case.ask(engine, [tokens], logits="all")
        assert answer.cached == 0
        case.check(answer)


@pytest.mark.parametrize(("case", "block", "budget"), [("turbomind", 64, 7), ("turbomind", 16, 1), ("pytorch", 16, 1)], indirect=["case"])
def test_a_prompt_computed_in_chunks_has_the_references_answer_and_logits(case: Case, block: int, budget: int) -> None:
    engine = case.engine(cache_block_seq_len=block, max_prefill_token_num=budget)
    (answer,) = case.ask(engine, [prompt(38)], logits="all")
    case.check(answer)
    assert engine.stats().steps == -(-38 // budget) + COUNT - 1


@pytest.mark.parametrize(("case", "block", "shared"), [("turbomind", 64, 0), ("turbomind", 16, 48), ("pytorch", 16, 48)], indirect=["case"])
def test_a_prefix_hit_has_the_references_answer(case: Case, block: int, shared: int) -> None:
    engine = case.engine(cache_block_seq_len=block)
    long = prompt(70)
    (cold,) = case.ask(engine, [long])
    (again,) = case.ask(engine, [long])
    assert (cold.cached, again.cached) == (0, 64)
    (partly,) = case.ask(engine, [long[:50] + prompt(20, seed=1)])
    assert partly.cached == shared
    (next_turn,) = case.ask(engine, [long + cold.tokens[:20] + prompt(6, seed=2)])  # hits blocks that decoding has filled
    assert next_turn.cached == (80 if block == 16 else 64)
    for answer in (cold, again, partly, next_turn):
        case.check(answer)


@pytest.mark.parametrize(("case", "block", "slots", "budget"), [("turbomind", 64, 3, 256), ("turbomind", 16, 2, 9), ("pytorch", 16, 2, 9)], indirect=["case"])
def test_a_batch_of_unequal_lengths_has_the_references_answers_and_logits(case: Case, block: int, slots: int, budget: int) -> None:
    engine = case.engine(cache_block_seq_len=block, max_batch_size=slots, max_prefill_token_num=budget)
    assert len(UNEQUAL) > slots
    for answer in case.ask(engine, UNEQUAL, logits="all", at_once=4):
        case.check(answer)


@pytest.mark.parametrize(("case", "caching"), [("turbomind", True), ("turbomind", False), ("pytorch", True)], indirect=["case"])
def test_pre_empted_answers_are_the_references(case: Case, caching: bool) -> None:
    engine = case.engine(cache_max_entry_count=8, enable_prefix_caching=caching, max_prefill_token_num=40)
    answers = case.ask(engine, UNEQUAL, logits="all")
    assert engine.stats().preemptions > 0
    for answer in answers:
        case.check(answer)


# ------------------------------------------------------------------ ropes whose base the length of the prompt fixes

CHANGING = [name for name, family in FAMILIES.items() if not family.greedy]


@pytest.mark.parametrize("backend", list(CONFIGS))
@pytest.mark.parametrize("name", CHANGING)
def test_a_base_that_the_prompts_length_fixes_stays_whatever_the_engine_does(name: str, backend: str, tmp_path: Path) -> None:
    """transformers changes the base while it generates, so only rows of the prompt have an outside opinion; the rest is our own cold run."""
    reference, config = reference_logits(make_reference(FAMILIES[name], tmp_path)), CONFIGS[backend]
    alone = [ask(start(tmp_path, config), [tokens], logits="all")[0] for tokens in UNEQUAL]
    for answer in alone:
        rows = len(answer.prompt)
        reference([5])  # a short input makes transformers forget the base of a longer one
        assert float((answer.rows[:rows] - reference(answer.prompt)).abs().max()) < TOLERANCE
    tight = start(tmp_path, config, cache_max_entry_count=8, max_prefill_token_num=9)
    for engine in (start(tmp_path, config, max_batch_size=3), start(tmp_path, config, max_prefill_token_num=7), tight):
        for _ in range(2):  # cold, then from the prefix cache
            found = ask(engine, UNEQUAL)
            assert [a.tokens for a in found] == [a.tokens for a in alone]
    assert tight.stats().preemptions > 0
    roomy, longer = start(tmp_path, config), UNEQUAL[2] + prompt(5)
    ask(roomy, [UNEQUAL[2]])
    (found_longer,) = ask(roomy, [longer])
    assert found_longer.cached == 0  # the same beginning with another base is another key
    assert found_longer.tokens == ask(start(tmp_path, config), [longer])[0].tokens


# ------------------------------------------------------------------ equal bits, whatever else is computed

SHAPES: dict[str, dict[str, Any]] = {
    "heads of 16, groups of 8": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16, "hidden_size": 80, "intermediate_size": 200},
    "heads of 128": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128, "hidden_size": 48, "intermediate_size": 33},
    "odd widths": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 18, "hidden_size": 67, "intermediate_size": 101, "vocab_size": 137},
    "wide": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "hidden_size": 320, "intermediate_size": 544, "vocab_size": 700},
    "groups of 5, tied": {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 40, "hidden_size": 200, "tie_word_embeddings": True},
}


@pytest.fixture
def torch_threads() -> Iterator[None]:
    """Engines set torch's threads; later tests get theirs back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[*FAMILIES, *SHAPES])
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of every family and of shapes that the tiles of the kernels do not divide."""
    folder = tmp_path_factory.mktemp("model")
    if request.param in SHAPES:
        return write_llama(folder, seed=3, **SHAPES[request.param])
    make_reference(FAMILIES[request.param], folder, seed=1)
    return folder


@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_native_kernels_give_an_answer_the_same_bits_in_any_company(any_model: Path, dtype: str) -> None:
    def native(**options: Any) -> Engine:
        return start(any_model, TurbomindEngineConfig, dtype=dtype, **options)

    engine = native(max_batch_size=1, enable_prefix_caching=False)
    if not all(name.startswith("native") for name in engine.info.kernels.values()):
        pytest.skip(f"this processor has no native kernel for {dtype}: {engine.info.kernels}")
    alone = ask(engine, UNEQUAL, logits="all", count=16)
    others = {
        "in a batch, by 2 threads": native(max_batch_size=7, cpu_threads=2),
        "in chunks, blocks of 5": native(max_prefill_token_num=7, cache_block_seq_len=5, cache_max_entry_count=200),
        "pre-empted": native(cache_max_entry_count=24, cache_block_seq_len=4, max_prefill_token_num=40, max_batch_size=7),
    }
    for how, engine in others.items():
        for wanted, found in zip(alone, ask(engine, UNEQUAL, logits="all", count=16), strict=True):
            assert found.tokens == wanted.tokens, how
            assert torch.equal(found.rows, wanted.rows), f"{how}: {int((found.rows != wanted.rows).any(1).sum())} rows of {len(wanted.rows)} differ"
    assert others["pre-empted"].stats().preemptions > 0
    hits = ask(others["in a batch, by 2 threads"], UNEQUAL, count=16)
    assert [a.cached for a in hits] == [16, 0, 64, 0, 32, 0, 48]
    assert [a.tokens for a in hits] == [a.tokens for a in alone]
