"""`BlockPool`: who owns which KV block. Numbers only; the memory itself lies with the ranks.

Every block is in exactly one place: referenced (count > 0), idle (count 0, its content is in the prefix cache and may be
taken up again; oldest first), or free. Allocation takes free blocks first, then the oldest idle ones. All operations are O(1) a block.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable


class BlockPool:
    """Reference counts of `num_blocks` blocks. `on_evict(block)` is told that a cached block will be overwritten."""

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None] | None = None) -> None:
        assert num_blocks > 0, f"num_blocks={num_blocks}"
        self.num_blocks = num_blocks
        self.on_evict = on_evict
        self.version = 0  # grows whenever blocks become available: "is it worth trying again?"
        self._refs = [0] * num_blocks
        self._cached = bytearray(num_blocks)  # 1 = the prefix cache knows the content
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached and unreferenced, oldest first

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give, idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Cached blocks that nobody references."""
        return len(self._idle)

    @property
    def num_used(self) -> int:
        """Blocks with references."""
        return self.num_blocks - self.num_free

    def references(self, block: int) -> int:
        """How many sequences hold `block`."""
        return self._refs[block]

    def is_cached(self, block: int) -> bool:
        """Whether the prefix cache knows the content of `block`."""
        return bool(self._cached[block])

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each; the caller has checked `num_free`."""
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        free = self._free
        while len(free) < count:
            self._evict_oldest()  # an eviction can free more than one block
        blocks = [free.pop() for _ in range(count)]
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more reference to each; idle blocks come back to life."""
        for block in blocks:
            if self._refs[block] == 0:
                assert self._cached[block], f"block {block} is free, not shared"
                del self._idle[block]
            self._refs[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Drop one reference of each. The last blocks of a sequence become the oldest idle ones: a prefix outlives its continuation."""
        for block in reversed(blocks):
            assert self._refs[block] > 0, f"block {block} is released twice"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._cached[block]:
                    self._idle[block] = None
                else:
                    self._free.append(block)
        self.version += 1

    def mark_cached(self, block: int) -> None:
        """The prefix cache has taken in the content of this referenced block."""
        assert self._refs[block] > 0 and not self._cached[block], f"block {block} cannot be published"
        self._cached[block] = 1

    def forget(self, block: int) -> None:
        """The prefix cache does not know `block` any more."""
        assert self._cached[block], f"block {block} is not cached"
        self._cached[block] = 0
        if self._refs[block] == 0:
            del self._idle[block]
            self._free.append(block)

    def _evict_oldest(self) -> None:
        block = next(iter(self._idle))
        if self.on_evict is not None:
            self.on_evict(block)
        else:
            self.forget(block)
        assert not self._cached[block], f"block {block} was evicted, yet stays in the prefix cache"

    def check_integrity(self, held: Iterable[int] | None = None) -> None:
        """Every block is in one place only; with `held` (all block tables, concatenated) the counts are right too."""
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), "a block is twice in the free list"
        assert not free & idle, f"free and idle: {free & idle}"
        for block, refs in enumerate(self._refs):
            assert refs >= 0, f"block {block} has {refs} references"
            assert (refs == 0) == (block in free or block in idle), f"block {block} has {refs} references; free={block in free} idle={block in idle}"
            assert block not in free or not self._cached[block], f"block {block} is free and cached"
            assert block not in idle or self._cached[block], f"block {block} is idle and not cached"
        if held is not None:
            counts = Counter(held)
            wrong = {b: (r, counts[b]) for b, r in enumerate(self._refs) if r != counts[b]}
            assert not wrong, f"block -> (references, holders): {wrong}"
