"""One `.safetensors` file: the header is checked by us, byte for byte of what it claims, before anything is mapped.

Layout: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data. After `_read_header` every
tensor lies inside the file, has the size that its shape and type need, and shares no byte with another.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import torch

from lmdeploy.errors import CheckpointError

#: The format's own limit.
MAX_HEADER_BYTES = 100_000_000
#: What a repository cloned without git-lfs has in place of a large file; as a header length no file could be so long.
GIT_LFS_POINTER = b"version https://git-lfs.github.com/"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor is: `begin` and `end` count from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """A `TensorFile` over a memory map."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries = _read_header(path)
        self._map: mmap.mmap | None = None

    def names(self) -> list[str]:
        """Tensor names."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor."""
        return self._entries[name].dtype

    def tensor(self, name: str) -> torch.Tensor:
        """The mapped tensor."""
        entry = self._entries[name]
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)  # frombuffer refuses an empty buffer
        if self._map is None:
            self._map = self._open_map()
        return torch.frombuffer(self._map, dtype=entry.dtype, count=prod(entry.shape), offset=entry.begin).view(entry.shape)

    def drop_pages(self, name: str) -> None:
        """Give the tensor's pages back; only those that no other tensor touches, so that small neighbours are not read twice."""
        entry = self._entries[name]
        begin = -(-entry.begin // mmap.PAGESIZE) * mmap.PAGESIZE
        length = entry.end // mmap.PAGESIZE * mmap.PAGESIZE - begin
        if self._map is not None and length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, length)

    def close(self) -> None:
        """Unmap, as soon as no view of the map is left (an exception's traceback may still hold one)."""
        self._map = None

    def _open_map(self) -> mmap.mmap:
        """Map the file; private and never written, because torch warns about read-only buffers."""
        needed = max(e.end for e in self._entries.values())
        with self.path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if len(mapped) < needed:
            raise CheckpointError(f"{self.path}: shrank to {len(mapped)} bytes while it was read, {needed} are needed")
        return mapped


def _read_header(path: Path) -> dict[str, Entry]:
    """Read and check the header."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            head = file.read(8)
            if head == GIT_LFS_POINTER[:8]:
                raise CheckpointError(f"{path}: is a git-lfs pointer, not the weights; run `git lfs pull` in {path.parent}")
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            if length < 0:
                raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file")
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: the header claims {length} bytes, but the file has {size} (limit {MAX_HEADER_BYTES}); it is truncated or no safetensors file"
                )
            raw = _parse_json(path, file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    raw.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length, size) for name, value in raw.items()}
    _check_cover(path, entries, 8 + length, size)
    return entries


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """The header's JSON object; NaN, Infinity and a name given twice are not JSON that we accept."""
    try:
        raw = json.loads(text.decode(), parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: the header is a JSON {type(raw).__name__}, not an object")
    return raw


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{_short(twice)} is given twice")
    return table


def _entry(path: Path, name: str, value: Any, data_start: int, size: int) -> Entry:
    """One tensor's line of the header, checked."""
    where = f"{path}: tensor {name!r}"
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: its header entry is not an object")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if not _whole_numbers(shape) or len(shape) > 8:
        raise CheckpointError(f"{where}: shape {_short(shape)} is not a list of whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {_short(offsets)} are not [begin, end]")
    needed, found = prod(shape) * DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if needed != found:
        raise CheckpointError(f"{where}: shape {_short(shape)} of {dtype} needs {needed} bytes, but its data_offsets span {found}")
    begin, end = data_start + offsets[0], data_start + offsets[1]
    if end > size:
        there = max(0, min(end, size) - begin)
        raise CheckpointError(f"{where} needs {found} bytes up to byte {end}, but the file ends at {size}: only {there} are there (truncated download?)")
    return Entry(DTYPES[dtype], tuple(shape), begin, end)


def _check_cover(path: Path, entries: dict[str, Entry], data_start: int, size: int) -> None:
    """The tensors follow each other without overlap, and nothing hides between or behind them."""
    end, before = data_start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < end:
            raise CheckpointError(f"{path}: tensor {name!r} starts at byte {entry.begin}, inside {before}, which ends at {end}")
        if entry.begin > end:
            raise CheckpointError(f"{path}: bytes {end}..{entry.begin} before tensor {name!r} belong to no tensor")
        end, before = entry.end, f"tensor {name!r}"
    if end != size:
        raise CheckpointError(f"{path}: bytes {end}..{size} after {before} belong to no tensor")


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    """A list of whole numbers that are not negative and not beyond any file."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
