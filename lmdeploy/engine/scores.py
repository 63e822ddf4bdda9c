"""What a request may ask of a step beside the next token: log-probabilities and raw logits, of the logits before any processing.

Rows are scored a fixed number at a time: a prompt of any length with `prompt_logprobs` takes the same memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lmdeploy.engine.plan import PlanItem
from lmdeploy.messages import TokenLogprobs

Tensor = torch.Tensor
CHUNK_BYTES = 32 << 20


def rows_per_chunk(vocab_size: int) -> int:
    """How many rows of float32 logits are held at a time."""
    return max(1, min(256, CHUNK_BYTES // (4 * vocab_size)))


def token_logprobs(logprobs: Tensor, chosen: Tensor, counts: list[int]) -> list[TokenLogprobs]:
    """Of float32 [S, V] log-probabilities: that of the chosen token (int64 [S]) and of the counts[i] likeliest ones."""
    most = max(counts)
    own = logprobs.gather(1, chosen[:, None]).squeeze(1).tolist()
    values, ids = logprobs.topk(most, dim=-1) if most else (logprobs[:, :0], logprobs[:, :0])
    tops = zip(ids.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprobs(token, value, list(zip(top_ids[:count], top_values[:count], strict=True)))
        for token, value, count, (top_ids, top_values) in zip(chosen.tolist(), own, counts, tops, strict=True)
    ]


def prompt_logprobs(logits_of: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, count: int, chunk: int) -> list[TokenLogprobs]:
    """Log-probabilities of the targets int64 [n] that hidden [n, M] predict, `chunk` rows at a time."""
    found: list[TokenLogprobs] = []
    for start in range(0, hidden.shape[0], chunk):
        rows = slice(start, start + chunk)
        logits = logits_of(hidden[rows])
        torch.log_softmax(logits, dim=-1, out=logits)
        found += token_logprobs(logits, targets[rows], [count] * logits.shape[0])
    return found


def all_logits(logits_of: Callable[[Tensor], Tensor], hidden: Tensor, vocab_size: int, chunk: int) -> Tensor:
    """Raw float32 logits [n, V] of hidden [n, M], on the host."""
    out = torch.empty((hidden.shape[0], vocab_size), dtype=torch.float32)
    for start in range(0, hidden.shape[0], chunk):
        out[start : start + chunk] = logits_of(hidden[start : start + chunk])
    return out


def pooled(rows: Tensor, how: str) -> bytes:
    """float64 [M], so that how a prompt was cut into chunks does not show in the float32 result."""
    row = rows.double().sum(0) if how == "mean" else rows[-1].double()
    return row.cpu().numpy().tobytes()


def part_of(rows: Tensor, which: str, item: PlanItem) -> Tensor | None:
    """The rows that 'all' or 'generation' asks for."""
    if which == "all":
        return rows
    return rows[-1:] if item.sample else None
