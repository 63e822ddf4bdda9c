"""Masks that processes of their own fill are those that would be filled here, and whatever happens to a process, only its own answers notice."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmdeploy.engine import mask_pool, mask_process
from lmdeploy.engine.grammar_compiler import GrammarCompiler
from lmdeploy.engine.mask_pool import ROWS_EACH, MaskPool, processes_for
from lmdeploy.engine.mask_wire import BROKEN, GOES_ON, STOPPED
from lmdeploy.engine.masks import Ints, Masks, MasksHere
from lmdeploy.errors import EngineError, RequestError
from lmdeploy.grammar import Grammar

CPU = torch.device("cpu")
WORDS = Grammar("regex", "[a-z]{1,12}( [a-z]{1,12}){2,9}")
PERSON = Grammar("json_schema", json.dumps({"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}}, "required": ["name"]}))
CHOICE = Grammar("choice", json.dumps(["red", "green, or nearly so"]))


def open_pool(folder: Path, slots: int = 8, most: int = 2) -> MaskPool:
    return MaskPool(folder, 5120, (2, 5118), most=most).begin(slots, CPU)


@pytest.fixture
def pool(model_folder: Path, request: pytest.FixtureRequest) -> Iterator[MaskPool]:
    """Of two processes, or as many as are asked for."""
    pool = open_pool(model_folder, most=getattr(request, "param", 2))
    yield pool
    pool.close()


def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def wait_for(masks: Masks, slots: Ints) -> None:
    end = time.monotonic() + 20
    while not masks.there(slots).all():
        assert time.monotonic() < end, "a mask never came"
        masks.wait(0.05)


def slots_of(*slots: int) -> Ints:
    return np.array(slots, dtype=np.int64)


def tokens_for(masks: Masks, slots: Ints, draw: np.random.Generator) -> Ints:
    """For each of the slots one that its mask allows."""
    bits = np.unpackbits(masks.words.numpy().view(np.uint8)[slots], axis=1, bitorder="little")
    return np.array([draw.choice(np.flatnonzero(row)) for row in bits])


def is_running(pid: int) -> bool:
    """Not ended, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def pids(pool: MaskPool) -> list[int]:
    return [pool._root.process.pid, *(process.pid for process in pool._processes if process.alive)]


# ------------------------------------------------------------------ masks


def test_masks_and_ends_are_those_of_this_process(pool: MaskPool, model_folder: Path) -> None:
    """Answers begin, end, and are replaced at random, with tokens that were generated before or without."""
    here, draw = MasksHere(GrammarCompiler.open(model_folder, 5120, (2, 5118)), 8), np.random.default_rng(5)
    told: dict[int, list[int]] = {}
    ends = 0
    for step in range(120):
        for slot in range(8):
            if slot not in told or draw.random() < 0.02:
                grammar = (WORDS, PERSON, CHOICE)[int(draw.integers(3))]
                again = told.pop(slot, None)
                for masks in (pool, here):
                    if again is not None:
                        masks.leave(slot)
                    masks.take(slot, grammar, [])
                told[slot] = []
        slots = np.sort(draw.choice(8, size=int(draw.integers(1, 9)), replace=False))
        wait_for(pool, slots)
        assert here.there(slots).all()
        assert (here.words[slots] == pool.words[slots]).all() and (here.states(slots) == pool.states(slots)).all(), step
        slots = slots[pool.states(slots) == GOES_ON]
        tokens, last = tokens_for(pool, slots, draw), draw.random(slots.size) < 0.3
        complete, expected = pool.advance(slots, tokens, last, 20), here.advance(slots, tokens, last, 0)
        assert (complete == (expected & last)).all(), "of those that are last it is known at once"
        for slot, ended in zip(slots.tolist(), expected.tolist(), strict=True):
            if ended:
                ends += 1
                wait_for(pool, slots_of(slot))
                assert pool.states(slots_of(slot)).tolist() == [STOPPED]
                for masks in (pool, here):
                    masks.leave(slot)
                del told[slot]
    assert ends > 10


def test_an_answer_goes_on_from_the_tokens_that_it_has(pool: MaskPool) -> None:
    draw, tokens = np.random.default_rng(1), list[int]()
    pool.take(0, WORDS, [])
    for _ in range(6):
        wait_for(pool, slots_of(0))
        tokens += tokens_for(pool, slots_of(0), draw).tolist()
        pool.advance(slots_of(0), np.array(tokens[-1:]), np.zeros(1, dtype=bool), 20)
    pool.take(3, WORDS, tokens)
    wait_for(pool, slots_of(0, 3))
    assert (pool.words[0] == pool.words[3]).all()


def test_nobody_waits_for_long_to_hear_whether_an_answer_is_complete(pool: MaskPool) -> None:
    pool.take(0, Grammar("regex", "[0-9]"), [])
    wait_for(pool, slots_of(0))
    holder = pool._processes[pool._process_of[0]]
    os.kill(holder.pid, signal.SIGSTOP)
    begun = time.monotonic()
    digit = tokens_for(pool, slots_of(0), np.random.default_rng(0))
    assert pool.advance(slots_of(0), digit, np.ones(1, dtype=bool), 0.05).tolist() == [False]
    assert 0.05 <= time.monotonic() - begun < 5
    os.kill(holder.pid, signal.SIGCONT)
    wait_for(pool, slots_of(0))
    assert pool.states(slots_of(0)).tolist() == [STOPPED], "it is known later, should it go on"


def test_a_mask_that_cannot_be_made_says_why(pool: MaskPool) -> None:
    digits = Grammar("regex", "[0-9]+")
    pool.take(0, digits, [300])
    pool.take(1, digits, [])
    wait_for(pool, slots_of(0, 1))
    assert pool.states(slots_of(0, 1)).tolist() == [BROKEN, GOES_ON]
    assert "could not be worked out" in pool.reason(0)


def test_a_slot_is_not_written_to_by_two_processes(pool: MaskPool) -> None:
    """Who has it next begins when who had it before has done with it."""
    held = pool.prepare(WORDS, answers=8 * ROWS_EACH)
    held.result(20)
    first, second = pool._processes
    pool.take(0, WORDS, [])
    wait_for(pool, slots_of(0))
    holder, other = (first, second) if first.slots else (second, first)
    os.kill(holder.pid, signal.SIGSTOP)
    pool.advance(slots_of(0), tokens_for(pool, slots_of(0), np.random.default_rng(0)), np.zeros(1, dtype=bool), 20)
    pool.leave(0)
    holder.slots += 1  # so that the other one is to have it
    pool.take(0, WORDS, [])
    holder.slots -= 1
    assert other.slots == 1
    time.sleep(0.05)
    assert not pool.there(slots_of(0)).any() and pool._deferred
    os.kill(holder.pid, signal.SIGCONT)
    wait_for(pool, slots_of(0))
    assert not pool._deferred and pool._process_of[0] == other.number
    pool.leave(0)
    assert [process.slots for process in pool._processes] == [0, 0]


def test_a_slot_is_free_when_the_process_that_had_it_has_ended(pool: MaskPool) -> None:
    held = pool.prepare(WORDS, answers=8 * ROWS_EACH)
    held.result(20)
    pool.take(0, WORDS, [])
    wait_for(pool, slots_of(0))
    holder = pool._processes[pool._process_of[0]]
    os.kill(holder.pid, signal.SIGSTOP)
    pool.leave(0)
    holder.slots += 1  # so that the other one is to have it
    pool.take(0, WORDS, [])
    holder.slots -= 1
    assert pool._deferred
    os.kill(holder.pid, signal.SIGKILL)
    wait_for(pool, slots_of(0))
    assert not pool._deferred and pool.states(slots_of(0)).tolist() == [GOES_ON]


def test_who_leaves_before_he_could_begin_was_never_there(pool: MaskPool) -> None:
    held = pool.prepare(WORDS, answers=8 * ROWS_EACH)
    held.result(20)
    pool.take(0, WORDS, [])
    wait_for(pool, slots_of(0))
    holder = pool._processes[pool._process_of[0]]
    os.kill(holder.pid, signal.SIGSTOP)
    pool.leave(0)
    holder.slots += 1
    pool.take(0, WORDS, [])
    holder.slots -= 1
    pool.leave(0)
    os.kill(holder.pid, signal.SIGCONT)
    pool.take(0, CHOICE, [])
    wait_for(pool, slots_of(0))
    assert sum(process.slots for process in pool._processes) == 1


# ------------------------------------------------------------------ grammars


def test_a_grammar_is_compiled_where_its_answers_are(pool: MaskPool) -> None:
    held = [pool.prepare(WORDS)]
    assert len(held[0].result(20).at) == 1, "few answers have one process"
    held.append(pool.prepare(WORDS, answers=2 * ROWS_EACH))
    assert len(held[1].result(20).at) == 2
    for slot in range(8):
        pool.take(slot, WORDS, [])
    assert [process.slots for process in pool._processes] == [4, 4]
    assert pool.prepare(WORDS).done(), "who comes later does not wait"


@pytest.mark.parametrize(("answers", "processes"), [(0, 0), (1, 1), (4, 1), (5, 2), (16, 4), (32, 4), (33, 5), (64, 8), (96, 12), (1000, 125)])
def test_few_processes_have_four_answers_each_and_many_have_eight(answers: int, processes: int) -> None:
    assert processes_for(answers) == processes


def test_grammars_are_compiled_where_fewest_answers_are_and_among_those_where_fewest_grammars_are(pool: MaskPool) -> None:
    held = [pool.prepare(WORDS)]
    (full,) = held[0].result(20).at
    for slot in range(3):
        pool.take(slot, WORDS, [])
    for grammar in (PERSON, CHOICE, Grammar("regex", "[0-9]")):
        held.append(pool.prepare(grammar))
        assert full not in held[-1].result(20).at
    for slot in range(3):
        pool.leave(slot)
    assert pool.prepare(Grammar("regex", "[a-f]")).result(20).at == [full]


def test_a_grammar_that_takes_long_to_compile_is_compiled_once(pool: MaskPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_pool, "CHEAP_SECONDS", 0.0)
    assert len(pool.prepare(WORDS, answers=100).result(20).at) == 1


def test_lexers_of_all_grammars_are_bounded(pool: MaskPool) -> None:
    pool._most_more = 1
    held = [pool.prepare(grammar, answers=100) for grammar in (WORDS, PERSON, CHOICE)]
    assert sorted(len(future.result(20).at) for future in held) == [1, 1, 2]
    del held
    gc.collect()
    again = pool.prepare(Grammar("regex", "[a-f]+"), answers=100)
    assert len(again.result(20).at) == 2, "nobody wants the others any more"


def test_of_grammars_that_nobody_wants_those_are_kept_that_memory_has_room_for(pool: MaskPool) -> None:
    wanted, left = pool.prepare(PERSON, answers=100), pool.prepare(WORDS, answers=100)
    assert [len(future.result(20).at) for future in (wanted, left)] == [2, 2]
    del left
    gc.collect()
    pool._most_more = 1
    assert pool.prepare(CHOICE).result(20).at
    gc.collect()
    assert set(pool._by_grammar) == {PERSON, CHOICE}


def test_a_grammar_that_is_none_is_refused_and_others_are_not(pool: MaskPool) -> None:
    bad = pool.prepare(Grammar("regex", "(a"))
    with pytest.raises(RequestError, match="the grammar is refused") as refused:
        bad.result(20)
    assert refused.value.code == "invalid_grammar" and pool.num_compiled == 0
    assert pool.prepare(WORDS).result(20).at
    with pytest.raises(RequestError):
        pool.take(0, Grammar("regex", "(a"), [])


def test_whoever_waits_when_it_is_closed_hears_of_it(model_folder: Path) -> None:
    pool = open_pool(model_folder)
    for process in pool._processes:
        os.kill(process.pid, signal.SIGSTOP)
    waiting = [pool.prepare(grammar) for grammar in (WORDS, PERSON)]
    running = pids(pool)
    pool.close()
    pool.close()
    for future in waiting:
        with pytest.raises(EngineError, match="closed"):
            future.result(5)
    with pytest.raises(EngineError, match="closed"):
        pool.prepare(CHOICE)
    until(lambda: not any(map(is_running, running)))


def test_closing_ends_those_that_the_first_process_ends_no_more(model_folder: Path) -> None:
    pool = open_pool(model_folder)
    running = pids(pool)
    pool._root.process.kill()
    pool.close()
    until(lambda: not any(map(is_running, running)), 5)


def test_grammars_that_nobody_wants_any_more_are_forgotten(pool: MaskPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_pool, "MAX_KEPT", 3)
    wanted = pool.prepare(WORDS)
    wanted.result(20)
    for number in range(20):
        pool.prepare(Grammar("regex", f"a{{{number + 1}}}")).result(20)
    gc.collect()
    assert pool.num_compiled <= 4
    pool.take(0, WORDS, [])
    wait_for(pool, slots_of(0))
    assert pool.states(slots_of(0)).tolist() == [GOES_ON]


def test_grammars_that_are_not_kept_are_compiled_for_those_who_wait(pool: MaskPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_pool, "MAX_KEPT", 1)
    held = [pool.prepare(Grammar("regex", f"b{{{number + 1}}}"), answers=9) for number in range(12)]
    assert all(future.result(20).at for future in held)


# ------------------------------------------------------------------ processes that end, or hang


def test_only_answers_of_a_process_that_ends_fail_and_another_takes_its_place(pool: MaskPool) -> None:
    held = pool.prepare(WORDS, answers=8 * ROWS_EACH)
    held.result(20)
    for slot in range(8):
        pool.take(slot, WORDS, [])
    slots = np.arange(8)
    wait_for(pool, slots)
    victim = pool._processes[0]
    its = np.flatnonzero(pool._process_of == victim.number)
    others = np.setdiff1d(slots, its)
    os.kill(victim.pid, signal.SIGKILL)
    until(lambda: pool._any_lost)
    draw = np.random.default_rng(0)
    assert pool.there(slots).all() and (pool.states(its) == BROKEN).all() and (pool.states(others) == GOES_ON).all()
    assert "ended" in pool.reason(its.item(0))
    pool.advance(others, tokens_for(pool, others, draw), np.zeros(others.size, dtype=bool), 20)
    wait_for(pool, others)
    for slot in its.tolist():
        pool.leave(slot)
    until(lambda: len(pool._processes) == 3)
    more = pool.prepare(WORDS, answers=8 * ROWS_EACH)
    assert len([process for process in more.result(20).at if process.alive]) == 2
    for slot in its.tolist():
        pool.take(slot, WORDS, [])
    wait_for(pool, slots)
    assert (pool.states(slots) == GOES_ON).all()
    assert sorted(process.slots for process in pool._processes if process.alive) == [4, 4]


def test_a_process_that_ends_while_it_compiles_is_not_the_end_of_who_waits(pool: MaskPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_pool, "QUICKLY", 4.0)
    first, second = pool._processes
    for process in (first, second):
        os.kill(process.pid, signal.SIGSTOP)
    waiting = pool.prepare(WORDS)
    (compiled,) = pool._busy
    (asked,) = compiled.asked
    other = second if asked is first else first
    os.kill(asked.pid, signal.SIGKILL)
    until(lambda: compiled.asked == [other], 2)  # before another one takes its place
    os.kill(other.pid, signal.SIGCONT)
    assert waiting.result(20).at


@pytest.mark.parametrize("pool", [1], indirect=True)
def test_only_the_grammar_that_ends_two_processes_is_refused(pool: MaskPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others, which waited for their turn meanwhile, are compiled by the third."""
    monkeypatch.setattr(mask_pool, "QUICKLY", 0.01)
    large = Grammar("json_schema", json.dumps({"type": "object", "properties": {f"k{i}": {"type": "string", "maxLength": 3000 + i} for i in range(150)}}))
    waiting, others, killed = pool.prepare(large), [pool.prepare(grammar) for grammar in (WORDS, PERSON)], set[int]()
    (compiled,) = (each for each in pool._busy if each.grammar == large)
    while not waiting.done():
        for process in list(pool._processes):
            if process.compiling == compiled.number and process.alive and process.pid not in killed:
                killed.add(process.pid)
                process.kill()
        time.sleep(0.0005)
    with pytest.raises(RequestError, match="limits of memory"):
        waiting.result()
    assert len(killed) == 2 and all(future.result(20) for future in others)
    for slot, grammar in enumerate((WORDS, PERSON)):
        pool.take(slot, grammar, [])
    wait_for(pool, slots_of(0, 1))
    assert pool.states(slots_of(0, 1)).tolist() == [GOES_ON, GOES_ON]


def test_a_grammar_that_one_process_has_is_not_refused_whatever_happens_to_others(pool: MaskPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_pool, "QUICKLY", 0.01)
    monkeypatch.setattr(mask_pool, "CHEAP_SECONDS", 1000.0)
    large = Grammar("json_schema", json.dumps({"type": "object", "properties": {f"k{i}": {"type": "string", "maxLength": 3000 + i} for i in range(150)}}))
    held = [pool.prepare(large)]
    compiled = held[0].result(20)
    for deaths in (1, 2):
        until(lambda: sum(process.alive for process in pool._processes) == 2)
        held.append(pool.prepare(large, answers=2 * ROWS_EACH))
        (asked,) = compiled.asked
        until(lambda asked=asked: asked.compiling == compiled.number)  # type: ignore[misc]
        asked.kill()
        assert held[-1].result(20) is compiled and compiled.deaths == deaths, "it goes on with the one"


def test_a_process_that_brings_no_mask_is_replaced(pool: MaskPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_pool, "PATIENCE", 0.5)
    pool.take(0, WORDS, [])
    wait_for(pool, slots_of(0))
    os.kill(pool._processes[pool._process_of[0]].pid, signal.SIGSTOP)
    pool.advance(slots_of(0), tokens_for(pool, slots_of(0), np.random.default_rng(0)), np.zeros(1, dtype=bool), 20)
    wait_for(pool, slots_of(0))
    assert pool.states(slots_of(0)).tolist() == [BROKEN]
    pool.leave(0)
    pool.take(0, WORDS, [])
    wait_for(pool, slots_of(0))
    assert pool.states(slots_of(0)).tolist() == [GOES_ON]


def test_a_process_that_has_had_nothing_to_do_for_long_does_not_hang(pool: MaskPool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.take(0, WORDS, [])
    wait_for(pool, slots_of(0))
    holder = pool._processes[pool._process_of[0]]
    monkeypatch.setattr(mask_pool, "PATIENCE", 0.2)
    time.sleep(0.3)
    os.kill(holder.pid, signal.SIGSTOP)  # a moment, in which it cannot answer
    pool.leave(0)
    pool.wait(0.001)
    os.kill(holder.pid, signal.SIGCONT)
    until(lambda: pool.there(slots_of(0)).all())
    assert holder.alive


def test_numbers_of_grammars_are_forgotten_with_them(pool: MaskPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process hears of all that are forgotten, though it has compiled some."""
    monkeypatch.setattr(mask_pool, "MAX_KEPT", 1)
    memory = [Path(f"/proc/{process.pid}/smaps_rollup") for process in pool._processes]
    for number in range(60):
        pool.prepare(Grammar("regex", f"c{{{number + 1}}}")).result(20)
    assert all(path.exists() for path in memory) and len(pool._by_number) <= 2


def test_without_the_first_process_none_can_be_replaced_and_the_engine_hears_of_it(pool: MaskPool) -> None:
    os.kill(pool._root.process.pid, signal.SIGKILL)
    pool._root.process.wait()
    assert pool.prepare(WORDS).result(20).at, "those that there are go on"
    os.kill(pool._processes[0].pid, signal.SIGKILL)
    until(lambda: not pool._processes[0].alive)
    assert pool.prepare(PERSON).result(20).at, "also alone"
    waiting = pool.prepare(CHOICE, answers=100)
    os.kill(pool._processes[1].pid, signal.SIGKILL)
    until(lambda: pool._failure)
    with pytest.raises(EngineError, match="ended"):
        pool.prepare(PERSON)
    until(waiting.done)


def test_a_first_process_that_answers_late_is_asked_again_and_not_taken_at_an_old_word(pool: MaskPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_process, "FORK_SECONDS", 0.2)
    monkeypatch.setattr(mask_pool, "QUICKLY", 0.1)
    first = pool._processes[0]
    os.kill(pool._root.process.pid, signal.SIGSTOP)
    first.kill()
    until(lambda: pool._any_lost)
    time.sleep(0.6)
    os.kill(pool._root.process.pid, signal.SIGCONT)
    until(lambda: len(pool._processes) == 3)
    new = pool._processes[2]
    new.kill()
    until(lambda: not new.alive)
    assert pool._processes[1].alive


def test_two_engines_of_one_process_have_nothing_to_do_with_each_other(pool: MaskPool, model_folder: Path) -> None:
    other = open_pool(model_folder)
    for each in (pool, other):
        each.take(0, WORDS, [])
        wait_for(each, slots_of(0))
    ended = pids(other)
    other.close()
    until(lambda: not any(map(is_running, ended)))
    pool.advance(slots_of(0), tokens_for(pool, slots_of(0), np.random.default_rng(0)), np.zeros(1, dtype=bool), 20)
    wait_for(pool, slots_of(0))
    assert pool.states(slots_of(0)).tolist() == [GOES_ON] and all(map(is_running, pids(pool)))


def test_who_is_killed_leaves_no_process_behind(model_folder: Path) -> None:
    """The engine, while a process of it fills masks."""
    program = (
        "import sys, time, torch\nfrom pathlib import Path\nfrom lmdeploy.engine.mask_pool import MaskPool\nfrom lmdeploy.grammar import Grammar\n"
        "pool = MaskPool(Path(sys.argv[1]), 5120, (2, 5118), most=2).begin(8, torch.device('cpu'))\n"
        "for slot in range(8): pool.take(slot, Grammar('regex', '[a-z ]+'), [])\n"
        "print(*[pool._root.process.pid, *(p.pid for p in pool._processes)], flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(model_folder)], stdout=subprocess.PIPE, text=True) as engine:
        assert engine.stdout is not None
        running = [int(word) for word in engine.stdout.readline().split()]
        assert len(running) == 3 and all(map(is_running, running))
        engine.kill()
    until(lambda: not any(map(is_running, running)))


def test_a_folder_without_a_tokenizer_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    pool = MaskPool(tmp_path, 5120)
    with pytest.raises(RequestError):
        pool.opened()
    assert pool._root.process.poll() is not None


def test_closing_gives_files_and_threads_back(model_folder: Path) -> None:
    def open_files() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    def reader_threads() -> int:
        return sum(thread.name == "masks-reader" for thread in threading.enumerate())

    until(lambda: reader_threads() == 0)
    before = open_files()
    for _ in range(3):
        pool = open_pool(model_folder)
        future: Future[Any] = pool.prepare(WORDS)
        future.result(20)
        pool.take(0, WORDS, [])
        wait_for(pool, slots_of(0))
        pool.close()
        del pool, future
    until(lambda: reader_threads() == 0)
    assert open_files() <= before
