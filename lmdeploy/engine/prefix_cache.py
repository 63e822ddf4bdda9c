"""`PrefixCache`: which KV blocks hold which token prefixes. A tree whose nodes are full blocks, children found by their content: their tokens, as bytes.

A node is reached only from its parent by its exact content (dict look-up: hash, then equality), so a hash collision cannot
serve wrong KV. Trees are apart by what else the keys depend on: the cache salt, and the rope length where rope depends on it.
Invariant: a known node's parent is known; evicting a block forgets its whole subtree, which could not be reached any more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from lmdeploy.engine.blocks import BlockPool


class RootKey(NamedTuple):
    """What separates trees."""

    salt: str
    rope_length: int  # 0 where rope does not depend on the length


@dataclass(slots=True, eq=False)
class Node:
    """One full block of one prefix. `block` is -1 at a root and after the cache forgot the node."""

    parent: Node | None
    content: bytes
    block: int
    children: dict[bytes, Node] = field(default_factory=dict)
    root_key: RootKey | None = None  # of a root


class PrefixCache:
    """Finds the blocks of a known prefix; told of every block whose keys and values are really computed."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._roots: dict[RootKey, Node] = {}
        self._nodes: dict[int, Node] = {}  # block -> node
        pool.on_evict = self._on_evict

    def match(self, key: RootKey, content: Callable[[int], bytes], max_tokens: int) -> tuple[list[int], Node | None]:
        """Blocks of the longest known prefix of at most `max_tokens` tokens, and its last node. `content` is told the number of a full block. Takes no references."""
        blocks: list[int] = []
        node = self._roots.get(key)
        last = None
        for number in range(max_tokens // self._block_size):
            node = node.children.get(content(number)) if node is not None else None
            if node is None:
                break
            blocks.append(node.block)
            last = node
        return blocks, last

    def publish(self, key: RootKey, parent: Node | None, content: bytes, block: int) -> Node | None:
        """Make `block` known as the continuation of `parent` (None = the first block).

        Returns the node of this content: an older one if the content was known already (`block` then stays private), and None
        when `parent` was forgotten meanwhile: start again from the first block.
        """
        if parent is None:
            parent = self._roots.get(key) or self._new_root(key)
        elif parent.block < 0:
            return None
        new = Node(parent, content, block)
        node = parent.children.setdefault(content, new)
        if node is new:
            self._pool.mark_cached(block)
            self._nodes[block] = new
        return node

    def clear(self) -> None:
        """Forget everything; nobody may hold a block."""
        for root in list(self._roots.values()):
            for node in list(root.children.values()):
                self._on_evict(node.block)

    def _new_root(self, key: RootKey) -> Node:
        root = self._roots[key] = Node(None, b"", -1, root_key=key)
        return root

    def _on_evict(self, block: int) -> None:
        node = self._nodes[block]
        assert node.parent is not None
        del node.parent.children[node.content]
        self._forget_subtree(node)
        if node.parent.root_key is not None and not node.parent.children:
            del self._roots[node.parent.root_key]

    def _forget_subtree(self, top: Node) -> None:
        stack = [top]
        while stack:
            node = stack.pop()
            del self._nodes[node.block]
            self._pool.forget(node.block)
            node.block = -1
            if node.children:
                stack.extend(node.children.values())
                node.children.clear()

    def check_integrity(self) -> None:
        """The tree and the pool agree on what is cached, and every node is reachable by its content."""
        reached: dict[int, Node] = {}
        for key, root in self._roots.items():
            assert root.children and root.root_key == key, f"root {key}"
            stack = list(root.children.values())
            while stack:
                node = stack.pop()
                assert node.parent is not None and node.parent.children[node.content] is node
                assert node.content and node.block not in reached
                reached[node.block] = node
                stack.extend(node.children.values())
        assert reached == self._nodes, "unreachable nodes"
        cached = {b for b in range(self._pool.num_blocks) if self._pool.is_cached(b)}
        assert cached == set(self._nodes), f"pool says {sorted(cached)}, tree says {sorted(self._nodes)}"
