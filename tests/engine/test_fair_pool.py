"""Jobs of many owners on one thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import wait
from functools import partial

import pytest

from lmdeploy.engine.fair_pool import FairPool
from lmdeploy.errors import EngineError, OverloadedError


class Held:
    """A pool whose thread is busy until `go` is set, so that what is submitted meanwhile waits."""

    def __init__(self, **limits: int) -> None:
        self.pool, self.go, self.done = FairPool("tests", **limits), threading.Event(), []
        began = threading.Event()
        self.first = self.pool.submit("first", lambda: (began.set(), self.go.wait(60)))
        assert began.wait(60)

    def submit(self, owner: str, name: str) -> object:
        return self.pool.submit(owner, partial(self.done.append, name))


@pytest.fixture
def held() -> Iterator[Held]:
    made = Held(most=8, most_of_one=4)
    yield made
    made.go.set()
    made.pool.close()


def test_owners_take_turns(held: Held) -> None:
    futures = [held.submit(owner, name) for owner, name in [("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("b", "b2"), ("c", "c1")]]
    held.go.set()
    wait(futures, 60)  # type: ignore[arg-type]
    assert held.done == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_an_owner_has_a_limit_and_all_together_have_one(held: Held) -> None:
    for i in range(4):
        held.submit("a", str(i))
    with pytest.raises(OverloadedError, match="4 of your requests wait for tests"):
        held.submit("a", "too many")
    for i in range(4):
        held.submit("", f"own {i}")
    with pytest.raises(OverloadedError, match="8 requests wait for tests"):
        held.submit("b", "too many")
    held.go.set()
    held.first.result(60)


def test_without_a_name_only_the_common_limit_counts(held: Held) -> None:
    for i in range(8):
        held.submit("", str(i))
    with pytest.raises(OverloadedError, match="8 requests"):
        held.submit("", "too many")


def test_a_job_that_two_owners_want_is_done_once_at_the_earlier_turn(held: Held) -> None:
    for name in ("a1", "a2"):
        held.submit("a", name)
    job = partial(held.done.append, "shared")
    shared = held.pool.submit("a", job)
    assert held.pool.submit("b", job, shared) is shared
    assert held.pool.submit("b", job, shared) is shared
    last = held.submit("b", "b2")
    held.go.set()
    wait([shared, last], 60)  # type: ignore[list-item]
    held.pool.submit("", lambda: None).result(60)
    assert held.done == ["a1", "shared", "a2", "b2"]


def test_a_job_that_raises_or_is_not_wanted_any_more_harms_no_other(held: Held) -> None:
    bad, gone, good = held.pool.submit("a", lambda: 1 // 0), held.pool.submit("a", lambda: held.done.append("gone")), held.submit("a", "good")
    assert gone.cancel()
    held.go.set()
    wait([bad, good], 60)  # type: ignore[list-item]
    assert isinstance(bad.exception(), ZeroDivisionError) and held.done == ["good"]


def test_closing_ends_what_waits(held: Held) -> None:
    waits = held.submit("a", "never")
    held.pool.close()
    with pytest.raises(EngineError, match="closed"):
        waits.result(60)  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="closed"):
        held.submit("a", "late")
    held.go.set()
    held.first.result(60)
    assert held.done == []
