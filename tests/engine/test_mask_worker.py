"""A process that follows grammars, without the process: what it does first, and what it forgets."""

from __future__ import annotations

import os
import socket
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmdeploy.engine import mask_worker
from lmdeploy.engine.grammar_compiler import GrammarLibrary
from lmdeploy.engine.mask_wire import GOES_ON, STATE_BITS, STOPPED, Advance, Compile, Compiled, Forget, FromWorker, Inbox, Leave, Table, Take
from lmdeploy.engine.mask_worker import Worker
from lmdeploy.engine.string_ends import StringEnds
from lmdeploy.grammar import Grammar

WORDS = Grammar("regex", "[a-z]{1,12}( [a-z]{1,12}){2,9}")


@pytest.fixture(scope="module")
def library(model_folder: Path) -> GrammarLibrary:
    return GrammarLibrary.open(model_folder, 5120, (2, 5118))


@pytest.fixture
def worker(library: GrammarLibrary) -> Iterator[tuple[Worker, Callable[[], Any]]]:
    """Of eight slots; and the next thing that it says."""
    ours, theirs = socket.socketpair()
    file, notify = os.memfd_create("masks"), os.eventfd(0, os.EFD_NONBLOCK)
    os.ftruncate(file, Table.size(8, 160))
    worker, inbox, said = Worker(library, StringEnds(library.pieces), theirs, Table(file, 8, 160), notify), Inbox[FromWorker](ours, FromWorker), list[Any]()

    def listen() -> Any:
        said.extend([] if said else inbox.read(block=True))
        return said.pop(0)

    ours.settimeout(20)
    yield worker, listen
    worker._pool.close()
    for open_file in (file, notify):
        os.close(open_file)
    for sock in (ours, theirs):
        sock.close()


def compiled(worker: Worker, listen: Callable[[], Any], number: int, grammar: Grammar = WORDS) -> None:
    worker._obey(Compile(number, grammar, ""))
    while not isinstance(said := listen(), Compiled):
        pass
    assert said.number == number and said.problem is None


def test_masks_that_are_quick_to_fill_come_first_and_others_wait_until_it_was_looked_for_messages(
    worker: tuple[Worker, Callable[[], Any]], library: GrammarLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mask_worker, "LOOK", 0.0)
    it, listen = worker
    compiled(it, listen, 0)
    a = library.pieces.index(b"a")
    for slot, count in ((0, 9), (1, 3), (2, 6)):
        it._obey(Take(slot + 1, slot, 0, array("i", [a] * count).tobytes()))
    left = []
    while it._todo:
        it._work()
        left.append(set(it._todo))
    assert left == [{0, 2}, {0}, set()]


def test_whether_a_last_token_ends_an_answer_is_said_before_any_mask_is_filled(worker: tuple[Worker, Callable[[], Any]], library: GrammarLibrary) -> None:
    it, listen = worker
    compiled(it, listen, 0, Grammar("regex", "a{2}"))
    for turn, slot in ((1, 0), (2, 1)):
        it._obey(Take(turn, slot, 0, array("i", [library.pieces.index(b"a")] * slot).tobytes()))
    while it._todo:
        it._work()
    it._obey(Advance(3, array("i", [0, 1]).tobytes(), array("i", [~library.pieces.index(b"a")] * 2).tobytes()))
    assert it._status[:2].tolist() == [3 << STATE_BITS | GOES_ON, 3 << STATE_BITS | STOPPED] and len(it._todo) == 2
    while it._todo:
        it._work()
    assert it._status[:2].tolist() == [4 << STATE_BITS | GOES_ON, 4 << STATE_BITS | STOPPED], "and the mask is of the turn after"


def test_who_has_left_is_not_worked_for(worker: tuple[Worker, Callable[[], Any]], library: GrammarLibrary) -> None:
    it, listen = worker
    compiled(it, listen, 0)
    it._obey(Take(1, 3, 0, b""))
    it._work()
    it._obey(Advance(2, array("i", [3]).tobytes(), array("i", [library.pieces.index(b"a")]).tobytes()))
    it._obey(Leave(3, 3))
    assert not it._todo and not it._slots and it._status[3] >> STATE_BITS == 3


def test_a_grammar_that_is_forgotten_takes_no_memory(worker: tuple[Worker, Callable[[], Any]]) -> None:
    """Whether it has been compiled by then or not."""
    it, listen = worker
    compiled(it, listen, 0)
    it._obey(Forget(0))
    assert not it._grammars
    it._obey(Compile(1, WORDS, ""))
    it._obey(Forget(1))
    compiled(it, listen, 2)
    assert set(it._grammars) == {2} and not it._waiting
