"""What the scheduler tells a rank to compute, and what comes back: small plain data that can cross a process.

A rank keeps, per slot, the token table row, the block table row and the sampling parameters. So a plan sends a new
sequence whole, once, and afterwards only differences. A rank reads input tokens from its own token table, where it also
writes the tokens it samples: that is what lets step N+1 be launched before the host has seen the tokens of step N.
"""

from __future__ import annotations

import msgspec

from lmdeploy.messages import Picture, SamplingParams, TokenLogprobs


class NewSequence(msgspec.Struct, array_like=True):
    """A sequence that takes `slot`: everything that the rank needs to know of it (again, after a pre-emption)."""

    slot: int
    token_ids: list[int]  # prompt, and what was generated before a pre-emption
    prompt_len: int
    sampling: SamplingParams  # seed already offset by the answer's index
    rope_length: int
    pictures: list[Picture] = []


class PlanItem(msgspec.Struct, array_like=True):
    """Compute tokens `start .. start + num_tokens` of `slot`; they see keys 0 .. start + num_tokens.

    `new_blocks` are appended to the slot's block table before the step. `sample`: the chunk reaches the end of the
    known tokens, so a next token is drawn from its last row and written to the slot's token table.
    """

    slot: int
    start: int
    num_tokens: int
    new_blocks: list[int]
    sample: bool


class StepPlan(msgspec.Struct, array_like=True):
    """One step. `released` slots are forgotten first, then `new` ones set up, then `items` computed together."""

    step: int
    released: list[int]
    new: list[NewSequence]
    items: list[PlanItem]


class SlotResult(msgspec.Struct, array_like=True):
    """What a step brought one slot. `token_id` is None for an item with `sample=False` or with `error`."""

    slot: int
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None  # for prompt positions start+1 .. start+num_tokens of this chunk
    error: str | None = None
    logits: object = None  # float32 [n, V] on request: rows of this chunk ('all') or its sampled row ('generation')
    last_hidden_state: object = None
    embedding: bytes | None = None  # float64 [M] of a request that embeds: the sum over this chunk's hidden rows, or the prompt's last row
    complete: bool = False  # the sequence's grammar allows nothing behind this token: the answer ends
    error_code: str = "step_failed"


class StepResult(msgspec.Struct, array_like=True):
    """Results in the order of the plan's items."""

    step: int
    slots: list[SlotResult]
    seconds: float
