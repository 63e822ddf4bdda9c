"""Which files of a folder hold the weights, and which tensor is in which file.

Only names and headers are read here. An index decides which files belong to the model; without one, safetensors are preferred to `.bin`.
A file that an index names must lie inside the folder: names with `..` or an absolute path are refused. Links inside the folder are fine:
the hub's cache is made of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Protocol

import torch

from lmdeploy.checkpoint.safetensors_file import SafetensorsFile
from lmdeploy.checkpoint.torch_file import TorchFile
from lmdeploy.errors import CheckpointError

#: An index of a 700 GB model is 10 MB.
MAX_INDEX_BYTES = 256 << 20

#: Training leftovers that also end in .bin, and the second copy of the weights that some repositories carry.
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*|consolidated.*|adapter_model.*|.*mm_projector.*)\.(bin|safetensors)")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<total>\d+)\.(bin|safetensors)")


class TensorFile(Protocol):
    """One weight file: its tensors' facts, and their bytes once mapped."""

    path: Path

    def names(self) -> list[str]:
        """Tensor names."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """The mapped tensor; read it, never write it. Maps the file when it is not."""
        ...

    def drop_pages(self, name: str) -> None:
        """Give the tensor's mapped pages back to the system; they can be read again."""
        ...

    def close(self) -> None:
        """Unmap; `tensor` maps again."""
        ...


@dataclass(frozen=True, slots=True)
class Layout:
    """The weight files of a folder."""

    folder: Path
    file_of: Mapping[str, TensorFile]


def find_layout(folder: Path) -> Layout:
    """Find and open (headers only) the weight files of `folder`."""
    kinds: tuple[tuple[str, str, Callable[[Path], TensorFile]], ...] = (("model", "safetensors", SafetensorsFile), ("pytorch_model", "bin", TorchFile))
    for stem, suffix, opener in kinds:
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            return Layout(folder, _from_index(folder, index, opener))
        if paths := _weight_files(folder, stem, suffix):
            return Layout(folder, _from_files(folder, paths, opener))
    raise CheckpointError(f"{folder}: no weights found (*.safetensors or *.bin); {_what_is_there(folder)}")


def _from_index(folder: Path, index: Path, opener: Callable[[Path], TensorFile]) -> dict[str, TensorFile]:
    """Tensor -> file as the index says, checked against the files."""
    weight_map = _read_weight_map(index)
    files = {name: opener(_inside(folder, index, name)) for name in sorted(set(weight_map.values()))}
    present = {name: set(file.names()) for name, file in files.items()}
    for tensor, name in weight_map.items():
        if tensor not in present[name]:
            raise CheckpointError(f"{index}: tensor {tensor!r} should be in {name!r}, but that file does not have it")
    file_of = {tensor: files[name] for tensor, name in weight_map.items()}
    for file in files.values():
        for tensor in file.names():
            file_of.setdefault(tensor, file)  # not in the index: finish() will report it unless a module takes it
    return file_of


def _from_files(folder: Path, paths: list[Path], opener: Callable[[Path], TensorFile]) -> dict[str, TensorFile]:
    """Tensor -> file by looking into each file."""
    file_of: dict[str, TensorFile] = {}
    for path in paths:
        file = opener(path)
        for tensor in file.names():
            if tensor in file_of:
                raise CheckpointError(f"{folder}: tensor {tensor!r} is in both {file_of[tensor].path.name} and {path.name}; remove one or add an index")
            file_of[tensor] = file
    return file_of


def _weight_files(folder: Path, stem: str, suffix: str) -> list[Path]:
    """`model.safetensors` if it is there, else all weight files of that kind; a set of shards must be complete."""
    single = folder / f"{stem}.{suffix}"
    if single.is_file():
        return [single]
    paths = sorted(p for p in folder.glob(f"*.{suffix}") if p.is_file() and not _NOT_WEIGHTS.fullmatch(p.name))
    for match in filter(None, (_SHARD.fullmatch(p.name) for p in paths)):
        total = int(match["total"])
        numbers = {int(m["number"]) for m in (_SHARD.fullmatch(p.name) for p in paths) if m and m["stem"] == match["stem"] and m["total"] == match["total"]}
        if total > 100_000 or (missing := sorted(set(range(1, total + 1)) - numbers)):
            lost = f"{match['stem']}-{missing[0]:0{len(match['number'])}d}-of-{match['total']}.{suffix}" if total <= 100_000 else "shards"
            raise CheckpointError(f"{folder}: {lost} is missing; {len(numbers)} of {total} shards are there")
    return paths


def _read_weight_map(index: Path) -> dict[str, str]:
    """The index's name -> file table."""
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise CheckpointError(f"{index}: {index.stat().st_size} bytes is too large for an index (limit {MAX_INDEX_BYTES})")
    try:
        raw = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: not valid JSON: {error}") from None
    table = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
        raise CheckpointError(f"{index}: 'weight_map' must be an object of tensor names and file names")
    return table


def _inside(folder: Path, index: Path, name: str) -> Path:
    """The file `name` of the folder; anything that leads out of it is refused."""
    pure, windows = PurePosixPath(name), PureWindowsPath(name)
    if not name or "\0" in name or pure.is_absolute() or windows.drive or windows.root or ".." in pure.parts or ".." in windows.parts:
        raise CheckpointError(f"{index}: file name {name!r} leads out of the model folder")
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{folder}: {name} is missing, though {index.name} lists it")
    return path


def _what_is_there(folder: Path) -> str:
    """A few names, for the error message."""
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if not names:
        return "the folder is empty" if folder.is_dir() else "there is no such folder"
    return "found " + ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
