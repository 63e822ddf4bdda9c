"""Which format each linear layer has: in the files, by config.json and by what they hold; and in memory, where options quantise while loading.

A method, width or layout that is not supported is an error that names it, and so is an option that contradicts the folder: nothing is guessed, because
packed numbers read in the wrong layout give fluent nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from lmdeploy.checkpoint.source import WeightSource
from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.formats import at_load
from lmdeploy.formats.at_load import AtLoadFormat
from lmdeploy.formats.awq import AwqFormat
from lmdeploy.formats.compressed_tensors import compressed_format
from lmdeploy.formats.dense import DenseFormat
from lmdeploy.formats.gptq import GptqFormat
from lmdeploy.formats.packed8 import ScaledFormat
from lmdeploy.formats.smooth_quant import DTYPES, smooth_quant_format
from lmdeploy.formats.weight_format import FileFormat, Part, QuantisedFormat
from lmdeploy.log import get_logger

logger = get_logger(__name__)

#: quant_method of config.json -> what errors call such weights; the option's spelling has `-` for `_`
METHODS = {
    "awq": "AWQ 4-bit weights",
    "gptq": "GPTQ 4-bit weights",
    "smooth_quant": "SmoothQuant 8-bit weights",
    "fp8": "fp8 weights",
    "compressed-tensors": "weights of compressed-tensors",
}
#: AWQ's kinds of packing whose files are the GEMM layout
AWQ_VERSIONS = ("gemm", "exllama")
#: GPTQ's kinds of packing -> what their stored zero points lack
GPTQ_OFFSETS = {"gptq": 1, "gptq_v2": 0}
#: scales of fp8 files; both multiply
FP8_SCALES = ("weight_scale_inv", "weight_scale")
#: lists of modules that are not quantised, by the names that methods have for them
SKIP_KEYS = ("modules_to_not_convert", "ignored_layers", "ignore")
#: Tensors of quantised files that nothing here needs: scales of activations and of the KV cache, which are measured while the model runs, and sizes.
UNUSED = (
    "*.input_scale",
    "*.input_zero_point",
    "*.weight_zero_point",  # all zero where weights are symmetric; read where they are not
    "*.input_scale_ub",
    "*.output_scale",
    "*.q_scale",
    "*.k_scale",
    "*.v_scale",
    "*.weight_shape",
    "*.weight_g_idx",
)


@dataclass(frozen=True, slots=True)
class Formats:
    """The formats of one checkpoint. `skip`: modules that config.json says are not quantised, as parts of names or "re:" and a pattern.

    `at_load` rounds the 16-bit linear layers of the decoder while they are read, `head` the output head. `unused`: names of tensors that may be left over.
    """

    packed: QuantisedFormat | None = None
    skip: tuple[str, ...] = ()
    at_load: AtLoadFormat | None = None
    head: AtLoadFormat | None = None
    unused: tuple[str, ...] = ()

    def of(self, source: WeightSource, parts: Sequence[Part]) -> FileFormat:
        """The format of a layer; the modules that it is made of must have the same."""
        if self.packed is None:
            inside = self.at_load is not None and all(self._expected(part.name) for part in parts)
            return self.at_load if inside and self.at_load else DenseFormat()
        found = {part.name: self._is_packed(self.packed, source, part.name) for part in parts}
        if len(set(found.values())) > 1:
            packed, plain = (", ".join(name for name, value in found.items() if value is wanted) for wanted in (True, False))
            raise CheckpointError(f"{packed} is quantised, but {plain} is not; modules that are computed together must be stored alike")
        return self.packed if all(found.values()) else DenseFormat()

    def of_head(self, source: WeightSource, parts: Sequence[Part]) -> FileFormat:
        """The format of the output head: what the files hold, rounded while it is read where they hold 16 bits and `head` asks for it."""
        found = self.of(source, parts)
        if self.head is None or isinstance(found, DenseFormat):
            return self.head or found
        logger.warning("%s is quantised in the files; head_bits has no effect on it", parts[0].name)
        return found

    def _is_packed(self, packed: QuantisedFormat, source: WeightSource, name: str) -> bool:
        """What the file holds; where that does not say, what config.json makes us expect."""
        found = packed.holds(source, name)
        return self._expected(name) if found is None else found

    def _expected(self, name: str) -> bool:
        """Linear layers of the decoder but routers."""
        if ".layers." not in name or name.endswith(".gate"):
            return False
        return not any(re.match(part[3:], name) if part.startswith("re:") else part in name for part in self.skip)


DENSE = Formats()


def choose_formats(
    quantization: Mapping[str, Any] | None,
    model_format: str | None = None,
    where: str = "the model",
    *,
    head_bits: int = 16,
    quantise_activations: bool = True,
) -> Formats:
    """From config.json's `quantization_config` and the options of EngineConfig. `where` is what errors call the folder."""
    formats = _of_files(quantization, where, quantise_activations) if quantization else DENSE
    method = str(quantization.get("quant_method")).lower() if quantization else "hf"
    spelled = method.replace("_", "-")
    if model_format == "fp8" and not quantization:
        formats = Formats(at_load=at_load.FP8)
    elif model_format not in (None, spelled):
        holds = METHODS.get(method, "unquantised weights (config.json has no quantization_config)")
        raise ConfigError(f"model_format={model_format!r}, but {where} holds {holds}; use model_format={spelled!r} or leave it out")
    return formats if head_bits == 16 else replace(formats, head=at_load.HEADS[head_bits])


def _of_files(quantization: Mapping[str, Any], where: str, quantise_activations: bool) -> Formats:
    """How quantised files are read."""
    method = str(quantization.get("quant_method", "")).lower()
    skip = _skipped(quantization, where)
    if method in ("awq", "gptq"):
        return Formats(_four_bit(quantization, method, where), skip)
    if method == "smooth_quant":
        smooth = smooth_quant_format(quantization, quantise_activations)
        if smooth is None:
            raise _unsupported(where, "quant_dtype", quantization.get("quant_dtype"), ", ".join(DTYPES))
        return Formats(smooth, skip)
    if method == "fp8":
        return Formats(_fp8(quantization, quantise_activations, where), skip, unused=UNUSED)
    if method == "compressed-tensors":
        return Formats(compressed_format(quantization, quantise_activations, partial(_unsupported, where)), skip, unused=UNUSED)
    raise _unsupported(where, "quant_method", quantization.get("quant_method"), ", ".join(METHODS))


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


def _four_bit(quantization: Mapping[str, Any], method: str, where: str) -> QuantisedFormat:
    group_size = _whole_number(quantization, ("group_size", "q_group_size"), where)
    bits = _whole_number(quantization, ("bits", "w_bit"), where)
    if bits != 4:
        raise _unsupported(where, "bits", bits, "4")
    return _awq(quantization, group_size, where) if method == "awq" else _gptq(quantization, group_size, where)


def _awq(quantization: Mapping[str, Any], group_size: int, where: str) -> QuantisedFormat:
    version = quantization.get("version") or "gemm"
    if str(version).lower() not in AWQ_VERSIONS:
        raise _unsupported(where, "version", version, ", ".join(AWQ_VERSIONS))
    return AwqFormat(group_size)


def _gptq(quantization: Mapping[str, Any], group_size: int, where: str) -> QuantisedFormat:
    packing = quantization.get("checkpoint_format") or "gptq"
    if packing not in GPTQ_OFFSETS:
        raise _unsupported(where, "checkpoint_format", packing, ", ".join(GPTQ_OFFSETS))
    return GptqFormat(group_size, GPTQ_OFFSETS[packing])


def _fp8(quantization: Mapping[str, Any], quantise_activations: bool, where: str) -> QuantisedFormat:
    """Scales for blocks, rows or whole tensors; activations are scaled row by row whatever `activation_scheme` says."""
    kind, block = quantization.get("fmt") or "e4m3", quantization.get("weight_block_size")
    if kind not in ("e4m3", "float8_e4m3fn"):
        raise _unsupported(where, "fmt", kind, "e4m3")
    if block is None:
        return ScaledFormat(FP8_SCALES, torch.float8_e4m3fn, quantise_activations)
    if not (isinstance(block, (list, tuple)) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise _unsupported(where, "weight_block_size", block, "two whole numbers such as [128, 128]")
    return ScaledFormat(FP8_SCALES, torch.float8_e4m3fn, block=(block[0], block[1]))


def _skipped(quantization: Mapping[str, Any], where: str) -> tuple[str, ...]:
    key = next((key for key in SKIP_KEYS if quantization.get(key)), SKIP_KEYS[0])
    names = quantization.get(key) or ()
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise _unsupported(where, key, names, "lists of names")
    return tuple(names)
