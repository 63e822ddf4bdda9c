"""The process that says whether a grammar can be served: its verdicts, its time limit, its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from lmdeploy.engine.grammar_check import MAX_OF_ONE, GrammarChecker
from lmdeploy.errors import EngineError, OverloadedError, RequestError
from lmdeploy.grammar import Grammar

ROOT = Path(__file__).resolve().parents[2]
GOOD = Grammar("regex", "[a-z]+")
#: builds an automaton with four million states: some twenty seconds, where a check may take five
ENDLESS = Grammar("json_schema", json.dumps({"type": "integer", "multipleOf": 3999971}))


@pytest.fixture
def checker(model_folder: Path) -> Iterator[GrammarChecker]:
    made = GrammarChecker(model_folder, 5120, (2,), seconds=1.0)
    yield made
    made.close()


def schema(value: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (schema({"not": {"type": "string"}}), ["keyword not supported: not"]),
        (schema({"type": "array", "uniqueItems": True}), ["uniqueItems"]),
        (schema({"if": {}, "then": {}}), ["if, then"]),
        (schema({"properties": {"a": {"dependentRequired": {}}}}), ["dependentRequired"]),
        (schema({"properties": {"a": {"items": [{"type": "string"}], "additionalItems": False}}}), ["properties.a.additionalItems"]),
        (schema({"type": "number", "minimum": 1, "exclusiveMinimum": True}), ["exclusiveMinimum"]),
        (schema({"$ref": "http://127.0.0.1:1/schema.json"}), ["127.0.0.1", "not"]),
        (schema({"$ref": "#/$defs/no"}), ["/$defs/no"]),
        (schema({"allOf": [{"$ref": "#"}]}), ["no answer fits"]),
        (schema({"oneOf": [{"type": "string"}, {"type": "string", "minLength": 2}]}), ["oneOf"]),
        (schema({"x-guidance": {"lenient": True}, "not": {}}), ["x-guidance"]),
        (schema({"type": "int"}), ["int"]),
        (schema({"type": "string", "format": "isbn"}), ["isbn"]),
        (schema(False), ["object"]),
        (Grammar("json_schema", "{"), ["not valid JSON"]),
        (Grammar("json_schema", '{"a":' * 70 + "1" + "}" * 70), ["nested more than 64"]),
        (Grammar("regex", "(" * 5000 + ")" * 5000), ["nested more than 64"]),
        (Grammar("regex", "(?=a)b"), ["look-around"]),
        (Grammar("regex", "a" * 70_000), ["70000 bytes", "65536"]),
        (Grammar("regex", "\ud800"), ["surrogate"]),
        (Grammar("ebnf", "start: nothing"), ["nothing"]),
        (Grammar("ebnf", "root ::= [a-z"), []),
        (Grammar("regex", "((((a{0,50}){0,50}){0,50}){0,50}){0,50}"), ["too many"]),
        (Grammar("choice", '["a", ""]'), ["empty"]),
        (Grammar("structural_tag", "{}"), ["tags"]),
        (Grammar("structural_tag", '{"mode": "auto", "triggers": ["<x"], "tags": [{"begin": "<y>", "schema": {}, "end": ""}]}'), ["<x"]),
        (Grammar("what", ""), ["what"]),  # type: ignore[arg-type]
    ],
    ids=lambda v: str(v)[:60],
)
def test_what_cannot_be_served_is_refused_with_the_reason(grammar: Grammar, words: list[str], frontend_checker: GrammarChecker) -> None:
    with pytest.raises(RequestError) as error:
        frontend_checker.check(grammar)
    text = str(error.value)
    assert error.value.param == ("tools" if grammar.kind == "structural_tag" else "response_format") or grammar.kind == "what"
    assert error.value.code == "invalid_grammar" and all(word in text for word in words) and "\n" not in text and len(text) < 700, text


@pytest.fixture(scope="module")
def frontend_checker(model_folder: Path) -> Iterator[GrammarChecker]:
    """One child for many verdicts; it has time, for machines that are busy."""
    made = GrammarChecker(model_folder, 5120, (2,), seconds=30.0)
    yield made
    made.close()


@pytest.mark.parametrize(
    "value",
    [
        {},
        True,
        {"allOf": [{"type": "object", "properties": {"a": {"type": "string"}}}, {"required": ["a"]}]},
        {"$ref": "#/definitions/a", "definitions": {"a": {"type": "object", "properties": {"next": {"$ref": "#/definitions/a"}}}}},
        {"title": "t", "description": "d", "default": 1, "examples": [1], "type": "integer", "$schema": "https://json-schema.org/draft/2020-12/schema"},
        {"type": "object", "properties": {"additionalItems": {"type": "string"}, "not": {"type": "null"}}},
        {"type": "object", "properties": {f"k{i}": {"type": "string", "maxLength": 9} for i in range(200)}, "additionalProperties": False},
    ],
    ids=lambda v: str(v)[:60],
)
def test_good_schemas_pass(value: Any, frontend_checker: GrammarChecker) -> None:
    frontend_checker.check(schema(value))


def test_a_grammar_that_takes_too_long_is_refused_in_time_and_the_next_one_is_checked(checker: GrammarChecker) -> None:
    checker.check(GOOD)
    first = checker.pid
    start = time.monotonic()
    with pytest.raises(RequestError, match="longer than 1 s") as error:
        checker.check(ENDLESS)
    assert time.monotonic() - start < 10 and error.value.code == "invalid_grammar"
    assert first is not None and not psutil.pid_exists(first), "the child that was stuck lives on"
    checker.check(Grammar("regex", "[a-y]+"))
    assert checker.pid not in (None, first)


def test_another_owner_does_not_wait_for_all_the_slow_grammars_of_one(checker: GrammarChecker) -> None:
    checker.check(GOOD)
    slow = [schema({"type": "integer", "multipleOf": 3999971 + 2 * i}) for i in range(5)]
    order: list[str] = []

    def check(grammar: Grammar, owner: str, name: str) -> None:
        try:
            checker.check(grammar, owner)
        except RequestError as error:
            assert "longer than 1 s of processor time" in str(error)
        order.append(name)

    with ThreadPoolExecutor(8) as pool:
        checks = [pool.submit(check, grammar, "mallory", f"slow {i}") for i, grammar in enumerate(slow)]
        while len(checker._waiting) < 5:
            time.sleep(0.01)
        checks.append(pool.submit(check, Grammar("json_object"), "alice", "json_object"))
        checks.append(pool.submit(check, Grammar("regex", "[c-z]+"), "alice", "quick"))
        for done in checks:
            done.result(60)
    assert order.index("json_object") <= 1, "the commonest grammar waits for nothing"
    assert order.index("quick") <= 3, order  # behind the one that ran, and one more at her turn


def test_one_owner_may_let_a_few_grammars_wait_and_no_more(checker: GrammarChecker) -> None:
    async def flood() -> list[BaseException | None]:
        slow = [schema({"type": "integer", "multipleOf": 3999971 + 2 * i}) for i in range(MAX_OF_ONE + 4)]
        checks = [asyncio.ensure_future(checker.until_checked(grammar, "mallory")) for grammar in slow]
        await asyncio.sleep(0)
        refused = [check for check in checks if check.done()]
        await checker.until_checked(GOOD, "alice")
        checker.close()
        await asyncio.gather(*checks, return_exceptions=True)
        return [check.exception() for check in refused]

    refused = asyncio.run(flood())
    assert len(refused) in (3, 4) and all(isinstance(error, OverloadedError) for error in refused)


def test_a_verdict_does_not_depend_on_how_busy_the_machine_is(checker: GrammarChecker) -> None:
    """A child that gets no processor for longer than the limit is not blamed for it."""
    checker.check(GOOD)
    assert checker.pid is not None
    os.kill(checker.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(checker.check, Grammar("regex", "[d-z]+"))
        time.sleep(2.5)
        assert not waits.done()
        os.kill(checker.pid, signal.SIGCONT)
        waits.result(60)


def test_a_machine_that_never_finds_time_is_told_and_no_verdict_is_kept(checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    checker.check(GOOD)
    monkeypatch.setattr("lmdeploy.engine.grammar_check.PATIENCE", 0.5)
    assert checker.pid is not None
    os.kill(checker.pid, signal.SIGSTOP)
    with pytest.raises(OverloadedError, match="too busy"):
        checker.check(Grammar("regex", "[d-z]+"))
    monkeypatch.undo()
    checker.check(Grammar("regex", "[d-z]+"))


def test_verdicts_are_kept(checker: GrammarChecker) -> None:
    with pytest.raises(RequestError):
        checker.check(ENDLESS)
    start = time.monotonic()
    for _ in range(20):
        with pytest.raises(RequestError, match="longer than 1 s"):
            checker.check(ENDLESS)
    assert time.monotonic() - start < 1 and checker.pid is None


def test_a_child_that_died_is_replaced(checker: GrammarChecker) -> None:
    checker.check(GOOD)
    assert checker.pid is not None
    os.kill(checker.pid, signal.SIGKILL)
    checker.check(Grammar("regex", "[b-z]+"))


def test_an_event_loop_is_not_blocked_and_a_waiter_that_leaves_cancels_nothing(checker: GrammarChecker) -> None:
    async def both() -> float:
        leaving = asyncio.ensure_future(checker.until_checked(ENDLESS))
        staying = asyncio.ensure_future(checker.until_checked(ENDLESS))
        worst, last = 0.0, time.monotonic()
        for turn in range(20):
            await asyncio.sleep(0.02)
            worst, last = max(worst, time.monotonic() - last), time.monotonic()
            if turn == 5:
                leaving.cancel()
        with pytest.raises(RequestError, match="longer"):
            await staying
        return worst

    assert asyncio.run(both()) < 0.9


def test_after_close_there_is_no_child_and_no_verdict(checker: GrammarChecker) -> None:
    checker.check(GOOD)
    pid = checker.pid
    checker.close()
    assert pid is not None and not psutil.pid_exists(pid)
    with pytest.raises(EngineError, match="closed"):
        checker.check(ENDLESS)


def test_the_child_ends_with_its_parent_even_while_it_compiles(model_folder: Path) -> None:
    code = (
        "import sys, os, threading, time\nfrom pathlib import Path\nfrom lmdeploy.engine.grammar_check import GrammarChecker\nfrom lmdeploy.grammar import Grammar\n"
        f"c = GrammarChecker(Path({str(model_folder)!r}), 5120, (2,), seconds=60)\nc.check(Grammar('regex', 'a'))\n"
        f"threading.Thread(target=c.check, args=(Grammar('json_schema', {ENDLESS.text!r}),), daemon=True).start()\n"
        "time.sleep(0.3)\nprint(c.pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    child = int(done.stdout)
    deadline = time.monotonic() + 20
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child outlives its parent"
        time.sleep(0.05)
