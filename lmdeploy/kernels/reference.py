"""The operators in plain torch, on any device and dtype: the definition of each, the test oracle, and the `pytorch` kernel set.

Written for clarity first. Everything but the matrix products is computed in float32 (torch accumulates those in float32 itself)
and rounded once when written to `out`. Nothing here may depend on a device, and nothing reads past a sequence's own KV blocks:
the pool is uninitialised memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from lmdeploy.inputs import AttentionMeta
from lmdeploy.kernels.api import Kernels
from lmdeploy.kernels.kv_quant import FP8_MAX, dequantise_rows, divided, quantise_rows
from lmdeploy.kv_layer import KVLayer, Width

Tensor = torch.Tensor

#: Numbers that decoding gathers at once for keys, and again for values: 64 MiB each in float32.
GATHER_LIMIT = 1 << 24
#: Numbers of a quantised weight that are written out at once: 16 MiB in float32.
DEQUANTISE_LIMIT = 1 << 22

Linear = Callable[[Tensor, Tensor, Tensor | None, Tensor], None]
LinearSilu = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor], None]
LinearW4 = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor], None]
LinearW8 = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], None]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x @ weight.T + bias. x [T, K], weight [N, K], bias [N], out [T, N]."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def dequantise_w4(qweight: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    """(q - zero) * scale, rounded once to `dtype`. qweight uint8 [N, K/2], low half first; scales float16 and zeros uint8, or both float32, [N, K/g]; result [N, K]."""
    numbers = torch.stack((qweight & 15, qweight >> 4), dim=-1)
    grouped = numbers.view(*scales.shape, -1).float()  # [N, K/g, g]
    return grouped.sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1)).flatten(1).to(dtype)


def _row_parts(x: Tensor, rows: int) -> Iterator[slice]:
    """The rows of a weight [N, K] in runs of at most DEQUANTISE_LIMIT numbers."""
    step = max(1, DEQUANTISE_LIMIT // x.shape[1])
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _multiply_parts(product: Linear, x: Tensor, weight: Callable[[slice], Tensor], bias: Tensor | None, out: Tensor) -> None:
    """`product` with a weight of which only some rows are written out at a time: `weight(rows)` makes them."""
    for part in _row_parts(x, out.shape[1]):
        whole = part.stop - part.start == out.shape[1]
        result = out if whole else out.new_empty(out.shape[0], part.stop - part.start)
        product(x, weight(part), bias[part] if bias is not None else None, result)
        if not whole:
            out[:, part] = result


def dequantising(product: Linear) -> LinearW4:
    """`linear_w4` by a dense product of weights that are written out in the type of x, a bounded number of rows at a time."""

    def run(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, out: Tensor) -> None:
        _multiply_parts(product, x, lambda rows: dequantise_w4(qweight[rows], scales[rows], zeros[rows], x.dtype), bias, out)

    return run


linear_w4 = dequantising(linear)


def dequantise_w8(qweight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """q * scale, rounded once to `dtype`. qweight int8 or float8_e4m3fn [N, K], scales float32 [N, K/g]; result [N, K]."""
    return qweight.float().view(*scales.shape, -1).mul_(scales.unsqueeze(-1)).flatten(1).to(dtype)


def dequantising_w8(product: Linear) -> LinearW8:
    """`linear_w8` by a dense product of weights that are written out in the type of x, a bounded number of rows at a time."""

    def run(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor) -> None:
        _multiply_parts(product, x, lambda rows: dequantise_w8(qweight[rows], scales[rows], x.dtype), bias, out)

    return run


linear_w8 = dequantising_w8(linear)


def quantise_activations(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(the numbers xq [T, K] as float32, sx [T, 1]) with x ~ xq * sx, one scale a row. `dtype` is int8 or float8_e4m3fn; a row of zeros has scale 1."""
    x = x.float()
    largest = 127 if dtype is torch.int8 else FP8_MAX
    scale = divided(x.abs().amax(-1, keepdim=True), largest)
    scale = torch.where(scale == 0, 1.0, scale)
    numbers = (x / scale).clamp_(-largest, largest)  # beyond them only where the scale is so small that it lost bits
    return (numbers.round() if dtype is torch.int8 else numbers.to(dtype).float()), scale


def linear_w8a8(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = (xq @ qweight.T) * sx * scales + bias. x [T, K], qweight [N, K], scales float32 [N, 1]; sums in float64, exact for int8."""
    numbers, scale = quantise_activations(x, qweight.dtype)
    numbers = numbers.double()
    for part in _row_parts(x, qweight.shape[0]):
        sums = (numbers @ qweight[part].double().t()).float().mul_(scale).mul_(scales[part].view(1, -1))
        out[:, part] = sums if bias is None else sums.add_(bias[part].float())


def _normalise(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight. x and out [T, M], weight [M]."""
    out.copy_(_normalise(x, eps).mul_(weight.float()))


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """residual += x, rounded to its dtype; out = rms_norm(residual). x, residual and out [T, M]."""
    residual.add_(x)
    rms_norm(residual, weight, eps, out)


def head_norm(x: Tensor, weight: Tensor, eps: float) -> None:
    """RMSNorm of each head in place. x [T, H, D], rows may be strided; weight [D]."""
    rms_norm(x, weight, eps, x)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, scale: Tensor | None, center: Tensor | None = None) -> None:
    """Half-split rotation of the first R dims of x [T, H, D] in place; `scale` [T] multiplies whole rows and `center` [H, D] leaves them, past R too."""
    half = cos.shape[1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [T, 1, R/2]
    x1, x2 = x[..., :half].float(), x[..., half : 2 * half].float()
    first, second = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    if scale is not None:
        factor = scale.view(-1, 1, 1)
        first, second = first * factor, second * factor
        x[..., 2 * half :] = x[..., 2 * half :].float() * factor
    if center is not None:
        first, second = first - center[:, :half], second - center[:, half : 2 * half]
        x[..., 2 * half :] = x[..., 2 * half :].float() - center[:, 2 * half :]
    x[..., :half] = first
    x[..., half : 2 * half] = second


def rope_write_kv(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, q_scale: Tensor | None, kv: KVLayer, slot_mapping: Tensor) -> None:
    """Rotate q [T, H, D] and k [T, K, D] in place, scale the rows of q, write k and v to their slots of the cache; see `api.Kernels`."""
    _rotate(q, cos, sin, q_scale)
    _rotate(k, cos, sin, None, kv.key_center)
    if kv.rotation is not None:
        for x in (q, k, v):
            x.copy_(x.float() @ kv.rotation)
    block_size = kv.key.shape[2]
    block = torch.div(slot_mapping, block_size, rounding_mode="floor")
    offset = slot_mapping - block * block_size
    _write_rows(k, kv.key, kv.key_scales, kv.key_width, block, offset)
    _write_rows(v, kv.value, kv.value_scales, kv.value_width, block, offset)


def _write_rows(x: Tensor, cache: Tensor, scales: Tensor | None, width: Width, block: Tensor, offset: Tensor) -> None:
    """Rows x [T, K, D] to the slots (block, offset) of a cache."""
    if scales is None:
        cache[block, :, offset] = x
        return
    numbers, pairs = quantise_rows(x, width)
    scales[block, :, offset] = pairs
    if width == "fp8":  # torch cannot scatter float8
        cache, numbers = cache.view(torch.uint8), numbers.view(torch.uint8)
    cache[block, :, offset] = numbers


def _read_blocks(kv: KVLayer, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the given blocks [...] as float32 [..., K, S, D]."""
    stored = ((kv.key, kv.key_scales, kv.key_width), (kv.value, kv.value_scales, kv.value_width))
    keys, values = (dequantise_rows(_pick_blocks(cache, blocks), scales[blocks] if scales is not None else None, width) for cache, scales, width in stored)
    return keys, values


def _pick_blocks(cache: Tensor, blocks: Tensor) -> Tensor:
    """cache[blocks]; torch cannot gather float8."""
    return cache.view(torch.uint8)[blocks].view(cache.dtype) if cache.dtype is torch.float8_e4m3fn else cache[blocks]


def _line_up(rows: Tensor, skip: int, length: int, group: int) -> Tensor:
    """Rows skip..skip + length of blocks [n, K, S, D] as [1, H, length, D], H = K * group."""
    rows = rows.transpose(0, 1).flatten(1, 2)[:, skip : skip + length]
    return rows.repeat_interleave(group, dim=0).unsqueeze(0) if group > 1 else rows.unsqueeze(0)


def _turned_back(result: Tensor, kv: KVLayer) -> Tensor:
    """Weighted sums [..., D] of values, out of the cache's rotation."""
    return result if kv.rotation is None else result @ kv.rotation


def _mask(query_len: int, kv_len: int, first_key: int, window: int, device: torch.device) -> Tensor:
    """bool [query_len, kv_len - first_key], True = visible."""
    query = torch.arange(kv_len - query_len, kv_len, device=device).unsqueeze(1)
    key = torch.arange(first_key, kv_len, device=device)
    visible = key <= query
    return visible & (key > query - window) if window > 0 else visible


def _extend(q: Tensor, kv: KVLayer, meta: AttentionMeta, row: int, start: int, scale: float, window: int, out: Tensor) -> None:
    """Attention of sequence `row`, whose new tokens begin at row `start` of q and out."""
    num_heads, head_dim = q.shape[1:]
    group, block_size = num_heads // kv.key.shape[1], kv.key.shape[2]
    query_len, kv_len = meta.query_lens[row], meta.kv_lens_host[row]
    oldest = max(0, kv_len - query_len - window + 1) if window > 0 else 0  # no query sees keys before it
    first_block = oldest // block_size
    blocks = meta.block_table[row, first_block : -(-kv_len // block_size)]
    skip = oldest - first_block * block_size
    keys, values = (_line_up(rows, skip, kv_len - oldest, group) for rows in _read_blocks(kv, blocks))
    queries = q[start : start + query_len].transpose(0, 1).unsqueeze(0).float()  # [1, H, query_len, D]
    # One query sees all keys that were gathered; a fresh prompt inside the window is plainly causal; only the rest needs a mask.
    causal = 1 < query_len == kv_len and (window <= 0 or kv_len <= window)
    mask = None if query_len == 1 or causal else _mask(query_len, kv_len, oldest, window, q.device)
    result = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal, scale=scale)
    out[start : start + query_len].view(query_len, num_heads, head_dim).copy_(_turned_back(result[0].transpose(0, 1), kv))


def _decode(q: Tensor, kv: KVLayer, meta: AttentionMeta, rows: slice, scale: float, window: int, out: Tensor) -> None:
    """Attention of several sequences with one new token each, padded to the longest of them.

    The heads that share a KV head take the place of query positions, so that keys are not repeated.
    """
    num_kv_heads, block_size = kv.key.shape[1:3]
    used = -(-max(meta.kv_lens_host[rows]) // block_size)
    lengths = meta.kv_lens[rows].unsqueeze(1)  # [n, 1]
    place = torch.arange(used * block_size, device=q.device)
    visible = place < lengths  # [n, L]
    if window > 0:
        visible &= place >= lengths - window
    table = meta.block_table[rows, :used].masked_fill(place[::block_size] >= lengths, 0)  # entries past the sequence are undefined
    hidden = ~visible[:, None, :, None]  # what lies there may be NaN, which no mask removes
    keys, values = (rows.transpose(1, 2).flatten(2, 3).masked_fill_(hidden, 0) for rows in _read_blocks(kv, table))  # [n, K, L, D]
    queries = q[rows].reshape(-1, num_kv_heads, q.shape[1] // num_kv_heads, q.shape[2]).float()  # [n, K, H / K, D]
    result = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible[:, None, None], scale=scale)
    out[rows].view(queries.shape).copy_(_turned_back(result, kv))


def _decode_groups(lengths: list[int], row_size: int) -> list[slice]:
    """Consecutive sequences whose padded keys (longest x row_size numbers each) stay within GATHER_LIMIT together."""
    groups, first, longest = [], 0, 0
    for i, length in enumerate(lengths):
        if i > first and max(longest, length) * (i + 1 - first) * row_size > GATHER_LIMIT:
            groups.append(slice(first, i))
            first, longest = i, 0
        longest = max(longest, length)
    return [*groups, slice(first, len(lengths))] if lengths else groups


def attention(q: Tensor, k: Tensor, v: Tensor, kv: KVLayer, meta: AttentionMeta, scale: float, window: int, out: Tensor) -> None:
    """Causal attention of the new tokens of each sequence over its cached keys. q [T, H, D], out [T, H * D].

    Sequences with one new token are computed together, the others one at a time.
    """
    row_size = kv.key.shape[1] * q.shape[2]
    for rows in _decode_groups(meta.kv_lens_host[: meta.num_decode], row_size):
        if rows.stop - rows.start == 1:  # nothing to pad, so nothing to mask
            _extend(q, kv, meta, rows.start, rows.start, scale, window, out)
        else:
            _decode(q, kv, meta, rows, scale, window, out)
    start = meta.num_decode
    for row in range(meta.num_decode, len(meta.query_lens)):
        _extend(q, kv, meta, row, start, scale, window, out)
        start += meta.query_lens[row]


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """out = silu(gate_up[:, :F]) * gate_up[:, F:]. gate_up [T, 2F], out [T, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    out.copy_(F.silu(gate.float()).mul_(up))


def gated(product: Linear, silu: Callable[[Tensor, Tensor], None]) -> LinearSilu:
    """`linear_silu` of the two operators that it is made of."""

    def linear_silu(x: Tensor, weight: Tensor, bias: Tensor | None, both: Tensor, out: Tensor) -> None:
        product(x, weight, bias, both)
        silu(both, out)

    return linear_silu


def experts(x: Tensor, gate_up: Tensor, down: Tensor, expert_ids: Tensor, expert_weights: Tensor, out: Tensor) -> None:
    """out = sum over the chosen experts of weight * down(silu_mul(gate_up(x))): a loop over the experts that have tokens.

    x and out [T, M], gate_up [E, 2F, M], down [E, M, F], expert_ids and expert_weights [T, k].
    """
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for expert in torch.unique(expert_ids).tolist():
        token, choice = torch.where(expert_ids == expert)
        both = x[token] @ gate_up[expert].t()  # [n, 2F]
        hidden = both.new_empty(both.shape[0], both.shape[1] // 2)
        silu_mul(both, hidden)
        share = expert_weights[token, choice].float().unsqueeze(1)
        total.index_add_(0, token, (hidden @ down[expert].t()).float().mul_(share))
    out.copy_(total)


_OPERATORS = {
    "linear": linear, "linear_silu": gated(linear, silu_mul), "linear_w4": linear_w4, "linear_w8": linear_w8, "linear_w8a8": linear_w8a8,
    "rms_norm": rms_norm, "add_rms_norm": add_rms_norm, "head_norm": head_norm, "rope_write_kv": rope_write_kv, "attention": attention,
    "silu_mul": silu_mul, "experts": experts,
}  # fmt: skip
REFERENCE = Kernels(**_OPERATORS, names=dict.fromkeys(_OPERATORS, "torch"))  # type: ignore[arg-type]
