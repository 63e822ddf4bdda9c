"""`WeightSource`: tensors by name out of a model folder, copied straight to where they stay.

Modules pull: each asks for the slice that it owns, into memory that it has already allocated; nothing here allocates a tensor of a weight's size.
Files are mapped when first needed, their pages are dropped as they are copied, and a file is unmapped when nothing of it is left to take.
`finish()` then finds what nobody asked for. Every fault is a CheckpointError that names the tensor and the file.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from lmdeploy.checkpoint.files import Layout, TensorFile, find_layout
from lmdeploy.checkpoint.staging import Staging
from lmdeploy.errors import CheckpointError

#: Buffers that some exporters save and every model recomputes.
HARMLESS = ("*rotary_emb.inv_freq", "*rope.inv_freq", "*rotary_emb.cos_cached", "*rotary_emb.sin_cached", "*rotary_emb.original_inv_freq")

#: Bytes copied before their mapped pages are given back; bounds what a load holds beyond the weights themselves.
CHUNK_BYTES = 16 << 20


class WeightSource(Protocol):
    """Where modules take their tensors from. `out` may be on any device and of any floating type."""

    def names(self) -> set[str]:
        """Names of all tensors."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape in the file."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Type in the file."""
        ...

    def take(self, name: str, out: torch.Tensor, rows: slice | None = None, cols: slice | None = None, *, shape: Sequence[int] | None = None) -> None:
        """Copy `tensor[rows, cols]` into `out`. `shape`, when given, is what the whole tensor must have in the file."""
        ...

    def take_ranges(self, name: str, out: torch.Tensor, ranges: Sequence[slice], cols: slice | None = None, *, shape: Sequence[int] | None = None) -> None:
        """Copy several row ranges, one after the other, into `out`."""
        ...

    def finish(self, ignore: Sequence[str] = ()) -> None:
        """Close the files; raise CheckpointError when tensors were left that match neither `ignore` (glob patterns) nor the known harmless ones."""
        ...


def open_source(folder: Path) -> WeightSource:
    """The weights of a model folder: safetensors if there are any, else `.bin` files; sharded or not, with an index or without."""
    return FolderSource(find_layout(Path(folder)))


class FolderSource:
    """Tensors of a folder's weight files."""

    def __init__(self, layout: Layout) -> None:
        self.folder = layout.folder
        self._file_of: Mapping[str, TensorFile] = layout.file_of
        self._left: dict[TensorFile, set[str]] = {f: set() for f in layout.file_of.values()}
        for name, file in layout.file_of.items():
            self._left[file].add(name)
        self._staging = Staging(CHUNK_BYTES)

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file_of)

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape in the file."""
        return self._file(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Type in the file."""
        return self._file(name).dtype(name)

    def take(self, name: str, out: torch.Tensor, rows: slice | None = None, cols: slice | None = None, *, shape: Sequence[int] | None = None) -> None:
        """Copy `tensor[rows, cols]` into `out`, casting."""
        file = self._file(name)
        full = file.shape(name)
        self._check_whole(name, file, shape)
        if rows is None and cols is None:
            self._copy(name, file, out, file.tensor(name))
            return
        ranges = [rows if rows is not None else slice(0, full[0] if full else 0)]
        self.take_ranges(name, out, ranges, cols)

    def take_ranges(self, name: str, out: torch.Tensor, ranges: Sequence[slice], cols: slice | None = None, *, shape: Sequence[int] | None = None) -> None:
        """Copy row ranges into consecutive rows of `out`. Ranges of one length at one distance, as a fused tensor has them, are one strided copy."""
        file = self._file(name)
        self._check_whole(name, file, shape)
        tensor = file.tensor(name)
        bounds = [_bounds(r, tensor, 0, name, file) for r in ranges]
        if cols is not None:
            start, stop = _bounds(cols, tensor, 1, name, file)
            tensor = tensor[:, start:stop]
        total = sum(stop - start for start, stop in bounds)
        if out.shape != (total, *tensor.shape[1:]):
            raise self._mismatch(name, file, (total, *tensor.shape[1:]), out)
        row = 0
        for view in _views(tensor, bounds):
            many = view.dim() > tensor.dim()  # [ranges, rows, ...]
            count = view.shape[0] * view.shape[1] if many else view.shape[0]
            part = out[row : row + count]
            self._copy(name, file, part.view(view.shape) if many else part, view)
            row += count

    def finish(self, ignore: Sequence[str] = ()) -> None:
        """Close the files and complain about tensors that nobody took."""
        self.close()
        patterns = (*HARMLESS, *ignore)
        left = sorted(n for names in self._left.values() for n in names if not any(fnmatch.fnmatchcase(n, p) for p in patterns))
        if left:
            shown = ", ".join(f"{n!r} ({self._file_of[n].path.name})" for n in left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
            raise CheckpointError(f"{self.folder}: {len(left)} tensors do not belong to the model that config.json describes: {shown}")

    def close(self) -> None:
        """Unmap all files; a later take maps them again."""
        self._staging.close()
        for file in self._left:
            file.close()

    def _file(self, name: str) -> TensorFile:
        file = self._file_of.get(name)
        if file is None:
            stem = name.removesuffix("weight")
            packed = next((other for other in (f"{stem}qweight", f"{stem}weight_packed") if other in self._file_of), None)
            if stem.endswith(".") and packed:
                raise CheckpointError(
                    f"{self.folder}: the weights are quantised ({packed!r}), but config.json has no quantization_config that says how; add it, or give the unquantised model"
                )
            near = difflib.get_close_matches(name, self._file_of, 3)
            hint = (
                f"the nearest names are {', '.join(map(repr, near))}"
                if near
                else f"it has {len(self._file_of)} other tensors, e.g. {next(iter(self._file_of))!r}"
            )
            raise CheckpointError(f"{self.folder}: tensor {name!r} is missing; {hint}")
        return file

    def _check_whole(self, name: str, file: TensorFile, shape: Sequence[int] | None) -> None:
        if shape is not None and tuple(shape) != file.shape(name):
            raise CheckpointError(f"{file.path}: tensor {name!r} has shape {list(file.shape(name))}, but config.json asks for {list(shape)}")

    def _mismatch(self, name: str, file: TensorFile, found: Sequence[int], out: torch.Tensor) -> CheckpointError:
        return CheckpointError(f"{file.path}: tensor {name!r} has shape {list(found)} where {list(out.shape)} is expected")

    def _copy(self, name: str, file: TensorFile, out: torch.Tensor, view: torch.Tensor) -> None:
        """Copy in chunks of the first axis, giving the mapped pages back after each, so that they do not pile up."""
        if view.shape != out.shape:
            raise self._mismatch(name, file, view.shape, out)
        # 8-bit numbers mean nothing without their scales, so they are not cast either.
        if view.is_floating_point() != out.is_floating_point() or (1 in (view.dtype.itemsize, out.dtype.itemsize) and view.dtype != out.dtype):
            bare = view.dtype.itemsize == 1 and out.dtype.itemsize > 1
            hint = "; 8-bit weights need their scales, and a quantization_config in config.json that says how they are stored" if bare else ""
            raise CheckpointError(f"{file.path}: tensor {name!r} is {str(view.dtype)[6:]} where {str(out.dtype)[6:]} is expected{hint}")
        rows = view.shape[0] if view.dim() else 1
        step = max(1, CHUNK_BYTES * rows // max(1, view.nbytes))
        for start in range(0, rows, step):
            if view.dim():
                self._staging.copy(out[start : start + step], view[start : start + step])
            else:
                out.copy_(view)
            file.drop_pages(name)
        self._taken(name, file)

    def _taken(self, name: str, file: TensorFile) -> None:
        """Note that a tensor was used, and unmap the other files that have nothing left."""
        self._left[file].discard(name)
        for other, names in self._left.items():
            if not names and other is not file:
                other.close()


def _bounds(wanted: slice, tensor: torch.Tensor, axis: int, name: str, file: TensorFile) -> tuple[int, int]:
    """(start, stop) inside the axis, or an error that says what the tensor has."""
    size = tensor.shape[axis] if tensor.dim() > axis else 0
    start, stop = wanted.start or 0, size if wanted.stop is None else wanted.stop
    if wanted.step not in (None, 1) or not 0 <= start <= stop <= size:
        raise CheckpointError(
            f"{file.path}: tensor {name!r} has shape {list(tensor.shape)}, too small for {'rows' if axis == 0 else 'columns'} {start}..{stop}"
        )
    return start, stop


def _views(tensor: torch.Tensor, bounds: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """The row ranges: one [ranges, rows, ...] view if they are equally long and equally spaced, else a [rows, ...] view for each."""
    starts = [start for start, _ in bounds]
    lengths = {stop - start for start, stop in bounds}
    gaps = {b - a for a, b in zip(starts, starts[1:], strict=False)}
    if len(bounds) > 1 and len(lengths) == 1 and len(gaps) == 1 and (gap := gaps.pop()) > 0:
        shape, stride = (len(bounds), lengths.pop(), *tensor.shape[1:]), (gap * tensor.stride(0), *tensor.stride())
        return [tensor.as_strided(shape, stride, tensor.storage_offset() + starts[0] * tensor.stride(0))]
    return [tensor[start:stop] for start, stop in bounds]
