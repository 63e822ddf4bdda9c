"""The facts of a folder's language model, also where it is part of a vision-language model. Must not import torch: `lmdeploy plan` reads them.

Composite folders nest its config (`llm_config`, `text_config`); the first LLaVA folders have a llama's config with the tower's keys added.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmdeploy.models.names import MODEL_TYPES
from lmdeploy.spec import LANGUAGE_KEYS, ModelSpec, load_spec, merged, read_json_object, with_quantization

#: Architectures that are a language model with a vision tower added, in one flat config.
FLAT = {"LlavaLlamaForCausalLM": "LlamaForCausalLM", "LlavaMistralForCausalLM": "MistralForCausalLM", "LlavaQwenForCausalLM": "Qwen2ForCausalLM"}
#: What transformers takes for granted of a nested llama: it writes only what differs from that.
LLAMA = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6, "vocab_size": 32000,
    "max_position_embeddings": 2048,
}  # fmt: skip
#: Keys of the whole config that a nested one may lack.
SHARED = ("torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "quantization_config")


def language_spec(folder: Path, overrides: Mapping[str, Any] | None = None) -> ModelSpec:
    """The facts of the folder's language model, from its config.json alone. Raises CheckpointError as `load_spec` does."""
    nested = _nested(_raw(folder))
    if nested is None:
        return load_spec(folder, overrides)
    generation = folder / "generation_config.json"
    more = read_json_object(generation) if generation.is_file() else None
    return ModelSpec.from_config(merged(with_quantization(nested, folder), overrides or {}), more, str(folder / "config.json"))


def is_nested(folder: Path) -> bool:
    """Whether the language model is part of a larger one."""
    return _nested(_raw(folder)) is not None


def _raw(folder: Path) -> Mapping[str, Any]:
    """config.json when it is readable; `load_spec` complains about one that is not."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return raw if isinstance(raw, Mapping) else {}


def _nested(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """The language model's own config, complete; None when the folder is a plain language model."""
    architecture = next(iter(raw.get("architectures") or ()), "")
    if architecture in FLAT:
        return {**raw, "architectures": [FLAT[architecture]]}
    if "hidden_size" in raw:
        return None
    part = next((raw[key] for key in LANGUAGE_KEYS if isinstance(raw.get(key), Mapping)), None)
    if part is None:
        return None
    kind = part.get("model_type", "")
    names = part.get("architectures") or [MODEL_TYPES.get(kind, architecture)]
    return {**{key: raw[key] for key in SHARED if key in raw}, **(LLAMA if kind == "llama" else {}), **part, "architectures": names}
