"""The operators that layers call. `Kernels` is a frozen set of callables; `select.py` chooses them, layers never do.

Shapes: T tokens in the step, B sequences, H query heads, K KV heads, D head dim, M model width, F feed-forward, N blocks, S block size,
E experts. Results go to `out`, which is contiguous unless said otherwise and never aliases an input. Activations and weights share one floating
dtype (float32, bfloat16, float16) unless said otherwise; arithmetic inside is float32. `reference.py` is the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lmdeploy.inputs import AttentionMeta
from lmdeploy.kv_layer import KVLayer

Tensor = torch.Tensor


class Before(NamedTuple):
    """What the inputs of a product lack: row t is to be divided by the root of squares[t] / width + eps. Squares are whole numbers of 2^-24."""

    squares: Tensor  # int64
    eps: float


class After(NamedTuple):
    """Where a product's result goes: residual [T, N] += result, rounded; squares[t] += the row's squares; the result is residual * weight [N]."""

    residual: Tensor
    weight: Tensor
    squares: Tensor  # int64


class RopeRule(NamedTuple):
    """Where the frequencies of a rotary embedding come from. Fixed (`limit` 0): frequencies [R/2]. By the length L of the sequence: frequencies [2, R/2], of
    which the second row is for L > limit; or, with a theta, 1 / base^e of the exponents e [R/2], base = theta * (factor * max(L, limit) / limit - factor + 1)^power.
    Cosines and sines are multiplied by `scale`."""

    frequencies: Tensor  # float32
    scale: float = 1.0
    limit: int = 0
    theta: float = 0.0
    factor: float = 1.0
    power: float = 1.0


@dataclass(frozen=True, slots=True)
class NormedProducts:
    """Products of few rows with the RMSNorms around them inside. A weight is (numbers,) in 16 bits or (qweight, scales, zeros) as for `linear_w4`."""

    #: (weight, N, dtype of x) -> up to how many rows `product` takes; 0: it does not serve this weight
    rows_served: Callable[[tuple[Tensor, ...], int, torch.dtype], int]
    #: (x [T, K], weight, bias | None, out [T, N], silu, before | None, after | None): out = x @ W.T + bias, with `silu` as `linear_silu`; K is the norm's width
    product: Callable[[Tensor, tuple[Tensor, ...], Tensor | None, Tensor, bool, Before | None, After | None], None]


@dataclass(frozen=True, slots=True)
class Kernels:
    """One callable per operator; `names` says which implementation each is, for check_env and the start-up lines."""

    #: (x [T, K], weight [N, K], bias [N] | None, out [T, N]): out = x @ weight.T + bias. Rows of `x` may be strided.
    linear: Callable[[Tensor, Tensor, Tensor | None, Tensor], None]
    #: (x [T, K], weight [2F, K] = [gate | up], bias [2F] | None, both [T, 2F], out [T, F]): out = silu(gate) * up of the product; `both` is room for it,
    #: whose content is undefined afterwards.
    linear_silu: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor], None]
    #: (x [T, K], qweight uint8 [N, K/2], scales float16 [N, K/g], zeros uint8 [N, K/g], bias [N] | None, out [T, N]): out = x @ W.T + bias of a 4-bit
    #: weight W[n, k] = (q[n, k] - zeros[n, k // g]) * scales[n, k // g]; scales and zeros may both be float32 too. Byte j of a row holds q[n, 2j] in its
    #: low half and q[n, 2j + 1] in its high half; g = K // scales.shape[1] is even and divides K. Rows of `x` may be strided.
    linear_w4: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor], None]
    #: (x [T, K], qweight [N, K] int8 or float8_e4m3fn, scales float32 [N, K/g], bias [N] | None, out [T, N]): out = x @ W.T + bias with
    #: W[n, k] = qweight[n, k] * scales[n, k // g]; x stays as it is. g = K // scales.shape[1] divides K; K/g = 1: one scale a row. Rows of `x` may be strided.
    linear_w8: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], None]
    #: The same with one scale a row, scales float32 [N, 1], and x quantised row by row to the type of the weight while it runs: x ~ xq * sx with
    #: sx = max|x| / 127 (int8, rounded to nearest even) or / 448 (float8_e4m3fn); out = (xq @ qweight.T) * sx * scales + bias. Sums of int8 are exact.
    linear_w8a8: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], None]
    #: (x [T, M], weight [M], eps, out [T, M]): out = x / sqrt(mean(x^2) + eps) * weight
    rms_norm: Callable[[Tensor, Tensor, float, Tensor], None]
    #: (x [T, M], residual [T, M], weight [M], eps, out [T, M]): residual += x in place; out = rms_norm(residual)
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float, Tensor], None]
    #: (x [T, H, D], weight [D], eps): RMSNorm of each head in place; rows of x may be strided (a part of qkv)
    head_norm: Callable[[Tensor, Tensor, float], None]
    #: (q [T, H, D], k [T, K, D], v [T, K, D], cos [T, R/2], sin [T, R/2], q_scale [T] | None, kv, slot_mapping [T]): rotate the first R of D dims of q and k
    #: in place, half-split (x1 cos - x2 sin, x2 cos + x1 sin), scale q rows. Where kv.key_center is given, subtract it from rotary k before k is rounded; where
    #: kv.rotation is given, multiply q, k and v by it: both in place, so k holds the rows that are stored. Write k and v to the cache, quantised as
    #: `kv_quant.py` says. q, k and v may be strided parts of one qkv buffer (last dim contiguous).
    rope_write_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, KVLayer, Tensor], None]
    #: (q [T, H, D], k [T, K, D], v [T, K, D], kv, meta, scale, window, out [T, H * D]): causal attention of the new tokens over all kv_lens keys as the cache
    #: holds them, k less kv.key_center, which shifts all scores of a query alike; q, k and v are as `rope_write_kv` left them, and the new k and v are already
    #: in the cache. window > 0: a query at p sees keys p - window + 1 .. p. Query head h reads KV head h * K // H. Where kv.rotation is given, the result is
    #: rotated back.
    attention: Callable[[Tensor, Tensor, Tensor, KVLayer, AttentionMeta, float, int, Tensor], None]
    #: (gate_up [T, 2F], out [T, F]): out = silu(gate_up[:, :F]) * gate_up[:, F:]
    silu_mul: Callable[[Tensor, Tensor], None]
    #: (x [T, M], gate_up [E, 2F, M], down [E, M, F], expert_ids int64 [T, k], expert_weights float32 [T, k], out [T, M]): sum over the k chosen experts
    experts: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
    names: dict[str, str]
    #: (x [T, K], weight [N, K], residual [T, N]) -> whether residual += x @ weight.T was done, rounded once; False, and nothing, where `linear` and
    #: `add_rms_norm` are as fast, and in sets that are not asked for more (None).
    linear_add: Callable[[Tensor, Tensor, Tensor], bool] | None = None
    #: (q, k, v, cos, sin, q_scale, kv, meta, scale, window, out): `rope_write_kv` at meta.slot_mapping and `attention` in fewer launches, where a set has that; q, k
    #: and v are undefined afterwards. Returns what `attention` writes to out: `out`, or another tensor where that saves a copy. None: call one after the other.
    rope_attention: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, KVLayer, AttentionMeta, float, int, Tensor], Tensor] | None = None
    #: (ids int64 [T], table [V, M], weight [M], eps, residual [T, M], out [T, M], zeros int64 | None): residual = table[ids], out = rms_norm(residual), and all of
    #: `zeros` is 0, in one launch. None: operators one after the other.
    embed_norm: Callable[[Tensor, Tensor, Tensor, float, Tensor, Tensor, Tensor | None], None] | None = None
    #: (positions int64 [T], rule, lengths int64 [T] | None): cos and sin, float32 [T, R/2], in one launch. None: torch's operators, one after the other.
    rope_angles: Callable[[Tensor, RopeRule, Tensor | None], tuple[Tensor, Tensor]] | None = None
    #: (scores [T, E], normalise, chosen int64 [T, k], weights float32 [T, k]): the k largest of softmax(scores) in falling order, over their sum if `normalise`.
    #: None: torch does it.
    choose_experts: Callable[[Tensor, bool, Tensor, Tensor], None] | None = None
    #: Products with norms inside, where a set has them; None: norms are operators of their own.
    normed: NormedProducts | None = None
    #: Operators that hand rows on in quarters, where a set has them.
    quarters: Quarters | None = None


@dataclass(frozen=True, slots=True)
class Quarters:
    """4-bit products that read x [T, K] in quarters, and what writes those: number k of row t is number ((k // 128 * 4 + k % 4) * T + t) * 32 + k % 128 // 4
    of the same memory. All rows of a buffer are handed on together."""

    #: (weight as for NormedProducts, dtype of x) -> the numbers of rows for which its product is fastest so; none: it has no such product
    rows_served: Callable[[tuple[Tensor, ...], torch.dtype], range]
    #: The set, but `rms_norm`, `add_rms_norm` and `silu_mul` write quarters and `linear_w4` reads them.
    kernels: Kernels
