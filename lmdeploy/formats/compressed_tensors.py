"""The layouts of the compressed-tensors library (llm-compressor) that are common: 4-bit and 8-bit integers in words, int8, and fp8.

`pack-quantized`: `weight_packed` int32 [out, in/8] (or in/4), number i of a word in its bits 4i (8i), stored plus 8 (128); `weight_scale` [out, in/g];
`weight_zero_point` int32 [out/8, in/g], packed along the outputs, plus 8 too; `weight_g_idx` [in] where groups are not neighbours. `int-quantized` and
`float-quantized`: `weight` and `weight_scale` for a tensor, a row, a group or a block. config.json maps modules to groups of such settings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmdeploy.checkpoint.source import WeightSource
from lmdeploy.errors import CheckpointError
from lmdeploy.formats import packed4
from lmdeploy.formats.packed4 import Packed4, PackedFormat
from lmdeploy.formats.packed8 import ScaledFormat, load_table
from lmdeploy.formats.weight_format import Part, QuantisedFormat, WeightFormat, all_cols, all_rows

Tensor = torch.Tensor
#: makes the error for (key, value, what is known)
Refuse = Callable[[str, object, str], CheckpointError]

SCALE = "weight_scale"
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
#: every byte of an int32 plus 128
FLIP = -0x7F7F7F80


class PackedInt4(PackedFormat):
    """4-bit numbers in words along the inputs, which are our layout byte for byte."""

    def __init__(self, group_size: int, symmetric: bool) -> None:
        super().__init__(group_size)
        self.symmetric = symmetric

    def holds(self, source: WeightSource, name: str) -> bool | None:
        """Whether the module is stored so; None where the files hold both or neither."""
        packed = source.has(f"{name}.weight_packed")
        return packed if packed != source.has(f"{name}.weight") else None

    def group(self, part: Part) -> int:
        """Words hold eight inputs, those of zero points eight outputs."""
        if part.in_features % 8 or (part.out_features % 8 and not self.symmetric):
            raise CheckpointError(f"{part.name}: {part.in_features} inputs and {part.out_features} outputs; packed 4-bit files hold multiples of 8")
        return packed4.group_of(part.name, part.in_features, self.group_size)

    def load_numbers(self, source: WeightSource, part: Part, out: Tensor) -> None:
        """Straight to their place, unless a rank begins or ends inside a word."""
        name, shape, cols = f"{part.name}.weight_packed", (part.out_features, part.in_features // 8), all_cols(part)
        words = slice(cols.start // 8, -(-cols.stop // 8))
        if cols.start % 8 == 0 and cols.stop % 8 == 0:
            source.take_ranges(name, out.view(torch.int32), all_rows(part), words, shape=shape)
            return
        whole = torch.empty(out.shape[0], words.stop - words.start, dtype=torch.int32, device=out.device)
        source.take_ranges(name, whole, all_rows(part), words, shape=shape)
        first = (cols.start - words.start * 8) // 2
        out.copy_(whole.view(torch.uint8)[:, first : first + out.shape[1]])

    def load_zeros(self, source: WeightSource, part: Part, group: int, out: Tensor) -> None:
        """8 where the numbers are symmetric."""
        if self.symmetric:
            out.fill_(8)
            return
        shape = (part.out_features // 8, part.in_features // group)
        words = torch.empty(shape, dtype=torch.int32, device=out.device)
        source.take(f"{part.name}.weight_zero_point", words, shape=shape)
        numbers = packed4.nibbles(words.t().contiguous())  # [K/g, N]
        groups = packed4.groups_of(part, group, out.shape[1]).to(out.device)
        out.copy_(packed4.pick(numbers, all_rows(part), 0)[:, groups])

    def load_scales(self, source: WeightSource, part: Part, group: int, out: Tensor) -> None:
        """[out, in/g], of any floating type."""
        load_table(source, part, SCALE, (1, group), out.device).spread(part, out)
        if not bool(torch.isfinite(out).all()):
            raise CheckpointError(f"tensor '{part.name}.{SCALE}' holds numbers beyond 65504, which 4-bit weights cannot keep; the checkpoint is broken")

    def finish(self, source: WeightSource, parts: Sequence[Part], weight: Packed4) -> None:
        """Sort the columns where groups are not neighbours."""
        packed4.sort_columns(source, parts, weight, "weight_g_idx", self.group_size)


class PackedInt8(ScaledFormat):
    """8-bit numbers in words, plus 128."""

    def holds(self, source: WeightSource, name: str) -> bool | None:
        """Whether the module is stored so; None where the files hold both or neither."""
        packed = source.has(f"{name}.weight_packed")
        return packed if packed != source.has(f"{name}.weight") else None

    def load_numbers(self, source: WeightSource, part: Part, out: Tensor) -> None:
        """Straight to their place, where the highest bit of each is turned."""
        cols = all_cols(part)
        if part.in_features % 4 or cols.start % 4 or cols.stop % 4:
            raise CheckpointError(f"{part.name}: inputs {cols.start}..{cols.stop} of {part.in_features} begin or end inside a word of 4; use a smaller tp")
        words, shape = out.view(torch.int32), (part.out_features, part.in_features // 4)
        source.take_ranges(f"{part.name}.weight_packed", words, all_rows(part), slice(cols.start // 4, cols.stop // 4), shape=shape)
        words.bitwise_xor_(FLIP)


@dataclass(frozen=True, slots=True)
class Group:
    """Modules and how they are stored. `targets`: names, "re:" and a pattern, or a class of modules (Linear)."""

    targets: tuple[str, ...]
    stored: QuantisedFormat

    def names(self, module: str) -> bool:
        """Whether a target is this module, by name."""
        return any(re.match(target[3:], module) if target.startswith("re:") else target == module for target in self.targets)


@dataclass(frozen=True, slots=True)
class CompressedFormat:
    """All groups of a checkpoint; a module belongs to the first that names it, else to the first that is for every linear layer."""

    groups: tuple[Group, ...]

    def holds(self, source: WeightSource, name: str) -> bool | None:
        """As its group says."""
        group = self._group(name)
        return False if group is None else group.stored.holds(source, name)

    def load(self, source: WeightSource, parts: Sequence[Part], bias: bool, dtype: torch.dtype, device: torch.device) -> WeightFormat:
        """As the group of the parts says."""
        groups = [self._group(part.name) for part in parts]
        assert groups[0] is not None, f"{parts[0].name} is in no group"
        for part, group in zip(parts, groups, strict=True):
            if group is not groups[0]:
                raise CheckpointError(
                    f"{parts[0].name} and {part.name} are quantised in different ways; modules that are computed together must be stored alike"
                )
        return groups[0].stored.load(source, parts, bias, dtype, device)

    def _group(self, name: str) -> Group | None:
        named = next((group for group in self.groups if group.names(name)), None)
        return named or next((group for group in self.groups if "Linear" in group.targets), None)


def compressed_format(quantization: Mapping[str, Any], quantise_activations: bool, refuse: Refuse) -> CompressedFormat:
    """The reader that a quantization_config asks for; `refuse` makes the error for what is not supported."""
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(group, Mapping) for group in groups.values()):
        raise refuse("config_groups", groups, "tables of targets and weights")
    for key in ("sparsity_config", "transform_config"):
        table = quantization.get(key) or {}
        if not isinstance(table, Mapping) or table.get("config_groups") or table.get("format", "dense") != "dense":
            raise refuse(key, table, "weights without it")
    return CompressedFormat(tuple(_group_of(group, quantization.get("format"), quantise_activations, refuse) for group in groups.values()))


def _group_of(group: Mapping[str, Any], general: object, quantise_activations: bool, refuse: Refuse) -> Group:
    targets = group.get("targets")
    if not isinstance(targets, (list, tuple)) or not all(isinstance(target, str) for target in targets):
        raise refuse("targets", targets, "lists of names")
    stored, weights = group.get("format") or general, group.get("weights")
    if stored not in FORMATS:
        raise refuse("format", stored, ", ".join(FORMATS))
    if not isinstance(weights, Mapping):
        raise refuse("weights", weights, "a table")
    return Group(tuple(targets), _stored(str(stored), weights, quantise_activations and group.get("input_activations") is not None, refuse))


def _stored(stored: str, weights: Mapping[str, Any], quantise_inputs: bool, refuse: Refuse) -> QuantisedFormat:
    """The reader of one group's weights."""
    bits, kind, symmetric = weights.get("num_bits"), weights.get("type", "int"), weights.get("symmetric", True) is not False
    if stored == "pack-quantized" and (bits, kind) == (4, "int"):
        return PackedInt4(_group_size(weights, refuse), symmetric)
    if bits != 8 or kind not in ("int", "float") or (stored, kind) in (("int-quantized", "float"), ("float-quantized", "int"), ("pack-quantized", "float")):
        raise refuse("weights", {"num_bits": bits, "type": kind}, "4-bit int in pack-quantized, 8-bit int, 8-bit float")
    if not symmetric:
        raise refuse("symmetric", False, "true with 8 bits")
    if stored == "pack-quantized":
        return PackedInt8((SCALE,), torch.int8, quantise_inputs)
    block = _block(weights, refuse)
    return ScaledFormat((SCALE,), torch.int8 if kind == "int" else torch.float8_e4m3fn, quantise_inputs and block is None, block)


def _group_size(weights: Mapping[str, Any], refuse: Refuse) -> int:
    """-1: a row is a group."""
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy not in (None, "group", "channel"):
        raise refuse("strategy", strategy, "group, channel")
    if strategy == "channel" or size is None:
        return -1
    if type(size) is not int:
        raise refuse("group_size", size, "whole numbers")
    return size


def _block(weights: Mapping[str, Any], refuse: Refuse) -> tuple[int, int] | None:
    """(rows, inputs) of a scale where the strategy is blocks; older files write "128x128"."""
    if weights.get("strategy") != "block":
        return None
    block = weights.get("block_structure")
    sizes = block.split("x") if isinstance(block, str) else block
    if not isinstance(sizes, (list, tuple)) or len(sizes) != 2 or not all(str(size).isdigit() and int(size) > 0 for size in sizes):
        raise refuse("block_structure", block, "two whole numbers such as [128, 128]")
    return int(sizes[0]), int(sizes[1])
