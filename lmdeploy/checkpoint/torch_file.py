"""One `.bin` file of `torch.save`: read with `weights_only=True`, so nothing in it is ever executed, and memory-mapped where the format allows.

Files older than torch 1.6 are no zip archives and cannot be mapped; they are read whole and freed when their last tensor was taken.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from lmdeploy.errors import CheckpointError


class TorchFile:
    """A `TensorFile` over `torch.load`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped = zipfile.is_zipfile(path)
        self._tensors: dict[str, torch.Tensor] | None = _load(path, self._mapped)
        self._facts = {name: (tuple(t.shape), t.dtype) for name, t in self._tensors.items()}
        self.close()

    def names(self) -> list[str]:
        """Tensor names."""
        return list(self._facts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._facts[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor."""
        return self._facts[name][1]

    def tensor(self, name: str) -> torch.Tensor:
        """The mapped tensor."""
        if self._tensors is None:
            self._tensors = _load(self.path, self._mapped)
        return self._tensors[name]

    def drop_pages(self, name: str) -> None:
        """Give the tensor's pages back. Only for a mapped file: anonymous memory would read as zeros afterwards."""
        advise = _madvise()
        if self._tensors is None or not self._mapped or advise is None:
            return
        tensor = self._tensors[name]
        begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - begin
        if length > 0 and tensor.is_contiguous():
            advise(begin, length, mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Forget the tensors; the map goes with the last of them."""
        self._tensors = None


def _load(path: Path, mapped: bool) -> dict[str, torch.Tensor]:
    """The state dict of a file."""
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged file can raise anything from struct.error to UnicodeDecodeError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if type(error).__name__ == "UnpicklingError":
            raise CheckpointError(f"{path}: refused, because it holds more than tensors or is damaged ({reason}); convert it to safetensors") from None
        raise CheckpointError(f"{path}: cannot be read ({reason}); it is truncated or no torch file") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: holds a {type(raw).__name__}, not a table of tensors")
    for name, value in raw.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: entry {name!r} is a {type(value).__name__}, not a tensor")
    return dict(raw)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's madvise, where there is one."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function
