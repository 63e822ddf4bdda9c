"""Rows to sample from, and what may come out, by the definition in float64: shared by the tests of the interpreter and of the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lmdeploy.engine import sampler as sampler_module
from lmdeploy.engine.sampler import Sampler, SamplingTable, uniforms
from lmdeploy.kernels.select import TokenKernel
from lmdeploy.messages import SamplingParams

Tensor = torch.Tensor
PROMPT, WIDTH = 2, 16
#: how far from a border of the distribution a uniform number may fall to the other side: what float32 exponentials and sums make of it
EDGE = 1e-5

MIXTURE: list[dict[str, Any]] = [
    {}, {"temperature": 0.8, "top_k": 40}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.0}, {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.9, "top_k": 50, "top_p": 0.8}, {"temperature": 1.5, "top_k": 20, "min_p": 0.1}, {"temperature": 1.2, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 1}, {"temperature": 2.0, "top_p": 0.99}, {"temperature": 1.0, "top_k": 300}, {"temperature": 2.0, "top_k": 3000, "top_p": 0.7},
    {"temperature": 1.0, "top_p": 0.0}, {"temperature": 1.0, "top_p": 1e-3}, {"temperature": 0.8, "top_k": 2}, {"temperature": 2.0, "top_k": 100000},
]  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """Rows of a step: one slot each, in another order than the rows."""

    params: list[SamplingParams]
    logits: Tensor
    slots: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def sampler(self, device: str, kernel: TokenKernel | None = None) -> Sampler:
        """A sampler on `device`, with `kernel` wherever it is."""
        chosen = sampler_module.token_kernel
        try:
            if kernel is not None:
                sampler_module.token_kernel = lambda _: kernel
            table = SamplingTable(len(self.params), self.logits.shape[1], torch.device(device))
            sampler = Sampler(table, torch.zeros(len(self.params) + 1, WIDTH, dtype=torch.int32, device=device))
        finally:
            sampler_module.token_kernel = chosen
        for slot, params in zip(self.slots.tolist(), self.params, strict=True):
            table.set(slot, params, PROMPT)
        return sampler

    def part(self, rows: slice) -> Rows:
        """Some of the rows, the slots numbered anew."""
        count = len(self.params[rows])
        return Rows(self.params[rows], self.logits[rows], np.arange(count)[::-1].copy(), self.lengths[rows])

    @property
    def numbers(self) -> NDArray[np.float64]:
        """The uniform number of each row."""
        seeds = np.array([p.seed for p in self.params], dtype=np.uint64)
        return uniforms(seeds, (self.lengths - PROMPT).astype(np.uint64))

    def permitted(self, tokens: list[int]) -> list[bool]:
        """Whether each token is what the definition gives, or its neighbour at a border that the row's number all but hits."""
        return [_permitted(*row) for row in zip(self.logits, self.params, self.numbers.tolist(), tokens, strict=True)]


def rows_of(params: list[dict[str, Any]], logits: Tensor, first_seed: int = 0) -> Rows:
    """A row for each of the parameters, with a seed of its own where it has none."""
    count = len(params)
    made = [SamplingParams(**{"max_new_tokens": 20, "seed": first_seed + 7919 * i, **p}) for i, p in enumerate(params)]
    return Rows(made, logits, np.arange(count)[::-1].copy(), np.array([PROMPT + i % (WIDTH - PROMPT - 1) for i in range(count)]))


def distribution(logits: Tensor, params: SamplingParams) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that may come in the order of the draw, and their probabilities."""
    x = logits.double().numpy()
    ids = np.arange(len(x))
    with np.errstate(invalid="ignore"):
        weights = np.exp((x - x.max()) / params.temperature)
    limited = 0 < params.top_k < len(x)
    if limited or params.top_p < 1:
        order = np.lexsort((ids, -x))[: params.top_k if limited else None]
        weights, ids = weights[order], ids[order]
    probs = weights / weights.sum()
    before = np.cumsum(probs) - probs
    top_p, min_p = float(np.float32(params.top_p)), float(np.float32(params.min_p))
    kept = (probs >= min_p * probs.max()) & ((before <= top_p) if limited or params.top_p < 1 else True)
    ids, probs = ids[kept], probs[kept]
    return ids, probs / probs.sum()


def _permitted(logits: Tensor, params: SamplingParams, number: float, token: int) -> bool:
    if not logits.max().isfinite() or bool(logits.isnan().any()):
        return token == -1
    if params.temperature == 0 or params.top_k == 1:
        return token == int(logits.argmax())
    ids, probs = distribution(logits, params)
    places = np.flatnonzero(ids == token)
    if not len(places) or probs[places[0]] == 0:  # one past the end of the nucleus, where its border is all but hit
        return number > 1 - EDGE and token >= 0
    end = float(np.cumsum(probs)[places[0]])
    return end - float(probs[places[0]]) - EDGE <= number <= end + EDGE


def assert_follow(tokens: list[int], ids: NDArray[np.int64], probs: NDArray[np.float64]) -> None:
    """Chi-square of tokens drawn from one distribution, against its 99.99 % point by Wilson and Hilferty; nothing but `ids` may come."""
    seen = np.array([tokens.count(token) for token in ids.tolist()])
    assert seen.sum() == len(tokens)
    expected = probs * len(tokens)
    rare = expected < 5
    if rare.any():
        expected, seen = np.append(expected[~rare], expected[rare].sum()), np.append(seen[~rare], seen[rare].sum())
    freedom = len(expected) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert ((seen - expected) ** 2 / expected).sum() < limit
