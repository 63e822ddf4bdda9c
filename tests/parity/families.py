"""Tiny random models of every family, made by transformers and saved as real checkpoints: the outside opinion of the parity tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Tensor = torch.Tensor

COMMON: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
SHORT, LONG = [1.0 + 0.1 * i for i in range(12)], [1.5 + 0.7 * i for i in range(12)]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def _rope(**values: Any) -> dict[str, Any]:
    return {"head_dim": 24, "rope_parameters": {"rope_theta": 10000.0, **values}}


@dataclass(frozen=True)
class Family:
    """A transformers config, as changes to COMMON; `longest` bounds the test prompts, for ropes that change their base on the way."""

    model_type: str
    changes: dict[str, Any]
    greedy: bool = True  # False: transformers rotates later tokens with another base, we keep the one that the sequence started with


FAMILIES: dict[str, Family] = {
    "llama, 4:2 heads of 24": Family("llama", {"head_dim": 24}),
    "llama, one KV head, tied": Family("llama", {"hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama, all KV heads, all biases": Family("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "llama, linear": Family("llama", _rope(rope_type="linear", factor=3.0)),
    "llama, llama3": Family("llama", _rope(**LLAMA3)),
    "llama, yarn": Family("llama", _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)),
    "llama, dynamic": Family("llama", {**_rope(rope_type="dynamic", factor=2.0), "max_position_embeddings": 16}, greedy=False),
    "llama, longrope": Family(
        "llama",
        {**_rope(rope_type="longrope", short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=16), "max_position_embeddings": 64},
        greedy=False,
    ),
    "mistral, window 7": Family("mistral", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 20, "sliding_window": 7}),
    "mistral, no window": Family("mistral", {"head_dim": 24, "sliding_window": None}),
    "qwen2": Family("qwen2", {}),
    "qwen2, window in upper layers": Family("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": Family("qwen3", {"head_dim": 20}),
    "qwen3, tied": Family("qwen3", {"head_dim": 32, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mixtral": Family("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 24, "sliding_window": None}),
    "qwen3_moe": Family("qwen3_moe", {"head_dim": 20, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True}),
    "qwen3_moe, dense layers, raw weights": Family(
        "qwen3_moe",
        {"head_dim": 20, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": False, "mlp_only_layers": [1]},
    ),
    "phi3": Family("phi3", {"sliding_window": None}),
    "phi3, window 6": Family("phi3", {"sliding_window": 6}),
    "phi3, longrope": Family(
        "phi3",
        {
            "sliding_window": None,
            "original_max_position_embeddings": 16,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "longrope", "short_factor": SHORT[:8], "long_factor": LONG[:8]},
        },
        greedy=False,
    ),
}


@torch.no_grad()
def make_reference(family: Family, folder: Path, seed: int = 0) -> PreTrainedModel:
    """A random float32 model of the family, saved to `folder`."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family.model_type](**{**COMMON, **family.changes})
    config.architectures = None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
        elif parameter.dim() == 1:
            parameter.copy_(0.3 * torch.randn_like(parameter))
        else:  # large enough that every part of the model changes the logits
            parameter.copy_(torch.randn_like(parameter) * (1.5 / parameter.shape[-1] ** 0.5))
    model.save_pretrained(folder)
    return model


def reference_logits(model: PreTrainedModel) -> Callable[[list[int]], Tensor]:
    """token ids -> float32 logits [n, V] of the whole sequence, without any cache."""

    def run(token_ids: list[int]) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(torch.tensor([token_ids]), use_cache=False).logits[0]
        return logits

    return run
