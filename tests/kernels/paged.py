"""Sequences in a shuffled paged cache of any format, on any device. What no sequence wrote is NaN, and block tables point nowhere past their end."""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace

import torch

from lmdeploy.inputs import AttentionMeta
from lmdeploy.kernels.api import Kernels
from lmdeploy.kernels.kv_quant import quantise_rows
from lmdeploy.kv_layer import KVFormat, KVLayer

Tensor = torch.Tensor
NOWHERE = 1 << 30

FORMATS = {
    "16": KVFormat(), "8": KVFormat("8", "8"), "4": KVFormat("4", "4"), "4 rotated": KVFormat("4", "4", True), "8 rotated": KVFormat("8", "8", True),
    "k8v4": KVFormat("8", "4", True), "k4v8": KVFormat("4", "8"), "fp8": KVFormat("fp8", "fp8"), "k16v4": KVFormat("16", "4", True),
    "k8v16": KVFormat("8", "16"), "k-fp8 v4": KVFormat("fp8", "4", True), "16 rotated": KVFormat("16", "16", True),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """H query heads on K KV heads of D dims, S slots a block."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int = 8
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


@dataclass(frozen=True)
class Sequence:
    """`new` of its `length` tokens are new; its numbers come from `seed` alone."""

    length: int
    new: int
    seed: int


@dataclass
class Case:
    """What `attention` takes."""

    q: Tensor
    layer: KVLayer
    meta: AttentionMeta
    key: Tensor  # of the new tokens, [T, K, D]; the cache holds them, too
    value: Tensor

    def attend(self, kernels: Kernels, window: int = 0) -> Tensor:
        """[T, H * D], from a buffer of NaN."""
        out = torch.full((self.q.shape[0], self.q.shape[1] * self.q.shape[2]), float("nan"), dtype=self.q.dtype, device=self.q.device)
        kernels.attention(self.q, self.key, self.value, self.layer, self.meta, self.q.shape[2] ** -0.5, window, out)
        return out

    def rows(self, index: int) -> slice:
        """The rows of sequence `index`."""
        start = sum(self.meta.query_lens[:index])
        return slice(start, start + self.meta.query_lens[index])


def sequences(lengths: list[tuple[int, int]], seed: int = 1) -> list[Sequence]:
    """One per (length, new tokens), decode rows first."""
    made = [Sequence(length, new, seed + i) for i, (length, new) in enumerate(lengths)]
    return sorted(made, key=lambda s: s.new > 1)


def numbers(shape: Shape, seed: int, *size: int) -> Tensor:
    """Random of the shape's type, on its device, alike for a seed."""
    return torch.randn(size, generator=torch.Generator(shape.device).manual_seed(seed), device=shape.device).to(shape.dtype)


def store(layer: KVLayer, block: Tensor, offset: Tensor, key: Tensor, value: Tensor) -> None:
    """Rows [L, K, D] to their slots, in the numbers of each width."""
    for rows, cache, scales, width in ((key, layer.key, layer.key_scales, layer.key_width), (value, layer.value, layer.value_scales, layer.value_width)):
        if scales is None:
            cache[block, :, offset] = rows
        else:
            stored, scales[block, :, offset] = quantise_rows(rows, width)
            cache.view(torch.uint8)[block, :, offset] = stored.view(torch.uint8)


def paged_case(fmt: KVFormat, shape: Shape, batch: list[Sequence], shuffle: int = 0) -> Case:
    """A step of `batch`; `shuffle` places the blocks."""
    needed = [-(-s.length // shape.block_size) for s in batch]
    free = list(range(sum(needed) + 3))
    random.Random(shuffle).shuffle(free)
    size = fmt.layer_bytes(len(free), shape.kv_heads, shape.block_size, shape.head_dim, shape.dtype)
    memory = torch.full((size,), 0xFF, dtype=torch.uint8, device=shape.device)  # NaN in every floating type
    layer = fmt.layer(memory, len(free), shape.kv_heads, shape.block_size, shape.head_dim, shape.dtype)
    table = torch.full((len(batch), max(needed) + 1), NOWHERE, dtype=torch.int32)
    queries, new = [], []
    for i, s in enumerate(batch):
        table[i, : needed[i]] = torch.tensor([free.pop() for _ in range(needed[i])])
        place = torch.arange(s.length)
        block, offset = table[i].long()[place // shape.block_size].to(shape.device), (place % shape.block_size).to(shape.device)
        key, value = (numbers(shape, 10 * s.seed + part, s.length, shape.kv_heads, shape.head_dim) for part in range(2))
        store(layer, block, offset, key, value)
        new.append((key[s.length - s.new :], value[s.length - s.new :]))
        queries.append(numbers(shape, 10 * s.seed + 2, s.length, shape.heads, shape.head_dim)[s.length - s.new :])
    counts, lengths = [s.new for s in batch], [s.length for s in batch]
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    parts = (starts, torch.tensor(lengths, dtype=torch.int32), table, torch.zeros(sum(counts), dtype=torch.int64))
    meta = AttentionMeta(*(p.to(shape.device) for p in parts), counts, lengths, sum(n == 1 for n in counts))
    keys, values = (torch.cat(rows) for rows in zip(*new, strict=True))
    return Case(torch.cat(queries), layer, meta, keys, values)


def one_launch_and_two(
    rope_attention: Callable[..., Tensor], reference: Kernels, case: Case, shape: Shape, qkv: Tensor, angles: Tensor, factor: Tensor | None,
    center: Tensor | None, scale: float,
) -> tuple[list[KVLayer], list[Tensor]]:  # fmt: skip
    """The cache and the result of `rope_attention`, and of the reference's two operators, from qkv [T, H + 2 K, D] and `angles` [T, R / 2]."""
    layers, outs = [], []
    for fused in (True, False):
        layer = replace(deepcopy(case.layer), key_center=None if center is None else center.clone())
        q, k, v = torch.split(qkv.clone(), [shape.heads, shape.kv_heads, shape.kv_heads], 1)
        out = torch.full((qkv.shape[0], shape.heads * qkv.shape[2]), float("nan"), dtype=qkv.dtype)
        if fused:
            assert rope_attention(q, k, v, angles.cos(), angles.sin(), factor, layer, case.meta, scale, 0, out) is out
        else:
            reference.rope_write_kv(q, k, v, angles.cos(), angles.sin(), factor, layer, case.meta.slot_mapping)
            reference.attention(q, k, v, layer, case.meta, scale, 0, out)
        layers.append(layer)
        outs.append(out)
    return layers, outs


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest number; NaN where either has one."""
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())
