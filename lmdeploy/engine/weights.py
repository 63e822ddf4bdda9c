"""The weights of a running engine: dropped and brought back (sleep), replaced by others of the same model (update), all in place.

Tensors keep their shapes and, while awake, their addresses; sleeping empties their storages, so that no module has to know of it. A folder of
new weights is compared with the loaded one before anything is changed: names, shapes and kinds of all tensors, and config.json if it has one.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lmdeploy.checkpoint.files import find_layout
from lmdeploy.checkpoint.source import HARMLESS, WeightSource
from lmdeploy.errors import CheckpointError, ConfigError, EngineError
from lmdeploy.log import get_logger
from lmdeploy.spec import ModelSpec

logger = get_logger(__name__)
Tensor = torch.Tensor
Signature = dict[str, tuple[tuple[int, ...], str]]  # name -> shape, and a type that others of its kind may replace


@dataclass(frozen=True, slots=True)
class Facts:
    """What new weights must agree with."""

    spec: ModelSpec
    tensors: Signature

    @classmethod
    def of(cls, spec: ModelSpec, source: WeightSource) -> Facts:
        """Of a model and its files. Floating types are cast, so any will do, but for 8-bit ones, which mean nothing without their scales."""
        kinds = {name: source.dtype(name) for name in source.names() if not any(fnmatch.fnmatchcase(name, p) for p in HARMLESS)}
        names = {n: "float" if t.is_floating_point and t.itemsize > 1 else str(t) for n, t in kinds.items()}
        # token ids and the type are no part of what weights must agree with
        spec = replace(spec, dtype="float32", bos_token_id=None, eos_token_ids=(), pad_token_id=None)
        return cls(spec, {name: (source.shape(name), kind) for name, kind in names.items()})

    def check(self, folder: Path, other: Facts) -> None:
        """Raise CheckpointError with the first difference."""
        for text, names in (
            ("is missing", self.tensors.keys() - other.tensors.keys()),
            ("does not belong to the model", other.tensors.keys() - self.tensors.keys()),
        ):
            if named := sorted(names):
                raise CheckpointError(f"{folder}: tensor {named[0]!r} {text}" + (f", and {len(named) - 1} more" if named[1:] else ""))
        for name, mine in sorted(self.tensors.items()):
            if mine != other.tensors[name]:
                (shape, kind), (found, found_kind) = mine, other.tensors[name]
                raise CheckpointError(f"{folder}: tensor {name!r} is {found_kind} {list(found)}, the model that is served has {kind} {list(shape)}")
        if self.spec != other.spec:
            raise CheckpointError(f"{folder}: config.json describes another model than the one that is served")


class Weights:
    """All weights of a rank. `load(folder)` pulls them again, in place; `facts_of(folder)` looks without changing anything."""

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], load: Callable[[Path], None], facts_of: Callable[[Path], Facts], folder: Path) -> None:
        self._tensors, self._load, self._facts_of, self._folder = tensors, load, facts_of, folder
        self._facts = facts_of(folder)
        self._dropped: list[tuple[torch.UntypedStorage, int]] = []  # while they sleep: storages, and their bytes
        self._host: list[Tensor] | None = None  # their content, at level 1

    @property
    def asleep(self) -> bool:
        """Whether they are not on the device."""
        return bool(self._dropped)

    def sleep(self, level: int) -> None:
        """Empty the storages. Level 1 keeps the content in host memory, where the weights of a CPU model are anyway and stay."""
        if level == 2:
            self._host = None
        if self._dropped:
            return
        unique = list({s.data_ptr(): s for s in (t.untyped_storage() for t in self._tensors()) if s.nbytes()}.values())
        if level == 1:
            if all(storage.device.type == "cpu" for storage in unique):
                return
            self._host = [_to_host(storage) for storage in unique]
        self._dropped = [(storage, storage.nbytes()) for storage in unique]
        for storage in unique:
            storage.resize_(0)

    def wake(self) -> None:
        """Bring them back. Raises ConfigError, and they still sleep, when the memory is not there."""
        if not self._dropped:
            return
        storages, host = self._allocate(), self._host
        self._host = None
        if host is None:
            self._load(self._folder)
            return
        for storage, content in zip(storages, host, strict=True):
            _bytes_of(storage).copy_(content, non_blocking=True)
        torch.cuda.synchronize()

    def update(self, folder: Path) -> None:
        """Replace them, asleep or not. Raises CheckpointError when the folder does not fit, and then nothing was changed."""
        wrong = next((file.path.name for file in find_layout(folder).file_of.values() if file.path.suffix != ".safetensors"), None)
        if wrong is not None:
            raise CheckpointError(f"{folder}: {wrong} is no safetensors file; new weights are taken from these only")
        self._facts.check(folder, self._facts_of(folder))
        if self._dropped:
            self._allocate()
            self._host = None
        try:
            self._load(folder)
        except Exception as e:
            logger.warning("the new weights of %s could not be read to the end (%s); the old ones are loaded again", folder, e)
            try:
                self._load(self._folder)
            except Exception as again:
                raise EngineError(f"new weights were half read ({e}), and the old ones cannot be loaded again: {again}") from e
            raise CheckpointError(f"{folder}: could not be read to the end ({e}); the old weights are in place") from e
        self._folder = folder

    def _allocate(self) -> list[torch.UntypedStorage]:
        try:
            for storage, nbytes in self._dropped:
                storage.resize_(nbytes)
        except torch.AcceleratorError:
            raise  # the device is lost: that is no lack of memory
        except (RuntimeError, MemoryError) as e:
            for storage, _ in self._dropped:
                storage.resize_(0)
            raise ConfigError(f"there is no memory for the weights: {str(e).splitlines()[0]}; free some, then wake again") from e
        storages, self._dropped = [storage for storage, _ in self._dropped], []
        return storages


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _to_host(storage: torch.UntypedStorage) -> Tensor:
    """A copy in page-locked memory, from which waking reads at the full speed of the bus."""
    content = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=True)
    return content.copy_(_bytes_of(storage))
