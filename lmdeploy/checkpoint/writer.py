"""`ShardWriter`: a model folder that appears whole or not at all, and can be taken up again.

Everything is written to a hidden folder beside the target, `.<name>.partial`. Tensors that belong together (a layer) become durable at once, as a part:
a file that is written under another name first. `finish` joins parts to shards, `commit` gives the folder its name, `discard` removes it. Two runs never
share a partial folder: it is locked.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lmdeploy.errors import CheckpointError, ConfigError

SHARD_BYTES = 2_000_000_000
STATE, LOCK = "state.json", "lock"
_PART, _DRAFT, _UNNAMED = ".part", ".draft", "more-"


def partial_folder(folder: Path) -> Path:
    """Where a folder is made."""
    return folder.with_name(f".{folder.name}.partial")


def left_state(folder: Path) -> dict[str, Any] | None:
    """What an earlier, interrupted run said of itself; None when there is none or nothing of it can be used."""
    try:
        state = json.loads((partial_folder(folder) / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


class ShardWriter:
    """Writes one model folder. `state` says what is being made; with `resume` the parts of an earlier run stay, and `notes` holds what was noted of them."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES, *, state: Mapping[str, Any] | None = None, resume: bool = False) -> None:
        self.folder, self.shard_bytes, self.partial = folder, shard_bytes, partial_folder(folder)
        self.notes: dict[str, dict[str, Any]] = {}
        self._pending: dict[str, torch.Tensor] = {}
        self._size = 0
        self._parts: list[str] = []
        with self._writing():
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.partial)
        try:
            with self._writing():
                self._clear(keep=resume)
                (self.partial / STATE).write_text(json.dumps(dict(state or {})), encoding="utf-8")
        except CheckpointError:
            self.discard()
            raise

    def _clear(self, *, keep: bool) -> None:
        """Remove what an earlier run left, whole parts apart when they are wanted."""
        for path in sorted(self.partial.iterdir()):
            if keep and path.suffix == _PART:
                self.notes[path.stem] = _note_of(path)
            elif path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """One tensor; it is copied to the host."""
        size = tensor.nbytes
        if self._pending and self._size + size > self.shard_bytes:
            self.close_part(f"{_UNNAMED}{len(self._parts):05d}")
        # cloned: a view of a larger tensor would keep all of it alive
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._size += size

    def close_part(self, label: str, note: Mapping[str, Any] | None = None) -> None:
        """Make what was added since the last part durable, with a note that a later run reads."""
        draft, path = self.partial / f"{label}{_DRAFT}", self.partial / f"{label}{_PART}"
        with self._writing():
            save_file(self._pending, draft, metadata={"format": "pt", "note": json.dumps(dict(note or {}))})
            draft.rename(path)
        self._parts.append(label)
        self._pending, self._size = {}, 0

    def keep_part(self, label: str) -> dict[str, Any]:
        """Take a part of the earlier run as it is; returns its note."""
        assert not self._pending and label in self.notes
        self._parts.append(label)
        return self.notes[label]

    def finish(self, stem: str = "model") -> None:
        """Join parts to shards of at most `shard_bytes`, and write the index; the shards' names say how many there are."""
        if self._pending:
            self.close_part(f"{_UNNAMED}{len(self._parts):05d}")
        shards = list(self._shards())
        total, weight_map = 0, {}
        for number, paths in enumerate(shards, 1):
            file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            for name, size in self._join(paths, self.partial / file).items():
                total += size
                weight_map[name] = file
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        with self._writing():
            (self.partial / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")

    def _join(self, paths: list[Path], target: Path) -> dict[str, int]:
        """Parts to one file; bytes by tensor."""
        tensors = {name: tensor for path in paths for name, tensor in load_file(path).items()}
        with self._writing():
            if len(paths) == 1 and paths[0].name.startswith(_UNNAMED):  # without a note: files of two runs are equal
                paths[0].rename(target)
            else:
                save_file(tensors, target, metadata={"format": "pt"})
                for path in paths:
                    path.unlink()
        return {name: tensor.nbytes for name, tensor in tensors.items()}

    def _shards(self) -> Iterator[list[Path]]:
        """Parts that go into one file together."""
        paths: list[Path] = []
        size = 0
        for path in (self.partial / f"{label}{_PART}" for label in self._parts):
            if paths and size + path.stat().st_size > self.shard_bytes:
                yield paths
                paths, size = [], 0
            paths.append(path)
            size += path.stat().st_size
        if paths:
            yield paths

    def commit(self) -> None:
        """Give the folder its name; what was there before goes when the new one is in its place."""
        for name in (STATE, LOCK):
            (self.partial / name).unlink(missing_ok=True)
        old = self.folder.with_name(f".{self.folder.name}.old")
        if self.folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.folder.rename(old)
        self.partial.rename(self.folder)
        os.close(self._lock)
        shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.partial, ignore_errors=True)
        os.close(self._lock)

    def leave(self) -> int:
        """Leave the parts for a later run; returns how many there are."""
        self._pending = {}
        os.close(self._lock)
        return len(list(self.partial.glob(f"*{_PART}")))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A full disk, a read-only folder and their like become one clear line."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise write_error(self.partial.parent, error) from None


def write_error(where: Path, error: Exception) -> CheckpointError:
    """What to say of a file that could not be written below `where`."""
    reason = (getattr(error, "strerror", None) or str(error)).removeprefix("Error while serializing: ").strip()
    with contextlib.suppress(OSError):
        reason += f" ({shutil.disk_usage(where).free / 1e6:.0f} MB are free there)"
    return CheckpointError(f"{where}: cannot be written: {reason}; free some space or give another --work-dir")


def _locked(partial: Path) -> int:
    """An open, locked file of the folder; the lock ends with the process, however it ends."""
    file = os.open(partial / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise ConfigError(f"{partial}: another lmdeploy command is writing there; wait for it, or give another --work-dir") from None
    return file


def _note_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        note = json.loads((file.metadata() or {}).get("note", "{}"))
    assert isinstance(note, dict)
    return note
