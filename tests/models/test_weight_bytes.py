"""The planner's bytes are the engine's, byte for byte: every way to store weights, on real models and on random ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lmdeploy.checkpoint.random_source import RandomSource
from lmdeploy.formats.choose import choose_formats
from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.models.language_spec import language_spec
from lmdeploy.models.registry import build_model
from lmdeploy.models.weight_bytes import DENSE, FP8, HEADS, check_split, matrices, parameters, stored, weights_of
from lmdeploy.parallel import Parallel
from lmdeploy.spec import ModelSpec
from lmdeploy.vision.spec import load_vision_spec

CONFIGS = Path(__file__).resolve().parents[2] / "../shared/data/configs"

SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 640, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "torch_dtype": "bfloat16",
}  # fmt: skip
SHAPES = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 64},
    "internlm2": {"architectures": ["InternLM2ForCausalLM"], "bias": True},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4},
    "qwen3-moe": {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "mlp_only_layers": [1], "head_dim": 32},
}  # fmt: skip
STORED = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": -1},
    "smooth_quant": {"quant_method": "smooth_quant", "quant_dtype": "int8"},
    "fp8 blocks": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "fp8": {"quant_method": "fp8"},
}


class Weights(RandomSource):
    """Random weights of a file that does not repeat a tied head."""

    def has(self, name: str) -> bool:
        return not name.startswith("lm_head") and super().has(name)


def loaded_bytes(spec: ModelSpec, dtype: torch.dtype, **options: Any) -> int:
    """Bytes of the weights of a loaded model."""
    model = build_model(spec, dtype, "cpu", REFERENCE, Parallel(), choose_formats(spec.quantization, **options))
    model.load(Weights())
    return model.weight_bytes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_unquantised_bytes_are_those_of_the_loaded_model(shape: str, dtype: torch.dtype) -> None:
    spec = ModelSpec.from_config({**SMALL, **SHAPES[shape]})
    assert weights_of(spec, stored(spec), DENSE, dtype.itemsize).total == loaded_bytes(spec, dtype)


@pytest.mark.parametrize("method", STORED)
@pytest.mark.parametrize("shape", ["llama", "qwen2", "qwen3-moe"])
def test_quantised_bytes_are_those_of_the_loaded_model(shape: str, method: str) -> None:
    spec = ModelSpec.from_config({**SMALL, **SHAPES[shape], "quantization_config": STORED[method]})
    assert weights_of(spec, stored(spec), DENSE, 2).total == loaded_bytes(spec, torch.bfloat16)


@pytest.mark.parametrize("shape", ["llama", "tied"])
@pytest.mark.parametrize("bits", [8, 4])
def test_bytes_of_a_quantised_head_and_of_fp8_at_load(shape: str, bits: int) -> None:
    spec = ModelSpec.from_config({**SMALL, **SHAPES[shape], "intermediate_size": 688})
    assert weights_of(spec, FP8, HEADS[bits], 2).total == loaded_bytes(spec, torch.bfloat16, model_format="fp8", head_bits=bits)


def test_act_order_counts_its_order() -> None:
    plain = ModelSpec.from_config({**SMALL, "quantization_config": STORED["gptq"]})
    ordered = ModelSpec.from_config({**SMALL, "quantization_config": {**STORED["gptq"], "desc_act": True}})
    inputs = sum(m.cols * m.count for m in matrices(plain))
    assert weights_of(ordered, stored(ordered), DENSE, 2).total - weights_of(plain, stored(plain), DENSE, 2).total == 8 * inputs


def test_w4_takes_67_bytes_for_128_weights() -> None:
    from lmdeploy.models.weight_bytes import W4

    assert W4.nbytes(1, 128, 2) == 67


def test_ranks_share_matrices_and_replicate_heads_that_are_too_few() -> None:
    spec = ModelSpec.from_config(SMALL)
    whole, halves = weights_of(spec, DENSE, DENSE, 2), weights_of(spec, DENSE, DENSE, 2, tp=2)
    assert halves.parts["attention"] * 2 == whole.parts["attention"]
    assert halves.parts["embedding"] == whole.parts["embedding"]
    assert check_split(spec, 2).num_kv_heads == 1
    assert check_split(spec, 4).num_kv_heads == 1, "two ranks hold the same KV head"
    with pytest.raises(Exception, match="tp=3 does not divide 8 heads"):
        check_split(spec, 3)


def test_a_step_reads_the_experts_that_tokens_go_to() -> None:
    spec = ModelSpec.from_config({**SMALL, **SHAPES["qwen3-moe"]})
    weights = weights_of(spec, DENSE, DENSE, 2)
    assert weights.read_bytes(1) == weights.read + weights.expert_bytes // 2
    assert weights.read_bytes(10_000) == weights.read + weights.expert_bytes
    assert weights.read + weights.expert_bytes == weights.total - weights.parts["embedding"]


#: what the makers say or the files sum up to, in billions
PARAMETERS = {
    "internlm2_5-7b-chat": 7.74, "internlm2_5-1_8b-chat": 1.89, "Llama-3.1-8B-Instruct": 8.03, "Qwen2.5-7B-Instruct": 7.62, "Qwen3-8B": 8.19,
    "InternVL2-26B": 25.5, "InternVL2-2B": 2.21, "InternVL2-1B": 0.94, "llava-1.5-7b": 7.06, "llava-v1.6-vicuna-7b": 7.06,
}  # fmt: skip


@pytest.mark.skipif(not CONFIGS.is_dir(), reason="shared/data/configs is not beside the repository")
@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters_is_the_makers(name: str) -> None:
    count = parameters(language_spec(CONFIGS / name), load_vision_spec(CONFIGS / name))
    assert count / 1e9 == pytest.approx(PARAMETERS[name], rel=0.01)
