"""The reference operators against independent, naive definitions written in float64 loops."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmdeploy.inputs import AttentionMeta
from lmdeploy.kernels import reference
from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.kv_layer import KVLayer, rotation_matrix

Tensor = torch.Tensor

# Largest relative error of one rounding to the type, with room for the order of a float32 sum.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = list(TOLERANCE)
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
pytestmark = pytest.mark.parametrize("device", DEVICES)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def assert_close(found: Tensor, wanted: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    torch.testing.assert_close(found.double().cpu(), wanted.double().cpu(), rtol=factor * TOLERANCE[dtype], atol=factor * TOLERANCE[dtype])


@EACH_DTYPE
@pytest.mark.parametrize(("rows", "inner", "outer"), [(5, 123, 77), (1, 64, 1), (0, 16, 8), (33, 7, 130)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_is_a_dot_product_per_output_plus_bias(device: str, dtype: torch.dtype, rows: int, inner: int, outer: int, with_bias: bool) -> None:
    x, weight = make(rows, inner, dtype=dtype, device=device), make(outer, inner, dtype=dtype, device=device, seed=1) / inner**0.5
    bias = make(outer, dtype=dtype, device=device, seed=2) if with_bias else None
    out = torch.empty(rows, outer, dtype=dtype, device=device)
    REFERENCE.linear(x, weight, bias, out)
    wanted = (x.double().unsqueeze(1) * weight.double()).sum(-1) + (bias.double() if bias is not None else 0)
    assert_close(out, wanted, dtype)


def naive_w4(qweight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The 4-bit weight number by number, as api.py describes it; float64 [N, K]."""
    rows, inner = qweight.shape[0], qweight.shape[1] * 2
    group = inner // scales.shape[1]
    weight = torch.empty(rows, inner, dtype=torch.float64)
    for n in range(rows):
        for k in range(inner):
            byte = int(qweight[n, k // 2])
            q = byte // 16 if k % 2 else byte % 16
            weight[n, k] = (q - float(zeros[n, k // group])) * float(scales[n, k // group])
    return weight


def make_w4(outer: int, inner: int, group: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(outer * inner)
    qweight = torch.randint(0, 256, (outer, inner // 2), generator=generator, dtype=torch.uint8)
    scales = torch.rand(outer, inner // group, generator=generator) / inner**0.5 + 0.01
    zeros = torch.randint(0, 17, (outer, inner // group), generator=generator).float()
    return qweight.to(device), scales.to(device), zeros.to(device)


@EACH_DTYPE
@pytest.mark.parametrize(("rows", "inner", "outer", "group"), [(5, 48, 37, 16), (1, 64, 1, 64), (0, 16, 8, 2), (33, 6, 130, 6)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("limit", [1 << 22, 300])
def test_linear_w4_multiplies_by_the_numbers_that_the_nibbles_stand_for(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, rows: int, inner: int, outer: int, group: int, with_bias: bool, limit: int
) -> None:
    monkeypatch.setattr(reference, "DEQUANTISE_LIMIT", limit)
    x, (qweight, scales, zeros) = make(rows, inner, dtype=dtype, device=device), make_w4(outer, inner, group, device)
    bias = make(outer, dtype=dtype, device=device, seed=2) if with_bias else None
    out = make(rows, outer, dtype=dtype, device=device, seed=3)
    REFERENCE.linear_w4(x, qweight, scales, zeros, bias, out)
    weight = naive_w4(qweight.cpu(), scales.cpu(), zeros.cpu()).to(dtype).double()
    wanted = x.double().cpu() @ weight.t() + (bias.double().cpu() if bias is not None else 0)
    assert_close(out, wanted, dtype, 4)


def test_linear_reads_rows_with_a_stride(device: str) -> None:
    wide = make(5, 40, dtype=torch.float32, device=device)
    weight, out = make(3, 16, dtype=torch.float32, device=device, seed=1), torch.empty(5, 3, device=device)
    REFERENCE.linear(wide[:, 8:24], weight, None, out)
    assert_close(out, wide[:, 8:24].double() @ weight.double().t(), torch.float32, 5)


def naive_rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@EACH_DTYPE
@pytest.mark.parametrize("shape", [(5, 123), (1, 1), (0, 64), (3, 4096)])
def test_rms_norm_divides_by_the_root_mean_square(device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, weight = 30 * make(*shape, dtype=dtype, device=device), make(shape[1], dtype=dtype, device=device, seed=1)
    out = torch.empty_like(x)
    REFERENCE.rms_norm(x, weight, 1e-5, out)
    assert_close(out, naive_rms(x, weight, 1e-5), dtype, 4)


def test_rms_norm_of_large_float16_numbers_does_not_overflow(device: str) -> None:
    x, weight = torch.full((2, 64), 3000.0, dtype=torch.float16, device=device), torch.ones(64, dtype=torch.float16, device=device)
    out = torch.empty_like(x)
    REFERENCE.rms_norm(x, weight, 1e-6, out)
    assert torch.equal(out, torch.ones_like(out))


@EACH_DTYPE
def test_add_rms_norm_updates_the_residual_and_normalises_what_it_stored(device: str, dtype: torch.dtype) -> None:
    x, residual = make(5, 123, dtype=dtype, device=device), make(5, 123, dtype=dtype, device=device, seed=1)
    weight, out, before = make(123, dtype=dtype, device=device, seed=2), torch.empty_like(x), residual.clone()
    REFERENCE.add_rms_norm(x, residual, weight, 1e-6, out)
    assert torch.equal(residual, (before.double() + x.double()).to(dtype))
    assert_close(out, naive_rms(residual, weight, 1e-6), dtype, 4)


@EACH_DTYPE
def test_head_norm_works_in_place_on_a_part_of_a_wider_buffer(device: str, dtype: torch.dtype) -> None:
    qkv, weight = make(5, 7, 20, dtype=dtype, device=device), make(20, dtype=dtype, device=device, seed=1)
    before = qkv.clone()
    REFERENCE.head_norm(qkv[:, 2:5], weight, 1e-6)
    assert_close(qkv[:, 2:5], naive_rms(before[:, 2:5], weight, 1e-6), dtype, 4)
    assert torch.equal(qkv[:, :2], before[:, :2]) and torch.equal(qkv[:, 5:], before[:, 5:])


def naive_rotate(row: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One head [D] by complex multiplication of the pairs (i, i + R/2)."""
    half, out = len(cos), row.double().clone()
    for i in range(half):
        turned = complex(row[i], row[half + i]) * complex(cos[i], sin[i])
        out[i], out[half + i] = turned.real, turned.imag
    return out


@EACH_DTYPE
@pytest.mark.parametrize(("rotary", "with_scale"), [(20, False), (12, True)])
def test_rope_write_kv_turns_pairs_scales_queries_and_fills_the_slots(device: str, dtype: torch.dtype, rotary: int, with_scale: bool) -> None:
    tokens, heads, kv_heads, dim, block_size = 5, 3, 1, 20, 4
    qkv = make(tokens, heads + 2 * kv_heads, dim, dtype=dtype, device=device)
    before, (q, k, v) = qkv.cpu().clone(), qkv.split([heads, kv_heads, kv_heads], dim=1)
    angles = make(tokens, rotary // 2, dtype=torch.float32, device=device, seed=1) * 3
    cos, sin = angles.cos(), angles.sin()
    scale = torch.tensor([1.0, 1.5, 1.0, 0.5, 2.0], device=device) if with_scale else None
    caches = [torch.zeros(6, kv_heads, block_size, dim, dtype=dtype, device=device) for _ in range(2)]
    slots = torch.tensor([3, 21, 0, 22, 9], device=device)
    REFERENCE.rope_write_kv(q, k, v, cos, sin, scale, KVLayer(*caches), slots)
    for t in range(tokens):
        factor = float(scale[t]) if scale is not None else 1.0
        for h in range(heads):
            assert_close(q[t, h], naive_rotate(before[t, h], cos[t].cpu(), sin[t].cpu()) * factor, dtype, 4)
        block, offset = divmod(int(slots[t]), block_size)
        assert_close(caches[0][block, 0, offset], naive_rotate(before[t, heads], cos[t].cpu(), sin[t].cpu()), dtype, 4)
        assert torch.equal(caches[0][block, 0, offset], k[t, 0])
        assert torch.equal(caches[1][block, 0, offset].cpu(), before[t, heads + 1])
    untouched = [s for s in range(24) if s not in slots.tolist()]
    assert all(not caches[0][s // 4, :, s % 4].any() for s in untouched)


@EACH_DTYPE
@pytest.mark.parametrize("rotary", [20, 12, 0])
@pytest.mark.parametrize("rotated", [False, True])
def test_rope_write_kv_takes_the_centre_from_rotary_keys_before_they_are_rounded(device: str, dtype: torch.dtype, rotary: int, rotated: bool) -> None:
    """A bias of 100 would leave bfloat16 keys steps of a half; less their centre they are as fine as others."""
    tokens, dim = 5, 20
    q, k, v = (make(tokens, heads, dim, dtype=dtype, device=device, seed=i) for i, heads in enumerate((3, 2, 2)))
    before, values, queries = k.cpu().clone(), v.clone(), q.clone()
    angles = make(tokens, rotary // 2, dtype=torch.float32, device=device, seed=3) * 3
    center = (make(2, dim, dtype=torch.float32, device=device, seed=4) + torch.tensor([[100.0], [-100.0]], device=device)).contiguous()
    caches = [torch.zeros(1, 2, 8, dim, dtype=dtype, device=device) for _ in range(2)]
    matrix = rotation_matrix(dim) if rotated else None
    layer = KVLayer(*caches, key_center=center, rotation=matrix.to(device) if matrix is not None else None)
    REFERENCE.rope_write_kv(q, k, v, angles.cos(), angles.sin(), None, layer, torch.arange(tokens, device=device))
    for t in range(tokens):
        for h in range(2):
            wanted = naive_rotate(before[t, h], angles[t].cos().cpu(), angles[t].sin().cpu()) - center[h].double().cpu()
            wanted = wanted.to(dtype).double() @ matrix.double() if matrix is not None else wanted
            torch.testing.assert_close(k[t, h].double().cpu(), wanted, rtol=0, atol=4 * TOLERANCE[dtype] * float(wanted.abs().max()))
    assert torch.equal(caches[0][0, :, :tokens].transpose(0, 1), k)
    same = [x.clone() for x in (queries, before.to(device), values)]
    REFERENCE.rope_write_kv(*same, angles.cos(), angles.sin(), None, replace(layer, key_center=None), torch.arange(tokens, device=device))
    assert torch.equal(q, same[0]) and torch.equal(v, same[2]) and not torch.allclose(k, same[1], atol=10), "queries and values have no centre"


@pytest.mark.parametrize("window", [0, 3])
def test_attention_does_not_see_a_centre(device: str, window: int) -> None:
    """Exact for any vector: all scores of a query fall by its product with the centre, and softmax knows differences only."""
    tokens, dim, outs = 9, 16, []
    for size in (0.0, 5.0):
        q, k, v = (make(tokens, heads, dim, dtype=torch.float32, device=device, seed=i) for i, heads in enumerate((4, 2, 2)))
        angles = make(tokens, dim // 2, dtype=torch.float32, device=device, seed=3)
        center = size * make(2, dim, dtype=torch.float32, device=device, seed=4)
        layer = KVLayer(*(torch.zeros(3, 2, 4, dim, device=device) for _ in range(2)), key_center=center)
        REFERENCE.rope_write_kv(q, k, v, angles.cos(), angles.sin(), None, layer, torch.arange(tokens, device=device))
        counts = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, tokens], [tokens], [[0, 1, 2]])]
        meta = AttentionMeta(*counts, torch.arange(tokens, device=device), [tokens], [tokens], 0)
        outs.append(torch.empty(tokens, 4 * dim, device=device))
        REFERENCE.attention(q, k, v, layer, meta, dim**-0.5, window, outs[-1])
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=2e-5)


def naive_attention(q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int) -> Tensor:
    """q [n, H, D] are the last n of keys [L, K, D]; float64, one query and head at a time."""
    count, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=torch.float64)
    for i in range(count):
        place = len(keys) - count + i
        first = max(0, place - window + 1) if window else 0
        for h in range(heads):
            kv_head = h * keys.shape[1] // heads
            scores = torch.tensor([float(q[i, h].double() @ keys[p, kv_head].double()) * scale for p in range(first, place + 1)], dtype=torch.float64)
            share = torch.softmax(scores, 0)
            out[i, h] = sum(share[p - first] * values[p, kv_head].double() for p in range(first, place + 1))
    return out


def paged(lengths: list[int], counts: list[int], kv_heads: int, dim: int, block_size: int, dtype: torch.dtype, device: str):  # type: ignore[no-untyped-def]
    """Keys and values of each sequence, and a shuffled cache that holds them among NaNs."""
    needed = [-(-n // block_size) for n in lengths]
    free = list(range(sum(needed) + 3))
    random.Random(0).shuffle(free)
    caches = [torch.full((len(free), kv_heads, block_size, dim), math.nan, dtype=dtype, device=device) for _ in range(2)]
    contents, table = [], torch.full((len(lengths), max(needed) + 1), 1 << 30, dtype=torch.int32)
    for b, length in enumerate(lengths):
        pair = [make(length, kv_heads, dim, dtype=dtype, device=device, seed=10 * b + i) for i in range(2)]
        contents.append(pair)
        for j in range(needed[b]):
            block = table[b, j] = free.pop()
            for cache, rows in zip(caches, pair, strict=True):
                part = rows[j * block_size : (j + 1) * block_size]
                cache[int(block), :, : len(part)] = part.transpose(0, 1)
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=device)
    slots = torch.zeros(sum(counts), dtype=torch.int64, device=device)
    meta = AttentionMeta(starts, torch.tensor(lengths, dtype=torch.int32, device=device), table.to(device), slots, counts, lengths, sum(n == 1 for n in counts))
    return contents, caches, meta


@EACH_DTYPE
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 24), (3, 1, 20), (5, 5, 8)])
@pytest.mark.parametrize("window", [0, 1, 5])
def test_attention_of_mixed_decode_and_prefill_matches_a_loop_over_keys(
    device: str, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, window: int
) -> None:
    lengths, counts = [1, 9, 4, 7, 13], [1, 1, 1, 7, 5]  # first token, decode, decode on a full block, fresh prefill, chunk
    contents, caches, meta = paged(lengths, counts, kv_heads, dim, 4, dtype, device)
    q = make(sum(counts), heads, dim, dtype=dtype, device=device, seed=99)
    empty = torch.empty(sum(counts), kv_heads, dim, dtype=dtype, device=device)
    out = torch.full((sum(counts), heads * dim), math.nan, dtype=dtype, device=device)
    REFERENCE.attention(q, empty, empty, KVLayer(*caches), meta, dim**-0.5, window, out)
    start = 0
    for (keys, values), count in zip(contents, counts, strict=True):
        wanted = naive_attention(q[start : start + count].cpu(), keys.cpu(), values.cpu(), dim**-0.5, window)
        assert_close(out[start : start + count], wanted.flatten(1), dtype, 4)
        start += count


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_attention_of_any_batch_matches_the_loop(device: str, data: st.DataObject) -> None:
    pairs = data.draw(st.lists(st.integers(1, 14).flatmap(lambda n: st.tuples(st.just(n), st.sampled_from([1, n, max(1, n // 2)]))), min_size=1, max_size=5))
    pairs.sort(key=lambda pair: pair[1] != 1)  # decode rows first
    lengths, counts = [n for n, _ in pairs], [n for _, n in pairs]
    block_size, window, heads = data.draw(st.sampled_from([1, 3, 8])), data.draw(st.sampled_from([0, 2, 6])), data.draw(st.sampled_from([(2, 1), (2, 2)]))
    contents, caches, meta = paged(lengths, counts, heads[1], 6, block_size, torch.float32, device)
    q, out = make(sum(counts), heads[0], 6, dtype=torch.float32, device=device), torch.empty(sum(counts), heads[0] * 6, device=device)
    REFERENCE.attention(q, q[:, : heads[1]], q[:, : heads[1]], KVLayer(*caches), meta, 0.4, window, out)
    start = 0
    for (keys, values), count in zip(contents, counts, strict=True):
        wanted = naive_attention(q[start : start + count].cpu(), keys.cpu(), values.cpu(), 0.4, window)
        assert_close(out[start : start + count], wanted.flatten(1), torch.float32, 4)
        start += count


@pytest.mark.parametrize("limit", [1, 9 * 16, 1 << 24])
def test_decoding_in_groups_of_any_size_is_the_same(device: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "GATHER_LIMIT", limit)
    lengths = [3, 9, 1, 4, 8, 2]
    contents, caches, meta = paged(lengths, [1] * 6, 2, 8, 4, torch.float32, device)
    q, out = make(6, 4, 8, dtype=torch.float32, device=device), torch.empty(6, 32, device=device)
    REFERENCE.attention(q, q[:, :2], q[:, :2], KVLayer(*caches), meta, 0.3, 0, out)
    for row, (keys, values) in enumerate(contents):
        assert_close(out[row : row + 1], naive_attention(q[row : row + 1].cpu(), keys.cpu(), values.cpu(), 0.3, 0).flatten(1), torch.float32, 4)


def test_attention_reads_queries_that_are_a_part_of_qkv(device: str) -> None:
    contents, caches, meta = paged([6], [3], 1, 8, 4, torch.float32, device)
    qkv, out = make(3, 4, 8, dtype=torch.float32, device=device), torch.empty(3, 16, device=device)
    REFERENCE.attention(qkv[:, :2], qkv[:, 2:3], qkv[:, 3:], KVLayer(*caches), meta, 0.3, 0, out)
    assert_close(out, naive_attention(qkv[:, :2].cpu(), contents[0][0].cpu(), contents[0][1].cpu(), 0.3, 0).flatten(1), torch.float32, 4)


@EACH_DTYPE
@pytest.mark.parametrize(("rows", "width"), [(5, 123), (1, 1), (0, 8)])
def test_silu_mul_gates_the_second_half_with_the_first(device: str, dtype: torch.dtype, rows: int, width: int) -> None:
    gate_up, out = 4 * make(rows, 2 * width, dtype=dtype, device=device), torch.empty(rows, width, dtype=dtype, device=device)
    REFERENCE.silu_mul(gate_up, out)
    gate, up = gate_up[:, :width].double(), gate_up[:, width:].double()
    assert_close(out, gate / (1 + torch.exp(-gate)) * up, dtype, 4)


@EACH_DTYPE
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_experts_sum_the_chosen_mlps_by_weight(device: str, dtype: torch.dtype, rows: int) -> None:
    num_experts, top_k, width, inner = 5, 2, 24, 36
    x = make(rows, width, dtype=dtype, device=device)
    gate_up = make(num_experts, 2 * inner, width, dtype=dtype, device=device, seed=1) / width**0.5
    down = make(num_experts, width, inner, dtype=dtype, device=device, seed=2) / inner**0.5
    generator = torch.Generator().manual_seed(3)
    ids = (
        torch.stack([torch.randperm(num_experts - 1, generator=generator)[:top_k] for _ in range(rows)]).to(device)
        if rows
        else torch.empty(0, 2).long().to(device)
    )
    weights = torch.rand(rows, top_k, generator=generator).to(device)
    out = torch.empty_like(x)
    REFERENCE.experts(x, gate_up, down, ids, weights, out)
    wanted = torch.zeros(rows, width, dtype=torch.float64)
    for t in range(rows):
        for j in range(top_k):
            both = gate_up[ids[t, j]].double().cpu() @ x[t].double().cpu()
            hidden = both[:inner] / (1 + torch.exp(-both[:inner])) * both[inner:]
            wanted[t] += float(weights[t, j]) * (down[ids[t, j]].double().cpu() @ hidden)
    assert_close(out, wanted, dtype, 4)


def test_every_operator_has_a_name(device: str) -> None:
    operators = {name for name in REFERENCE.__slots__ if getattr(REFERENCE, name) is not None}  # a set may lack what others are composed of
    assert set(REFERENCE.names) == operators - {"names"}
