"""Rows to sample from, and what may come out, by the definition in float64: shared by the tests of the interpreter and of the device."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import msgspec
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

PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3}, {"presence_penalty": 0.7}, {"frequency_penalty": 0.3}, {}, {"repetition_penalty": 0.6, "frequency_penalty": -0.4},
    {"repetition_penalty": 7.0, "presence_penalty": -1.5, "frequency_penalty": 0.1}, {"presence_penalty": 2.0, "frequency_penalty": 2.0},
]  # fmt: skip
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
    known: Tensor | None = None  # int32 [S, L], the tokens of each row: zeros unless given, [S, WIDTH]
    prompt: int = PROMPT  # how many of them came with the prompt

    def sampler(self, device: str, kernel: TokenKernel | None = None) -> Sampler:
        """A sampler on `device`, with `kernel` wherever it is."""
        chosen = sampler_module.token_kernel
        try:
            if kernel is not None:
                sampler_module.token_kernel = lambda _: kernel
            table = SamplingTable(len(self.params), self.logits.shape[1], torch.device(device))
            width = WIDTH if self.known is None else self.known.shape[1]
            sampler = Sampler(table, torch.zeros(len(self.params) + 1, width, dtype=torch.int32, device=device))
        finally:
            sampler_module.token_kernel = chosen
        for slot, params in zip(self.slots.tolist(), self.params, strict=True):
            table.set(slot, params, self.prompt)
        if self.known is not None:
            sampler.tokens[torch.from_numpy(self.slots)] = self.known.to(device)
        return sampler

    def part(self, rows: slice) -> Rows:
        """Some of the rows, the slots numbered anew."""
        count = len(self.params[rows])
        known = None if self.known is None else self.known[rows]
        return Rows(self.params[rows], self.logits[rows], np.arange(count)[::-1].copy(), self.lengths[rows], known, self.prompt)

    def edited(self) -> Rows:
        """The same rows without penalties, which are in the logits instead, float32, token by token as they are defined."""
        assert self.known is not None
        logits, plain = self.logits.to(torch.float32, copy=True), msgspec.structs.replace
        for row, p, ids, length in zip(logits.numpy(), self.params, self.known.tolist(), self.lengths.tolist(), strict=True):
            counts = Counter(ids[self.prompt : length])
            for token in set(ids[:length]):
                x, factor, count = row[token], np.float32(p.repetition_penalty), np.float32(counts[token])
                x = x * factor if x < 0 else x / factor
                row[token] = x - (count * np.float32(p.frequency_penalty) + (np.float32(p.presence_penalty) if count else np.float32(0)))
        params = [plain(p, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0) for p in self.params]
        return Rows(params, logits, self.slots, self.lengths, self.known, self.prompt)

    @property
    def numbers(self) -> NDArray[np.float64]:
        """The uniform number of each row."""
        seeds = np.array([p.seed for p in self.params], dtype=np.uint64)
        return uniforms(seeds, (self.lengths - self.prompt).astype(np.uint64))

    def permitted(self, tokens: list[int]) -> list[bool]:
        """Whether each token is what the definition gives, or its neighbour at a border that the row's number all but hits."""
        return [_permitted(*row) for row in zip(self.logits, self.params, self.numbers.tolist(), tokens, strict=True)]


def rows_of(params: list[dict[str, Any]], logits: Tensor, first_seed: int = 0) -> Rows:
    """A row for each of the parameters, with a seed of its own where it has none."""
    count = len(params)
    made = [SamplingParams(**{"max_new_tokens": 20, "seed": first_seed + 7919 * i, **p}) for i, p in enumerate(params)]
    return Rows(made, logits, np.arange(count)[::-1].copy(), np.array([PROMPT + i % (WIDTH - PROMPT - 1) for i in range(count)]))


def with_known(rows: Rows, width: int, prompt: int, seed: int = 0) -> Rows:
    """The same rows, each with tokens that are known: those with large logits among them, many more than once."""
    generator = torch.Generator().manual_seed(seed)
    count, vocab = rows.logits.shape
    likely = rows.logits.float().nan_to_num().topk(min(vocab, 12)).indices
    any_of_them = torch.randint(vocab, (count, width), generator=generator)
    known = torch.where(torch.rand(count, width, generator=generator) < 0.4, likely.gather(1, any_of_them % likely.shape[1]), any_of_them)
    lengths = np.array([prompt + i * 7919 % (width - prompt) for i in range(count)])
    return Rows(rows.params, rows.logits, rows.slots, lengths, known.int(), prompt)


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
