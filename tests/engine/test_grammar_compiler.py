"""Grammars on vocabularies of every kind: which tokens the mask lets through is a matter of their bytes."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmdeploy.engine import grammar_compiler
from lmdeploy.engine.grammar_compiler import MASK_THREADS, USERS_TOGETHER, GrammarCompiler, Lexer
from lmdeploy.engine.guided import GuidedSlots, forbid
from lmdeploy.engine.masks import MasksHere
from lmdeploy.errors import EngineError
from lmdeploy.grammar import Grammar
from lmdeploy.messages import SamplingParams
from lmdeploy.text.tokenizer import Tokenizer

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "tokenizers"
VOCABULARIES = {"tiny": 5120, "internlm2": 92544, "llama2": 32000, "llama3": 128256, "qwen": 151936}


@pytest.fixture(scope="module", params=VOCABULARIES)
def compiler(request: pytest.FixtureRequest, model_folder: Path) -> tuple[GrammarCompiler, Tokenizer]:
    folder = model_folder if request.param == "tiny" else SHARED / request.param
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    tokenizer = Tokenizer(folder)
    return GrammarCompiler(tokenizer, VOCABULARIES[request.param]), tokenizer


def allowed(matcher: Any) -> set[int]:
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def by_bytes(tokenizer: Tokenizer, fits: Callable[[bytes], bool], size: int) -> set[int]:
    return {i for i in range(min(tokenizer.vocab_size, size)) if i not in tokenizer.special_ids and (b := tokenizer.token_bytes(i)) and fits(b)}


def test_exactly_the_tokens_whose_bytes_fit_may_come(compiler: tuple[GrammarCompiler, Tokenizer]) -> None:
    grammars, tokenizer = compiler
    size = grammars.vocab_size
    digits = allowed(grammars.matcher(Grammar("regex", "[0-9]{1,20}")))
    assert digits == by_bytes(tokenizer, lambda b: b.isdigit() and len(b) <= 20, size), "byte pieces and doubles included"
    texts = ["  two", "日本語 text", "é"]
    prefixes = {t.encode()[:n] for t in texts for n in range(1, 20)}
    assert allowed(grammars.matcher(Grammar("choice", json.dumps(texts)))) == by_bytes(tokenizer, lambda b: b in prefixes, size)


@pytest.mark.parametrize("text", ['{"k": "日本 🙂 é", "n": [1, -2.5e3, null]}', '{\n  "Ünïcode": "ﬀ 한국어"\n}'])
def test_a_text_that_fits_can_be_written_in_the_tokenizers_own_tokens(compiler: tuple[GrammarCompiler, Tokenizer], text: str) -> None:
    grammars, tokenizer = compiler
    ids = tokenizer.encode("\n" + text, add_bos=False)  # behind a line break no tokenizer adds a space
    while b"".join(map(tokenizer.token_bytes, ids)).lstrip() != text.encode() or not tokenizer.token_bytes(ids[0]).strip():
        ids = ids[1:]
    matcher = grammars.matcher(Grammar("json_object"))
    for token in ids:
        assert token in allowed(matcher), tokenizer.token_bytes(token)
        assert matcher.consume_token(token)
    assert matcher.is_accepting() and matcher.is_stopped() and allowed(matcher) == {grammars.eos_token_id}


def test_special_tokens_are_never_text_and_ids_without_a_piece_never_come(compiler: tuple[GrammarCompiler, Tokenizer]) -> None:
    grammars, tokenizer = compiler
    free = allowed(grammars.matcher(Grammar("regex", r"(?s:.)*")))
    assert free & tokenizer.special_ids == {grammars.eos_token_id}
    assert not {i for i in free if i >= tokenizer.vocab_size}
    assert len(free) > 0.9 * min(tokenizer.vocab_size, grammars.vocab_size)


def test_tags_name_special_tokens_by_id(compiler: tuple[GrammarCompiler, Tokenizer]) -> None:
    grammars, tokenizer = compiler
    special = sorted(i for i in tokenizer.special_ids if i != grammars.eos_token_id and tokenizer.token_text(i))[-1]
    tag = {"begin": tokenizer.token_text(special) + "go", "schema": {"const": 1}, "end": ""}
    value = {"mode": "auto", "parallel": True, "triggers": [tokenizer.token_text(special)], "tags": [tag]}
    matcher = grammars.matcher(Grammar("structural_tag", json.dumps(value)))
    start = allowed(matcher)
    assert special in start and start >= tokenizer.special_ids & set(range(grammars.vocab_size)) - {grammars.eos_token_id}
    matcher.consume_token(special)
    assert allowed(matcher) == by_bytes(tokenizer, lambda b: b in (b"g", b"go", b"go1"), grammars.vocab_size)


def test_the_masks_of_a_step_forbid_what_the_grammars_do_not_allow(compiler: tuple[GrammarCompiler, Tokenizer]) -> None:
    grammars, tokenizer = compiler
    slots = GuidedSlots.of(grammars, 4, torch.device("cpu"))
    size = grammars.vocab_size
    for slot, grammar in ((0, Grammar("regex", "[0-9]+")), (2, None), (3, Grammar("choice", '["a"]'))):
        slots.set(slot, SamplingParams(max_new_tokens=9, grammar=grammar, stop_token_ids=(1,)), [])
    mask = slots.masks(np.array([3, 2, 0]), np.zeros(3, dtype=bool))
    assert mask is not None
    logits = torch.zeros(3, size)
    forbid(logits, mask)
    assert set(torch.isfinite(logits[0]).nonzero().flatten().tolist()) == by_bytes(tokenizer, lambda b: b == b"a", size)
    assert torch.isfinite(logits[1]).all()
    assert set(torch.isfinite(logits[2]).nonzero().flatten().tolist()) == by_bytes(tokenizer, bytes.isdigit, size)
    a, seven = (min(by_bytes(tokenizer, lambda b, t=t: b == t, size)) for t in (b"a", b"7"))
    assert slots.follow(mask, np.array([a, 0, seven])).tolist() == [True, False]
    mask = slots.masks(np.array([3, 2, 0]), np.zeros(3, dtype=bool))
    assert mask is not None
    forbid(logits.zero_(), mask)
    assert mask.ended.tolist() == [True, False] and mask.only_stops.tolist() == [False, False]
    stops = {1, grammars.eos_token_id}
    assert set(torch.isfinite(logits[0]).nonzero().flatten().tolist()) == {grammars.eos_token_id}
    assert set(torch.isfinite(logits[2]).nonzero().flatten().tolist()) == by_bytes(tokenizer, bytes.isdigit, size) | stops
    assert slots.masks(np.array([1, 2]), np.zeros(2, dtype=bool)) is None


def lexers(grammars: GrammarCompiler, grammar: Grammar) -> int:
    return len(grammars._alive[grammar].lexers)


def held_up(grammars: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, only: Grammar | None = None) -> threading.Event:
    """Until it is set, nothing is compiled, or not this grammar."""
    go_on, compile_now = threading.Event(), grammars._compile

    def compile_then(grammar: Grammar) -> Any:
        assert only not in (None, grammar) or go_on.wait(60)
        return compile_now(grammar)

    monkeypatch.setattr(grammars, "_compile", compile_then)
    return go_on


def test_many_users_of_a_cheap_grammar_do_not_share_one_lexer(compiler: tuple[GrammarCompiler, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, _ = compiler
    digits = Grammar("regex", "[0-9]{1,30}")
    users = (MASK_THREADS + 1) * USERS_TOGETHER
    monkeypatch.setattr(grammars, "_most_more", 64)
    masks, held, slots = MasksHere(grammars, users), [], np.arange(users)
    for slot in range(users):
        held.append(grammars.prepare(digits))
        held[-1].result()
        masks.take(slot, digits, [])
        assert lexers(grammars, digits) == min(slot // USERS_TOGETHER + 1, MASK_THREADS)
    counts = masks._users[digits]
    assert len(counts) == MASK_THREADS and max(counts.values()) <= 2 * USERS_TOGETHER
    assert masks.there(slots).all() and (masks.words == masks.words[0]).all()  # whichever lexer
    masks.leave(5)
    fewest = min(counts.values())
    masks.take(5, digits, [])
    assert counts[masks._lexers[5][1]] == fewest + 1
    for slot in range(users - 1):
        masks.leave(slot)
    assert list(masks._users[digits].values()) == [1]


def test_those_who_waited_for_a_grammar_together_have_lexers_enough_when_it_is_there(
    compiler: tuple[GrammarCompiler, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars, _ = compiler
    monkeypatch.setattr(grammars, "_most_more", 64)
    all_there = held_up(grammars, monkeypatch)
    letters = Grammar("regex", "[l-s]{1,30}")
    held = [grammars.prepare(letters, answers=USERS_TOGETHER) for _ in range(MASK_THREADS + 2)]
    all_there.set()
    wait(held, 60, FIRST_COMPLETED)
    assert lexers(grammars, letters) == MASK_THREADS
    assert all(future.result() is held[0].result() for future in held)
    assert grammars.prepare(letters).done(), "who comes later does not wait"


@pytest.fixture
def a_lexer_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with many threads."""
    monkeypatch.setattr(grammar_compiler, "USERS_TOGETHER", 1)
    monkeypatch.setattr(grammar_compiler, "MASK_THREADS", 40)


@pytest.mark.usefixtures("a_lexer_each")
def test_nobody_waits_for_the_grammars_of_others_to_get_a_lexer(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = GrammarCompiler.open(model_folder, 5120)
    monkeypatch.setattr(grammars, "_most_more", 64)
    warm, slow = Grammar("json_object"), Grammar("regex", "a*")
    held = [grammars.prepare(warm, answers=0)]
    held[0].result()
    assert grammars.prepare(warm).done(), "the first user finds it compiled"

    go_on = held_up(grammars, monkeypatch, slow)
    others = grammars.prepare(slow, "others")
    held += [grammars.prepare(warm, "mine") for _ in range(3)]
    assert all(future.result(30) is held[0].result() for future in held) and lexers(grammars, warm) == 3
    assert not others.done()
    go_on.set()
    assert others.result(30).lexers
    grammars.close()


@pytest.mark.usefixtures("a_lexer_each")
def test_nothing_is_compiled_for_those_who_have_left(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = GrammarCompiler.open(model_folder, 5120)
    monkeypatch.setattr(grammars, "_most_more", 64)
    compiled: list[Grammar] = []
    go_on = held_up(grammars, monkeypatch)
    compile_now = grammars._compile
    left = threading.Event()

    def note(grammar: Grammar) -> Any:
        compiled.append(grammar)
        if compiled.count(digits) == 2:
            assert left.wait(30)
        return compile_now(grammar)

    monkeypatch.setattr(grammars, "_compile", note)
    stays, leaves, letters, digits = Grammar("regex", "[a-c]+"), Grammar("regex", "[d-f]+"), Grammar("regex", "[a-z]+"), Grammar("regex", "[0-9]+")
    held = [grammars.prepare(stays), grammars.prepare(leaves, answers=30), grammars.prepare(letters, answers=30)]
    while not compiled:
        time.sleep(0.001)
    del held[1]  # before it was its turn
    go_on.set()
    assert held[1].result(30).lexers
    held += [grammars.prepare(digits, answers=30)]
    while compiled.count(digits) < 2:
        time.sleep(0.001)
    del held[2]  # while it was
    left.set()
    assert grammars.prepare(Grammar("regex", "x+"), answers=2).result(30).lexers
    assert compiled.count(stays) == 1 and compiled.count(leaves) == 0 and compiled.count(letters) == 30 and compiled.count(digits) <= 3
    grammars.close()


@pytest.mark.usefixtures("a_lexer_each")
def test_whoever_waits_when_a_compiler_is_closed_hears_of_it(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = GrammarCompiler.open(model_folder, 5120)
    monkeypatch.setattr(grammars, "_most_more", 64)
    go_on = held_up(grammars, monkeypatch)
    waiting = [grammars.prepare(Grammar("regex", text), answers=3) for text in ("a*", "b*")]
    grammars.close()
    go_on.set()
    for future in waiting:
        with pytest.raises(EngineError, match="closed"):
            future.result(30)


def test_thousands_who_wait_for_one_grammar_are_not_counted_for_each(compiler: tuple[GrammarCompiler, Tokenizer]) -> None:
    grammars, _ = compiler
    words = Grammar("regex", "[a-e]{1,30}")
    held = [grammars.prepare(words) for _ in range(20_000)]
    assert held[-1].result(60) is held[0].result(60)
    begun = time.process_time()
    held += [grammars.prepare(words) for _ in range(100)]
    assert time.process_time() - begun < 0.1, "one walk over all of them takes a millisecond"


def test_nobody_compiles_where_a_slot_is_set_up(compiler: tuple[GrammarCompiler, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, _ = compiler
    letters = Grammar("regex", "[t-z]{1,30}")
    held = grammars.prepare(letters)
    held.result()
    monkeypatch.setattr(grammars, "_compile", None)
    users: Counter[Lexer] = Counter()
    for _ in range(4 * USERS_TOGETHER):
        users[grammars.lexer(letters, users)] += 1
    assert len(users) == 1


def test_a_grammar_that_takes_long_to_compile_has_one_lexer(compiler: tuple[GrammarCompiler, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, _ = compiler
    monkeypatch.setattr(grammar_compiler, "CHEAP_SECONDS", 0.0)
    held = grammars.prepare(Grammar("regex", "[a-c]{1,40}"), answers=1000)
    assert len(held.result().lexers) == 1


def test_lexers_of_all_grammars_are_bounded_and_nobody_loses_those_that_are_used(
    compiler: tuple[GrammarCompiler, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars, _ = compiler
    monkeypatch.setattr(grammar_compiler, "MASK_THREADS", 3)
    first, second, third = (Grammar("regex", f"[{letters}]{{1,30}}") for letters in ("a-f", "g-k", "l-o"))
    monkeypatch.setattr(grammars, "_most_more", 3 + sum(len(one.lexers) - 1 for one in grammars._alive.values() if one.lexers and one.answers()))
    grammars._kept.clear()  # what other tests have left, and nobody uses
    gc.collect()
    used = grammars.prepare(first, answers=100)
    assert len(used.result().lexers) == 3
    taken, users = [], Counter[Lexer]()
    for _ in range(4):
        taken.append(grammars.lexer(first, users))
        users[taken[-1]] += 1
    assert sorted(users.values()) == [1, 1, 2]
    assert len(grammars.prepare(second, answers=100).result().lexers) == 2, "one is left"
    assert len(grammars.prepare(third, answers=100).result().lexers) == 2 and lexers(grammars, second) == 1, "nobody uses it any more"
    assert lexers(grammars, first) == 3
    del used
    gc.collect()
    assert len(grammars.prepare(second, answers=100).result().lexers) == 3 and lexers(grammars, first) == 1
    assert taken[2].start.deep_copy().compute_bitmask() == grammars.matcher(first).compute_bitmask(), "whoever has one goes on with it"


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("vocabulary", [32, 33, 5120, 5121])
def test_forbid_sets_the_bits_that_are_off_whatever_the_width(rows: int, vocabulary: int) -> None:

    from lmdeploy.engine.guided import StepMask

    generator = torch.Generator().manual_seed(rows * vocabulary)
    words = torch.randint(-(2**31), 2**31 - 1, (rows, -(-vocabulary // 32)), generator=generator, dtype=torch.int32)
    logits = torch.randn(rows + 2, vocabulary, generator=generator)
    expected = logits.clone()
    for place in range(rows):
        bits = np.unpackbits(words[place].numpy().view(np.uint8), bitorder="little")[:vocabulary]
        expected[place + 1][torch.from_numpy(bits == 0)] = float("-inf")
    forbid(logits, StepMask(np.arange(1, rows + 1), words))
    assert torch.equal(logits, expected)
