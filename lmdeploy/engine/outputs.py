"""`EngineOutput`s of a sequence: what one result, or its end, tells the caller.

Prompt log-probabilities and pooled hidden states are collected over the chunks of a prompt and go out whole, with the first token (or
the end of a request without tokens). Logits and hidden states go out chunk by chunk. A row that was handed on before a pre-emption never comes twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lmdeploy.engine.plan import PlanItem, SlotResult
from lmdeploy.engine.sequence import Sequence
from lmdeploy.messages import EngineOutput, FinishReason


def step_output(seq: Sequence, item: PlanItem, token: int, slot: SlotResult, reason: FinishReason | None) -> EngineOutput | None:
    """What this result brought, or None for a chunk in the middle of a prompt that brought nothing."""
    if slot.embedding is not None:
        _pool(seq, item, slot.embedding)
    if token < 0 and reason is None and not seq.wants_rows:
        return None
    output = EngineOutput(
        request_id=seq.request.request_id,
        index=seq.index,
        finish_reason=reason,
        num_prompt=seq.prompt_len,
        num_cached=seq.num_cached,
        num_generated=seq.num_generated,
    )
    if token >= 0:
        output.token_ids = [token]
        if seq.num_generated == 1:
            output.queue_seconds = seq.queue_seconds
        if slot.logprobs is not None:
            output.logprobs = [slot.logprobs]
        if reason == "stop" and token in seq.sampling.stop_token_ids:  # else a grammar ended it with its last token
            output.stop_token_id = token
    if seq.embedding is not None and reason is not None:
        output.embedding = (seq.embedding / max(float(np.linalg.norm(seq.embedding)), 1e-30)).astype(np.float32).tobytes()
    if seq.wants_rows or slot.logits is not None or slot.last_hidden_state is not None:
        _take_rows(seq, item, slot, output)
    brings = output.token_ids or reason is not None or output.logits is not None or output.last_hidden_state is not None
    return output if brings else None


def final_output(seq: Sequence, reason: FinishReason, error: str | None = None, code: str = "step_failed") -> EngineOutput:
    """The last output of a sequence that no result ended."""
    return EngineOutput(
        request_id=seq.request.request_id,
        index=seq.index,
        finish_reason=reason,
        num_prompt=seq.prompt_len,
        num_cached=max(seq.num_cached, 0),
        num_generated=seq.num_generated,
        error=error,
        error_code=None if error is None else code,
    )


def _pool(seq: Sequence, item: PlanItem, part: bytes) -> None:
    """Add what a chunk brought. A sequence that was pre-empted starts again at 0, and so does its sum. Only the direction matters: a sum is a mean."""
    row = np.frombuffer(part)
    seq.embedding = row if item.start == 0 or seq.embedding is None else seq.embedding + row


def _take_rows(seq: Sequence, item: PlanItem, slot: SlotResult, output: EngineOutput) -> None:
    """Prompt log-probabilities, logits and hidden states of this chunk; rows handed on before a pre-emption are left out.

    Prompt log-probabilities are collected and go out whole with the first token (or the end); the others go out chunk by chunk.
    """
    fresh = 0
    if seq.wants_rows:
        fresh = max(seq.rows_done - item.start, 0)
        if slot.prompt_logprobs and seq.rows_done < seq.prompt_len - 1:
            seq.prompt_logprobs += slot.prompt_logprobs[fresh:]
        seq.rows_done = max(seq.rows_done, seq.num_done)
        if seq.sampling.prompt_logprobs is not None and (seq.num_generated == 1 or output.finish_reason is not None and seq.num_generated == 0):
            assert len(seq.prompt_logprobs) == seq.prompt_len, f"{len(seq.prompt_logprobs)} prompt log-probabilities for {seq.prompt_len} tokens"
            output.prompt_logprobs = seq.prompt_logprobs
    if slot.logits is not None:
        output.logits = _fresh_rows(slot.logits, fresh if seq.sampling.output_logits == "all" else 0, item.num_tokens)
    if slot.last_hidden_state is not None:
        output.last_hidden_state = _fresh_rows(slot.last_hidden_state, fresh if seq.sampling.output_last_hidden_state == "all" else 0, item.num_tokens)


def _fresh_rows(rows: Any, skip: int, count: int) -> Any:
    """`rows` without the first `skip` of `count`; None when none is left."""
    return rows[skip:] if skip < count else None
