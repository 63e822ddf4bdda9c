"""A guess which masks take long: how many characters a string may still have, read off the mask before."""

from __future__ import annotations

import json
from array import array
from pathlib import Path

import pytest

from lmdeploy.engine.grammar_compiler import GrammarLibrary
from lmdeploy.engine.string_ends import OUTSIDE, StringEnds
from lmdeploy.grammar import Grammar


@pytest.fixture(scope="module")
def library(model_folder: Path) -> GrammarLibrary:
    return GrammarLibrary.open(model_folder, 5120, (2, 5118))


def test_characters_are_counted_not_bytes_and_what_ends_a_string_is_outside() -> None:
    pieces = [b"a", "né".encode(), "日本".encode(), b'a"', b"\\n", b"\n", b"", b"\xe6\x97", b" of", b"\x7f"]
    assert StringEnds(pieces).lengths.tolist() == [1, 2, 2, OUTSIDE, OUTSIDE, OUTSIDE, OUTSIDE, 1, 3, OUTSIDE]


def test_how_much_of_a_string_is_left_is_read_off_its_masks(library: GrammarLibrary) -> None:
    ends, pieces = StringEnds(library.pieces), library.pieces
    *_, below, longest = (length for length, _, _ in ends._rungs)
    matcher = library.compile(Grammar("json_schema", json.dumps({"type": "string", "maxLength": longest})))
    lower = {len(piece): token for token, piece in enumerate(pieces) if piece.isalpha() and piece.islower() and piece.isascii()}
    quote, left, near = pieces.index(b'"'), [], []
    for token in [quote, lower[1], lower[longest - 7], lower[1], lower[3], quote]:
        left.append(ends.left(array("I", matcher.compute_bitmask())))
        near.append(ends.near(left[-1], token))
        assert matcher.consume_token(token)
    assert left[:2] == [0, 0], "outside, and where all words are allowed, as in a string without end"
    assert left[2:] == [below, 6, 5, 2], "no more than the longest word that is allowed"
    assert near == [False, False, True, True, True, False]


def test_a_vocabulary_without_words_has_nothing_to_guess_from() -> None:
    ends = StringEnds([b"1", b'"', b"\n"])
    assert ends.left(array("I", [0xFFFFFFFF])) == 0 and not ends.near(0, 0)
    assert StringEnds([]).left(array("I")) == 0
