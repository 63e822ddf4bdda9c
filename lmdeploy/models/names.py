"""Which class runs which checkpoint: architecture -> "module:Class". Must not import torch: `lmdeploy plan` asks which models there are.

A new model is one line here and one small file. A checkpoint without `architectures` is found by its `model_type`.
"""

from __future__ import annotations

import difflib

from lmdeploy.errors import CheckpointError
from lmdeploy.spec import ModelSpec

MODELS = {
    "InternLM2ForCausalLM": "internlm2:InternLM2",
    "InternLM3ForCausalLM": "internlm3:InternLM3",
    "InternLMForCausalLM": "internlm3:InternLM3",
    "LlamaForCausalLM": "llama:Llama",
    "MistralForCausalLM": "mistral:Mistral",
    "MixtralForCausalLM": "mixtral:Mixtral",
    "Phi3ForCausalLM": "phi3:Phi3",
    "Qwen2ForCausalLM": "qwen2:Qwen2",
    "Qwen3ForCausalLM": "qwen3:Qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe:Qwen3Moe",
}

#: model_type -> architecture
MODEL_TYPES = {
    "internlm": "InternLMForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
    "internlm3": "InternLM3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def class_of(spec: ModelSpec) -> str:
    """The "module:Class" of a spec; an unknown architecture raises CheckpointError naming the nearest ones that are supported."""
    where = MODELS.get(spec.architecture or MODEL_TYPES.get(spec.model_type, ""))
    if where is None:
        unknown = spec.architecture or f"model_type {spec.model_type}"
        near = difflib.get_close_matches(spec.architecture or spec.model_type, [*MODELS, *MODEL_TYPES], 3, cutoff=0.4)
        shown = repr(unknown if len(unknown) <= 80 else unknown[:77] + "...")
        raise CheckpointError(f"model architecture {shown} is not supported; the nearest supported are {', '.join(near or MODELS)}")
    return where
