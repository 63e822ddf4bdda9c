"""Whether one combination of weights, KV policy and ranks fits a machine, by the engine's own rule of how large its pool is. Must not import torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from lmdeploy.config import EngineConfig
from lmdeploy.engine.sizing import FORMATS, PoolSize, bytes_per_token, pool_request, size_pool, unset_limits
from lmdeploy.errors import ConfigError
from lmdeploy.models.weight_bytes import HEADS, Storage, Weights, check_split, weights_of
from lmdeploy.plan.machines import Machine
from lmdeploy.spec import ModelSpec
from lmdeploy.vision.spec import VisionSpec


@dataclass(frozen=True, slots=True)
class NumberBytes:
    """Stands for a torch.dtype in the engine's arithmetic."""

    itemsize: int


@dataclass(frozen=True, slots=True)
class Subject:
    """What is planned for: the model, how it is run, and the conversations that shall fit. `config` is what the user gave, `resolved` has no open limits."""

    spec: ModelSpec
    vision: VisionSpec | None
    config: EngineConfig
    resolved: EngineConfig
    machine: Machine
    number_bytes: int
    users: int
    context: int


def subject(spec: ModelSpec, vision: VisionSpec | None, config: EngineConfig, machine: Machine, number_bytes: int, users: int, context: int) -> Subject:
    """With the limits decided as the engine decides them."""
    limits = unset_limits(config, spec, cpu=machine.cpu)
    if "max_batch_size" in limits:
        limits["max_batch_size"] = max(limits["max_batch_size"], users)
    resolved = config.replace(device_type="cpu" if machine.cpu else "cuda", **limits)
    return Subject(spec, vision, config, resolved, machine, number_bytes, users, context)


@dataclass(frozen=True, slots=True)
class Fit:
    """One combination, figures for one rank, in bytes. `missing` 0: it fits; else how much more memory it needs. `note`: why the engine would refuse, or shorten."""

    weights: str
    policy: int | str
    kv: str
    tp: int
    weight_bytes: int
    workspace: int
    other: int
    kv_pool: int
    bytes_per_token: int
    num_blocks: int
    tokens: int
    session_len: int
    conversations: int  # of the length asked for
    longest: int  # tokens of the longest single conversation
    share: float  # cache_max_entry_count
    need: int  # memory with which it fits
    missing: int
    note: str = ""


def try_fit(subject: Subject, storage: Storage, policy: int | str, tp: int, share: float | None = None) -> Fit:
    """The combination on the subject's machine. `share` replaces the config's cache_max_entry_count. ConfigError when ranks cannot split the model."""
    rank, machine = check_split(subject.spec, tp), subject.machine
    weights = rank_weights(subject, storage, tp)
    token_bytes = bytes_per_token(rank, NumberBytes(subject.number_bytes), FORMATS[policy])
    session_len, size = subject.resolved.session_len or 0, subject.resolved.cache_block_seq_len
    workspace = workspace_bytes(subject, tp, min(session_len, subject.resolved.max_prefill_token_num + 1))
    free = machine.memory - machine.other - weights.total - workspace
    request = pool_request(subject.config, subject.resolved)
    if share is not None:
        request = dataclasses.replace(request, amount=share)
    try:
        pool = size_pool(request, token_bytes, max(0, free))
    except ConfigError as error:
        pool = PoolSize(0, 0, str(error))
    wanted = subject.users * -(-subject.context // size) * size * token_bytes
    ratio = request.amount if request.amount < 1 else 1.0
    need = machine.other + weights.total + workspace + math.ceil(max(wanted, size * token_bytes) / ratio)
    tokens = pool.num_blocks * size
    held = tokens // (-(-subject.context // size) * size)
    fits = held >= subject.users and pool.session_len >= min(subject.context, session_len)
    missing = 0 if fits else max(1, need - machine.memory, wanted - tokens * token_bytes if request.amount >= 1 else 0)
    return Fit(
        storage.name, policy, FORMATS[policy].name, tp, weights.total, workspace_bytes(subject, tp, min(session_len, tokens)), machine.other,
        tokens * token_bytes, token_bytes, pool.num_blocks, tokens, pool.session_len, held, min(tokens, max(session_len, subject.context)),
        request.amount, need, missing, pool.note,
    )  # fmt: skip


def rank_weights(subject: Subject, storage: Storage, tp: int) -> Weights:
    """The weights of one rank."""
    return weights_of(subject.spec, storage, HEADS[subject.config.head_bits], subject.number_bytes, tp, subject.vision)


def workspace_bytes(subject: Subject, tp: int, session_len: int) -> int:
    """The engine's buffers: activations of the largest step (`layers.build.StepBuffers`), the sampler's two rows per sequence, the slots' tables.

    An estimate of the same buffers, and no more: what kernels and the C library keep besides is in `other`. The engine measures its own at start.
    """
    spec, config = subject.spec, subject.resolved
    batch, size = config.max_batch_size or 0, config.cache_block_seq_len
    heads, kv_heads = spec.num_heads // tp * spec.head_dim, max(1, spec.num_kv_heads // tp) * spec.head_dim
    dense = not spec.num_experts or spec.dense_layers
    width = 3 * (spec.intermediate_size // tp) if dense else 0
    row = 3 * spec.hidden_size + heads + 2 * kv_heads + max(heads, spec.hidden_size) + width + spec.num_experts
    steps = config.max_prefill_token_num * row * subject.number_bytes
    tables = batch * (session_len + 1 + -(-session_len // size) + 1) * 4
    return steps + 2 * batch * spec.vocab_size * 4 + tables
