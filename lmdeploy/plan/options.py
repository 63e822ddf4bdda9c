"""The options of `lmdeploy plan` that the engine does not have itself, once; the flags are made from them. This module must not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from lmdeploy.checked import CheckedOptions, above, between, option, remembers_given
from lmdeploy.errors import ConfigError

#: options of the engine that change what fits; `lmdeploy plan` has them too
ENGINE_OPTIONS = (
    "quant_policy", "model_format", "head_bits", "session_len", "max_batch_size", "cache_max_entry_count", "cache_block_seq_len", "max_prefill_token_num",
    "dtype", "kv_rotation", "download_dir", "revision",
)  # fmt: skip


@remembers_given
@dataclass
class PlanConfig(CheckedOptions):
    """Where the model shall run and what is asked of it. Raises ConfigError naming field, value and limit."""

    gpu: str | None = option(None, "a card that the table knows, such as a100-40g, 4090 or l4 (`--gpu list` shows all): its memory and bandwidth")
    gpu_memory: str | None = option(
        None, "memory of one GPU: 24GB or 24566MiB. GB is what cards are sold by, 2^30 bytes (default: that of --gpu, else this CPU)"
    )
    gpu_memory_used: str = option("0", "what other programs hold of it")
    bandwidth: float | None = option(None, "GB/s at which memory is read (default: of --gpu; this CPU's is measured)", check=above(0))
    tp: int = option(1, "GPUs that share the model", check=between(1, 64))
    users: int = option(1, "conversations that shall fit at once", check=between(1, 1 << 20))
    context: int | None = option(None, "tokens of each (default: --session-len, else 4096 or the model's own limit)", check=between(1, 1 << 31))
    json: bool = option(False, "print everything as JSON")

    def __post_init__(self) -> None:
        self._check(lambda _, text: ConfigError(text))
