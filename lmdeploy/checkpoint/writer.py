"""`ShardWriter`: tensors into safetensors shards with an index, so that a folder appears whole or not at all.

Everything is written to `<folder>.partial`; `commit` gives it its name, `discard` removes it. Shards are written as they fill: no more than one is in memory.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

SHARD_BYTES = 2_000_000_000


class ShardWriter:
    """Writes the weights of one model folder."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.partial = folder.with_name(folder.name + ".partial")
        if self.partial.exists():
            shutil.rmtree(self.partial)  # of a run that was killed
        self.partial.mkdir(parents=True)
        self._pending: dict[str, torch.Tensor] = {}
        self._size = self._total = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """One tensor; it is copied to the host."""
        size = tensor.nbytes
        if self._pending and self._size + size > self.shard_bytes:
            self._flush()
        # cloned: a view of a larger tensor would keep all of it alive
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._size += size
        self._total += size

    def _flush(self) -> None:
        self._shards.append(list(self._pending))
        save_file(self._pending, self.partial / f"shard-{len(self._shards)}", metadata={"format": "pt"})
        self._pending, self._size = {}, 0

    def finish(self) -> None:
        """Write what is left, and the index; the shards get their names, which say how many there are."""
        if self._pending:
            self._flush()
        count, weight_map = len(self._shards), {}
        for number, names in enumerate(self._shards, 1):
            file = f"model-{number:05d}-of-{count:05d}.safetensors"
            (self.partial / f"shard-{number}").rename(self.partial / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")

    def commit(self) -> None:
        """Give the folder its name; what was there before goes."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.partial.rename(self.folder)

    def discard(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.partial, ignore_errors=True)
