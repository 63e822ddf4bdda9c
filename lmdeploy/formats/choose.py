"""Which file format each linear layer of a checkpoint has. config.json names the method; whether a module is quantised is seen in the files.

A method, width or layout that is not supported is an error that names it, and so is an option that contradicts the folder: nothing is guessed, because
packed numbers read in the wrong layout give fluent nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmdeploy.checkpoint.source import WeightSource
from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.formats.awq import AwqFormat
from lmdeploy.formats.dense import DenseFormat
from lmdeploy.formats.gptq import GptqFormat
from lmdeploy.formats.packed4 import PackedFormat
from lmdeploy.formats.weight_format import FileFormat, Part

METHODS = ("awq", "gptq")
#: AWQ's kinds of packing whose files are the GEMM layout
AWQ_VERSIONS = ("gemm", "exllama")
#: GPTQ's kinds of packing -> what their stored zero points lack
GPTQ_OFFSETS = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True, slots=True)
class Formats:
    """The formats of one checkpoint. `skip`: parts of module names that config.json says are not quantised."""

    packed: PackedFormat | None = None
    skip: tuple[str, ...] = ()

    def of(self, source: WeightSource, parts: Sequence[Part]) -> FileFormat:
        """The format of a layer; the modules that it is made of must have the same."""
        if self.packed is None:
            return DenseFormat()
        found = {part.name: self._is_packed(source, part.name) for part in parts}
        if len(set(found.values())) > 1:
            packed, plain = (", ".join(name for name, value in found.items() if value is wanted) for wanted in (True, False))
            raise CheckpointError(f"{packed} is quantised, but {plain} is not; modules that are computed together must be stored alike")
        return self.packed if all(found.values()) else DenseFormat()

    def _is_packed(self, source: WeightSource, name: str) -> bool:
        """What the file holds; where it holds both or neither, what config.json makes us expect."""
        packed = source.has(f"{name}.qweight")
        if packed != source.has(f"{name}.weight"):
            return packed
        return ".layers." in name and not name.endswith(".gate") and not any(part in name for part in self.skip)


DENSE = Formats()


def choose_formats(quantization: Mapping[str, Any] | None, model_format: str | None = None, where: str = "the model") -> Formats:
    """From config.json's `quantization_config` and the option, which may be None. `where` is what errors call the folder."""
    method = _method(quantization, where) if quantization else "hf"
    if model_format is not None and model_format != method:
        holds = "unquantised weights (config.json has no quantization_config)" if method == "hf" else f"{method.upper()} 4-bit weights"
        raise ConfigError(f"model_format={model_format!r}, but {where} holds {holds}; use model_format={method!r} or leave it out")
    if not quantization:
        return DENSE
    group_size = _whole_number(quantization, ("group_size", "q_group_size"), where)
    bits = _whole_number(quantization, ("bits", "w_bit"), where)
    if bits != 4:
        raise _unsupported(where, "bits", bits, "4")
    packed = _awq(quantization, group_size, where) if method == "awq" else _gptq(quantization, group_size, where)
    return Formats(packed, _skipped(quantization, where))


def _method(quantization: Mapping[str, Any], where: str) -> str:
    method = str(quantization.get("quant_method", "")).lower()
    if method not in METHODS:
        raise _unsupported(where, "quant_method", quantization.get("quant_method"), ", ".join(METHODS))
    return method


def _unsupported(where: str, key: str, value: object, known: str) -> CheckpointError:
    shown = repr(value)
    return CheckpointError(f"{where}: quantization_config has {key}={shown[:60]}, which this version of lmdeploy does not load; known: {known}")


def _whole_number(quantization: Mapping[str, Any], keys: Sequence[str], where: str) -> int:
    """The first of the keys that is there."""
    key = next((key for key in keys if quantization.get(key) is not None), keys[0])
    value = quantization.get(key)
    if type(value) is not int:
        raise _unsupported(where, key, value, "whole numbers")
    return value


def _awq(quantization: Mapping[str, Any], group_size: int, where: str) -> PackedFormat:
    version = quantization.get("version") or "gemm"
    if str(version).lower() not in AWQ_VERSIONS:
        raise _unsupported(where, "version", version, ", ".join(AWQ_VERSIONS))
    return AwqFormat(group_size)


def _gptq(quantization: Mapping[str, Any], group_size: int, where: str) -> PackedFormat:
    packing = quantization.get("checkpoint_format") or "gptq"
    if packing not in GPTQ_OFFSETS:
        raise _unsupported(where, "checkpoint_format", packing, ", ".join(GPTQ_OFFSETS))
    return GptqFormat(group_size, GPTQ_OFFSETS[packing])


def _skipped(quantization: Mapping[str, Any], where: str) -> tuple[str, ...]:
    names = quantization.get("modules_to_not_convert") or ()
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise _unsupported(where, "modules_to_not_convert", names, "lists of names")
    return tuple(names)
