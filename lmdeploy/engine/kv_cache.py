"""The KV pool: the memory itself, taken once and never given back before close. How many blocks fit is said in `sizing.py`.

On CPU the pages are really touched at start-up: what the memory bill says is what the process has, and no later step can run out of memory.
"""

from __future__ import annotations

import dataclasses
import mmap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from lmdeploy.engine.sizing import PLAIN, SEE_PLAN, gib
from lmdeploy.errors import ConfigError
from lmdeploy.kv_layer import KVFormat, KVLayer
from lmdeploy.spec import ModelSpec

Tensor = torch.Tensor
HUGE_PAGE = 2 << 20


@dataclass(frozen=True, slots=True)
class KVLayout:
    """A format, and for each layer the centre of its keys (`KVLayer.key_center`); () = no layer has one."""

    format: KVFormat = PLAIN
    key_centers: tuple[Tensor | None, ...] = ()


PLAIN_LAYOUT = KVLayout()


class KVCache:
    """One pool for all layers: `layers[i]` is the cache of layer i, its tensors views of one piece of memory."""

    def __init__(self, spec: ModelSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device, layout: KVLayout = PLAIN_LAYOUT) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        shape = (num_blocks, spec.num_kv_heads, block_size, spec.head_dim)
        format = layout.format
        layer_bytes = format.layer_bytes(*shape, dtype)
        count = spec.num_layers * layer_bytes
        try:
            memory = _resident(count) if device.type == "cpu" else torch.zeros(count, dtype=torch.uint8, device=device)
        except (OSError, MemoryError, torch.OutOfMemoryError) as error:
            raise ConfigError(f"the KV cache of {gib(count)} could not be allocated ({error}); lower cache_max_entry_count; {SEE_PLAN}") from error
        self.nbytes = count
        self.layers: list[KVLayer] = [format.layer(memory[i * layer_bytes : (i + 1) * layer_bytes], *shape, dtype) for i in range(spec.num_layers)]
        self.center(layout.key_centers)

    def center(self, key_centers: tuple[Tensor | None, ...]) -> None:
        """Set the centre of each layer's keys; () = no layer has one. What is stored already means nothing afterwards."""
        for i, layer in enumerate(self.layers):  # in the list that others hold
            self.layers[i] = dataclasses.replace(layer, key_center=key_centers[i] if key_centers else None)

    def free(self) -> None:
        """Drop the pool; its memory goes back when no view is left."""
        self.layers = []


def _resident(count: int) -> Tensor:
    """`count` zero bytes in pages of their own (huge ones where possible), touched; they return to the system when freed."""
    nbytes = -(-count // HUGE_PAGE) * HUGE_PAGE
    # private, for huge pages are not made for a shared mapping; none of these names exist on Windows
    area = mmap.mmap(-1, nbytes) if not hasattr(mmap, "MAP_PRIVATE") else mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    pages = np.frombuffer(area, dtype=np.uint8).reshape(-1, mmap.PAGESIZE)
    middle = len(pages) // 2
    with ThreadPoolExecutor(2) as threads:  # the kernel zeroes a page when it is first written: 2 threads, twice the speed
        for half in (pages[:middle], pages[middle:]):
            threads.submit(_touch, half)
    return torch.frombuffer(area, dtype=torch.uint8, count=count)


def _touch(pages: np.ndarray[tuple[int, int], np.dtype[np.uint8]]) -> None:
    for start in range(0, len(pages), 1 << 14):  # in pieces, so that the two threads overlap
        pages[start : start + (1 << 14), 0] = 0
