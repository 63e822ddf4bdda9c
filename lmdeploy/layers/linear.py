"""Linear layers: which modules of the checkpoint they are made of, and which rows and columns of them this rank owns.

Sharding is written here once, for every weight format: column layers cut output rows, row layers cut input columns and sum over
ranks. A fused layer names its parts, so q, k and v are one product though the file has three tensors; a tensor that is
fused in the file is cut by output ranges, straight to its place. A bias is what the file has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lmdeploy.checkpoint.source import WeightSource
from lmdeploy.formats.dense import DenseWeight
from lmdeploy.formats.weight_format import FileFormat, Part, WeightFormat
from lmdeploy.kernels.api import After, Before, Kernels
from lmdeploy.layers.build import BuildContext

Tensor = torch.Tensor


class Linear:
    """out = x @ W.T + b, rows of W put together from `parts`.

    `expect_bias`: config.json says that there is a bias, so its absence in the file is an error; a bias that only the file knows of is used too.
    """

    def __init__(self, ctx: BuildContext, parts: Sequence[Part], *, expect_bias: bool = False) -> None:
        self.parts, self.expect_bias = tuple(parts), expect_bias
        self.kernels, self.dtype, self.device, self.formats = ctx.kernels, ctx.dtype, ctx.device, ctx.formats
        self.weight: WeightFormat | None = None

    def load(self, source: WeightSource) -> None:
        """Allocate and pull the weights."""
        bias = self.expect_bias or any(source.has(f"{part.name}.bias") for part in self.parts)
        self.weight = self.file_format(source).load(source, self.parts, bias, self.dtype, self.device)

    def file_format(self, source: WeightSource) -> FileFormat:
        """How the files hold the layer, or how it is quantised while it is read."""
        return self.formats.of(source, self.parts)

    def tensors(self) -> Iterator[Tensor]:
        """Everything that the weights are made of."""
        assert self.weight is not None, "not loaded"
        yield from self.weight.memory()

    def forward(self, x: Tensor, out: Tensor, kernels: Kernels | None = None) -> None:
        """x [T, K] -> out [T, N]; `kernels`: the set whose order x is in, where it is not the layer's own."""
        self.weight.matmul(x, out, kernels or self.kernels)  # type: ignore[union-attr]  # loaded; not checked again per call

    @property
    def whole(self) -> bool:
        """Whether the weights are held in 16 bits."""
        return self.weight is not None and len(self.weight.operands) == 1

    def rows_in_quarters(self) -> range:
        """For how many rows x is best in quarters."""
        assert self.weight is not None, "not loaded"
        return self.kernels.quarters.rows_served(self.weight.operands, self.dtype) if self.kernels.quarters else range(0)

    def normed_rows(self, *, silu: bool = False) -> int:
        """Up to how many rows `normed` takes; 0: it does not serve this layer."""
        assert self.weight is not None, "not loaded"
        outer = sum(part.num_rows for part in self.parts)
        return self.kernels.normed.rows_served(self.weight.operands, outer // 2 if silu else outer, self.dtype) if self.kernels.normed else 0

    def normed(self, x: Tensor, out: Tensor, *, silu: bool = False, before: Before | None = None, after: After | None = None) -> None:
        """`forward` or, with `silu`, `gated` of few rows, with what is left of the norm before and what is done of the norm after."""
        weight = self.weight
        self.kernels.normed.product(x, weight.operands, weight.bias, out, silu, before, after)  # type: ignore[union-attr]  # loaded, and served


class Head(Linear):
    """The output head, which an option may quantise."""

    def file_format(self, source: WeightSource) -> FileFormat:
        """As all layers, but for the option."""
        return self.formats.of_head(source, self.parts)


class TiedHead(Linear):
    """The output head that is the embedding table itself; where an option quantises it, a copy of the table, because rows are looked up in 16 bits."""

    def __init__(self, ctx: BuildContext, table: Tensor, name: str) -> None:
        super().__init__(ctx, ())
        self.table, self.name = table, name
        self.weight = DenseWeight(table)

    def load(self, source: WeightSource) -> None:
        """The embedding has loaded the table; at most a quantised copy is made of it."""
        if self.formats.head is not None:
            self.weight = self.formats.head.of_table(self.table, self.name, self.dtype)


class QKVLinear(Linear):
    """Query, key and value heads of this rank in one product; output rows are [q | k | v]."""

    def __init__(self, ctx: BuildContext, prefix: str, parts: Sequence[str], *, interleaved: bool = False) -> None:
        spec, parallel = ctx.spec, ctx.parallel
        queries, keys = parallel.slice(spec.num_heads, "num_heads"), parallel.slice(spec.num_kv_heads, "num_kv_heads")
        names = [f"{prefix}.{name}" for name in parts]
        if len(names) == 3:
            rows = _separate_rows(ctx, queries, keys)
        elif interleaved:
            rows = _interleaved_rows(ctx, keys)
        else:
            rows = _stacked_rows(ctx, queries, keys)
        names = names * (3 // len(names))
        super().__init__(ctx, [Part(name, size, spec.hidden_size, wanted) for name, (size, wanted) in zip(names, rows, strict=True)], expect_bias=spec.qkv_bias)


Rows = list[tuple[int, list[slice]]]  # for q, k and v: rows of the tensor in the file, and those of them that this rank wants


def _scaled(heads: slice, head_dim: int, offset: int = 0) -> list[slice]:
    return [slice((offset + heads.start) * head_dim, (offset + heads.stop) * head_dim)]


def _separate_rows(ctx: BuildContext, queries: slice, keys: slice) -> Rows:
    dim, spec = ctx.spec.head_dim, ctx.spec
    return [(heads * dim, _scaled(part, dim)) for heads, part in ((spec.num_heads, queries), (spec.num_kv_heads, keys), (spec.num_kv_heads, keys))]


def _stacked_rows(ctx: BuildContext, queries: slice, keys: slice) -> Rows:
    """All queries, then all keys, then all values in one tensor (Phi-3)."""
    dim, heads, kv_heads = ctx.spec.head_dim, ctx.spec.num_heads, ctx.spec.num_kv_heads
    total = (heads + 2 * kv_heads) * dim
    return [(total, _scaled(queries, dim)), (total, _scaled(keys, dim, heads)), (total, _scaled(keys, dim, heads + kv_heads))]


def _interleaved_rows(ctx: BuildContext, keys: slice) -> Rows:
    """Per KV group its query heads, its key, its value, group after group in one tensor (InternLM2)."""
    dim, group = ctx.spec.head_dim, ctx.spec.num_heads // ctx.spec.num_kv_heads
    total = ctx.spec.num_kv_heads * (group + 2) * dim
    starts = [kv_head * (group + 2) * dim for kv_head in range(keys.start, keys.stop)]
    queries = [slice(s, s + group * dim) for s in starts]
    key_rows, value_rows = ([slice(s + (group + i) * dim, s + (group + i + 1) * dim) for s in starts] for i in (0, 1))
    return [(total, queries), (total, key_rows), (total, value_rows)]


class GateUpLinear(Linear):
    """Gate and up projection of an MLP in one product; output rows are [gate | up]. One name = stacked in the file (Phi-3)."""

    def __init__(self, ctx: BuildContext, prefix: str, parts: Sequence[str], width: int) -> None:
        wanted = ctx.parallel.slice(width, "intermediate_size")
        names = [f"{prefix}.{name}" for name in parts]
        if len(names) == 2:
            rows = [(width, wanted), (width, wanted)]
        else:
            rows = [(2 * width, wanted), (2 * width, slice(width + wanted.start, width + wanted.stop))]
            names = names * 2
        made = [Part(name, size, ctx.spec.hidden_size, [part]) for name, (size, part) in zip(names, rows, strict=True)]
        super().__init__(ctx, made, expect_bias=ctx.spec.mlp_bias)

    def gated(self, x: Tensor, both: Tensor, out: Tensor, kernels: Kernels | None = None) -> None:
        """x [T, K] -> out [T, F] = silu(gate) * up; `both` [T, 2F] is room for the product; `kernels`: the set whose order x and out are in."""
        self.weight.gated(x, both, out, kernels or self.kernels)  # type: ignore[union-attr]  # loaded; not checked again per call


class RowLinear(Linear):
    """A layer cut along its inputs: each rank multiplies its columns, the results are summed; the bias is added by rank 0 alone."""

    def __init__(self, ctx: BuildContext, name: str, in_features: int, out_features: int, *, expect_bias: bool) -> None:
        self.parallel = ctx.parallel
        cols = ctx.parallel.slice(in_features, f"inputs of {name}")
        super().__init__(ctx, [Part(name, out_features, in_features, None, cols)], expect_bias=expect_bias)

    def load(self, source: WeightSource) -> None:
        """Allocate and pull; ranks above 0 drop the bias."""
        super().load(source)
        if self.parallel.rank > 0:
            assert self.weight is not None
            self.weight.bias = None

    def normed_rows(self, *, silu: bool = False) -> int:
        """None where ranks share a sum: only the whole sum is added to the residual."""
        return super().normed_rows(silu=silu) if self.parallel.size == 1 else 0

    def forward(self, x: Tensor, out: Tensor, kernels: Kernels | None = None) -> None:
        """x [T, K of this rank] -> out [T, N], summed over ranks."""
        super().forward(x, out, kernels)
        if self.parallel.size > 1:
            self.parallel.all_reduce(out)

    def add(self, x: Tensor, residual: Tensor) -> bool:
        """residual [T, N] += x @ W.T in the product itself, which saves a pass over both; False, and nothing done, where there is no such product."""
        weight, product = self.weight, self.kernels.linear_add
        if product is None or self.parallel.size > 1 or not isinstance(weight, DenseWeight) or weight.bias is not None:
            return False
        return product(x, weight.weight, residual)
