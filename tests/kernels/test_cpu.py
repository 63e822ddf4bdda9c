"""The native CPU kernels against the reference, for every instruction set of this CPU, and what they promise beyond it:
a row's bits do not depend on the batch, the chunk, the cache layout or the number of threads."""

from __future__ import annotations

import random

import pytest
import torch

from lmdeploy.inputs import AttentionMeta
from lmdeploy.kernels.api import Kernels
from lmdeploy.kernels.build import NativeBuild
from lmdeploy.kernels.cpu import native_kernels
from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.kv_layer import KVLayer

Tensor = torch.Tensor
# Largest error relative to the largest result: the order of a float32 sum; one bfloat16 rounding.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3}
EACH_DTYPE = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


@pytest.fixture(scope="module")
def kernels(build: NativeBuild) -> Kernels:
    return native_kernels(build, threads=2)


@pytest.fixture(scope="module")
def best(best_build: NativeBuild) -> Kernels:
    return native_kernels(best_build, threads=2)


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Poisoned memory: whatever a kernel does not write shows."""
    return torch.full(shape, float("nan"), dtype=dtype)


def assert_near(found: Tensor, wanted: Tensor, factor: float = 1.0) -> None:
    assert not found.isnan().any()
    scale = wanted.abs().max().item() if wanted.numel() else 0.0
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=factor * TOLERANCE[found.dtype] * max(scale, 1e-3))


# ---- linear


@EACH_DTYPE
@pytest.mark.parametrize("rows", [0, 1, 3, 16, 17, 32, 33, 70])
@pytest.mark.parametrize(("inner", "outer"), [(64, 32), (70, 33), (7, 3), (33, 300), (544, 80)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_agrees_with_exact_arithmetic(kernels: Kernels, dtype: torch.dtype, rows: int, inner: int, outer: int, with_bias: bool) -> None:
    x, weight = make(rows, inner, dtype=dtype), make(outer, inner, dtype=dtype, seed=1)
    bias, out = make(outer, dtype=dtype, seed=2) if with_bias else None, empty(rows, outer, dtype=dtype)
    kernels.linear(x, weight, bias, out)
    assert_near(out, x.double() @ weight.double().t() + (bias.double() if bias is not None else 0))


@EACH_DTYPE
@pytest.mark.parametrize(("inner", "outer"), [(256, 512), (100, 77), (1056, 300)])
def test_a_row_has_the_same_bits_alone_and_anywhere_in_any_batch(best: Kernels, best_build: NativeBuild, dtype: torch.dtype, inner: int, outer: int) -> None:
    if dtype is torch.bfloat16 and best_build.variant != "amx":
        pytest.skip("bfloat16 products are torch's without AMX")
    weight, bias = make(outer, inner, dtype=dtype, seed=1), make(outer, dtype=dtype, seed=2)
    x, wanted = make(600, inner, dtype=dtype), empty(600, outer, dtype=dtype)
    for row in range(600):
        best.linear(x[row : row + 1], weight, bias, wanted[row : row + 1])
    for rows in (2, 5, 15, 16, 17, 31, 32, 33, 64, 100, 511, 512, 513, 600):
        out = empty(rows, outer, dtype=dtype)
        best.linear(x[600 - rows :], weight, bias, out)
        assert torch.equal(out, wanted[600 - rows :]), rows


def test_linear_reads_strided_rows_and_writes_nothing_around_its_output(kernels: Kernels) -> None:
    for dtype in TOLERANCE:
        wide, weight, frame = make(5, 80, dtype=dtype), make(19, 48, dtype=dtype, seed=1), torch.zeros(5, 40, dtype=dtype)
        kernels.linear(wide[:, 16:64], weight, None, frame[:, 10:29])
        assert_near(frame[:, 10:29], wide[:, 16:64].double() @ weight.double().t())
        assert not frame[:, :10].any() and not frame[:, 29:].any()


def test_linear_passes_other_types_and_layouts_to_torch(kernels: Kernels) -> None:
    x, weight = make(3, 32, dtype=torch.float16), make(8, 32, dtype=torch.float16, seed=1)
    out, wanted = torch.empty(3, 8, dtype=torch.float16), torch.empty(3, 8, dtype=torch.float16)
    kernels.linear(x, weight, None, out)
    REFERENCE.linear(x, weight, None, wanted)
    assert torch.equal(out, wanted)
    transposed, out32 = make(32, 8, seed=2).t(), torch.empty(3, 8)
    kernels.linear(x.float(), transposed, None, out32)
    assert_near(out32, x.double() @ transposed.double().t())


def test_the_number_of_threads_changes_no_bit(best_build: NativeBuild) -> None:
    for dtype in TOLERANCE:
        x, weight = make(40, 320, dtype=dtype), make(1000, 320, dtype=dtype, seed=1)
        results = []
        for threads in (1, 2, 3):
            results.append(empty(40, 1000, dtype=dtype))
            native_kernels(best_build, threads).linear(x, weight, None, results[-1])
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# ---- the small operators


@EACH_DTYPE
@pytest.mark.parametrize("shape", [(1, 1), (0, 64), (5, 123), (1, 2048), (90, 1000)])
def test_norms_agree_with_the_reference(kernels: Kernels, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, weight, residual = 30 * make(*shape, dtype=dtype), make(shape[1], dtype=dtype, seed=1), make(*shape, dtype=dtype, seed=2)
    outs, residuals = [empty(*shape, dtype=dtype) for _ in range(4)], [residual.clone(), residual.clone()]
    kernels.rms_norm(x, weight, 1e-5, outs[0])
    REFERENCE.rms_norm(x, weight, 1e-5, outs[1])
    kernels.add_rms_norm(x, residuals[0], weight, 1e-5, outs[2])
    REFERENCE.add_rms_norm(x, residuals[1], weight, 1e-5, outs[3])
    assert torch.equal(residuals[0], residuals[1])
    assert_near(outs[0], outs[1])
    assert_near(outs[2], outs[3])


@EACH_DTYPE
@pytest.mark.parametrize("head_dim", [8, 20, 64, 128])
def test_head_norm_touches_only_its_part_of_the_buffer(kernels: Kernels, dtype: torch.dtype, head_dim: int) -> None:
    buffer, weight = make(5, 7, head_dim, dtype=dtype), make(head_dim, dtype=dtype, seed=1)
    before, wanted = buffer.clone(), buffer.clone()
    kernels.head_norm(buffer[:, 2:5], weight, 1e-6)
    REFERENCE.head_norm(wanted[:, 2:5], weight, 1e-6)
    assert_near(buffer, wanted)
    assert torch.equal(buffer[:, :2], before[:, :2]) and torch.equal(buffer[:, 5:], before[:, 5:])


@EACH_DTYPE
@pytest.mark.parametrize("shape", [(1, 1), (0, 8), (3, 70), (2, 9000)])
def test_silu_mul_agrees_with_the_reference_for_large_arguments_too(kernels: Kernels, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate_up = 40 * make(shape[0], 2 * shape[1], dtype=dtype)
    out, wanted = empty(*shape, dtype=dtype), empty(*shape, dtype=dtype)
    kernels.silu_mul(gate_up, out)
    REFERENCE.silu_mul(gate_up, wanted)
    assert_near(out, wanted)


@EACH_DTYPE
@pytest.mark.parametrize(("head_dim", "rotary"), [(8, 8), (20, 12), (64, 64), (80, 32), (128, 128)])
@pytest.mark.parametrize("with_scale", [False, True])
def test_rope_write_kv_agrees_with_the_reference(kernels: Kernels, dtype: torch.dtype, head_dim: int, rotary: int, with_scale: bool) -> None:
    tokens, heads, kv_heads, block_size = 9, 4, 2, 7
    angles, slots = make(tokens, rotary // 2, seed=1) * 3, torch.randperm(5 * block_size, generator=torch.Generator().manual_seed(3))[:tokens]
    scale = make(tokens, seed=2).abs() if with_scale else None
    results = []
    for chosen in (kernels, REFERENCE):
        qkv = make(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
        caches = torch.zeros(2, 5, kv_heads, block_size, head_dim, dtype=dtype)
        q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
        chosen.rope_write_kv(q, k, v, angles.cos(), angles.sin(), scale, KVLayer(*caches), slots)
        results.append((qkv, caches))
    assert_near(results[0][0], results[1][0])
    assert_near(results[0][1], results[1][1])


@EACH_DTYPE
def test_experts_agree_with_the_reference_and_do_not_depend_on_the_batch(kernels: Kernels, build: NativeBuild, dtype: torch.dtype) -> None:
    x, gate_up, down = make(9, 48, dtype=dtype), make(5, 64, 48, dtype=dtype, seed=1) / 7, make(5, 48, 32, dtype=dtype, seed=2)
    generator = torch.Generator().manual_seed(4)
    ids = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(9)])
    weights, out, wanted = make(9, 2, seed=3).softmax(-1), empty(9, 48, dtype=dtype), empty(9, 48, dtype=dtype)
    kernels.experts(x, gate_up, down, ids, weights, out)
    REFERENCE.experts(x, gate_up, down, ids, weights, wanted)
    assert_near(out, wanted, 2)
    if dtype is torch.float32 or build.variant == "amx":
        for row in range(9):
            alone = empty(1, 48, dtype=dtype)
            kernels.experts(x[row : row + 1], gate_up, down, ids[row : row + 1], weights[row : row + 1], alone)
            assert torch.equal(alone[0], out[row])


# ---- attention


class Pool:
    """Sequences in a paged cache whose unused slots are NaN and whose block tables end in rubbish."""

    def __init__(self, kv_lens: list[int], kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, seed: int = 0) -> None:
        needed = [(n + block_size - 1) // block_size for n in kv_lens]
        free = list(range(sum(needed) + 3))
        random.Random(seed).shuffle(free)
        self.block_size, self.kv_lens = block_size, kv_lens
        self.cache = torch.full((2, len(free), kv_heads, block_size, head_dim), float("nan"), dtype=dtype)
        self.table = torch.full((len(kv_lens), max(needed)), 2**30, dtype=torch.int32)
        for row, (length, count) in enumerate(zip(kv_lens, needed, strict=True)):
            kv = make(2, length, kv_heads, head_dim, dtype=dtype, seed=1000 + length)  # the same sequence in every pool
            for i in range(count):
                block = free.pop()
                self.table[row, i] = block
                part = kv[:, i * block_size : (i + 1) * block_size].transpose(1, 2)
                self.cache[:, block, :, : part.shape[2]] = part

    def meta(self, query_lens: list[int], kv_lens: list[int] | None = None) -> AttentionMeta:
        kv_lens = kv_lens or self.kv_lens
        start = torch.tensor([0, *query_lens]).cumsum(0).int()
        decodes = next((i for i, n in enumerate(query_lens) if n != 1), len(query_lens))
        return AttentionMeta(start, torch.tensor(kv_lens, dtype=torch.int32), self.table, torch.empty(0, dtype=torch.int64), query_lens, kv_lens, decodes)


def attend(kernels: Kernels, pool: Pool, q: Tensor, meta: AttentionMeta, window: int = 0) -> Tensor:
    out = empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype)
    kernels.attention(q, q, q, KVLayer(*pool.cache), meta, q.shape[2] ** -0.5, window, out)
    return out


@EACH_DTYPE
@pytest.mark.parametrize("head_dim", [8, 20, 24, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads", "block_size", "window"), [(4, 2, 64, 0), (6, 1, 16, 5), (2, 2, 7, 100)])
def test_attention_agrees_with_the_reference(
    kernels: Kernels, dtype: torch.dtype, head_dim: int, heads: int, kv_heads: int, block_size: int, window: int
) -> None:
    pool = Pool([1, 200, 5, 150, 70], kv_heads, head_dim, block_size, dtype)
    query_lens = [1, 1, 5, 60, 70]
    q, meta = make(sum(query_lens), heads, head_dim, dtype=dtype), pool.meta(query_lens)
    assert_near(attend(kernels, pool, q, meta, window), attend(REFERENCE, pool, q, meta, window))


@EACH_DTYPE
@pytest.mark.parametrize("window", [0, 50])
def test_attention_gives_the_same_bits_decoded_prefilled_or_in_chunks(kernels: Kernels, dtype: torch.dtype, window: int) -> None:
    length, heads = 300, 6
    pool, q = Pool([length], 2, 64, 16, dtype), make(length, heads, 64, dtype=dtype, seed=5)
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
def test_attention_gives_the_same_bits_in_any_batch_and_any_block_layout(best_build: NativeBuild, dtype: torch.dtype) -> None:
    lengths, results = [129, 64, 700], []
    for order, block_size, threads in (([0, 1, 2], 64, 2), ([2, 0, 1], 16, 1), ([1, 2, 0], 20, 3)):
        pool = Pool([lengths[i] for i in order], 2, 128, block_size, dtype, seed=block_size)
        q = torch.stack([make(4, 128, dtype=dtype, seed=50 + i) for i in order])
        out = attend(native_kernels(best_build, threads), pool, q, pool.meta([1, 1, 1]))
        results.append(out[[order.index(i) for i in range(3)]])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_attention_with_scores_far_apart_stays_finite(kernels: Kernels) -> None:
    for dtype in TOLERANCE:
        pool, q = Pool([130], 1, 64, 64, dtype), 300 * make(130, 2, 64, dtype=dtype)
        found, wanted = attend(kernels, pool, q, pool.meta([130])), attend(REFERENCE, pool, q, pool.meta([130]))
        assert_near(found, wanted, 20)


def test_attention_of_large_heads_goes_to_the_reference(kernels: Kernels) -> None:
    pool, q = Pool([9], 1, 320, 16, torch.float32), make(9, 2, 320)
    assert torch.equal(attend(kernels, pool, q, pool.meta([9])), attend(REFERENCE, pool, q, pool.meta([9])))
