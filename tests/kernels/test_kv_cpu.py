"""Quantised and rotated caches in the native CPU kernels: what they write is what `kv_quant` defines, what they read agrees with the reference, and
a row's bits depend on nothing but its own sequence. Unwritten slots hold random numbers with NaN scales."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmdeploy.inputs import AttentionMeta
from lmdeploy.kernels.api import Kernels
from lmdeploy.kernels.build import NativeBuild
from lmdeploy.kernels.cpu import native_kernels
from lmdeploy.kernels.kv_quant import dequantise_rows, quantise_rows
from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.kv_layer import KVFormat, KVLayer, rotation_matrix
from tests.kernels.test_cpu import EACH_DTYPE, Pool, empty, make

Tensor = torch.Tensor

POLICIES = {
    "8": KVFormat("8", "8"), "4": KVFormat("4", "4"), "8 rotated": KVFormat("8", "8", True), "4 rotated": KVFormat("4", "4", True),
    "k8v4": KVFormat("8", "4", True), "k4v8": KVFormat("4", "8"), "k16v4": KVFormat("16", "4", True), "k8v16": KVFormat("8", "16"), "16 rotated": KVFormat("16", "16", True),
}  # fmt: skip
EACH_POLICY = pytest.mark.parametrize("policy", POLICIES)
FEW_POLICIES = pytest.mark.parametrize("policy", ["8", "4 rotated", "k8v4", "k4v8"])  # each way to read keys and values


@pytest.fixture(scope="module")
def kernels(build: NativeBuild) -> Kernels:
    return native_kernels(build, threads=2)


class QuantisedPool(Pool):
    """The same sequences in a cache of another format, each part in a frame of its own."""

    def __init__(self, kv_lens: list[int], kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, fmt: KVFormat, seed: int = 0) -> None:
        super().__init__(kv_lens, kv_heads, head_dim, block_size, dtype, seed)
        blocks = self.cache.shape[1]
        memory = torch.empty(fmt.layer_bytes(blocks, kv_heads, block_size, head_dim, dtype), dtype=torch.uint8)
        memory.random_(0, 256, generator=torch.Generator().manual_seed(seed))
        self.layer = fmt.layer(memory, blocks, kv_heads, block_size, head_dim, dtype)
        written = ~self.cache[0, ..., 0].isnan()
        parts = ((self.layer.key, self.layer.key_scales, fmt.key), (self.layer.value, self.layer.value_scales, fmt.value))
        for source, (rows, scales, width) in zip(self.cache, parts, strict=True):
            if scales is None:
                rows.copy_(source)
                continue
            scales.fill_(float("nan"))
            numbers, pairs = quantise_rows(source[written], width)
            rows[written], scales[written] = numbers, pairs


def attend(kernels: Kernels, pool: QuantisedPool, q: Tensor, meta: AttentionMeta, window: int = 0) -> Tensor:
    out = empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype)
    kernels.attention(q, q, q, pool.layer, meta, q.shape[2] ** -0.5, window, out)
    return out


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Errors relative to the largest result."""
    assert not found.isnan().any() and not wanted.isnan().any()
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=tolerance * wanted.abs().max().item())


# float32: the order of sums. bfloat16: keys, values, weights and the result are each rounded once, 2^-9 of the largest together with the sums' averaging.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2}


# ---- rope_write_kv


def written(
    kernels: Kernels, fmt: KVFormat, head_dim: int, dtype: torch.dtype, poison: int | None = None, center: Tensor | None = None
) -> tuple[Tensor, KVLayer, Tensor]:
    """qkv [9, 8, D] after a call, the cache, and the slots; token `poison` has a NaN in its last KV head's key. `center` float32 [2, D] leaves the keys."""
    tokens, heads, kv_heads, block_size = 9, 4, 2, 7
    qkv = 3 * make(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype) + 1
    if poison is not None:
        qkv[poison, heads + kv_heads - 1, 3] = float("nan")
    layer = fmt.layer(torch.zeros(fmt.layer_bytes(5, kv_heads, block_size, head_dim, dtype), dtype=torch.uint8), 5, kv_heads, block_size, head_dim, dtype)
    layer = replace(layer, key_center=center)
    slots = torch.randperm(5 * block_size, generator=torch.Generator().manual_seed(3))[:tokens]
    angles = make(tokens, head_dim // 4, seed=1) * 3
    q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
    kernels.rope_write_kv(q, k, v, angles.cos(), angles.sin(), make(tokens, seed=2).abs(), layer, slots)
    return qkv, layer, slots


def rows_at(part: Tensor, slots: Tensor) -> Tensor:
    """Rows [T, K, ...] of a cache [N, K, S, ...]."""
    return part.transpose(1, 2).flatten(0, 1)[slots]


@EACH_DTYPE
@pytest.mark.parametrize("policy", ["8", "4", "8 rotated", "4 rotated", "k16v4"])
@pytest.mark.parametrize("head_dim", [16, 20, 64, 80, 96, 128, 256])
def test_rows_are_rotated_as_the_reference_does_and_stored_as_quantise_rows_says(kernels: Kernels, dtype: torch.dtype, policy: str, head_dim: int) -> None:
    fmt = POLICIES[policy]
    qkv, layer, slots = written(kernels, fmt, head_dim, dtype)
    wanted, _, _ = written(REFERENCE, fmt, head_dim, dtype)
    assert_close(qkv, wanted, 1e-6 if dtype is torch.float32 else 2**-8)
    assert_stored(qkv, layer, slots, fmt)


def assert_stored(qkv: Tensor, layer: KVLayer, slots: Tensor, fmt: KVFormat) -> None:
    """The cache holds k and v as they are in qkv now, exactly."""
    for heads, rows, scales, width in ((slice(4, 6), layer.key, layer.key_scales, fmt.key), (slice(6, 8), layer.value, layer.value_scales, fmt.value)):
        if scales is None:
            assert torch.equal(rows_at(rows, slots), qkv[:, heads])
            continue
        numbers, pairs = quantise_rows(qkv[:, heads], width)
        assert torch.equal(rows_at(rows, slots), numbers) and torch.equal(rows_at(scales, slots), pairs)


@EACH_DTYPE
@pytest.mark.parametrize(("policy", "head_dim"), [*((p, d) for p in ("16", "8", "4 rotated", "k16v4") for d in (16, 20, 64, 80, 256)), ("16", 320)])
def test_centres_leave_rotary_keys_and_nothing_else_as_in_the_reference(kernels: Kernels, dtype: torch.dtype, policy: str, head_dim: int) -> None:
    fmt, center = POLICIES.get(policy, KVFormat()), 40 * make(2, head_dim, seed=8)
    qkv, layer, slots = written(kernels, fmt, head_dim, dtype, center=center)
    wanted, _, _ = written(REFERENCE, fmt, head_dim, dtype, center=center)
    assert_close(qkv[:, 4:6], wanted[:, 4:6], 1e-6 if dtype is torch.float32 else 2**-8)
    assert_stored(qkv, layer, slots, fmt)
    without, _, _ = written(kernels, fmt, head_dim, dtype)
    assert torch.equal(qkv[:, :4], without[:, :4]) and torch.equal(qkv[:, 6:], without[:, 6:])
    assert ((without - qkv)[:, 4:6].float().abs().amax(-1) > 20).all()


def test_centres_with_gaps_go_to_the_reference(best_build: NativeBuild) -> None:
    center, fmt = make(64, 2, seed=8).t(), POLICIES["4 rotated"]
    found, wanted = (written(chosen, fmt, 64, torch.float32, center=center) for chosen in (native_kernels(best_build, 1), REFERENCE))
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1].key, wanted[1].key)


@EACH_POLICY
def test_nothing_but_the_slots_is_written(kernels: Kernels, policy: str) -> None:
    _, layer, slots = written(kernels, POLICIES[policy], 64, torch.bfloat16)
    others = torch.ones(35, dtype=torch.bool)
    others[slots] = False
    for part in (layer.key, layer.value, layer.key_scales, layer.value_scales):
        assert part is None or not part.transpose(1, 2).flatten(0, 1)[others].any()


@EACH_DTYPE
@pytest.mark.parametrize("width", ["8", "4"])
def test_extreme_rows_are_stored_as_quantise_rows_says(kernels: Kernels, dtype: torch.dtype, width: str) -> None:
    rows = torch.stack([torch.full((64,), x) for x in (0.0, -2.5, 1e30, 1e-38)] + [make(64, seed=i) * 10.0**i for i in range(-20, 20, 4)]).to(dtype)
    rows[1, 5], rows[2, 7], rows[0, 9] = float("inf"), float("-inf"), float("nan")
    v = rows.view(-1, 1, 64)
    fmt = KVFormat(width, width)  # type: ignore[arg-type]
    layer = fmt.layer(torch.zeros(fmt.layer_bytes(1, 1, 32, 64, dtype), dtype=torch.uint8), 1, 1, 32, 64, dtype)
    table, slots = torch.zeros(len(rows), 0), torch.arange(len(rows))
    kernels.rope_write_kv(v.clone(), v.clone(), v, table, table, None, layer, slots)
    numbers, pairs = quantise_rows(v, width)  # type: ignore[arg-type]
    assert layer.value_scales is not None
    assert torch.equal(rows_at(layer.value, slots), numbers)
    torch.testing.assert_close(rows_at(layer.value_scales, slots), pairs, rtol=0, atol=0, equal_nan=True)


# ---- attention


@EACH_DTYPE
@EACH_POLICY
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "block_size", "window"),
    [
        (16, 4, 2, 64, 0), (20, 6, 1, 16, 5), (64, 2, 2, 7, 100), (64, 6, 1, 16, 0), (80, 4, 2, 64, 5), (96, 2, 2, 7, 0),
        (128, 4, 2, 64, 0), (128, 40, 2, 16, 100), (256, 6, 1, 16, 5),
    ],
)  # fmt: skip
def test_attention_agrees_with_the_reference(
    kernels: Kernels, dtype: torch.dtype, policy: str, head_dim: int, heads: int, kv_heads: int, block_size: int, window: int
) -> None:
    pool = QuantisedPool([1, 200, 5, 150, 70], kv_heads, head_dim, block_size, dtype, POLICIES[policy])
    query_lens = [1, 1, 5, 60, 70]
    q, meta = make(sum(query_lens), heads, head_dim, dtype=dtype), pool.meta(query_lens)
    assert_close(attend(kernels, pool, q, meta, window), attend(REFERENCE, pool, q, meta, window), TOLERANCE[dtype])


@EACH_DTYPE
@FEW_POLICIES
@pytest.mark.parametrize(("head_dim", "window"), [(64, 0), (80, 50), (128, 50), (16, 0)])
def test_attention_gives_the_same_bits_decoded_prefilled_or_in_chunks(kernels: Kernels, dtype: torch.dtype, policy: str, head_dim: int, window: int) -> None:
    length, heads = 300, 6
    pool, q = QuantisedPool([length], 2, head_dim, 16, dtype, POLICIES[policy]), make(length, heads, head_dim, dtype=dtype, seed=5)
    whole = attend(kernels, pool, q, pool.meta([length]), window)
    for sizes in ([100, 1, 199], [299, 1], [64, 64, 64, 64, 44]):
        end, parts = 0, []
        for size in sizes:
            end += size
            parts.append(attend(kernels, pool, q[end - size : end], pool.meta([size], [end]), window))
        assert torch.equal(torch.cat(parts), whole), sizes
    for at in (0, 15, 63, 64, 200, 299):
        assert torch.equal(attend(kernels, pool, q[at : at + 1], pool.meta([1], [at + 1]), window)[0], whole[at])


@EACH_DTYPE
@EACH_POLICY
def test_attention_gives_the_same_bits_in_any_batch_and_any_block_layout(best_build: NativeBuild, dtype: torch.dtype, policy: str) -> None:
    lengths, results = [129, 64, 700], []
    for order, block_size, threads in (([0, 1, 2], 64, 2), ([2, 0, 1], 16, 1), ([1, 2, 0], 20, 3)):
        pool = QuantisedPool([lengths[i] for i in order], 2, 128, block_size, dtype, POLICIES[policy], seed=block_size)
        q = torch.stack([make(4, 128, dtype=dtype, seed=50 + i) for i in order])
        out = attend(native_kernels(best_build, threads), pool, q, pool.meta([1, 1, 1]))
        results.append(out[[order.index(i) for i in range(3)]])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@EACH_DTYPE
@pytest.mark.parametrize("policy", ["8", "4 rotated"])
def test_a_nan_in_a_key_reaches_the_tokens_that_see_it_and_no_others(kernels: Kernels, dtype: torch.dtype, policy: str) -> None:
    qkv, layer, slots = written(kernels, POLICIES[policy], 64, dtype, poison=2)
    table = torch.arange(5, dtype=torch.int32).view(1, 5)
    lens = torch.tensor([35], dtype=torch.int32)
    meta = AttentionMeta(torch.tensor([0, 1], dtype=torch.int32), lens, table, torch.empty(0, dtype=torch.int64), [1], [35], 1)
    for parts in (layer.key_scales, layer.value_scales):  # the slots that were not written
        assert parts is not None
        parts[parts == 0] = 1
    out = empty(1, 4 * 64, dtype=dtype)
    kernels.attention(qkv[:1, :4].nan_to_num(), qkv[:1, 4:6], qkv[:1, 6:], layer, meta, 0.125, 0, out)
    assert out.view(4, 64)[:2].isfinite().all() and out.view(4, 64)[2:].isnan().all()
    assert int(slots[2]) < 35


@EACH_DTYPE
def test_rotation_saves_four_bits_from_an_outlier_channel(kernels: Kernels, dtype: torch.dtype) -> None:
    """Keys with one channel forty times the others, as Qwen2's biases make them: written and read by the kernels, against exact attention."""
    tokens, head_dim = 200, 128
    q, k, v = (make(tokens, 1, head_dim, dtype=dtype, seed=i) for i in range(3))
    k[..., 7] += 40
    scores = (q.double().transpose(0, 1) @ k.double().permute(1, 2, 0) * head_dim**-0.5).masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
    wanted = (scores.softmax(-1) @ v.double().transpose(0, 1))[0]
    errors = {}
    for fmt in (KVFormat("16", "16"), KVFormat("4", "4"), KVFormat("4", "4", True), KVFormat("8", "4", True)):
        layer = fmt.layer(torch.zeros(fmt.layer_bytes(13, 1, 16, head_dim, dtype), dtype=torch.uint8), 13, 1, 16, head_dim, dtype)
        x, cos, sin = [part.clone() for part in (q, k, v)], torch.ones(tokens, 0), torch.zeros(tokens, 0)
        kernels.rope_write_kv(*x, cos, sin, None, layer, torch.arange(tokens))
        table = torch.arange(13, dtype=torch.int32).view(1, 13)
        start, lens = torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32)
        meta = AttentionMeta(start, lens, table, torch.empty(0, dtype=torch.int64), [tokens], [tokens], 0)
        out = empty(tokens, head_dim, dtype=dtype)
        kernels.attention(*x, layer, meta, head_dim**-0.5, 0, out)
        errors[(fmt.key, fmt.rotated)] = ((out.double() - wanted).square().mean() / wanted.square().mean()).sqrt().item()
    assert errors["16", False] < 0.01
    assert errors["8", True] < errors["4", True] < errors["4", False] / 2, errors


@pytest.mark.parametrize("head_dim", [16, 20, 80, 96, 256])
def test_attention_turns_its_result_back(kernels: Kernels, head_dim: int) -> None:
    """With one key the result is its value: the matrix of kv_layer.py undoes what the cache holds."""
    pool = QuantisedPool([1], 1, head_dim, 16, torch.float32, KVFormat("16", "16", True))
    block = int(pool.table[0, 0])
    found = attend(kernels, pool, make(1, 1, head_dim), pool.meta([1]))
    assert_close(found[0], pool.layer.value[block, 0, 0] @ rotation_matrix(head_dim), 1e-6)


def test_fp8_and_odd_heads_go_to_the_reference(best_build: NativeBuild) -> None:
    for fmt, head_dim in ((KVFormat("fp8", "fp8"), 64), (KVFormat("8", "8", True), 21), (KVFormat("8", "8"), 320)):
        outs = []
        for chosen in (native_kernels(best_build, 1), REFERENCE):
            pool = QuantisedPool([70], 1, head_dim, 16, torch.float32, KVFormat("16", "16"))
            layer = fmt.layer(torch.zeros(fmt.layer_bytes(8, 1, 16, head_dim, torch.float32), dtype=torch.uint8), 8, 1, 16, head_dim, torch.float32)
            pool.layer = layer
            numbers, pairs = quantise_rows(pool.cache[0].nan_to_num(), fmt.key)
            for rows, scales in ((layer.key, layer.key_scales), (layer.value, layer.value_scales)):
                assert scales is not None
                rows.view(torch.uint8)[:] = numbers.view(torch.uint8)
                scales[:] = pairs
            outs.append(attend(chosen, pool, make(2, 2, head_dim), pool.meta([2])))
        assert torch.equal(*outs)


def test_quantise_rows_and_back_is_what_attention_reads(kernels: Kernels) -> None:
    pool = QuantisedPool([1], 1, 96, 16, torch.float32, KVFormat("8", "4"))
    assert pool.layer.value_scales is not None
    value = dequantise_rows(pool.layer.value, pool.layer.value_scales, "4")[int(pool.table[0, 0]), 0, 0]
    assert_close(attend(kernels, pool, make(1, 1, 96), pool.meta([1]))[0], value, 1e-6)
