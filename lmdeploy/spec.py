"""`ModelSpec`: the facts of config.json, typed and frozen. Nothing else in the package reads a raw config.

Facts, not names: layers branch on `spec.qk_norm` or `spec.sliding_window`, never on an architecture's name.
`ModelSpec.from_config(raw)` lives in this file too; it raises ConfigError / CheckpointError naming the key at fault.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.log import get_logger

T = TypeVar("T")

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding: kind and its numbers; absent numbers are None. `original_max_position` is M in the formulas."""

    kind: RopeKind = "default"
    theta: float = 10000.0
    rotary_dim: int = 0  # R; head_dim unless partial_rotary_factor says less
    factor: float = 1.0
    original_max_position: int = 2048
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None  # yarn, longrope
    truncate: bool = True  # yarn
    short_factor: tuple[float, ...] = ()  # longrope, R/2 numbers each
    long_factor: tuple[float, ...] = ()

    @property
    def depends_on_length(self) -> bool:
        """True when the base depends on the sequence's own length (dynamic NTK, longrope)."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Architecture facts of one decoder-only language model."""

    architecture: str  # e.g. InternLM2ForCausalLM
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_position: int  # smallest of the length keys (surface 2.8)
    rope: RopeSpec
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each q and k head (qwen3)
    sliding_window: int = 0  # 0 = full attention
    window_layers: tuple[bool, ...] = ()  # per layer; empty = all layers when sliding_window > 0
    use_logn: bool = False
    num_experts: int = 0  # 0 = dense
    experts_per_token: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    dense_layers: tuple[int, ...] = ()  # MoE models: layers with an ordinary MLP
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the checkpoint
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()  # config.json's and generation_config.json's
    pad_token_id: int | None = None
    quantization: dict[str, Any] | None = None  # quantization_config as found

    @classmethod
    def from_config(cls, raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None, where: str = "config.json") -> ModelSpec:
        """Read a config.json (and generation_config.json); `where` is what errors call the file."""
        whole = _Facts(raw, where)
        architecture = _architecture(whole)
        text = _language_part(whole)
        family = FAMILIES.get(_architecture(text) if text is not whole else architecture, Family())
        hidden_size, num_layers = text.integer("hidden_size", high=1 << 20), text.integer("num_hidden_layers", high=4096)
        num_heads, num_kv_heads, head_dim = _heads(text, hidden_size, family)
        max_position = _max_position(text)
        window, window_layers = _windows(text, num_layers, family)
        return cls(
            architecture=architecture,
            model_type=whole.text("model_type", ""),
            vocab_size=text.integer("vocab_size", high=1 << 24),
            hidden_size=hidden_size,
            intermediate_size=text.integer("intermediate_size", high=1 << 22),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            norm_eps=text.number("rms_norm_eps", family.norm_eps, high=1.0),
            max_position=max_position,
            rope=_rope(text, head_dim, max_position, family),
            tie_embeddings=text.boolean("tie_word_embeddings", whole.boolean("tie_word_embeddings", False)),
            sliding_window=window,
            window_layers=window_layers,
            qk_norm=family.qk_norm,
            use_logn=text.boolean("use_logn_attn", False),
            dtype=_dtype(text, whole),
            bos_token_id=_first(_token_ids("bos_token_id", text, whole)),
            eos_token_ids=_token_ids("eos_token_id", text, whole, *([_Facts(generation, "generation_config.json")] if generation else [])),
            pad_token_id=_first(_token_ids("pad_token_id", text, whole)),
            quantization=text.table("quantization_config") or whole.table("quantization_config"),
            **_biases(text, family),
            **_mixture(text, num_layers, family),
        )


@dataclass(frozen=True, slots=True)
class Family:
    """What an architecture's own code takes for granted, and config.json therefore does not say.

    Biases: the keys of config.json that say so (the first one present counts, none = no), or a constant.
    """

    qkv_bias: tuple[str, ...] | bool = ("attention_bias",)
    o_bias: tuple[str, ...] | bool = ("attention_bias",)
    mlp_bias: tuple[str, ...] | bool = False
    qk_norm: bool = False
    head_dim: int | None = None  # None = hidden_size / num_attention_heads
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    window: Literal["none", "always", "switched", "switched_by_layer"] = "none"  # which keys turn the sliding window on
    window_default: int = 0
    moe: Literal["none", "mixtral", "qwen3"] = "none"


FAMILIES: dict[str, Family] = {
    "InternLM2ForCausalLM": Family(qkv_bias=("bias",), o_bias=("bias",)),
    # The second names are those under which transformers 5 saves its own InternLM3.
    "InternLM3ForCausalLM": Family(
        qkv_bias=("qkv_bias", "attention_bias"), o_bias=("bias", "mlp_bias"), mlp_bias=("bias", "mlp_bias"), head_dim=128, norm_eps=1e-5
    ),
    "LlamaForCausalLM": Family(mlp_bias=("mlp_bias",)),
    "Qwen2ForCausalLM": Family(qkv_bias=True, o_bias=False, window="switched_by_layer", window_default=4096),
    "Qwen3ForCausalLM": Family(qk_norm=True, head_dim=128, window="switched_by_layer", window_default=4096),
    "MistralForCausalLM": Family(qkv_bias=False, o_bias=False, window="always", window_default=4096),
    "MixtralForCausalLM": Family(qkv_bias=False, o_bias=False, rope_theta=1e6, norm_eps=1e-5, window="always", moe="mixtral"),
    "Phi3ForCausalLM": Family(qkv_bias=False, o_bias=False, norm_eps=1e-5, window="always"),
    "Qwen3MoeForCausalLM": Family(qk_norm=True, window="switched", window_default=4096, moe="qwen3"),
}

#: Where composite models keep the language model's config.
LANGUAGE_KEYS = ("llm_config", "text_config", "language_config")
#: files that hold the quantization_config where config.json has none, and the method that writes them
QUANTIZATION_FILES = {"quant_config.json": "awq", "quantize_config.json": "gptq"}
LENGTH_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
#: config.json's spelling -> ours
ROPE_KINDS: dict[str, RopeKind] = {**{kind: kind for kind in get_args(RopeKind)}, "su": "longrope"}
MAX_LENGTH = 1 << 31
MAX_CONFIG_BYTES = 16 << 20


class _Facts:
    """A JSON object whose values are checked as they are read; every complaint names the file, the key and the value. null counts as absent."""

    def __init__(self, raw: Any, where: str) -> None:
        if not isinstance(raw, Mapping):
            raise CheckpointError(f"{where}: expected a JSON object, found {_short(raw)}")
        self.raw, self.where = raw, where

    def has(self, key: str) -> bool:
        return self.raw.get(key) is not None

    def wrong(self, key: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key}={_short(self.raw.get(key))} {why}")

    def _value(self, key: str, default: T | None) -> Any:
        value = self.raw.get(key)
        if value is None and default is None:
            raise CheckpointError(f"{self.where}: '{key}' is missing")
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_LENGTH) -> int:
        value = self._value(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, "is not a whole number")
        if not low <= value <= high:
            raise self.wrong(key, f"must be in [{low}, {high}]")
        return value

    def number(self, key: str, default: float | None = None, *, low: float = 0.0, high: float = math.inf) -> float:
        """A finite number > low and <= high."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:  # NaN, Infinity, ints beyond floats
            raise self.wrong(key, "is not a number")
        if not low < value <= high:
            raise self.wrong(key, f"must be above {low:g}" + (f" and at most {high:g}" if high < math.inf else ""))
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "is neither true nor false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "is not a text")
        return value

    def sequence(self, key: str) -> Sequence[Any]:
        value = self._value(key, ())
        if not isinstance(value, (list, tuple)):
            raise self.wrong(key, "is not a list")
        return value

    def table(self, key: str) -> dict[str, Any] | None:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.wrong(key, "is not a JSON object")
        return dict(value) if value is not None else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _architecture(facts: _Facts) -> str:
    names = facts.sequence("architectures")
    if not names or not isinstance(names[0], str):
        raise CheckpointError(f"{facts.where}: 'architectures' does not name the model's class; this is not the config.json of a language model")
    return names[0]


def _language_part(facts: _Facts) -> _Facts:
    """The part of a composite config that describes the language model; the config itself if it is not composite."""
    for key in LANGUAGE_KEYS:
        if (part := facts.table(key)) is not None and "hidden_size" not in facts.raw:
            return _Facts({"architectures": facts.raw.get("architectures"), **part}, f"{facts.where}: {key}")
    return facts


def _heads(facts: _Facts, hidden_size: int, family: Family) -> tuple[int, int, int]:
    """(num_heads, num_kv_heads, head_dim), consistent with each other."""
    num_heads = facts.integer("num_attention_heads", high=1 << 16)
    num_kv_heads = facts.integer("num_key_value_heads", num_heads, high=1 << 16)
    if num_heads % num_kv_heads:
        raise facts.wrong("num_attention_heads", f"is no multiple of num_key_value_heads={num_kv_heads}")
    if not facts.has("head_dim") and family.head_dim is None and hidden_size % num_heads:
        raise facts.wrong("hidden_size", f"is no multiple of num_attention_heads={num_heads}, and there is no head_dim")
    head_dim = facts.integer("head_dim", family.head_dim or max(1, hidden_size // num_heads), high=4096)
    if head_dim % 2:
        raise CheckpointError(f"{facts.where}: head_dim={head_dim} is odd; rotary embedding needs pairs")
    return num_heads, num_kv_heads, head_dim


def _max_position(facts: _Facts) -> int:
    """The smallest length key; 2048 with a warning when there is none. Tokenizers write 1e30 for "no limit": not a limit."""
    for key in LENGTH_KEYS:
        if facts.has(key) and (isinstance(facts.raw[key], bool) or not isinstance(facts.raw[key], (int, float))):
            raise facts.wrong(key, "is not a whole number")
    found = [key for key in LENGTH_KEYS if facts.has(key) and not facts.raw[key] > MAX_LENGTH]
    if not found:
        get_logger(__name__).warning("%s: none of %s is given; the longest context is taken as 2048 tokens", facts.where, ", ".join(LENGTH_KEYS))
        return 2048
    return min(facts.integer(key) for key in found)


def _rope(facts: _Facts, head_dim: int, max_position: int, family: Family) -> RopeSpec:
    """From `rope_scaling` (4.x) or `rope_parameters` (5.x); the former wins when a config has both, as in transformers."""
    key = "rope_scaling" if facts.table("rope_scaling") else "rope_parameters"
    rope = _flat_rope(facts, key, facts.table(key) or {})
    name = rope.text("rope_type", rope.text("type", "default"))
    if name not in ROPE_KINDS:
        raise CheckpointError(f"{rope.where}: unknown kind of rotary embedding {name!r}; known: {', '.join(ROPE_KINDS)}")
    kind = ROPE_KINDS[name]
    trained = facts.integer("max_position_embeddings", max_position)
    original = trained
    if kind in ("llama3", "yarn", "longrope"):
        original = (facts if facts.has("original_max_position_embeddings") else rope).integer("original_max_position_embeddings", trained)
    share = rope.number("partial_rotary_factor", facts.number("partial_rotary_factor", 1.0, high=1.0), high=1.0)
    rotary_dim = int(head_dim * share)
    if rotary_dim < 2 or rotary_dim % 2 or (kind == "dynamic" and rotary_dim == 2):
        raise CheckpointError(f"{rope.where}: partial_rotary_factor={share:g} rotates {rotary_dim} of {head_dim} dimensions; an even number is needed")
    theta = rope.number("rope_theta", facts.number("rope_theta", family.rope_theta), high=1e15)
    common = {"kind": kind, "theta": theta, "rotary_dim": rotary_dim, "original_max_position": original}
    return RopeSpec(**cast(Any, {**common, **_rope_numbers(rope, kind, rotary_dim, trained / original)}))


def _flat_rope(facts: _Facts, key: str, table: dict[str, Any]) -> _Facts:
    """The rope table; one that is given per kind of layer must be the same for all of them."""
    nested = [value for value in table.values() if isinstance(value, Mapping)]
    if nested and (len(nested) != len(table) or any(dict(value) != dict(nested[0]) for value in nested)):
        raise facts.wrong(key, "gives layers different rotary embeddings, which is not supported")
    return _Facts(nested[0] if nested else table, f"{facts.where}: {key}")


def _rope_numbers(rope: _Facts, kind: RopeKind, rotary_dim: int, ratio: float) -> dict[str, Any]:
    """What the kind needs beyond the common numbers. `ratio` = present / original length, the factor of yarn and longrope when none is given."""
    if kind == "default":
        return {}
    if kind in ("linear", "dynamic"):
        return {"factor": rope.number("factor")}
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise rope.wrong("high_freq_factor", f"must be above low_freq_factor={low:g}")
        return {"factor": rope.number("factor"), "low_freq_factor": low, "high_freq_factor": high}
    numbers: dict[str, Any] = {"factor": rope.number("factor", ratio)}
    if rope.has("attention_factor"):
        numbers["attention_factor"] = rope.number("attention_factor")
    if kind == "longrope":
        return {**numbers, **{key: _factors(rope, key, rotary_dim // 2) for key in ("short_factor", "long_factor")}}
    for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if rope.raw.get(key):  # transformers takes 0 for absent
            numbers[key] = rope.number(key)
    return {**numbers, "truncate": rope.boolean("truncate", True)}


def _factors(rope: _Facts, key: str, count: int) -> tuple[float, ...]:
    """One positive number for each rotated pair."""
    values = rope.sequence(key)
    if len(values) != count:
        raise CheckpointError(f"{rope.where}: {key} has {len(values)} numbers, {count} are needed")
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) or not 0 < v < 1e300 for v in values):
        raise rope.wrong(key, "must hold positive numbers")
    return tuple(float(v) for v in values)


def _windows(facts: _Facts, num_layers: int, family: Family) -> tuple[int, tuple[bool, ...]]:
    """(sliding_window, window_layers): 0 when no layer has one, () when all have the same."""
    if family.window == "none" or (family.window.startswith("switched") and not facts.boolean("use_sliding_window", False)):
        return 0, ()
    # A key set to null turns the window off; a key that is absent means the architecture's default.
    if "sliding_window" in facts.raw and not facts.has("sliding_window"):
        return 0, ()
    window = facts.integer("sliding_window", family.window_default, low=0)
    if family.window != "switched_by_layer":
        return window, ()
    layers = _window_layers(facts, num_layers)
    if window == 0 or not any(layers):
        return 0, ()
    return window, () if all(layers) else layers


def _window_layers(facts: _Facts, num_layers: int) -> tuple[bool, ...]:
    """Which layers have the window: `layer_types`, else those from `max_window_layers` on."""
    if not facts.has("layer_types"):
        first = facts.integer("max_window_layers", 28, low=0)
        return tuple(layer >= first for layer in range(num_layers))
    kinds = facts.sequence("layer_types")
    if len(kinds) != num_layers:
        raise CheckpointError(f"{facts.where}: layer_types has {len(kinds)} entries, but num_hidden_layers={num_layers}")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise CheckpointError(f"{facts.where}: layer_types has {_short(kind)}; known: full_attention, sliding_attention")
    return tuple(kind == "sliding_attention" for kind in kinds)


def _biases(facts: _Facts, family: Family) -> dict[str, Any]:
    """Which linear layers have a bias."""
    if (activation := facts.text("hidden_act", "silu")) not in ("silu", "swish"):
        raise facts.wrong("hidden_act", f"is not supported; known: silu ({activation} would need another MLP)")
    rules = {"qkv_bias": family.qkv_bias, "o_bias": family.o_bias, "mlp_bias": family.mlp_bias}
    return {name: rule if isinstance(rule, bool) else _first_said(facts, rule) for name, rule in rules.items()}


def _first_said(facts: _Facts, keys: Sequence[str]) -> bool:
    """The first of the keys that config.json has; False when it has none."""
    return next((facts.boolean(key, False) for key in keys if facts.has(key)), False)


def _mixture(facts: _Facts, num_layers: int, family: Family) -> dict[str, Any]:
    """The mixture-of-experts facts; nothing for a dense model."""
    if family.moe == "none":
        return {}
    key = "num_local_experts" if facts.has("num_local_experts") else "num_experts"
    num_experts = facts.integer(key, 8 if family.moe == "mixtral" else 128, high=1 << 16)
    chosen = facts.integer("num_experts_per_tok", 2 if family.moe == "mixtral" else 8)
    if chosen > num_experts:
        raise facts.wrong("num_experts_per_tok", f"is more than {key}={num_experts}")
    common = {"num_experts": num_experts, "experts_per_token": chosen}
    if family.moe == "mixtral":  # its router always renormalises
        return {**common, "moe_intermediate_size": facts.integer("intermediate_size"), "norm_topk_prob": True}
    step, dense = facts.integer("decoder_sparse_step", 1), facts.sequence("mlp_only_layers")
    if not all(type(layer) is int and 0 <= layer < num_layers for layer in dense):
        raise facts.wrong("mlp_only_layers", f"must hold layer numbers below {num_layers}")
    return {
        **common,
        "moe_intermediate_size": facts.integer("moe_intermediate_size", 768, high=1 << 22),
        "norm_topk_prob": facts.boolean("norm_topk_prob", False),
        "dense_layers": tuple(layer for layer in range(num_layers) if layer in dense or (layer + 1) % step),
    }


def _dtype(*places: _Facts) -> Literal["float32", "bfloat16", "float16"]:
    """`dtype` (5.x) or `torch_dtype` (4.x) of the first place that has one; files without either are float32."""
    for facts in places:
        for key in ("dtype", "torch_dtype"):
            if facts.has(key):
                name = facts.text(key).removeprefix("torch.")
                if name not in ("float32", "bfloat16", "float16"):
                    raise facts.wrong(key, "is not one of float32, bfloat16, float16")
                return cast(Literal["float32", "bfloat16", "float16"], name)
    return "float32"


def _token_ids(key: str, *places: _Facts) -> tuple[int, ...]:
    """All ids that the places give under `key` (a number or a list), each once. Negative ids mean "none" in some old files."""
    found: dict[int, None] = {}
    for facts in places:
        value = facts.raw.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(v) is int and v < 1 << 31 for v in values):
            raise facts.wrong(key, "is neither a token id nor a list of them")
        found.update(dict.fromkeys(v for v in values if v >= 0))
    return tuple(found)


def _first(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids else None


def load_spec(folder: str | Path, overrides: Mapping[str, Any] | None = None) -> ModelSpec:
    """The spec of a model folder. `overrides` (hf_overrides) replace values of config.json; nested objects are merged, null removes a key."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(explain_not_a_model(folder))
    raw = read_json_object(folder / "config.json")
    if overrides is not None and not isinstance(overrides, Mapping):
        raise ConfigError(f"hf_overrides={_short(overrides)} must be a table of config.json keys and values")
    generation = folder / "generation_config.json"
    return ModelSpec.from_config(
        merged(with_quantization(raw, folder), overrides or {}), read_json_object(generation) if generation.is_file() else None, str(folder / "config.json")
    )


def with_quantization(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """config.json with `quantization_config` from the file of its own that older tools wrote."""
    if "quantization_config" in raw:
        return raw
    for name, method in QUANTIZATION_FILES.items():
        if (folder / name).is_file():
            return {**raw, "quantization_config": {"quant_method": method, **read_json_object(folder / name)}}
    return raw


def merged(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of the tables with the overrides put in."""
    out = dict(raw)
    for key, value in overrides.items():
        old = out.get(key)
        out[key] = merged(old if isinstance(old, Mapping) else {}, value) if isinstance(value, Mapping) else value
    return out


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file that may be broken, huge or something else."""
    try:
        if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path}: {size} bytes is too large for a config (limit {MAX_CONFIG_BYTES})")
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {_short(raw)}")
    return raw


def explain_not_a_model(folder: Path) -> str:
    """One line on what a path without config.json is, and what to do."""
    if not folder.exists():
        return f"{folder}: there is no such folder"
    if not folder.is_dir():
        return f"{folder}: is a file; give the folder that holds config.json and the weights"
    names = sorted(p.name for p in folder.iterdir())
    if "adapter_config.json" in names:
        return f"{folder}: holds a LoRA adapter, not a model (config.json is missing)"
    if "params.json" in names or "triton_models" in names:
        return f"{folder}: is in another system's layout (config.json is missing); give the Hugging Face version of the model"
    if inner := [name for name in names if (folder / name / "config.json").is_file()]:
        return f"{folder}: is not a model folder (config.json is missing); did you mean {folder / inner[0]}?"
    found = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"
    return f"{folder}: is not a model folder: config.json is missing; found {found}"
