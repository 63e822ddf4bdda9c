"""Plain data that crosses borders: from the text side to the engine (token ids only) and back, and what users get.

Everything between processes is a `msgspec.Struct`: typed, bounded, encoded as msgpack, never pickled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import msgspec

from lmdeploy.grammar import Grammar

FinishReason = Literal["stop", "length", "abort", "error"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose the next tokens of one sequence; resolved and checked, every field has its final value.

    `temperature == 0` means greedy (argmax). `top_k == 0` means the whole vocabulary. `seed` with the number of the
    generated token determines the random draw, so a request gives the same tokens alone or in any batch.
    """

    max_new_tokens: int  # 0 = only score the prompt
    min_new_tokens: int = 0  # stop ids are masked before
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and generated ids: logit < 0 ? logit * p : logit / p
    presence_penalty: float = 0.0  # generated ids: logit -= p if seen
    frequency_penalty: float = 0.0  # generated ids: logit -= p * count
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False  # stop_token_ids are masked until max_new_tokens
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences never produced (length 1 = a banned token)
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None  # top-n beside the chosen token's; 0 = the chosen token only
    prompt_logprobs: int | None = None  # the same for every prompt token but the first
    output_logits: Literal["all", "generation"] | None = None  # raw float32 logits; in-process engines only
    output_last_hidden_state: Literal["all", "generation"] | None = None
    embed: Literal["mean", "last"] | None = None  # pool the prompt's last hidden states; with max_new_tokens=0
    grammar: Grammar | None = None  # checked; see engine/guided.py


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """One picture of a prompt. The tokens `start .. start + count` stand for it; their ids say nothing."""

    start: int
    count: int
    tiles: int
    size: int  # pixels of a tile's side
    pixels: bytes  # uint8 [tiles, size, size, 3]
    grid: tuple[int, int] = (1, 1)  # anyres: tiles across and down, without the first, which is the whole picture
    original: tuple[int, int] = (1, 1)  # width, height
    digest: str = ""  # of everything that its features depend on: stands for its tokens in the prefix cache


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt. `n` answers share its KV blocks; their seeds are `sampling.seed + index`."""

    request_id: int
    token_ids: list[int]
    sampling: SamplingParams
    n: int = 1
    rope_length: int = 0  # the length that fixes a dynamic rope's base; 0 = len(token_ids). Sessions keep their first one
    cache_salt: str = ""  # prefix-cache blocks are shared only within one salt
    pictures: list[Picture] = []  # in order, their tokens apart from each other
    owner: str = ""  # who asks, an opaque name: work on grammars is done for each in turn


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """log p of one token, and of the `top` likeliest ones at the same place, best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class EngineOutput(msgspec.Struct, kw_only=True):
    """What one step brought one answer. The last one of an answer has `finish_reason`.

    A stop token ends the answer, is counted in `num_generated`, and is the last of `token_ids`
    (`stop_token_id` names it, so that the text side can drop it).
    """

    request_id: int
    index: int = 0  # which of the n answers
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # once, with the first output
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_prompt: int = 0
    num_cached: int = 0  # prompt tokens found in the prefix cache
    num_generated: int = 0
    queue_seconds: float | None = None  # with the first token: how long it waited for its first step
    error: str | None = None  # with finish_reason 'error'
    error_code: str | None = None  # machine-readable reason, as RequestError.code
    logits: Any = None  # torch [n, V] float32, in-process only
    last_hidden_state: Any = None
    embedding: bytes | None = None  # float32 [M], of length 1; with the last output of a request that embeds


class StepOutputs(msgspec.Struct, array_like=True):
    """What one step brought. Nearly all answers get one more token and nothing else: these are columns; `others` are told whole.

    An answer is in it once at most, but for outputs of its end. Reading it as a sequence of `EngineOutput`s makes those of the columns, without the
    counts that every answer's first and last outputs have. Steps of the same answers may share the lists of requests and indices: they are for reading.
    """

    request_ids: list[int] = []
    indices: list[int] = []
    token_ids: list[int] = []
    others: list[EngineOutput] = []

    def add_token(self, request_id: int, index: int, token: int) -> None:
        """One more token of an answer."""
        self.request_ids.append(request_id)
        self.indices.append(index)
        self.token_ids.append(token)

    def __len__(self) -> int:
        return len(self.token_ids) + len(self.others)

    def __iter__(self) -> Iterator[EngineOutput]:
        yield from self.others
        for request_id, index, token in zip(self.request_ids, self.indices, self.token_ids, strict=True):
            yield EngineOutput(request_id=request_id, index=index, token_ids=[token])


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine does between steps, when its running requests have ended, or were aborted after `drain_seconds`.

    sleep: give back memory; level 1 drops the KV cache and keeps weights in host memory, level 2 drops both. wake: bring back what `tags` name (all of
    SLEEPING when empty). update_weights: put those of the folder `path` in place of the old ones.
    """

    action: Literal["sleep", "wake", "update_weights"]
    level: int = 1
    tags: tuple[str, ...] = ()
    path: str = ""
    drain_seconds: float = 0.0

    def sleeping_after(self, before: frozenset[str]) -> frozenset[str]:
        """What sleeps when it has been carried out."""
        if self.action == "sleep":
            return frozenset(SLEEPING)
        return before - ({"weights"} if self.action == "update_weights" else set(self.tags or SLEEPING))


#: what can sleep
SLEEPING = ("weights", "kv_cache")


class EngineStats(msgspec.Struct, kw_only=True):
    """Counters since the start and gauges of now, for /metrics, /health and the progress lines."""

    running: int = 0
    waiting: int = 0
    num_blocks: int = 0
    used_blocks: int = 0  # referenced by live sequences; cached but unreferenced blocks are free
    cached_blocks: int = 0  # reusable prefix blocks that nobody references
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    late_tokens: int = 0  # times that a token did not come with its step but with the next one: its grammar's mask was not ready
    preemptions: int = 0
    aborted: int = 0
    finished: int = 0
    failed: int = 0
    last_step_time: float = 0.0  # time.monotonic() at the end of the last step (loop heart-beat), 0 before the first
    step_seconds: float = 0.0  # duration of the last step
    tokens_per_second: float = 0.0  # generated tokens over about the last 5 seconds
    busy: bool = False  # the engine's loop has something to do
    beat: int = 0  # times that the engine's loop came round: busy with the same beat for long = it hangs
    restarts: int = 0  # times that a failed engine process was replaced


class MemoryBill(msgspec.Struct, frozen=True, kw_only=True):
    """Where the memory went, in bytes; `total` is measured from outside (RSS or device), the parts add up to it."""

    device: str
    weights: int
    kv_pool: int
    workspace: int  # activations of the largest step
    other: int  # interpreter, libraries, kernels: total minus the three above
    total: int
    free: int  # what the device has left
    num_blocks: int
    block_size: int
    bytes_per_token: int  # KV bytes of one token over all layers
    session_len: int
    bytes_per_token_16bit: int = 0  # what it would be without quantising, in a 16-bit type
    kv_policy: str = "none"  # how keys and values are stored: none, int8, k8v4, int4, fp8, "rotated" where they are
    note: str = ""  # e.g. why the pool is smaller than the ratio asked for
    graphs: int = 0  # of what is free: what CUDA graphs will take


class KVScore(msgspec.Struct, frozen=True, kw_only=True):
    """What a KV policy does to the model's predictions of the start-up text, against a 16-bit cache."""

    policy: str
    perplexity: float
    mean_kl: float  # nats a token, KL(16 bit || policy)
    top1: float  # share of places where both have the same likeliest token


class KVQuality(msgspec.Struct, frozen=True, kw_only=True):
    """The start-up measurement of a 4-bit KV cache; `note` says why there is none. See engine/quality.py."""

    tokens: int = 0  # that were predicted
    perplexity: float = 0.0  # with the 16-bit cache
    scores: list[KVScore] = []  # of the policy in use, then of better ones that were tried because it failed
    passed: bool = False
    better: str = ""  # the first of those that passes, as options; '' with passed=False: none does
    seconds: float = 0.0
    note: str = ""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the text side must know of a started engine."""

    session_len: int
    vocab_size: int
    max_batch_size: int
    memory: MemoryBill
    kernels: dict[str, str]  # op -> chosen kernel, for the start-up lines
    dtype: str
    start_seconds: float
    step_seconds: float = 0.0  # what the largest step took at start-up
    kv_quality: KVQuality | None = None  # None: no part of the KV cache has 4 bits


@dataclass
class Response:
    """An answer, or an increment of one while streaming (`text`, `token_ids`, `logprobs` are then the new part)."""

    text: str
    generate_token_len: int
    input_token_len: int
    session_id: int = -1
    finish_reason: FinishReason | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] | None = None
    index: int = 0
    logits: Any = None
    last_hidden_state: Any = None
    cached_tokens: int = 0
    stop_reason: str | int | None = None  # which stop string or token id ended it
    error_code: str | None = None
    error_message: str | None = None
    prompt_logprobs: list[dict[int, float] | None] | None = None
    queue_seconds: float | None = None  # with the first increment: waiting in the engine
    embedding: bytes | None = None  # float32 [M], native byte order

    def __str__(self) -> str:
        """The text, then one `name=value` line for each field that says something; of tensors the shape."""
        lines = [self.text]
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "text" and value is not None:
                lines.append(f"{f.name}={tuple(value.shape) if hasattr(value, 'shape') else repr(value)}")
        return "\n".join(lines)
