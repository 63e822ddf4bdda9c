"""Long contexts on the CPU: keys are cut into splits that threads may share, and no bit may depend on who did which."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.kernels.build import NativeBuild
from lmdeploy.kernels.cpu import native_kernels
from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.kv_layer import KVLayer
from tests.kernels import test_kv_cpu as quantised
from tests.kernels.test_cpu import EACH_DTYPE, Pool, assert_near, attend, make

LENGTH = 2300  # three splits of 1024


@EACH_DTYPE
@pytest.mark.parametrize("window", [0, 1100])
def test_long_contexts_agree_with_the_reference_and_not_with_the_threads(build: NativeBuild, dtype: torch.dtype, window: int) -> None:
    pool, q = Pool([LENGTH, 40, 1024], 1, 64, 64, dtype), make(6, 2, 64, dtype=dtype)
    meta = pool.meta([1, 1, 4])
    found = [attend(native_kernels(build, threads), pool, q, meta, window) for threads in (1, 2, 5)]
    assert_near(found[0], attend(REFERENCE, pool, q, meta, window))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@EACH_DTYPE
@pytest.mark.parametrize("window", [0, 1100])
def test_a_split_context_gives_the_same_bits_decoded_and_prefilled(build: NativeBuild, dtype: torch.dtype, window: int) -> None:
    pool, q = Pool([LENGTH], 1, 32, 64, dtype), make(150, 3, 32, dtype=dtype, seed=5)
    whole = attend(native_kernels(build, 1), pool, q, pool.meta([150]), window)
    shared = native_kernels(build, 5)
    assert torch.equal(attend(shared, pool, q, pool.meta([150]), window), whole)
    for row in (0, 60, 149):  # 2150 .. 2299
        assert torch.equal(attend(shared, pool, q[row : row + 1], pool.meta([1], [LENGTH - 149 + row]), window)[0], whole[row])


@EACH_DTYPE
def test_a_window_beyond_the_first_split_does_not_mix_sequences(build: NativeBuild, dtype: torch.dtype) -> None:
    pool, q = Pool([100, LENGTH], 1, 64, 64, dtype), make(2, 1, 64, dtype=dtype)
    out = attend(native_kernels(build, 5), pool, q, pool.meta([1, 1]), 900)
    assert_near(out, attend(REFERENCE, pool, q, pool.meta([1, 1]), 900))


def test_a_negative_scale_goes_to_the_reference(best_build: NativeBuild) -> None:
    pool, q = Pool([70], 1, 64, 64, torch.float32), make(2, 1, 64)
    meta, outs = pool.meta([2]), [torch.empty(2, 64), torch.empty(2, 64)]
    for kernels, out in zip((native_kernels(best_build, 1), REFERENCE), outs, strict=True):
        kernels.attention(q, q, q, KVLayer(*pool.cache), meta, -0.5, 0, out)
    assert torch.equal(outs[0], outs[1])


@EACH_DTYPE
@pytest.mark.parametrize(
    ("policy", "window"), [("8", 0), ("8", 1100), ("4", 1100), ("4 rotated", 0), ("k8v4", 0), ("k8v4", 1100), ("k4v8", 0), ("16 rotated", 0)]
)
def test_splits_of_a_quantised_cache_keep_the_bits_decoded_and_prefilled(build: NativeBuild, dtype: torch.dtype, policy: str, window: int) -> None:
    pool = quantised.QuantisedPool([LENGTH], 1, 32, 64, dtype, quantised.POLICIES[policy])
    q = make(150, 3, 32, dtype=dtype, seed=5)
    alone, shared = native_kernels(build, 1), native_kernels(build, 5)
    whole = quantised.attend(alone, pool, q, pool.meta([150]), window)
    quantised.assert_close(whole, quantised.attend(REFERENCE, pool, q, pool.meta([150]), window), quantised.TOLERANCE[dtype])
    assert torch.equal(quantised.attend(shared, pool, q, pool.meta([150]), window), whole)
    for row in (0, 60, 149):  # 2150 .. 2299
        for kernels in (alone, shared):
            assert torch.equal(quantised.attend(kernels, pool, q[row : row + 1], pool.meta([1], [LENGTH - 149 + row]), window)[0], whole[row])
