"""Random weights: repeatable, well spread, never repeating rows, and norm weights near 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmdeploy.checkpoint.random_source import BLOCK, RandomSource
from lmdeploy.formats.packed4 import Packed4
from lmdeploy.formats.packed8 import Packed8
from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.models.registry import build_model
from lmdeploy.parallel import Parallel
from lmdeploy.spec import ModelSpec
from tests.formats.packing import compressed_entry, configuration
from tests.helpers import LLAMA_CONFIG, Harness


def taken(name: str, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.full(shape, torch.nan, dtype=dtype)
    RandomSource(seed, 0.02).take(name, out)
    return out


def test_the_same_seed_and_name_give_the_same_numbers_and_others_do_not() -> None:
    first = taken("a.weight", 64, 64)
    assert torch.equal(first, taken("a.weight", 64, 64))
    assert not torch.equal(first, taken("b.weight", 64, 64))
    assert not torch.equal(first, taken("a.weight", 64, 64, seed=1))


def test_numbers_have_the_asked_spread_also_beyond_one_block() -> None:
    out = taken("a.weight", 3000, 2048, dtype=torch.bfloat16).float()
    assert out.numel() > BLOCK
    assert out.isfinite().all()
    assert abs(out.std() - 0.02) < 0.001
    assert abs(out.mean()) < 0.001
    assert not torch.equal(out[0], out[BLOCK // 2048])


def test_rows_of_a_fused_tensor_differ() -> None:
    source, q, k = RandomSource(), torch.empty(8, 16), torch.empty(8, 16)
    source.take_ranges("wqkv.weight", q, [slice(0, 8)])
    source.take_ranges("wqkv.weight", k, [slice(8, 16)])
    assert not torch.equal(q, k)


def test_norm_weights_are_near_one_and_biases_are_small() -> None:
    assert abs(taken("model.norm.weight", 1000).mean() - 1) < 0.01
    assert abs(taken("q_proj.bias", 1000).mean()) < 0.01


def test_strided_outputs_are_filled() -> None:
    buffer = torch.full((6, 10), torch.nan)
    RandomSource().take("a.weight", buffer[:, 2:5])
    assert buffer[:, 2:5].isfinite().all()
    assert buffer[:, :2].isnan().all()
    stacked = torch.full((3, 4, 5), torch.nan)
    RandomSource().take("experts.weight", stacked.transpose(0, 1))
    assert stacked.isfinite().all()


def test_biases_are_only_given_to_those_who_expect_them() -> None:
    source = RandomSource()
    assert source.has("a.weight")
    assert not source.has("a.bias")
    source.take("a.bias", torch.empty(3))
    source.finish()


def test_packed_weights_are_random_numbers_around_zero() -> None:
    source, words, zeros, scales = RandomSource(), torch.empty(64, 64, dtype=torch.int32), torch.empty(2, 64, dtype=torch.int32), torch.empty(2, 64)
    for name, out in (("qweight", words), ("qzeros", zeros), ("scales", scales)):
        source.take(f"a.{name}", out)
    nibbles = torch.cat([words >> (4 * i) & 15 for i in range(8)]).float()
    assert abs(nibbles.mean() - 7.5) < 0.1 and abs(nibbles.std() - 4.61) < 0.05
    assert set((zeros >> 28 & 15).flatten().tolist()) == {8}
    assert scales.abs().min() > 0 and abs(scales.abs().mean() * 4.61 - source.scale) < 1e-3 and 0.3 < (scales < 0).float().mean() < 0.7
    assert not source.has("a.g_idx")


ENTRIES: dict[str, tuple[dict[str, Any], type]] = {
    "awq": (configuration("awq", 16), Packed4),
    "smooth_quant": ({"quant_method": "smooth_quant", "quant_dtype": "int8"}, Packed8),
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [32, 32]}, Packed8),
    "fp8": ({"quant_method": "fp8"}, Packed8),
    "compressed": (compressed_entry("pack-quantized", {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16}), Packed4),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_models_of_any_format_can_be_invented(name: str) -> None:
    entry, kind = ENTRIES[name]
    spec = ModelSpec.from_config({**LLAMA_CONFIG, "intermediate_size": 96, "head_dim": 16, "quantization_config": entry})
    model = build_model(spec, torch.float32, "cpu", REFERENCE, Parallel())
    model.load(RandomSource())
    for layer in model.layers:
        for linear in (layer.attention.qkv, layer.attention.out):
            assert isinstance(linear.weight, kind)
            weight = linear.weight.dequantised(torch.float32)
            assert abs(weight.mean()) < 0.004 and 0.0005 < weight.std() < 0.04 and not torch.equal(weight[0], weight[1])
    logits = Harness(model).step([(0, [1, 2, 3])])[0]
    assert logits.isfinite().all() and logits.std() > 1e-3


def test_a_tied_head_reads_the_random_embedding() -> None:
    model = build_model(ModelSpec.from_config({**LLAMA_CONFIG, "tie_word_embeddings": True}), torch.float32, "cpu", REFERENCE, Parallel())
    model.load(RandomSource())
    assert Harness(model).step([(0, [1, 2, 3])])[0].isfinite().all()


@pytest.mark.parametrize("middle", [8, 9])  # of AWQ; of GPTQ, which stores one less
def test_sums_of_4_bit_weights_are_around_zero(middle: int) -> None:
    """Else layers push activations in one direction: to 77,000 after the 32 layers of a 7B shape, whose squares no kernel has room for."""
    inner, outer, group = 4096, 256, 128
    words = torch.empty(inner, outer // 8, dtype=torch.int32)
    RandomSource().take("x.qweight", words)
    numbers = ((words[:, :, None] >> torch.arange(0, 32, 4)) & 15).reshape(inner, outer) - middle
    weight = numbers * taken("x.scales", inner // group, outer).repeat_interleave(group, 0)
    spread = 0.02 * inner**0.5
    assert 0.9 * 0.02 < weight.std() < 1.2 * 0.02
    assert weight.sum(0).mean().abs() < spread and weight.sum(0).std() < 5 * spread
