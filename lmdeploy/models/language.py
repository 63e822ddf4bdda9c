"""The language model inside a folder: the whole of it, or the part of a vision-language model that is quantised while the rest is copied.

Composite folders nest its config (`llm_config`, `text_config`) and put its tensors below `language_model.` (InternVL, LLaVA of transformers) or
`model.language_model.` (transformers 5); the first LLaVA folders have a llama with a vision tower beside its layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmdeploy.checkpoint.rename import Rename, RenamedSource, checkpoint_name
from lmdeploy.checkpoint.source import WeightSource, open_source
from lmdeploy.models.registry import MODEL_TYPES, model_class
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
BELOW, INSIDE = "language_model.", "model.language_model."


@dataclass(frozen=True, slots=True)
class Language:
    """Facts of the language model, where its tensors are (`rules`: its names -> the folder's), and the folder's other modules."""

    spec: ModelSpec
    rules: tuple[Rename, ...] = ()
    inside: bool = False  # of a larger model
    others: tuple[str, ...] = ()

    def stored(self, name: str) -> str:
        """The folder's name of a tensor or module."""
        return checkpoint_name(name, self.rules)

    def open(self, folder: Path) -> WeightSource:
        """The folder's weights under the language model's names; tensors that are not its own have no name."""
        source = open_source(folder)
        return _LanguageSource(source, self) if self.inside else source


class _LanguageSource(RenamedSource):
    """Asked with the language model's names, and lists them."""

    def __init__(self, source: WeightSource, language: Language) -> None:
        super().__init__(source, language.rules)
        self._own = {own for name in source.names() if (own := _own_name(name, language.rules, language.spec)) is not None}

    def names(self) -> set[str]:
        """Names of the language model's tensors."""
        return self._own


def language_spec(folder: Path, overrides: Mapping[str, Any] | None = None) -> ModelSpec:
    """The facts of the folder's language model, from its config.json alone. Raises CheckpointError as `load_spec` does."""
    nested = _nested(_raw(folder))
    if nested is None:
        return load_spec(folder, overrides)
    generation = folder / "generation_config.json"
    more = read_json_object(generation) if generation.is_file() else None
    return ModelSpec.from_config(merged(with_quantization(nested, folder), overrides or {}), more, str(folder / "config.json"))


def find_language(folder: Path) -> Language:
    """The language model of a folder. Raises CheckpointError as `load_spec` and `open_source` do."""
    spec = language_spec(folder)
    if _nested(_raw(folder)) is None:
        return Language(spec)
    names = open_source(folder).names()
    rules: tuple[Rename, ...] = ()
    if any(name.startswith(BELOW) for name in names):
        rules = (Rename("", BELOW),)
    elif any(name.startswith(INSIDE) for name in names):
        rules = (Rename(r"model\.", INSIDE),)
    strangers = sorted(name for name in names if _own_name(name, rules, spec) is None)
    return Language(spec, rules, True, tuple(dict.fromkeys(module for name in strangers if (module := _module(name)))))


def _raw(folder: Path) -> Mapping[str, Any]:
    """config.json when it is readable; `load_spec` complains about one that is not."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
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


def _own_name(name: str, rules: tuple[Rename, ...], spec: ModelSpec) -> str | None:
    """The language model's name of a tensor of the folder; None for one that is not its own."""
    names = model_class(spec).names
    if rules and rules[0].replacement == BELOW:
        return name.removeprefix(BELOW) if name.startswith(BELOW) else None
    if rules and name.startswith(INSIDE):
        return f"model.{name.removeprefix(INSIDE)}"
    stems = (names.head,) if rules else (names.embedding, names.layers, names.norm, names.head)
    return name if name.startswith(tuple(f"{stem}." for stem in stems)) else None


def _module(name: str) -> str:
    """The part of the larger model that a tensor belongs to: 'vision_model', 'model.mm_projector'; '' for a tensor in no module."""
    words = name.split(".")
    depth = 2 if words[0] == "model" else 1
    return ".".join(words[:depth]) if len(words) > depth else ""
