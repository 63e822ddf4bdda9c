"""Calls that fill masks beside the host, and the guess which of them take long."""

from __future__ import annotations

import json
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from lmdeploy.engine.grammar_compiler import GrammarCompiler
from lmdeploy.engine.guided import GuidedSlots, GuidedStep, is_among
from lmdeploy.engine.mask_calls import OUTSIDE, Callers, MaskCall, StringEnds
from lmdeploy.grammar import Grammar
from lmdeploy.messages import SamplingParams


def test_characters_are_counted_not_bytes_and_what_ends_a_string_is_outside() -> None:
    pieces = [b"a", "né".encode(), "日本".encode(), b'a"', b"\\n", b"\n", b"", b"\xe6\x97", b" of", b"\x7f"]
    assert StringEnds(pieces).lengths.tolist() == [1, 2, 2, OUTSIDE, OUTSIDE, OUTSIDE, OUTSIDE, 1, 3, OUTSIDE]


def test_how_much_of_a_string_is_left_is_read_off_its_masks(model_folder: Path) -> None:
    compiler = GrammarCompiler.open(model_folder, 5120, (2, 5118))
    *_, below, longest = compiler.ends._rungs.tolist()
    matcher = compiler.matcher(Grammar("json_schema", json.dumps({"type": "string", "maxLength": longest})))
    ends, left, near = compiler.ends, [], []
    lower = {len(piece): token for token, piece in enumerate(compiler_pieces(model_folder)) if piece.isalpha() and piece.islower() and piece.isascii()}
    quote = next(token for token, piece in enumerate(compiler_pieces(model_folder)) if piece == b'"')
    for token in [quote, lower[1], lower[longest - 7], lower[1], lower[3], quote]:
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint32)[None]
        left.append(ends.left(bits, np.array([0])).item())
        near.append(bool(ends.near(np.array(left[-1:]), np.array([token]))[0]))
        assert matcher.consume_token(token)
    assert left[:2] == [0, 0], "outside, and where all words are allowed, as in a string without end"
    assert left[2:] == [below, 6, 5, 2], "no more than the longest word that is allowed"
    assert near == [False, False, True, True, True, False]


def test_slots_are_found_among_others() -> None:
    for slots, others, found in (([3, 0, 7], [7, 9], [False, False, True]), ([], [1], []), ([2], [], [False]), ([5, 1], [1, 1, 5], [True, True])):
        assert is_among(np.array(slots, dtype=np.int64), np.array(others, dtype=np.int64)).tolist() == found


def compiler_pieces(folder: Path) -> list[bytes]:
    from lmdeploy.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(folder)
    return [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]


def test_a_vocabulary_without_words_has_nothing_to_guess_from() -> None:
    ends = StringEnds([b"1", b'"', b"\n"])
    assert ends.left(np.full((2, 1), 0xFFFFFFFF, dtype=np.uint32), np.array([0, 1])).tolist() == [0, 0]
    assert StringEnds([]).lengths.size == 0


def test_more_calls_than_threads_are_not_begun() -> None:
    callers, go_on = Callers(2), threading.Event()
    calls = [MaskCall([slot], [], usual=True) for slot in range(4)]
    begun = time.monotonic()
    assert [callers.begin(call, lambda: go_on.wait(10) and None) for call in calls[:3]] == [True, True, False]
    assert not calls[0].wait(0.01) and time.monotonic() - begun < 5
    go_on.set()
    assert calls[0].wait(5) and calls[1].wait(5) and calls[0].seconds >= 0.01
    assert callers.begin(calls[3], lambda: None) and calls[3].wait(5), "a thread that is done takes the next one"
    callers.close()


def test_a_call_that_is_over_holds_no_matcher() -> None:
    class Matcher:
        """A lexer takes some MB."""

    callers, matcher = Callers(1), Matcher()
    call, alive = MaskCall([0], [matcher], usual=True), weakref.ref(matcher)
    del matcher
    assert callers.begin(call, lambda: None) and call.wait(5) and alive() is None
    callers.close()


def test_whoever_waits_for_a_call_that_failed_hears_of_it_each_time() -> None:
    callers, call = Callers(1), MaskCall([0], [], usual=True)
    callers.begin(call, lambda: int("none") and None)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the grammar library failed: ValueError"):
            call.wait(5)
    callers.close()


def held_up(model_folder: Path, monkeypatch: pytest.MonkeyPatch, among: int = 100) -> tuple[GuidedSlots, GuidedStep, threading.Event]:
    """A row with a grammar among others, whose mask is not there before the event is set."""
    go_on = threading.Event()
    monkeypatch.setattr(GuidedSlots, "_fill_words", lambda self, call: go_on.wait(20) and None)
    slots = GuidedSlots(GrammarCompiler.open(model_folder, 5120, (2, 5118)), 100, torch.device("cpu"))
    slots._overlaps = True
    slots.set(0, SamplingParams(max_new_tokens=9, grammar=Grammar("regex", "[0-9]+")), [])
    step = slots.masks(np.arange(among), np.zeros(among, dtype=bool))
    assert step is not None
    step.late[:] = True
    return slots, step, go_on


def test_masks_are_waited_for_until_the_device_would_wait(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots, step, go_on = held_up(model_folder, monkeypatch)
    step.busy, step.paced = lambda: True, True
    begun = time.perf_counter()
    monkeypatch.setattr(slots._pace, "end", lambda: begun + 0.2)
    rows, *_ = step.join()
    assert 0.2 <= time.perf_counter() - begun < 5
    assert not rows.size and step.late.all()
    go_on.set()
    slots.close()


@pytest.mark.parametrize("seconds", [0.0, 0.1])
@pytest.mark.parametrize("paced", [True, False], ids=["taken for slow", "unknown"])
def test_no_mask_is_waited_for_when_the_device_has_nothing_to_do(model_folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, paced: bool) -> None:
    slots, step, go_on = held_up(model_folder, monkeypatch)
    begun = time.perf_counter()
    slots._pace._since, slots._pace._device, slots._pace._exact = begun, 30.0, True
    step.busy, step.paced = lambda: time.perf_counter() < begun + seconds, paced
    step.join()
    assert seconds <= time.perf_counter() - begun < 5
    assert step.late.all()
    go_on.set()
    slots.close()


def test_a_mask_is_waited_for_where_nobody_would_get_a_token(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots, step, go_on = held_up(model_folder, monkeypatch, among=1)
    threading.Timer(0.1, go_on.set).start()
    rows, *_ = step.join()
    assert rows.tolist() == [0] and not step.late.any()
    slots.close()


def two_calls(model_folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float) -> tuple[GuidedSlots, GuidedStep, threading.Event]:
    """Four guided rows: the first one's mask is not there before the event is set, the others' after so many seconds."""
    go_on, fill = threading.Event(), GuidedSlots._fill_words

    def slowly(self: GuidedSlots, call: MaskCall) -> None:
        if 0 in call.slots:
            go_on.wait(20)
        else:
            time.sleep(seconds)
        fill(self, call)

    monkeypatch.setattr(GuidedSlots, "_fill_words", slowly)
    slots = GuidedSlots(GrammarCompiler.open(model_folder, 5120, (2, 5118)), 4, torch.device("cpu"))
    slots._overlaps = True
    slow, quick = Grammar("regex", "[0-9]+"), Grammar("regex", "[a-z]+")
    for slot in range(4):
        slots.set(slot, SamplingParams(max_new_tokens=9, grammar=quick if slot else slow), [])
    slots._slow[slow] = 100  # it gets a call of its own
    step = slots.masks(np.arange(4), np.zeros(4, dtype=bool))
    assert step is not None
    step.late[:] = True
    return slots, step, go_on


def test_where_nobody_would_get_a_token_the_first_mask_that_comes_is_enough(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots, step, go_on = two_calls(model_folder, monkeypatch, 0.05)
    begun = time.perf_counter()
    rows, *_ = step.join()
    assert rows.tolist() == [1, 2, 3] and step.late.tolist() == [True, False, False, False]
    assert time.perf_counter() - begun < 5
    go_on.set()
    slots.close()


def test_nobody_waits_for_the_mask_of_who_has_left(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots, step, go_on = two_calls(model_folder, monkeypatch, 3.0)
    step.gone = np.ones(4, dtype=bool)
    begun = time.perf_counter()
    step.join()
    assert time.perf_counter() - begun < 2.5 and step.late.all()
    go_on.set()
    slots.close()


def test_masks_that_come_while_others_are_waited_for_are_not_late(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots, step, go_on = two_calls(model_folder, monkeypatch, 0.05)
    step.late[0] = False  # it has to be waited for
    threading.Timer(0.3, go_on.set).start()
    rows, *_ = step.join()
    assert rows.tolist() == [0, 1, 2, 3] and not step.late.any()
    slots.close()
