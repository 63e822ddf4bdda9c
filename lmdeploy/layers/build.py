"""`BuildContext`: what every layer needs to build itself; and `StepBuffers`, the activations that the layers of one step share.

A layer gets the context at construction and keeps what it needs; nothing is global, so two models in one process never meet.
Buffers are cut from the step's `Scratch` once per step, not once per layer: a slice costs as much as a small kernel launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from lmdeploy.checkpoint.source import WeightSource
from lmdeploy.formats.choose import DENSE, Formats
from lmdeploy.inputs import Scratch
from lmdeploy.kernels.api import Kernels
from lmdeploy.parallel import Parallel
from lmdeploy.spec import ModelSpec

Tensor = torch.Tensor


class Module(Protocol):
    """What every layer can do: pull its weights, and show them."""

    def load(self, source: WeightSource) -> None:
        """Pull all weights."""
        ...

    def tensors(self) -> Iterator[Tensor]:
        """All weights."""
        ...


class HasTensors(Protocol):
    """What holds weights."""

    def tensors(self) -> Iterator[Tensor]:
        """All of them, in the same order each time."""
        ...


def reload(part: HasTensors, load: Callable[[], None]) -> None:
    """Pull a loaded part's weights again, with `load`; every tensor keeps its address. Needs memory for the part once more while it does."""
    before = list(part.tensors())
    load()
    for old, new in zip(before, part.tensors(), strict=True):
        if new.data_ptr() != old.data_ptr():
            old.copy_(new)
            new.set_(old.untyped_storage(), old.storage_offset(), old.shape, old.stride())


@dataclass(frozen=True, slots=True)
class BuildContext:
    """Facts of the model, this rank's place, the operators, what tensors are made of, and how the checkpoint stores linear layers."""

    spec: ModelSpec
    parallel: Parallel
    kernels: Kernels
    dtype: torch.dtype
    device: torch.device
    formats: Formats = DENSE

    def empty(self, *shape: int) -> Tensor:
        """Uninitialised weight of this model's dtype and device."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class StepShape:
    """Widths of one rank's activations."""

    hidden_size: int  # M
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D
    mlp_width: int  # F; 0 = no dense MLP in the model

    @classmethod
    def of(cls, ctx: BuildContext, *, dense_mlp: bool) -> StepShape:
        """This rank's widths."""
        spec, parts = ctx.spec, ctx.parallel.size
        width = spec.intermediate_size // parts if dense_mlp else 0
        return cls(spec.hidden_size, spec.num_heads // parts, spec.num_kv_heads // parts, spec.head_dim, width)


@dataclass(frozen=True, slots=True)
class StepBuffers:
    """Views of the scratch for one step. q, k and v are parts of qkv; a buffer's content is dead once its reader has run."""

    residual: Tensor  # [T, M] the running sum
    normed: Tensor  # [T, M]
    proj: Tensor  # [T, M] what a block adds to the residual
    qkv: Tensor  # [T, (H + 2K) D]
    q: Tensor  # [T, H, D]
    k: Tensor  # [T, K, D]
    v: Tensor  # [T, K, D]
    attn: Tensor  # [T, H D]
    gate_up: Tensor  # [T, 2F]
    act: Tensor  # [T, F]
    #: What writes and reads `normed` and `act` where they are in another order (`kernels.api.Quarters`); None: each layer's own kernels.
    kernels: Kernels | None = None

    @classmethod
    def take(cls, scratch: Scratch, shape: StepShape, rows: int, kernels: Kernels | None = None) -> StepBuffers:
        """Buffers for `rows` tokens."""
        heads, kv_heads, dim, width = shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.mlp_width
        qkv = scratch.take("qkv", rows, (heads + 2 * kv_heads) * dim)
        q, k, v = torch.split(qkv.view(rows, heads + 2 * kv_heads, dim), [heads, kv_heads, kv_heads], dim=1)
        residual, normed, proj = (scratch.take(name, rows, shape.hidden_size) for name in ("residual", "normed", "proj"))
        attn = scratch.take("attn", rows, heads * dim)
        gate_up, act = scratch.take("gate_up", rows, 2 * width), scratch.take("act", rows, width)
        return cls(residual, normed, proj, qkv, q, k, v, attn, gate_up, act, kernels)

    def select(self, scratch: Scratch, shape: StepShape, rows: Tensor, attended: Tensor) -> StepBuffers:
        """Buffers for the given rows only, with their attention output, which is in `attended`, and residual copied over.

        For the last layer: beyond its attention only the rows whose logits are wanted matter. The copies land in
        buffers that are dead by then, q's part of qkv and attn itself.
        """
        count = rows.shape[0]
        attn = scratch.take("qkv", count, attended.shape[1])
        torch.index_select(attended, 0, rows, out=attn)
        residual = scratch.take("attn", count, shape.hidden_size)
        torch.index_select(self.residual, 0, rows, out=residual)
        normed, proj = (scratch.take(name, count, shape.hidden_size) for name in ("normed", "proj"))
        gate_up, act = scratch.take("gate_up", count, 2 * shape.mlp_width), scratch.take("act", count, shape.mlp_width)
        return StepBuffers(residual, normed, proj, self.qkv, self.q, self.k, self.v, attn, gate_up, act)
