"""How large the KV pool is, as a pure function of numbers: every refusal can be tested and can say what to change.

Also the limits that a config leaves open. This module must not import torch: `lmdeploy plan` answers with the engine's own arithmetic before anything is loaded.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lmdeploy.config import EngineConfig
from lmdeploy.errors import ConfigError
from lmdeploy.kv_layer import KVFormat, NumberType
from lmdeploy.spec import ModelSpec

MAX_POOL_TOKENS = 2**31 - 1  # block ids and slot numbers stay in int32 in kernels
CPU_BATCH, CUDA_BATCH = 32, 256
CPU_PREFILL_TOKENS = 1024
PLAIN = KVFormat()
#: at the end of every error for lack of memory; the command line adds a setting that fits
SEE_PLAN = "`lmdeploy plan` shows what fits"


@dataclass(frozen=True, slots=True)
class PoolRequest:
    """What the user asked for. `cap_blocks` bounds a default share; `keep_session` forbids to shorten session_len."""

    amount: float  # below 1 a share of the free memory, else a number of blocks
    block_size: int
    session_len: int
    cap_blocks: int | None = None
    keep_session: bool = False


@dataclass(frozen=True, slots=True)
class PoolSize:
    """What the user gets, and why it is less than what was asked for: one line a reason."""

    num_blocks: int
    session_len: int
    note: str = ""


def bytes_per_token(spec: ModelSpec, dtype: NumberType, format: KVFormat = PLAIN) -> int:
    """KV bytes of one token over all layers, scales and offsets of quantised rows included."""
    return spec.num_layers * spec.num_kv_heads * format.bytes_per_row(spec.head_dim, dtype)


FORMATS: dict[int | str, KVFormat] = {
    0: PLAIN, 8: KVFormat("8", "8"), 4: KVFormat("4", "4", rotated=True), "k8v4": KVFormat("8", "4", rotated=True), 16: KVFormat("fp8", "fp8"),
}  # fmt: skip
FP8_CAPABILITY = (8, 9)


def choose_format(policy: int | str, rotation: bool | None, head_dim: int, capability: tuple[int, int] | None) -> KVFormat:
    """The format of a `quant_policy`; `rotation` None = where keys or values have 4 bits. `capability` is the CUDA device's, None on CPU."""
    format = FORMATS[policy]
    if format.plain and rotation:
        raise ConfigError("kv_rotation=True has no use with quant_policy=0: only quantised keys and values gain by it; leave it out or choose quant_policy=4")
    if policy == 16 and (capability is None or capability < FP8_CAPABILITY):
        here = "this is a CPU" if capability is None else f"this one has {capability[0]}.{capability[1]}"
        raise ConfigError(
            f"quant_policy=16 (fp8) needs a CUDA device of compute capability 8.9 or newer, {here}; use quant_policy=8 (int8), as small and as exact"
        )
    if head_dim % 2 and "4" in (format.key, format.value):
        raise ConfigError(f"quant_policy={policy} stores two numbers a byte, but the model's head_dim={head_dim} is odd; use quant_policy=8 (int8)")
    return format if rotation is None else dataclasses.replace(format, rotated=rotation)


def unset_limits(config: EngineConfig, spec: ModelSpec, *, cpu: bool) -> dict[str, Any]:
    """Values for those of max_batch_size, max_prefill_token_num and session_len that the user left open."""
    limits: dict[str, Any] = {}
    if config.max_batch_size is None:
        limits["max_batch_size"] = CPU_BATCH if cpu else CUDA_BATCH
    if cpu and "max_prefill_token_num" not in config.given:
        limits["max_prefill_token_num"] = CPU_PREFILL_TOKENS
    if config.session_len is None:
        limits["session_len"] = spec.max_position
    return limits


def pool_request(config: EngineConfig, resolved: EngineConfig) -> PoolRequest:
    """How large the KV pool may be; `config` is what the user gave."""
    assert resolved.session_len is not None and resolved.max_batch_size is not None
    size = resolved.cache_block_seq_len
    capped = resolved.device_type == "cpu" and "cache_max_entry_count" not in config.given
    cap = resolved.max_batch_size * -(-resolved.session_len // size) if capped else None
    return PoolRequest(config.cache_max_entry_count, size, resolved.session_len, cap, keep_session=config.session_len is not None)


def size_pool(request: PoolRequest, token_bytes: int, free: int) -> PoolSize:
    """Blocks for `free` bytes; ConfigError when not one fits."""
    size, block_bytes = request.block_size, request.block_size * token_bytes
    fit = free // block_bytes
    if request.amount >= 1:
        blocks = int(request.amount)
        if blocks > fit:
            raise ConfigError(
                f"cache_max_entry_count={blocks} blocks of {size} tokens need {gib(blocks * block_bytes)}, but {gib(free)} are free after the weights and "
                f"the step workspace; use at most {fit} blocks or a share below 1"
                if fit
                else _nothing_fits(block_bytes, free, size)
            )
    else:
        blocks = int(request.amount * free) // block_bytes
        if blocks < 1:
            raise ConfigError(_share_too_small(request, block_bytes, free) if fit else _nothing_fits(block_bytes, free, size))
    notes = []
    if request.cap_blocks is not None and blocks > request.cap_blocks:
        notes.append(f"{blocks} blocks would fit; {request.cap_blocks} hold max_batch_size full sessions (give cache_max_entry_count for more)")
        blocks = request.cap_blocks
    if blocks * size > MAX_POOL_TOKENS:
        blocks = MAX_POOL_TOKENS // size
        notes.append(f"limited to {blocks} blocks: token slots are 32-bit numbers")
    return _with_session(request, blocks, notes)


def _with_session(request: PoolRequest, blocks: int, notes: list[str]) -> PoolSize:
    tokens, session_len = blocks * request.block_size, request.session_len
    if tokens < session_len and request.keep_session:
        notes.append(f"session_len={session_len} is more than the {tokens} tokens of the KV cache: longer requests are refused; raise cache_max_entry_count")
    elif tokens < session_len:
        notes.append(f"session_len is {tokens} instead of {session_len}: that is what the KV cache holds; raise cache_max_entry_count for more")
        session_len = tokens
    return PoolSize(blocks, session_len, "\n".join(notes))


def _share_too_small(request: PoolRequest, block_bytes: int, free: int) -> str:
    return (
        f"cache_max_entry_count={request.amount} of the {gib(free)} that are free after the weights is {gib(int(request.amount * free))}, but one KV block of "
        f"{request.block_size} tokens takes {gib(block_bytes)}; use at least {1.01 * block_bytes / free:.2g}, or a smaller cache_block_seq_len; {SEE_PLAN}"
    )


def _nothing_fits(block_bytes: int, free: int, block_size: int) -> str:
    return (
        f"no memory for the KV cache: one block of {block_size} tokens takes {gib(block_bytes)}, {gib(free)} are free after weights and step workspace; "
        f"free memory, use a smaller cache_block_seq_len or a smaller model; {SEE_PLAN}"
    )


def gib(count: int) -> str:
    """Bytes for people, three digits: '1.25 GiB', '38.1 MiB'."""
    value, unit = (count / 2**30, "GiB") if abs(count) >= 2**30 else (count / 2**20, "MiB")
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
