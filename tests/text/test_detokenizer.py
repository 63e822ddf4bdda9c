"""Incremental text equals whole text for every way to cut the ids, and never shows half a character."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.text.detokenizer import IncrementalDetokenizer
from tests.text.samples import FOLDERS, LLAMA2, QWEN, TINY, tokenizer

each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)


def stream(folder: Path, prompt: list[int], ids: list[int], cuts: list[int], skip: bool, spaces: bool) -> str:
    """Feed `ids` in pieces."""
    detokenizer = IncrementalDetokenizer(tokenizer(folder), prompt, skip, spaces)
    edges = [0, *sorted(c % (len(ids) + 1) for c in cuts), len(ids)]
    return "".join(detokenizer.feed(ids[a:b]) for a, b in zip(edges, edges[1:], strict=False)) + detokenizer.flush()


def rest(folder: Path, prompt: list[int], ids: list[int], skip: bool, spaces: bool) -> str:
    """What the answer adds to the decoded prompt."""
    ours = tokenizer(folder)
    before = ours.decode(prompt, None, skip, spaces)
    return ours.decode(prompt + ids, None, skip, spaces)[len(before) :]


@each_folder
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_ids_in_any_pieces_give_the_decoded_text(folder: Path, data: st.DataObject) -> None:
    ours = tokenizer(folder)
    low = st.integers(0, min(300, ours.vocab_size - 1))  # byte tokens and special ones
    one = st.one_of(low, st.integers(0, ours.vocab_size + 5), st.sampled_from(sorted(ours.special_ids)))
    prompt, ids = data.draw(st.lists(one, max_size=8)), data.draw(st.lists(one, max_size=24))
    cuts, skip, spaces = data.draw(st.lists(st.integers(0, 30), max_size=6)), data.draw(st.booleans()), data.draw(st.booleans())
    assert stream(folder, prompt, ids, cuts, skip, spaces) == rest(folder, prompt, ids, skip, spaces)


@each_folder
@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=60), cuts=st.lists(st.integers(0, 200), max_size=8), split=st.integers(0, 40))
def test_any_text_comes_back_in_any_pieces(folder: Path, text: str, cuts: list[int], split: int) -> None:
    ours = tokenizer(folder)
    ids = ours.encode(text, add_bos=False, split_special=False)
    assert stream(folder, [], ids, cuts, True, True) == text == ours.decode(ids)
    at = split % (len(ids) + 1)
    assert stream(folder, ids[:at], ids[at:], cuts, True, True) == rest(folder, ids[:at], ids[at:], True, True)


@each_folder
@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="a 你😀é\u200d🇩👩", min_size=1, max_size=20))
def test_valid_text_never_shows_a_replacement_character_on_the_way(folder: Path, text: str) -> None:
    ours = tokenizer(folder)
    detokenizer = IncrementalDetokenizer(ours)
    shown = ""
    for token_id in ours.encode(text, add_bos=False, split_special=False):
        shown += detokenizer.feed([token_id])
        assert text.startswith(shown)
    assert shown + detokenizer.flush() == text


def test_invalid_bytes_become_one_replacement_character_each_run() -> None:
    ours = tokenizer(LLAMA2)
    byte = {b: ours.token_id(f"<0x{b:02X}>") for b in range(256)}
    ids = [byte[b] for b in b"\xe4\xbd\xff\xf0\x9f\x98ok\xe4\xbd"]
    detokenizer = IncrementalDetokenizer(ours)
    shown = "".join(detokenizer.feed([i]) for i in ids if i is not None)
    assert shown == "\ufffd\ufffd\ufffdok" and detokenizer.pending == b"\xe4\xbd"
    assert detokenizer.flush() == "\ufffd"


def test_the_answer_keeps_the_space_that_begins_it_after_a_prompt() -> None:
    ours = tokenizer(LLAMA2)
    hello, world = ours.encode("Hello", add_bos=False), ours.encode("world", add_bos=False)
    assert IncrementalDetokenizer(ours, hello).feed(world) == " world"
    assert IncrementalDetokenizer(ours, []).feed(world) == "world"
    assert IncrementalDetokenizer(ours, [1]).feed(world) == "world"  # BOS is not text


def test_special_tokens_are_left_out_or_kept_as_asked() -> None:
    for folder in (TINY, QWEN):
        ours = tokenizer(folder)
        ids = ours.encode("a<|im_end|>b", add_bos=False)
        assert IncrementalDetokenizer(ours).feed(ids) == "ab"
        assert IncrementalDetokenizer(ours, skip_special_tokens=False).feed(ids) == "a<|im_end|>b"


def test_a_token_costs_the_same_after_a_long_answer() -> None:
    ours = tokenizer(TINY)
    ids = ours.encode("Once upon a time there was 一只猫. " * 2000, add_bos=False)
    detokenizer = IncrementalDetokenizer(ours, ids)
    start = time.perf_counter()
    for token_id in ids[:20_000]:
        detokenizer.feed([token_id])
    assert (time.perf_counter() - start) / min(len(ids), 20_000) < 50e-6
