"""Lexers are shared by all answers of a grammar, and full one day: no answer notices."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import pytest

from lmdeploy.engine.follower import Follower
from lmdeploy.engine.grammar_compiler import LIMITS, GrammarCompiler, GrammarLibrary, Lexer
from lmdeploy.engine.mask_wire import BROKEN, GOES_ON, STOPPED
from lmdeploy.engine.masks import MasksHere
from lmdeploy.grammar import Grammar

STRING = Grammar("json_schema", json.dumps({"type": "string", "maxLength": 200}))
SIZE = 5120 // 8


def limited(library: GrammarLibrary, states: int) -> None:
    library._limits = llguidance.LLParserLimits(**{**LIMITS, "max_lexer_states": states})


@pytest.fixture
def library(model_folder: Path) -> GrammarLibrary:
    return GrammarLibrary.open(model_folder, 5120, (2, 5118))


def lexer_of(library: GrammarLibrary, grammar: Grammar) -> Lexer:
    return Lexer(lambda: library.compile(grammar))


def mask_of(follower: Follower) -> tuple[int, list[int]]:
    """What `fill` says, and the tokens that may come."""
    memory = ctypes.create_string_buffer(SIZE)
    state = follower.fill(ctypes.addressof(memory), SIZE)
    return state, np.flatnonzero(np.unpackbits(np.frombuffer(memory.raw, dtype=np.uint8), bitorder="little")).tolist()


def walk(library: GrammarLibrary, lexer: Lexer, seed: int, most: int = 60) -> list[tuple[int, list[int]]]:
    """An answer of random tokens, mask by mask."""
    draw, follower = np.random.default_rng(seed), Follower(lexer)
    found: list[tuple[int, list[int]]] = []
    while len(found) < most:
        found.append(mask_of(follower))
        if found[-1][0] != GOES_ON:
            break
        follower.advance(draw.choice([token for token in found[-1][1] if token != library.eos_token_id or len(found[-1][1]) == 1]).item())
    return found


def test_a_full_lexer_is_renewed_and_no_mask_is_another(library: GrammarLibrary) -> None:
    expected = [walk(library, lexer_of(library, STRING), seed) for seed in range(12)]
    limited(library, 700)
    lexer, starts = lexer_of(library, STRING), []
    for seed in range(12):
        assert walk(library, lexer, seed) == expected[seed]
        starts.append(lexer.start)
    assert len({id(start) for start in starts}) > 2, "it was full some times"


def test_answers_that_go_on_share_what_the_first_of_them_has_renewed(library: GrammarLibrary) -> None:
    limited(library, 700)
    compiled: list[Any] = []

    def compile_now() -> Any:
        compiled.append(library.compile(STRING))
        return compiled[-1]

    lexer, draw = Lexer(compile_now), np.random.default_rng(0)
    followers = [Follower(lexer) for _ in range(8)]
    for follower in followers:
        follower.advance(library.pieces.index(b'"'))
    letters = [token for token, piece in enumerate(library.pieces) if len(piece) == 1 and piece.isalpha()]
    for step in range(150):
        states = {mask_of(follower)[0] for follower in followers}
        assert states == {GOES_ON}, step
        for follower in followers:
            follower.advance(int(draw.choice(letters)))
    assert 1 < len(compiled) < 10


def test_an_answer_whose_last_token_finds_the_lexer_full_has_stopped(library: GrammarLibrary) -> None:
    limited(library, 700)
    quote, lexer = library.pieces.index(b'"'), lexer_of(library, STRING)
    followers = [Follower(lexer, [quote, library.pieces.index(b"a")]) for _ in range(2)]
    full = lexer.start
    for seed in range(100):
        walk(library, lexer, seed)
        if lexer.start is not full:
            break
    assert [follower.advance(quote) for follower in followers] == [True, True]
    assert all(follower._start is lexer.start for follower in followers), "they have begun anew"


def test_who_finds_that_what_others_have_renewed_is_full_too_renews_it_again(library: GrammarLibrary) -> None:
    limited(library, 700)
    quote, a, lexer = library.pieces.index(b'"'), library.pieces.index(b"a"), lexer_of(library, STRING)
    followers, starts = [Follower(lexer, [quote, *[a] * length]) for length in range(190)], [lexer.start]
    for follower in followers:
        assert mask_of(follower)[0] == GOES_ON
        starts += [lexer.start] if lexer.start is not starts[-1] else []
    assert len(starts) > 3


def test_what_no_lexer_has_room_for_is_broken_and_says_why(library: GrammarLibrary) -> None:
    limited(library, 120)
    lexer = lexer_of(library, STRING)
    found = walk(library, lexer, 3)
    assert found[-1][0] == BROKEN and len(found) > 1
    follower = Follower(lexer)
    while mask_of(follower)[0] == GOES_ON:
        follower.advance(
            next(token for token in mask_of(follower)[1] if library.pieces[token] in (b'"', b"a")) if not follower._tokens else library.pieces.index(b"a")
        )
    assert "too many states" in follower.reason and "\n" not in follower.reason


def test_tokens_that_do_not_fit_are_broken(library: GrammarLibrary) -> None:
    follower = Follower(lexer_of(library, Grammar("regex", "[0-9]{3}")), [library.pieces.index(b"a")])
    assert mask_of(follower)[0] == BROKEN and "next tokens could not be worked out" in follower.reason


def test_alone_too(model_folder: Path) -> None:
    """The library fills the masks of no rows at all in another way than those of some."""
    compiler = GrammarCompiler.open(model_folder, 5120, (2, 5118))
    masks = MasksHere(compiler, 2)
    masks.take(1, Grammar("regex", "[0-9]{3}"), [compiler.pieces.index(b"a")])
    assert masks.there(np.array([1])).all() and masks.states(np.array([1])).tolist() == [BROKEN]
    assert "could not be worked out" in masks.reason(1)
    compiler.close()


def test_an_answer_has_stopped_behind_its_last_token_and_not_before_its_first(library: GrammarLibrary) -> None:
    one = library.pieces.index(b"1")
    follower = Follower(lexer_of(library, Grammar("regex", "1{3}")))
    said = [mask_of(follower)[0]] + [(follower.advance(one), mask_of(follower)[0])[1] for _ in range(3)]
    assert said == [GOES_ON, GOES_ON, GOES_ON, STOPPED] and mask_of(follower)[1] == [library.eos_token_id]
    assert mask_of(Follower(lexer_of(library, Grammar("regex", "1{3}")), [one] * 3))[0] == STOPPED, "also where all was replayed"
    assert mask_of(Follower(lexer_of(library, Grammar("regex", "(1{3})?")), []))[0] == GOES_ON


def test_strings_of_any_length_are_written_in_a_server_that_runs_for_long(model_folder: Path) -> None:
    """The second answer with a string of two thousand characters used to find the lexer full."""
    compiler = GrammarCompiler.open(model_folder, 5120, (2, 5118))
    limited(compiler, 2_000)
    grammar = Grammar("json_schema", json.dumps({"type": "string", "maxLength": 1_000}))
    masks, quote, draw = MasksHere(compiler, 2), compiler.pieces.index(b'"'), np.random.default_rng(0)
    letters = [token for token, piece in enumerate(compiler.pieces) if len(piece) <= 3 and piece.isalpha() and piece.isascii()]
    slots, none = np.arange(2), np.zeros(2, dtype=bool)
    for _ in range(3):
        for slot in slots.tolist():
            masks.take(slot, grammar, [])
        masks.advance(slots, np.full(2, quote), none, 0)
        for _ in range(320):
            assert masks.there(slots).all() and (masks.states(slots) == GOES_ON).all()
            masks.advance(slots, draw.choice(letters, size=2), none, 0)
        for slot in slots.tolist():
            masks.leave(slot)
    compiler.close()
