"""`attention` over the paged cache: sequences with one new token by `decode` or `decode_direct`, the others by `extend`, whole long prompts by cuDNN.

A row's bits depend neither on the batch nor on how a prompt was cut into chunks, within a kernel: those of cuDNN, of `extend`, and of `decode` for one token
alone differ.
Nothing here waits for the device, and no grid depends on lengths: one CUDA graph serves every context.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmdeploy.inputs import AttentionMeta
from lmdeploy.kernels.triton_kernels import decode_direct, decode_row16
from lmdeploy.kernels.triton_kernels.decode import Rope, decode
from lmdeploy.kernels.triton_kernels.extend import extend
from lmdeploy.kernels.triton_kernels.kv_write import rope_write_kv
from lmdeploy.kv_layer import KVLayer

Tensor = torch.Tensor
#: prompts of a step that cuDNN computes, one call each, the fewest tokens that are worth one, and what their number is rounded up to: cuDNN makes a plan for
#: each length that it meets, which takes far longer than computing it
MOST_PROMPTS, SHORTEST_PROMPT, ROUNDED = 8, 512, 512


def _suits_cudnn(q: Tensor, kv: KVLayer, meta: AttentionMeta, window: int) -> bool:
    """Whether all that is not decoding are a few long prompts without history, whose keys need not come from the cache."""
    lens, keys = meta.query_lens[meta.num_decode :], meta.kv_lens_host[meta.num_decode :]
    simple = kv.plain and window <= 0 and q.dtype is not torch.float32 and q.shape[2] in (64, 128) and q.is_cuda
    return simple and 0 < len(lens) <= MOST_PROMPTS and lens == keys and min(lens) >= SHORTEST_PROMPT and torch.backends.cudnn.is_available()


def _whole_prompts(q: Tensor, k: Tensor, v: Tensor, meta: AttentionMeta, scale: float, out: Tensor) -> Tensor:
    """cuDNN's attention for each prompt: about twice the rate of the tiles here (benchmark/RESULTS.md). Returns where the result is: `out`, or its own tensor."""
    start, lens = meta.num_decode, meta.query_lens[meta.num_decode :]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        for count in lens:
            rows = slice(start, start + count)
            heads = [_rounded(part[rows]).transpose(0, 1).unsqueeze(0) for part in (q, k, v)]
            found = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
            result = found.squeeze(0).transpose(0, 1)[:count].flatten(1)  # laid out as the queries are: a view
            if count == out.shape[0]:
                return result
            out[rows].copy_(result)
            start += count
    return out


def _rounded(part: Tensor) -> Tensor:
    """A prompt's heads [n, H, D] as they are where n is round, else copied and followed by zeros: no token sees what comes after it, but NaN there would spoil
    its sums."""
    count = part.shape[0]
    if count % ROUNDED == 0:
        return part
    whole = part.new_empty((-(-count // ROUNDED) * ROUNDED, *part.shape[1:]))
    whole[:count].copy_(part)
    whole[count:].zero_()
    return whole


def attention(q: Tensor, k: Tensor, v: Tensor, kv: KVLayer, meta: AttentionMeta, scale: float, window: int, out: Tensor) -> None:
    """Causal attention of the new tokens of each sequence over its cached keys; see `api.Kernels`. q [T, H, D], out [T, H * D]."""
    assert q.shape[2] % 2 == 0 and q.stride(2) == 1 and out.stride(1) == 1 and meta.block_table.stride(1) == 1
    assert kv.key.is_contiguous() and kv.value.is_contiguous()
    found = _attend(q, k, v, kv, meta, scale, window, out)
    if found is not out:
        out.copy_(found)


def _decode(q: Tensor, kv: KVLayer, meta: AttentionMeta, scale: float, window: int, out: Tensor, rope: Rope | None = None) -> None:
    """A kernel for a layer's format and heads, and perhaps another for a row alone, whose products have their own, too: else a row's bits do not depend on the batch."""
    kernel = decode_direct.decode if decode_direct.serves(q, kv) else decode_row16.decode if decode_row16.serves(q, kv, meta) else decode
    kernel(q, kv, meta, scale, window, out, rope)


def _attend(q: Tensor, k: Tensor, v: Tensor, kv: KVLayer, meta: AttentionMeta, scale: float, window: int, out: Tensor) -> Tensor:
    """`attention`; returns where the result is."""
    if meta.num_decode:
        _decode(q, kv, meta, scale, window, out)
    if meta.kv_lens.shape[0] > meta.num_decode:
        if _suits_cudnn(q, kv, meta, window):
            return _whole_prompts(q, k, v, meta, scale, out)
        extend(q, kv, meta, scale, window, out)
    return out


def rope_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, q_scale: Tensor | None, kv: KVLayer, meta: AttentionMeta, scale: float, window: int, out: Tensor
) -> Tensor:
    """`rope_write_kv` and `attention`, in one launch where every sequence decodes: see `api.Kernels`."""
    turns_by_signs = kv.rotation is None or q.shape[2] & (q.shape[2] - 1) == 0  # other rotations take more registers than a program of `decode` has
    if turns_by_signs and meta.num_decode == meta.kv_lens.shape[0] == q.shape[0]:
        _decode(q, kv, meta, scale, window, out, Rope(k, v, cos, sin, q_scale))
        return out
    rope_write_kv(q, k, v, cos, sin, q_scale, kv, meta.slot_mapping)
    return _attend(q, k, v, kv, meta, scale, window, out)
