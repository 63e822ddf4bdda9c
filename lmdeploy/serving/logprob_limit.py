"""One bound on the log-probabilities of a request: each of prompts, tokens and alternatives has its own, but their product is what takes memory."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from lmdeploy.answer import Prepared
from lmdeploy.errors import RequestError

#: of one request: tokens of prompts (echo) and answers, times 1 + top; about 24 bytes of JSON, and 220 of memory, each
MAX_LOGPROBS = 1 << 19


def bounded(prepared: list[Prepared], max_tokens: int | None) -> list[Prepared]:
    """The requests. Where `max_tokens` was not given, answers become as short as the bound asks; raises RequestError when that is not enough."""
    prompts = sum(len(p.token_ids) * (1 + p.sampling.prompt_logprobs) for p in prepared if p.sampling.prompt_logprobs is not None)
    per_token = sum(p.n * (1 + p.sampling.logprobs) for p in prepared if p.sampling.logprobs is not None)
    longest = max(p.sampling.max_new_tokens for p in prepared)
    if prompts + per_token * longest <= MAX_LOGPROBS:
        return prepared
    room = (MAX_LOGPROBS - prompts) // max(per_token, 1)
    if max_tokens is not None or room < 1:
        first = prepared[0].sampling
        top = max(first.logprobs or 0, first.prompt_logprobs or 0)
        parts = [f"{sum(len(p.token_ids) for p in prepared)} tokens of prompts"] if prompts else []
        parts += [f"{sum(p.n for p in prepared)} answers of at most {longest} tokens"] if longest else []
        raise RequestError(
            f"logprobs={top} for {' and '.join(parts)} makes {prompts + per_token * longest} log-probabilities (each token has 1 + {top}); "
            f"at most {MAX_LOGPROBS} per request: send fewer prompts at a time, or ask for fewer tokens or logprobs",
            param="logprobs",
        )
    return [replace(p, sampling=msgspec.structs.replace(p.sampling, max_new_tokens=min(p.sampling.max_new_tokens, room))) for p in prepared]
