"""The block pool: every block is referenced, idle or free, whatever is done to it."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmdeploy.engine.blocks import BlockPool


def test_allocated_blocks_are_distinct_and_come_back_when_released() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(4)
    assert sorted(blocks) == [0, 1, 2, 3] and pool.num_free == 0 and pool.num_used == 4
    pool.release(blocks[:2])
    assert pool.num_free == 2
    pool.check_integrity(blocks[2:])


def test_a_shared_block_is_free_only_after_its_last_release() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.acquire([block])
    pool.release([block])
    assert pool.references(block) == 1 and pool.num_free == 1
    pool.release([block])
    assert pool.num_free == 2


def test_cached_blocks_stay_idle_and_the_longest_unused_tail_is_evicted_first() -> None:
    pool = BlockPool(3)
    first, second, third = pool.allocate(3)
    for block in (first, second, third):
        pool.mark_cached(block)
    pool.release([first, second, third])
    assert pool.num_idle == pool.num_free == 3
    assert pool.allocate(1) == [third]
    assert pool.allocate(1) == [second]
    assert pool.is_cached(first) and not pool.is_cached(second)


def test_an_idle_block_that_is_acquired_again_is_not_evicted() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    for block in blocks:
        pool.mark_cached(block)
    pool.release(blocks)
    pool.acquire([blocks[1]])
    assert pool.allocate(1) == [blocks[0]]
    pool.check_integrity([blocks[1], blocks[0]])


def test_free_blocks_are_used_before_cached_content_is_thrown_away() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    pool.mark_cached(blocks[0])
    pool.release(blocks)
    pool.allocate(2)
    assert pool.is_cached(blocks[0])


def test_misuse_is_caught() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    with pytest.raises(AssertionError, match="2 blocks wanted, 1 free"):
        pool.allocate(2)
    with pytest.raises(AssertionError, match="is free, not shared"):
        pool.acquire([1 - block])
    pool.release([block])
    with pytest.raises(AssertionError, match="released twice"):
        pool.release([block])
    with pytest.raises(AssertionError, match="cannot be published"):
        pool.mark_cached(block)


def test_check_integrity_sees_a_lost_reference_and_a_block_in_two_places() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    with pytest.raises(AssertionError, match="references, holders"):
        pool.check_integrity(blocks[:1])
    pool._free.append(blocks[0])
    with pytest.raises(AssertionError):
        pool.check_integrity(blocks)


class PoolMachine(RuleBasedStateMachine):
    """A pool against a plain model: the set of holders of each block and what is cached."""

    @initialize(num_blocks=st.integers(1, 10))
    def build(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, on_evict=self.evict)
        self.tables: list[list[int]] = []
        self.cached: set[int] = set()

    def evict(self, block: int) -> None:
        assert block in self.cached and all(block not in table for table in self.tables), f"block {block} is in use"
        self.cached.remove(block)
        self.pool.forget(block)

    @rule(count=st.integers(0, 10))
    def allocate(self, count: int) -> None:
        in_use = {block for table in self.tables for block in table}
        if count > self.pool.num_blocks - len(in_use):
            with pytest.raises(AssertionError):
                self.pool.allocate(count)
            return
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count and not in_use & set(blocks) and not self.cached & set(blocks)
        self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        version = self.pool.version
        self.pool.release(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))
        assert self.pool.version > version

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        part = table[: data.draw(st.integers(0, len(table)))]
        self.pool.acquire(part)
        self.tables.append(list(part))

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def take_up_cached(self, data: st.DataObject) -> None:
        part = data.draw(st.lists(st.sampled_from(sorted(self.cached)), unique=True))
        self.pool.acquire(part)
        self.tables.append(part)

    @rule(data=st.data())
    def publish_or_forget(self, data: st.DataObject) -> None:
        candidates = sorted({block for table in self.tables for block in table} | self.cached)
        if candidates:
            block = data.draw(st.sampled_from(candidates))
            if block in self.cached:
                self.cached.remove(block)
                self.pool.forget(block)
            else:
                self.cached.add(block)
                self.pool.mark_cached(block)

    @invariant()
    def counts_are_right(self) -> None:
        if hasattr(self, "pool"):
            held = [block for table in self.tables for block in table]
            self.pool.check_integrity(held)
            assert self.pool.num_used == len(set(held)) and self.pool.num_idle == len(self.cached - set(held))
            assert {b for b in range(self.pool.num_blocks) if self.pool.is_cached(b)} == self.cached


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None, derandomize=True)
