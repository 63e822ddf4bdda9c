"""The prefix cache: exact tokens or nothing, and never a block that could not be reached."""

from __future__ import annotations

from collections.abc import Callable

from lmdeploy.engine.blocks import BlockPool
from lmdeploy.engine.prefix_cache import Node, PrefixCache, RootKey

KEY = RootKey("", 0)


def content(token_ids: list[int], size: int = 2) -> Callable[[int], bytes]:
    """Of each block."""
    return lambda number: bytes(token_ids[number * size : (number + 1) * size])


def match(cache: PrefixCache, key: RootKey, token_ids: list[int], max_tokens: int) -> tuple[list[int], Node | None]:
    return cache.match(key, content(token_ids), max_tokens)


def publish_all(cache: PrefixCache, pool: BlockPool, token_ids: list[int], key: RootKey = KEY, size: int = 2) -> list[int]:
    """Blocks for all full blocks of `token_ids`, published in order."""
    blocks = pool.allocate(len(token_ids) // size)
    node: Node | None = None
    for i, block in enumerate(blocks):
        node = cache.publish(key, node, content(token_ids, size)(i), block)
        assert node is not None
    return blocks


def build(num_blocks: int = 8) -> tuple[PrefixCache, BlockPool]:
    pool = BlockPool(num_blocks)
    return PrefixCache(pool, 2), pool


def test_the_longest_known_prefix_of_full_blocks_is_found() -> None:
    cache, pool = build()
    blocks = publish_all(cache, pool, [1, 2, 3, 4, 5, 6])
    assert match(cache, KEY, [1, 2, 3, 4, 9, 9], 6)[0] == blocks[:2]
    assert match(cache, KEY, [1, 2, 3, 4, 5, 6, 7], 7)[0] == blocks
    assert match(cache, KEY, [1, 2, 3], 3)[0] == blocks[:1]
    assert match(cache, KEY, [2, 1, 3, 4], 4)[0] == []


def test_no_more_tokens_are_matched_than_allowed() -> None:
    cache, pool = build()
    blocks = publish_all(cache, pool, [1, 2, 3, 4])
    assert match(cache, KEY, [1, 2, 3, 4], 3)[0] == blocks[:1]
    assert match(cache, KEY, [1, 2, 3, 4], 1)[0] == []


def test_equal_tokens_after_another_prefix_do_not_match() -> None:
    cache, pool = build()
    publish_all(cache, pool, [1, 2, 5, 6])
    publish_all(cache, pool, [3, 4])
    assert len(match(cache, KEY, [3, 4, 5, 6], 4)[0]) == 1


def test_salt_and_rope_length_separate_the_trees() -> None:
    cache, pool = build()
    publish_all(cache, pool, [1, 2], RootKey("a", 0))
    publish_all(cache, pool, [1, 2], RootKey("", 7))
    assert match(cache, KEY, [1, 2], 2)[0] == []
    assert len(match(cache, RootKey("a", 0), [1, 2], 2)[0]) == len(match(cache, RootKey("", 7), [1, 2], 2)[0]) == 1


class Clash(bytes):
    """A content whose hash equals that of every other one."""

    def __hash__(self) -> int:
        return 0


def test_a_hash_collision_cannot_serve_the_wrong_block() -> None:
    cache, pool = build()
    blocks = pool.allocate(2)
    for block in blocks:
        cache.publish(KEY, None, Clash([1, block]), block)
    assert [cache.match(KEY, lambda number, block=block: Clash([1, block]), 2)[0] for block in blocks] == [[block] for block in blocks]  # type: ignore[misc]
    assert cache.match(KEY, lambda number: Clash([1, 99]), 2)[0] == []


def test_the_second_copy_of_a_known_block_stays_private() -> None:
    cache, pool = build()
    first = publish_all(cache, pool, [1, 2])
    second = publish_all(cache, pool, [1, 2])
    assert pool.is_cached(first[0]) and not pool.is_cached(second[0])
    cache.check_integrity()


def test_an_evicted_block_takes_its_continuations_with_it() -> None:
    cache, pool = build(num_blocks=3)
    blocks = publish_all(cache, pool, [1, 2, 3, 4, 5, 6])
    pool.acquire(blocks[1:2])  # a copy's continuation keeps this one alive, not its parent
    pool.release(blocks)
    pool.acquire(blocks[2:])
    pool.allocate(1)
    assert match(cache, KEY, [1, 2, 3, 4, 5, 6], 6)[0] == []
    cache.check_integrity()
    pool.check_integrity()
    pool.release(blocks[1:])
    assert pool.num_idle == 0, "what nobody can find is free, not idle"


def test_publishing_after_a_forgotten_parent_says_so() -> None:
    cache, pool = build(num_blocks=2)
    publish_all(cache, pool, [1, 2])
    node = match(cache, KEY, [1, 2], 2)[1]
    pool.release([0 if pool.references(0) else 1])
    first, second = pool.allocate(2)
    assert cache.publish(KEY, node, bytes([3, 4]), second) is None
    again = cache.publish(KEY, None, bytes([1, 2]), first)
    assert again is not None and cache.publish(KEY, again, bytes([3, 4]), second) is not None
    assert match(cache, KEY, [1, 2, 3, 4], 4)[0] == [first, second]


def test_trees_of_salts_that_hold_nothing_are_dropped() -> None:
    cache, pool = build(num_blocks=1)
    for i in range(100):
        pool.release(publish_all(cache, pool, [1, 2], RootKey(f"salt {i}", 0)))
        cache.check_integrity()
    assert len(cache._roots) == 1
