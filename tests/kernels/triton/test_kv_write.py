"""Triton's `rope_write_kv`, in its interpreter: rows as the reference rotates them, stored bit by bit as `quantise_rows` says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmdeploy.kernels.kv_quant import quantise_rows
from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.kv_layer import KVFormat, KVLayer
from tests.kernels.paged import FORMATS, Shape, error, numbers

kv_write = pytest.importorskip("lmdeploy.kernels.triton_kernels.kv_write", reason="triton is not installed")

Tensor = torch.Tensor
TOKENS, HEADS, KV_HEADS, BLOCKS, SLOTS = 9, 4, 2, 5, 7
# The interpreter cuts bfloat16 off instead of rounding it, once after the rope and once after the rotation.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}


def empty_layer(fmt: KVFormat, head_dim: int, dtype: torch.dtype) -> KVLayer:
    return fmt.layer(torch.zeros(fmt.layer_bytes(BLOCKS, KV_HEADS, SLOTS, head_dim, dtype), dtype=torch.uint8), BLOCKS, KV_HEADS, SLOTS, head_dim, dtype)


def written(operator: object, layer: KVLayer, qkv: Tensor, rope: int, with_factor: bool = True) -> Tensor:
    """Run an operator on the parts of qkv [T, H + 2 K, D]; the slots."""
    tokens = qkv.shape[0]
    slots = torch.randperm(BLOCKS * SLOTS, generator=torch.Generator().manual_seed(3))[:tokens]
    angles = 3 * numbers(Shape(1, 1, 1), 4, TOKENS, rope // 2)[:tokens]
    factor = numbers(Shape(1, 1, 1), 5, TOKENS)[:tokens].abs() if with_factor else None
    operator(*torch.split(qkv, [HEADS, KV_HEADS, KV_HEADS], dim=1), angles.cos(), angles.sin(), factor, layer, slots)  # type: ignore[operator]
    return slots


def assert_stored(layer: KVLayer, qkv: Tensor, slots: Tensor) -> None:
    """The cache holds the rows of qkv as they are now, exactly."""
    parts = ((layer.key, layer.key_scales, layer.key_width), (layer.value, layer.value_scales, layer.value_width))
    for x, (cache, scales, width) in zip(qkv.split([HEADS, KV_HEADS, KV_HEADS], 1)[1:], parts, strict=True):
        rows = cache.transpose(1, 2).flatten(0, 1)
        if scales is None:
            assert torch.equal(rows[slots], x)
            continue
        wanted, pairs = quantise_rows(x, width)
        assert torch.equal(rows.view(torch.uint8)[slots], wanted.view(torch.uint8))
        torch.testing.assert_close(scales.transpose(1, 2).flatten(0, 1)[slots], pairs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "head_dim", "rope"), [(torch.float32, 80, 32), (torch.float16, 16, 16), (torch.bfloat16, 16, 16)], ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_are_rotated_and_stored(dtype: torch.dtype, fmt: str, head_dim: int, rope: int) -> None:
    qkv = 3 * numbers(Shape(1, 1, 1, dtype=dtype), 1, TOKENS, HEADS + 2 * KV_HEADS, head_dim) + 1
    wanted, layer = qkv.clone(), empty_layer(FORMATS[fmt], head_dim, dtype)
    slots = written(kv_write.rope_write_kv, layer, qkv, rope)
    written(REFERENCE.rope_write_kv, empty_layer(FORMATS[fmt], head_dim, dtype), wanted, rope)
    assert error(qkv, wanted) <= TOLERANCE[dtype]
    if dtype is not torch.bfloat16 and not FORMATS[fmt].rotated:
        assert torch.equal(qkv, wanted)
    assert_stored(layer, qkv, slots)
    others = torch.ones(BLOCKS * SLOTS, dtype=torch.bool)
    others[slots] = False
    for part in (layer.key, layer.key_scales, layer.value, layer.value_scales):
        assert part is None or not part.view(torch.uint8).transpose(1, 2).flatten(0, 1)[others].any()


@pytest.mark.parametrize("head_dim", [20, 64, 96, 128, 256])
@pytest.mark.parametrize("with_factor", [False, True])
def test_any_head_dim(head_dim: int, with_factor: bool) -> None:
    qkv = numbers(Shape(1, 1, 1), 2, TOKENS, HEADS + 2 * KV_HEADS, head_dim)
    wanted, layer = qkv.clone(), empty_layer(FORMATS["k8v4"], head_dim, torch.float32)
    slots = written(kv_write.rope_write_kv, layer, qkv, head_dim, with_factor)
    written(REFERENCE.rope_write_kv, empty_layer(FORMATS["k8v4"], head_dim, torch.float32), wanted, head_dim, with_factor)
    assert error(qkv, wanted) <= TOLERANCE[torch.float32]
    assert_stored(layer, qkv, slots)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("fmt", "head_dim", "rope"), [("16", 16, 16), ("16", 80, 0), ("8", 20, 12), ("4 rotated", 80, 32), ("4 rotated", 64, 64), ("k16v4", 96, 96)]
)
def test_centres_leave_rotary_keys_and_nothing_else(dtype: torch.dtype, fmt: str, head_dim: int, rope: int) -> None:
    before = 3 * numbers(Shape(1, 1, 1, dtype=dtype), 1, TOKENS, HEADS + 2 * KV_HEADS, head_dim) + 1
    layer = replace(empty_layer(FORMATS[fmt], head_dim, dtype), key_center=40 * numbers(Shape(1, 1, 1), 9, KV_HEADS, head_dim))
    qkv, wanted, without = before.clone(), before.clone(), before.clone()
    slots = written(kv_write.rope_write_kv, layer, qkv, rope)
    written(REFERENCE.rope_write_kv, replace(empty_layer(FORMATS[fmt], head_dim, dtype), key_center=layer.key_center), wanted, rope)
    assert error(qkv, wanted) <= TOLERANCE[dtype]
    if dtype is torch.float32 and not FORMATS[fmt].rotated:
        assert torch.equal(qkv, wanted)
    assert_stored(layer, qkv, slots)
    written(kv_write.rope_write_kv, empty_layer(FORMATS[fmt], head_dim, dtype), without, rope)
    keys = slice(HEADS, HEADS + KV_HEADS)
    assert torch.equal(qkv[:, :HEADS], without[:, :HEADS]) and torch.equal(qkv[:, keys.stop :], without[:, keys.stop :])
    assert ((without - qkv)[:, keys].float().abs().amax(-1) > 20).all()


@pytest.mark.parametrize("fmt", ["8", "4", "fp8"])
def test_extreme_rows_are_stored_as_quantise_rows_says(fmt: str) -> None:
    qkv = numbers(Shape(1, 1, 1), 6, TOKENS, HEADS + 2 * KV_HEADS, 16) * 10.0 ** torch.arange(-18, 18, 4).view(-1, 1, 1)
    for token, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        qkv[token, HEADS, 5] = qkv[token, HEADS + KV_HEADS, 12] = value
    for token, value in enumerate((0.0, -2.5, 1e30, 1e-38), 3):
        qkv[token, HEADS + 1] = qkv[token, HEADS + KV_HEADS + 1] = value
    layer = empty_layer(FORMATS[fmt], 16, torch.float32)
    q, k, v = torch.split(qkv, [HEADS, KV_HEADS, KV_HEADS], dim=1)
    slots = torch.arange(TOKENS) * 3  # without a rope: its infinity times 0 would be NaN
    kv_write.rope_write_kv(q, k, v, torch.ones(TOKENS, 0), torch.zeros(TOKENS, 0), None, layer, slots)
    assert_stored(layer, qkv, slots)


def test_a_token_has_the_same_bits_alone_and_in_a_batch() -> None:
    qkv = numbers(Shape(1, 1, 1), 7, TOKENS, HEADS + 2 * KV_HEADS, 80)
    alone, layers = qkv[:1].clone(), [empty_layer(FORMATS["4 rotated"], 80, torch.float32) for _ in range(2)]
    slots = written(kv_write.rope_write_kv, layers[0], qkv, 80)
    written(kv_write.rope_write_kv, layers[1], alone, 80)
    block, offset = divmod(int(slots[0]), SLOTS)
    assert torch.equal(alone[0], qkv[0])
    assert torch.equal(layers[0].key[block, :, offset], layers[1].key[block, :, offset])


def test_no_tokens_are_no_work() -> None:
    written(kv_write.rope_write_kv, empty_layer(FORMATS["4"], 16, torch.float32), torch.empty(0, HEADS + 2 * KV_HEADS, 16), 16)
