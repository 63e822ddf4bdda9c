"""`Packed4`: a linear layer in 4 bits as it stays in memory, whatever file it came from, and the arithmetic on nibbles that the file formats share.

Byte j of a row of `qweight` holds input 2j in its low half and input 2j + 1 in its high half; `scales` are float16 and `zeros` uint8, one of each for
every group of g inputs: w = (q - zero) * scale. In float32 they would be a ninth of the bytes of a decode step. Files are read in blocks of input rows, so
that a load holds little beyond the weights themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lmdeploy.checkpoint.source import WeightSource
from lmdeploy.errors import CheckpointError
from lmdeploy.formats.weight_format import Part, all_cols, all_rows, load_bias
from lmdeploy.kernels.api import Kernels
from lmdeploy.kernels.reference import dequantise_w4

Tensor = torch.Tensor

#: Packed words that are read at once; what they become while they are sorted is a few times as much.
BLOCK_BYTES = 4 << 20


@dataclass(slots=True)
class Packed4:
    """`qweight` uint8 [N, K/2], `scales` float16 and `zeros` uint8 [N, K/g], `bias` [N] in the model's type or None.

    `order` int64 [K]: the column of x that belongs to each column of the weight, where a file groups its inputs in another order than theirs (GPTQ's act-order).
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None = None
    order: Tensor | None = None

    @classmethod
    def empty(cls, out_features: int, in_features: int, group: int, bias: bool, dtype: torch.dtype, device: torch.device) -> Packed4:
        """Uninitialised weights; `dtype` is that of the bias."""
        assert in_features % group == 0 and group % 2 == 0, f"{in_features} inputs in groups of {group}"
        qweight = torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=device)
        scales, zeros = (torch.empty(out_features, in_features // group, dtype=kind, device=device) for kind in (torch.float16, torch.uint8))
        return cls(qweight, scales, zeros, torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    def matmul(self, x: Tensor, out: Tensor, kernels: Kernels) -> None:
        """out [T, N] = x [T, K] @ W.T + bias."""
        x = x if self.order is None else x.index_select(1, self.order)
        kernels.linear_w4(x, self.qweight, self.scales, self.zeros, self.bias, out)

    def gated(self, x: Tensor, both: Tensor, out: Tensor, kernels: Kernels) -> None:
        """out [T, N / 2] = silu(first half) * second half of the product; `both` [T, N] is room for it."""
        self.matmul(x, both, kernels)
        kernels.silu_mul(both, out)

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """The weight as `kernels.api.NormedProducts` wants it; nothing where inputs must be put in another order first."""
        return (self.qweight, self.scales, self.zeros) if self.order is None else ()

    def memory(self) -> Iterator[Tensor]:
        """Every tensor that is kept."""
        yield from (t for t in (self.qweight, self.scales, self.zeros, self.bias, self.order) if t is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.memory())

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] written out, its columns in the order of x."""
        weight = dequantise_w4(self.qweight, self.scales, self.zeros, dtype)
        return weight if self.order is None else weight[:, torch.argsort(self.order)]


class PackedFormat:
    """A file format of 4-bit weights. What differs between them is how `qweight` and `qzeros` hold their numbers."""

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size

    def holds(self, source: WeightSource, name: str) -> bool | None:
        """Whether the module is stored so; None where the files hold both or neither."""
        packed = source.has(f"{name}.qweight")
        return packed if packed != source.has(f"{name}.weight") else None

    def load(self, source: WeightSource, parts: Sequence[Part], bias: bool, dtype: torch.dtype, device: torch.device) -> Packed4:
        """The weights of a layer, part after part, straight from the checkpoint."""
        groups = {part.name: self.group(part) for part in parts}
        cols = all_cols(parts[0])
        local = math.gcd(*groups.values(), cols.start, cols.stop - cols.start)
        if local % 2:
            raise CheckpointError(f"{parts[0].name}: columns {cols.start}..{cols.stop} of one rank cut through groups of {self.group_size}; use a smaller tp")
        weight = Packed4.empty(sum(part.num_rows for part in parts), cols.stop - cols.start, local, bias, dtype, device)
        start = 0
        for part in parts:
            rows = slice(start, start + part.num_rows)
            self.load_numbers(source, part, weight.qweight[rows])
            self.load_zeros(source, part, groups[part.name], weight.zeros[rows])
            self.load_scales(source, part, groups[part.name], weight.scales[rows])
            load_bias(source, part, weight.bias, rows)
            start = rows.stop
        self.finish(source, parts, weight)
        return weight

    def group(self, part: Part) -> int:
        """Inputs per group of a module; what cannot be stored so is an error."""
        if part.out_features % 8 or part.in_features % 8:
            raise CheckpointError(f"{part.name}: {part.in_features} inputs and {part.out_features} outputs; 4-bit files hold multiples of 8 of both")
        return group_of(part.name, part.in_features, self.group_size)

    def load_numbers(self, source: WeightSource, part: Part, out: Tensor) -> None:
        """`qweight` of the file to out uint8 [n, K/2] of this rank."""
        raise NotImplementedError

    def load_zeros(self, source: WeightSource, part: Part, group: int, out: Tensor) -> None:
        """`qzeros` of the file to out uint8 [n, K/g] of this rank."""
        raise NotImplementedError

    def load_scales(self, source: WeightSource, part: Part, group: int, out: Tensor) -> None:
        """`scales` of the file to out float16 [n, K/g] of this rank."""
        load_scales(source, part, group, out)

    def finish(self, source: WeightSource, parts: Sequence[Part], weight: Packed4) -> None:
        """What is left to do when all parts are there."""


def group_of(name: str, in_features: int, group_size: int) -> int:
    """Inputs per group of a module; -1 in config.json means all of them."""
    group = in_features if group_size == -1 else group_size
    if group < 2 or group % 2 or in_features % group:
        fits = [g for g in (32, 64, 128, 256) if in_features % g == 0]
        raise CheckpointError(
            f"{name}: {in_features} inputs are no multiple of group_size={group_size} (an even number, or -1); fitting: {fits or in_features}"
        )
    return group


def words_around(rows: Sequence[slice]) -> slice:
    """The words of eight outputs each that cover all of the rows."""
    return slice(min(r.start for r in rows) // 8, -(-max(r.stop for r in rows) // 8))


def nibbles(words: Tensor) -> Tensor:
    """uint8 [R, 8 W] of int32 words [R, W]: the eight numbers of each word, lowest bits first."""
    data = words.view(torch.uint8)
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(1)


def words_of(numbers: Tensor) -> Tensor:
    """int32 words [R, W] of uint8 numbers 0..15 [R, 8 W]: the inverse of `nibbles`."""
    pairs = (numbers[:, 0::2] | numbers[:, 1::2] << 4).flatten()  # flat: a single row may have any stride, which view refuses
    return pairs.view(torch.int32).view(numbers.shape[0], -1)


def pick(columns: Tensor, rows: Sequence[slice], first: int) -> Tensor:
    """[n, R]: the wanted outputs of columns [R, outputs from `first` on], turned."""
    parts = [columns[:, r.start - first : r.stop - first] for r in rows]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).t()


def blocks_of(start: int, stop: int, row_bytes: int, step: int) -> Iterator[slice]:
    """start..stop in blocks of about BLOCK_BYTES, each a multiple of `step` rows."""
    size = max(1, BLOCK_BYTES // max(1, row_bytes * step)) * step
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def load_scales(source: WeightSource, part: Part, group: int, out: Tensor) -> None:
    """`scales` [in/g, out] of the file to out [n, K/g] of this rank."""
    rows = all_rows(part)
    hull = slice(min(r.start for r in rows), max(r.stop for r in rows))
    groups = groups_of(part, group, out.shape[1])
    table = torch.empty(int(groups[-1] - groups[0]) + 1, hull.stop - hull.start, dtype=out.dtype, device=out.device)
    source.take(f"{part.name}.scales", table, slice(int(groups[0]), int(groups[-1]) + 1), hull, shape=(part.in_features // group, part.out_features))
    if not bool(torch.isfinite(table).all()):
        raise CheckpointError(f"tensor '{part.name}.scales' holds infinite numbers or NaN; the checkpoint is broken")
    out.copy_(pick(table, rows, hull.start)[:, (groups - groups[0]).to(out.device)])


def groups_of(part: Part, group: int, count: int) -> Tensor:
    """The file's group that each of this rank's `count` groups lies in."""
    cols = all_cols(part)
    step = (cols.stop - cols.start) // count
    return torch.div(torch.arange(count) * step + cols.start, group, rounding_mode="floor")


def load_zero_words(source: WeightSource, part: Part, group: int, count: int, device: torch.device) -> tuple[Tensor, Tensor, slice]:
    """(words of `qzeros`, for each of this rank's groups the row of them, the words' place along the outputs)."""
    hull, groups = words_around(all_rows(part)), groups_of(part, group, count)
    wanted = slice(int(groups[0]), int(groups[-1]) + 1)
    words = torch.empty(wanted.stop - wanted.start, hull.stop - hull.start, dtype=torch.int32, device=device)
    source.take(f"{part.name}.qzeros", words, wanted, hull, shape=(part.in_features // group, part.out_features // 8))
    return words, (groups - groups[0]).to(device), hull


def sort_columns(source: WeightSource, parts: Sequence[Part], weight: Packed4, suffix: str, group_size: int) -> None:
    """Where groups are not neighbours (act-order): put the columns in the order of their groups, and note it. `<module>.<suffix>` [in] has the group of each input."""
    orders = [_order(source, part, suffix, group_size) for part in parts]
    if all(order is None for order in orders):
        return
    first, part = orders[0], parts[0]
    for order, other in zip(orders[1:], parts[1:], strict=True):
        if first is None or order is None or not torch.equal(first, order):
            raise CheckpointError(f"tensors '{part.name}.{suffix}' and '{other.name}.{suffix}' differ; modules with the same input need the same act-order")
    if part.cols is not None and part.cols != slice(0, part.in_features):
        raise CheckpointError(f"{part.name}: act-order (desc_act) cannot be split along the inputs; use tp=1")
    assert first is not None
    weight.order = first.to(weight.qweight.device)
    for block in blocks_of(0, weight.qweight.shape[0], weight.qweight.shape[1], step=1):
        numbers = nibbles(weight.qweight[block])[:, weight.order]
        weight.qweight[block] = numbers[:, 0::2] | numbers[:, 1::2] << 4


def _order(source: WeightSource, part: Part, suffix: str, group_size: int) -> Tensor | None:
    """The inputs in the order of their groups; None when they are so already, or when -1 says that there is no order."""
    name = f"{part.name}.{suffix}"
    if not source.has(name):
        return None
    index = torch.empty(part.in_features, dtype=torch.int32)
    source.take(name, index, shape=(part.in_features,))
    if bool((index == -1).all()):
        return None
    group = group_of(part.name, part.in_features, group_size)
    sorted_index, order = torch.sort(index, stable=True)
    plain = torch.arange(part.in_features, dtype=torch.int32) // group
    if not torch.equal(sorted_index, plain):
        raise CheckpointError(f"tensor '{name}' does not hold each of the groups 0..{part.in_features // group - 1} {group} times; the checkpoint is broken")
    return None if torch.equal(index, plain) else order
