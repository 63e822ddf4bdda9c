"""`ModelSpec`: the facts of config.json, typed and frozen. Nothing else in the package reads a raw config.

Facts, not names: layers branch on `spec.qk_norm` or `spec.sliding_window`, never on an architecture's name.
`ModelSpec.from_config(raw)` lives in this file too; it raises ConfigError / CheckpointError naming the key at fault.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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
