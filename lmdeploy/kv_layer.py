"""How keys and values are stored: `KVFormat` names a layout, `KVLayer` is the cache of one layer in it.

A row is one head's key or value of one token. Quantised rows are asymmetric, x = number * scale + offset, with one (scale, offset) a row, both rounded outwards
to bfloat16, so that every number of the row stays in reach. A rotated cache holds keys and values times an orthogonal matrix that spreads outlier channels over
all of them (QuaRot, arXiv 2404.00456); queries are rotated alike and the weighted sum of the values is rotated back, so attention is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Of a key or value: the activations' own type, unsigned integers, or float8_e4m3fn.
Width = Literal["16", "8", "4", "fp8"]

_NAMES: dict[tuple[Width, Width], str] = {("16", "16"): "none", ("8", "8"): "int8", ("4", "4"): "int4", ("8", "4"): "k8v4", ("fp8", "fp8"): "fp8"}
SCALE_BYTES = 4  # scale and offset of a row, bfloat16 each
ALIGNMENT = 64


class NumberType(Protocol):
    """What sizes need to know of a type of numbers; a torch.dtype is one."""

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        ...


@dataclass(frozen=True, slots=True)
class KVLayer:
    """The cache of one layer: N blocks, K heads, S slots, D dims. `key` and `value` need not be stored alike.

    16 bit: [N, K, S, D] of the activations' type, no scales. 8: uint8 [N, K, S, D]. 4: uint8 [N, K, S, D/2], byte j holds dim j in its low half and dim
    D/2 + j in its high half. fp8: float8_e4m3fn [N, K, S, D], whose offset is 0.
    """

    key: Tensor
    value: Tensor
    key_width: Width = "16"
    value_width: Width = "16"
    key_scales: Tensor | None = None  # bfloat16 [N, K, S, 2]: scale, offset
    value_scales: Tensor | None = None
    rotation: Tensor | None = None  # float32 [D, D], symmetric and orthogonal: its own inverse
    key_center: Tensor | None = None  # float32 [K, D]: what all rotary keys have in common, subtracted before they are rotated and stored; see `key_centers.py`

    @property
    def plain(self) -> bool:
        """True when nothing is quantised."""
        return self.key_width == self.value_width == "16"


@dataclass(frozen=True, slots=True)
class KVFormat:
    """Widths of keys and values, and whether both are rotated."""

    key: Width = "16"
    value: Width = "16"
    rotated: bool = False

    @property
    def plain(self) -> bool:
        """True when nothing is quantised."""
        return self.key == self.value == "16"

    @property
    def name(self) -> str:
        """As the start-up lines call it: 'none', 'int8', 'k8v4', 'rotated int4', 'fp8'."""
        return ("rotated " if self.rotated else "") + _NAMES.get((self.key, self.value), f"k{self.key}v{self.value}")

    def bytes_per_row(self, head_dim: int, dtype: NumberType) -> int:
        """Bytes of a key and a value of one head and token, scales included."""
        return sum(number_bytes(width, head_dim, dtype) + scale_bytes(width) for width in (self.key, self.value))

    def layer_bytes(self, blocks: int, heads: int, block_size: int, head_dim: int, dtype: NumberType) -> int:
        """Bytes of one layer's cache, the parts aligned."""
        rows = blocks * heads * block_size
        return sum(_aligned(size) for width in (self.key, self.value) for size in (rows * number_bytes(width, head_dim, dtype), rows * scale_bytes(width)))

    def layer(self, memory: Tensor, blocks: int, heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> KVLayer:
        """The cache of one layer as views of `memory`, uint8 [layer_bytes]: key, its scales, value, its scales."""
        import torch

        shape, start = (blocks, heads, block_size), 0
        parts: list[Tensor | None] = []
        for width in (self.key, self.value):
            for size, last, kind in (
                (number_bytes(width, head_dim, dtype), head_dim // 2 if width == "4" else head_dim, number_dtype(width, dtype)),
                (scale_bytes(width), 2, torch.bfloat16),
            ):
                nbytes = blocks * heads * block_size * size
                parts.append(memory[start : start + nbytes].view(kind).view(*shape, last) if size else None)
                start += _aligned(nbytes)
        key, key_scales, value, value_scales = parts
        assert key is not None and value is not None
        rotation = rotation_matrix(head_dim).to(memory.device) if self.rotated else None
        return KVLayer(key, value, self.key, self.value, key_scales, value_scales, rotation)


def number_dtype(width: Width, dtype: torch.dtype) -> torch.dtype:
    """Type of the stored numbers."""
    import torch

    return {"16": dtype, "8": torch.uint8, "4": torch.uint8, "fp8": torch.float8_e4m3fn}[width]


def number_bytes(width: Width, head_dim: int, dtype: NumberType) -> int:
    """Bytes of the numbers of a row."""
    return {"16": head_dim * dtype.itemsize, "8": head_dim, "4": head_dim // 2, "fp8": head_dim}[width]


def scale_bytes(width: Width) -> int:
    """Bytes of scale and offset of a row."""
    return 0 if width == "16" else SCALE_BYTES


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def rotation_matrix(head_dim: int) -> Tensor:
    """float32 [D, D], symmetric and orthogonal: a Hadamard matrix of the largest power of two in D, times a reflection of the odd factor m.

    Sylvester's Hadamard matrix H / sqrt(n) and the Householder reflection I - 2/m J are both symmetric and orthogonal, hence so is their Kronecker
    product; dim i = block * n + place, `block` of m mixed by the reflection, `place` of n by Hadamard.
    """
    import torch

    power = head_dim & -head_dim
    odd = head_dim // power
    hadamard = torch.ones(1, 1)
    while hadamard.shape[0] < power:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)], 0)
    reflection = torch.eye(odd) - 2 / odd if odd > 1 else torch.eye(1)
    return torch.kron(reflection, hadamard / power**0.5).contiguous()
