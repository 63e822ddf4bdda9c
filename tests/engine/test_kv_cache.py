"""Sizing in numbers, and the memory itself: touched at once, given back at once."""

from __future__ import annotations

import gc

import pytest
import torch

from lmdeploy.engine.kv_cache import KVCache
from lmdeploy.engine.memory import taken_bytes
from lmdeploy.engine.sizing import PoolRequest, bytes_per_token, gib, size_pool
from lmdeploy.errors import ConfigError
from lmdeploy.spec import ModelSpec, RopeSpec

MIB = 1 << 20
CPU = torch.device("cpu")


def spec(layers: int = 4) -> ModelSpec:
    """A shape whose bfloat16 KV takes 1024 bytes a token and layer."""
    return ModelSpec("X", "x", 100, 64, 128, layers, 8, 4, 64, 1e-5, 2048, RopeSpec())


def test_bytes_of_a_token_count_keys_and_values_of_all_layers() -> None:
    assert bytes_per_token(spec(4), torch.bfloat16) == 4096
    assert bytes_per_token(spec(4), torch.float32) == 8192


def test_a_share_is_taken_of_the_free_memory_and_rounded_down() -> None:
    size = size_pool(PoolRequest(0.4, 64, 2048), 4096, 1000 * MIB)
    assert size.num_blocks == int(0.4 * 1000 * MIB) // (64 * 4096) == 1600
    assert size.session_len == 2048 and size.note == ""


def test_a_number_of_blocks_is_taken_as_it_is() -> None:
    assert size_pool(PoolRequest(48, 64, 2048), 4096, 100 * MIB).num_blocks == 48


def test_a_default_share_is_capped_and_says_so() -> None:
    size = size_pool(PoolRequest(0.8, 64, 2048, cap_blocks=320), 4096, 1000 * MIB)
    assert size.num_blocks == 320 and "3200 blocks would fit" in size.note and "max_batch_size" in size.note


def test_session_len_is_shortened_only_when_it_was_not_given() -> None:
    assert size_pool(PoolRequest(3, 64, 2048), 4096, 100 * MIB).session_len == 192
    kept = size_pool(PoolRequest(3, 64, 2048, keep_session=True), 4096, 100 * MIB)
    assert kept.session_len == 2048
    assert "session_len=2048 is more than the 192 tokens" in kept.note and "cache_max_entry_count" in kept.note


def test_a_share_too_small_for_one_block_is_refused_and_the_share_that_it_names_works() -> None:
    with pytest.raises(ConfigError, match=r"cache_max_entry_count=0.001 of the 100 MiB .* one KV block of 64 tokens takes 0.25 MiB; use at least") as error:
        size_pool(PoolRequest(0.001, 64, 2048), 4096, 100 * MIB)
    named = float(str(error.value).split("use at least ")[1].split(",")[0])
    assert size_pool(PoolRequest(named, 64, 2048), 4096, 100 * MIB).num_blocks == 1


def test_more_blocks_than_fit_are_refused_with_the_number_that_fits() -> None:
    with pytest.raises(ConfigError, match=r"cache_max_entry_count=401 blocks of 64 tokens need 100 MiB, but 100 MiB are free .* use at most 400 blocks"):
        size_pool(PoolRequest(401, 64, 2048), 4096, 100 * MIB)


@pytest.mark.parametrize("amount", [0.8, 5])
def test_no_memory_for_a_single_block_is_said(amount: float) -> None:
    with pytest.raises(ConfigError, match="no memory for the KV cache: one block of 64 tokens takes 0.25 MiB"):
        size_pool(PoolRequest(amount, 64, 2048), 4096, 1000)


def test_slots_stay_32_bit_numbers() -> None:
    size = size_pool(PoolRequest(0.9, 64, 2048), 1, 1 << 40)
    assert size.num_blocks * 64 < 2**31 and "32-bit" in size.note


def test_layers_are_views_of_one_pool() -> None:
    cache = KVCache(spec(2), 5, 16, torch.bfloat16, CPU)
    assert len(cache.layers) == 2 and all(t.shape == (5, 4, 16, 64) and t.is_contiguous() for layer in cache.layers for t in (layer.key, layer.value))
    assert cache.nbytes == 5 * 16 * bytes_per_token(spec(2), torch.bfloat16)
    starts = [t.data_ptr() for layer in cache.layers for t in (layer.key, layer.value)]
    step = cache.nbytes // 4
    assert starts == [starts[0] + i * step for i in range(4)]


def test_the_pool_is_resident_at_once_and_given_back_when_freed() -> None:
    gc.collect()
    before = taken_bytes(CPU)
    cache = KVCache(spec(8), 512, 64, torch.bfloat16, CPU)  # 256 MiB
    grown = taken_bytes(CPU) - before
    assert abs(grown - cache.nbytes) < 0.02 * cache.nbytes + 3 * MIB
    cache.free()
    gc.collect()
    assert taken_bytes(CPU) - before < 4 * MIB


def test_a_pool_that_the_system_refuses_is_an_error_of_the_options() -> None:
    with pytest.raises(ConfigError, match="could not be allocated .* lower cache_max_entry_count"):
        KVCache(spec(8), 1 << 28, 64, torch.bfloat16, CPU)


def test_sizes_are_printed_for_people() -> None:
    assert [gib(n) for n in (0, 5 * MIB, 1234 * MIB, 1000 * MIB, 40 << 30)] == ["0 MiB", "5 MiB", "1.21 GiB", "1000 MiB", "40 GiB"]
