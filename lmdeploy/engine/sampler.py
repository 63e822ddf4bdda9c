"""From raw logits to the next token of every row, vectorised over rows; parameters are read from per-slot arrays.

Order: grammar, logit bias, repetition, presence and frequency penalties, banned tokens, temperature, top-k, top-p, min-p, draw.
Only rows that need a feature pay for it; an all-greedy batch is one max. Invariant: the token of a row depends only on that
row's logits, parameters, seed and number of generated tokens, never on its batch mates: candidates have one canonical order
(logit descending, then id ascending), and the draw is one counter-based uniform through the inverse CDF in that order.
On CUDA penalties and all from the temperature on are one kernel (`kernels/triton_kernels/sampling.py`), and nothing here waits for the device. It penalises
last, which is the same: what is banned stays banned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lmdeploy.engine.batch import MOST_PROMPTS, upload
from lmdeploy.engine.guided import StepMask, forbid
from lmdeploy.inputs import Scratch
from lmdeploy.kernels.select import token_kernel
from lmdeploy.messages import SamplingParams

Tensor = torch.Tensor
Ints = NDArray[np.int64]

#: columns of the float table
TEMPERATURE, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY, TOP_K = range(7)
NEGATIVE_INFINITY = float("-inf")
FIRST_CANDIDATES = 64


def uniforms(seeds: NDArray[np.uint64], counters: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, counter): two rounds of the splitmix64 finaliser, top 53 bits."""
    state = seeds + np.uint64(0x9E3779B97F4A7C15)
    for word in (counters * np.uint64(0xD1342543DE82EF95), np.uint64(0x2545F4914F6CDD1D)):
        state = state ^ word
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    numbers: NDArray[np.float64] = (state >> np.uint64(11)) * np.float64(2.0**-53)
    return numbers


@dataclass(frozen=True, slots=True)
class _Phrases:
    """Bad words of several tokens: right-aligned prefixes (-1 fits anything), and the token that each forbids."""

    prefixes: Tensor  # int32 [P, L]
    last: Tensor  # int64 [P]


class SamplingTable:
    """The sampling parameters of every slot: arrays on the device for the maths, on the host to decide what to compute."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device
        self.num_slots = num_slots
        # one row more: rows that fill up a CUDA graph belong to a slot of their own, which is greedy
        self._bytes = torch.zeros((num_slots + 1) * (8 + 8 + 8 + 7 * 4), dtype=torch.uint8)
        _columns(self._bytes, num_slots + 1)[0][:, REPETITION] = 1  # nobody's answer has no penalties
        self._device_bytes = self._bytes if device.type == "cpu" else self._bytes.to(device)
        self._stale = False
        #: float32 [slots, 7] and three int64 [slots]: parameters, seeds, lengths of the prompts, and up to how many tokens an answer is held back from its stop
        #: tokens by `young_words` (-1: it has a grammar, and no token without its mask); on the device, `refresh` brings them up to date
        self.columns = _columns(self._device_bytes, num_slots + 1)
        values, seeds, prompt_len, young_until = (column.numpy() for column in _columns(self._bytes, num_slots + 1))
        self.host: NDArray[np.float32] = values
        self.seeds: NDArray[np.uint64] = seeds.view(np.uint64)
        self.prompt_len: Ints = prompt_len
        self._young_until: Ints = young_until
        self._has_kernel = token_kernel(device.type) is not None
        #: int32 [slots, W] for the kernel: bit t % 32 of word t // 32 says that token t does not end this slot's answer
        self.young_words = torch.full((num_slots + 1 if self._has_kernel else 1, -(-vocab_size // 32)), -1, dtype=torch.int32, device=device)
        self._known_stops: dict[int, list[int]] = {}  # that are in `young_words`
        self.min_new = np.zeros(num_slots, dtype=np.int64)
        self.greedy = np.ones(num_slots, dtype=bool)
        self.edited = np.zeros(num_slots, dtype=bool)  # logits by torch, before the kernel where there is one
        self.penalised = np.zeros(num_slots, dtype=bool)
        self.apart = np.zeros(num_slots, dtype=bool)  # what a graph chooses is not what such a slot is to have, or not all
        self.logprobs = np.full(num_slots, -1, dtype=np.int64)  # -1 = not wanted
        self.params: list[SamplingParams | None] = [None] * num_slots
        self.bias: list[tuple[Ints, NDArray[np.float32]] | None] = [None] * num_slots
        self.stops: list[Ints | None] = [None] * num_slots
        self.banned: list[Ints | None] = [None] * num_slots
        self.phrases: list[_Phrases | None] = [None] * num_slots

    def set(self, slot: int, params: SamplingParams, prompt_len: int) -> None:
        """Set up `slot`; raises ValueError for token ids outside the vocabulary, before anything is changed."""
        self._check_ids(params)
        self.host[slot] = (
            params.temperature,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            params.top_k,
        )
        self._stale = True
        self.seeds[slot] = params.seed % 2**64
        self.prompt_len[slot] = prompt_len
        self.min_new[slot] = params.max_new_tokens if params.ignore_eos else params.min_new_tokens
        self.greedy[slot] = params.temperature == 0 or params.top_k == 1
        self.penalised[slot] = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        self.logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        self.params[slot] = params
        self._set_lists(slot, params)
        lists = (self.bias[slot], self.banned[slot], self.phrases[slot])
        by_torch = bool(self.penalised[slot]) and not self._has_kernel
        self._young_until[slot] = 0 if params.grammar is None else -1  # without its mask nothing is chosen
        self.edited[slot] = by_torch or any(x is not None for x in lists) or self._hold_back(slot, params)
        self.apart[slot] = self.edited[slot] or self.logprobs[slot] >= 0

    def _hold_back(self, slot: int, params: SamplingParams) -> bool:
        """Have no stop token come before `min_new_tokens`; True where logits are to be edited for it. The masks of a grammar see to it themselves."""
        stops = self.stops[slot]
        if stops is None or not self.min_new[slot] or params.grammar is not None:
            return False
        if not self._has_kernel:
            return True
        self._young_until[slot] = self.min_new[slot]
        if self._known_stops.get(slot) != stops.tolist():
            self._known_stops[slot] = stops.tolist()
            words = np.full(self.young_words.shape[1], 0xFFFFFFFF, dtype=np.uint32)
            np.bitwise_and.at(words, stops // 32, ~(np.uint32(1) << (stops % 32).astype(np.uint32)))
            self.young_words[slot].copy_(upload(words.view(np.int32), self.device))
        return False

    def _set_lists(self, slot: int, params: SamplingParams) -> None:
        bias, single = params.logit_bias, [w[0] for w in params.bad_words if len(w) == 1]
        self.bias[slot] = (np.array(list(bias), dtype=np.int64), np.array(list(bias.values()), dtype=np.float32)) if bias else None
        stops = [t for t in params.stop_token_ids if t < self.vocab_size]  # beyond the vocabulary: can never be drawn
        self.stops[slot] = np.array(stops, dtype=np.int64) if stops else None
        self.banned[slot] = np.array(single, dtype=np.int64) if single else None
        words = [w for w in params.bad_words if len(w) > 1]
        self.phrases[slot] = None
        if words:
            prefixes = np.full((len(words), max(map(len, words)) - 1), -1, dtype=np.int32)
            for row, word in zip(prefixes, words, strict=True):
                row[len(row) - len(word) + 1 :] = word[:-1]
            last = np.array([w[-1] for w in words], dtype=np.int64)
            self.phrases[slot] = _Phrases(upload(prefixes, self.device), upload(last, self.device))

    def _check_ids(self, params: SamplingParams) -> None:
        for name, ids in (("logit_bias", list(params.logit_bias)), ("bad_words", [t for word in params.bad_words for t in word])):
            wrong = [t for t in ids if not 0 <= t < self.vocab_size]
            if wrong:
                raise ValueError(f"{name} has token id {wrong[0]}; this model's ids are 0 to {self.vocab_size - 1}")

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._device_bytes.nbytes + self.young_words.nbytes

    def young(self, slots: Ints, lengths: Ints) -> NDArray[np.bool_]:
        """[S] whether answers with so many known tokens may not stop yet."""
        found: NDArray[np.bool_] = lengths - self.prompt_len[slots] < self.min_new[slots]
        return found

    def refresh(self) -> None:
        """Begin to bring `columns` up to date; what is launched afterwards sees them. A CUDA graph that chooses tokens wants it before each replay."""
        if self._stale and self._device_bytes is not self._bytes:
            self._device_bytes.copy_(self._bytes, non_blocking=True)  # has been read when the call returns, as in `upload`
        self._stale = False

    def on_device(self) -> Tensor:
        """float32 [slots, 7], up to date."""
        self.refresh()
        return self.columns[0]


class Sampler:
    """Chooses tokens. Owns its work buffers; reads the token table for penalties and bad words. `edits`, int32 [slots, V], are the kernel's work space for
    penalties: zero from step to step."""

    def __init__(self, table: SamplingTable, tokens: Tensor) -> None:
        self.table, self.tokens = table, tokens  # int32 [slots, session_len + 1]
        self.scratch = Scratch(1, torch.float32, tokens.device)
        self.kernel = token_kernel(tokens.device.type)
        if self.kernel is not None:  # now and for all: graphs keep its address
            places = torch.full((table.num_slots + MOST_PROMPTS,), -1, dtype=torch.int32, device=tokens.device)
            self._no_masks = (table.young_words[:1], places)
            self._in_order = torch.arange(table.num_slots + MOST_PROMPTS, device=tokens.device)
            self._candidates = self.scratch.take("candidates", table.num_slots, self.kernel.scratch_width, torch.int64)
            self._edits = self.scratch.take("edits", table.num_slots, table.vocab_size, torch.int32)

    def reserve(self, max_rows: int) -> None:
        """Take the work buffers for batches of `max_rows` now, so that no later step does."""
        for name in ("probs", "work") if self.kernel is None else ():
            self.scratch.take(name, max_rows, self.table.vocab_size)

    def sample(self, logits: Tensor, slots: Ints, lengths: Ints, mask: StepMask | None = None) -> Tensor:
        """Next token of each row, int64 [S]; -1 where no token can be chosen (NaN or nothing allowed). It, or 0, is also written to the token table at [slot, length].

        logits [S, V] are overwritten where they are float32; `lengths` counts the known tokens of each row, so the draw's number is lengths - prompt_len.
        `mask`: what the grammars of guided rows allow.
        """
        return self.begin(logits, slots, lengths, mask)()

    def begin(self, logits: Tensor, slots: Ints, lengths: Ints, mask: StepMask | None) -> Callable[[], Tensor]:
        """All of `sample` that need not know the masks; what is returned joins them, chooses, and is to be called once, before the logits are overwritten."""
        edited = self.table.edited[slots].any()
        if edited or self.kernel is None:
            logits = logits.to(torch.float32, copy=bool(edited) and mask is not None)  # rows whose masks are late are edited once more
        if edited:
            young = self.table.young(slots, lengths)
            if mask is not None:
                young[mask.rows] = False  # it is in their masks
            self._edit(logits, slots, lengths, young)
        if self.kernel is None:
            return partial(self._choose, logits, slots, lengths, mask)
        return self._prepare(logits, slots, lengths, mask)

    def _choose(self, logits: Tensor, slots: Ints, lengths: Ints, mask: StepMask | None) -> Tensor:
        """Without a kernel. logits float32, edited."""
        table = self.table
        if mask is not None:
            forbid(logits, mask)
        best, tokens = logits.max(dim=-1)
        greedy = table.greedy[slots]
        if not greedy.all():
            rows = np.flatnonzero(~greedy)
            counters = (lengths[rows] - table.prompt_len[slots[rows]]).astype(np.uint64)
            numbers = uniforms(table.seeds[slots[rows]], counters)
            self._draw(logits, rows, slots[rows], numbers, tokens)
        tokens = torch.where(best.isfinite(), tokens, -1)
        self.tokens.view(-1).index_copy_(0, self._tensor(slots * self.tokens.shape[1] + lengths), tokens.clamp_min(0).int())
        return tokens

    # -- the kernel --------------------------------------------------------------------------------------------------

    def choose(
        self,
        logits: Tensor,
        slots: Tensor,
        lengths: Tensor,
        tokens: Tensor,
        masks: tuple[Tensor, Tensor] | None = None,
        goes_on: tuple[Tensor, Tensor] | None = None,
        where: Tensor | None = None,
    ) -> None:
        """tokens int64 [S] = what `sample` gives for rows that need no edits, -1 where none can be chosen or a grammar's mask is missing, and into the token table
        at [slot, length].

        Everything is on the device, parameters are read from `table.columns` when it runs, logits, of any floating type, are left alone: this can be part of a
        CUDA graph. slots, lengths int64 [S]; several rows may have the slot that no sequence has, which is greedy, and no two another one. `masks`: words
        int32 [G, W] as in StepMask and for each row the place of its words, int32 [S], -1 for none, -2 if nothing is to be chosen. `goes_on`: positions and ends
        of the rows, which become the next step's, and so do `lengths`, but not those of the slot that no sequence has. `where`, int64 [S]: tokens are int64
        [lines, N], and each row's goes to this place of all lines together, nowhere with -1; with `goes_on` it becomes that of the next line. Penalties are over
        the tokens that are in the table when it runs. Only where there is a `kernel`.
        """
        assert self.kernel is not None
        # one kernel, which is there from the start on, for steps with masks and without
        words, places = masks or self._no_masks
        masks_of = (words, places, self.table.young_words)
        self.kernel.choose(
            logits,
            slots,
            lengths,
            self.table.columns,
            masks_of,
            self.tokens,
            tokens,
            self._in_order if where is None else where,
            self._candidates,
            self._edits,
            goes_on,
        )

    def _prepare(self, logits: Tensor, slots: Ints, lengths: Ints, mask: StepMask | None) -> Callable[[], Tensor]:
        """What `begin` returns, with the kernel, for edited logits: all is there but the masks."""
        self.table.refresh()
        there = self._tensor(np.stack([slots, lengths]))
        tokens = torch.empty(slots.size, dtype=torch.int64, device=logits.device)

        def choose() -> Tensor:
            masks = None if mask is None else self._masks_there(mask, slots.size)
            self.choose(logits, there[0], there[1], tokens, masks)
            return tokens

        return choose

    def _masks_there(self, mask: StepMask, count: int) -> tuple[Tensor, Tensor]:
        """Words on the device, and the place there of each of so many rows' words."""
        rows, words, at = mask.join()
        first, last = (int(at.min()), int(at.max()) + 1) if at.size else (0, 1)
        places = np.full(count, -1, dtype=np.int32)
        places[rows] = at - first
        return words[first:last].to(self.tokens.device, non_blocking=True), self._tensor(places)

    # -- editing the logits ------------------------------------------------------------------------------------------

    def _edit(self, logits: Tensor, slots: Ints, lengths: Ints, young: NDArray[np.bool_]) -> None:
        """`young`: rows that may not stop yet. Penalties only where there is no kernel to see to them."""
        table = self.table
        self._add_bias(logits, slots)
        rows = np.flatnonzero(table.penalised[slots])
        if rows.size and self.kernel is None:
            self._penalise(logits, rows, slots[rows], lengths[rows])
        flat: list[Ints] = []
        for row, slot in enumerate(slots.tolist()):
            base = row * logits.shape[1]
            if young[row] and (stops := table.stops[slot]) is not None:
                flat.append(stops + base)
            if (banned := table.banned[slot]) is not None:
                flat.append(banned + base)
            if (phrases := table.phrases[slot]) is not None:
                self._ban_phrases(logits[row], phrases, slot, int(lengths[row]))
        if flat:
            logits.view(-1).index_fill_(0, self._tensor(np.concatenate(flat)), NEGATIVE_INFINITY)

    def _add_bias(self, logits: Tensor, slots: Ints) -> None:
        found = [(row, bias) for row, slot in enumerate(slots.tolist()) if (bias := self.table.bias[slot]) is not None]
        if found:
            ids = np.concatenate([ids + row * logits.shape[1] for row, (ids, _) in found])
            logits.view(-1).index_add_(0, self._tensor(ids), self._tensor(np.concatenate([v for _, (_, v) in found])))

    def _penalise(self, logits: Tensor, rows: Ints, slots: Ints, lengths: Ints) -> None:
        """Repetition over prompt and answer; presence and frequency over the answer. Costs O(length), not O(V), but for the counts."""
        longest = int(lengths.max())
        slot_ids = self._tensor(slots)
        ids = self.tokens[:, :longest].index_select(0, slot_ids).long()  # [P, L]
        place = torch.arange(longest, device=ids.device)
        known = place < self._tensor(lengths)[:, None]
        ids = torch.where(known, ids, ids[:, :1])  # past the end: a token that is there anyway
        values = self.table.on_device().index_select(0, slot_ids)
        x = logits.index_select(0, self._tensor(rows)) if rows.size < logits.shape[0] else logits
        seen, factor = x.gather(1, ids), values[:, REPETITION, None]
        x.scatter_(1, ids, torch.where(seen < 0, seen * factor, seen / factor))
        generated = known & (place >= self._tensor(self.table.prompt_len[slots])[:, None])
        host = self.table.host[slots]
        if host[:, PRESENCE].any() or host[:, FREQUENCY].any():
            counts = self.scratch.take("work", x.shape[0], x.shape[1]).zero_().scatter_add_(1, ids, generated.float()).gather(1, ids)
            cost = counts * values[:, FREQUENCY, None] + (counts > 0) * values[:, PRESENCE, None]
            x.scatter_(1, ids, x.gather(1, ids) - cost)
        if x is not logits:
            logits.index_copy_(0, self._tensor(rows), x)

    def _ban_phrases(self, row: Tensor, phrases: _Phrases, slot: int, length: int) -> None:
        width = phrases.prefixes.shape[1]
        tail = self.tokens[slot, max(0, length - width) : length]
        if len(tail) < width:  # -2 fits no prefix
            tail = torch.cat([tail.new_full((width - len(tail),), -2), tail])
        match = ((phrases.prefixes == tail) | (phrases.prefixes == -1)).all(dim=1)
        limit = torch.where(match, NEGATIVE_INFINITY, float("inf"))
        row.scatter_reduce_(0, phrases.last, limit, "amin")

    # -- drawing -----------------------------------------------------------------------------------------------------

    def _draw(self, logits: Tensor, rows: Ints, slots: Ints, numbers: NDArray[np.float64], tokens: Tensor) -> None:
        """Draw for `rows`, in groups of one kind: top-k; top-p over the whole vocabulary; neither."""
        host = self.table.host[slots]
        by_k = (host[:, TOP_K] > 0) & (host[:, TOP_K] < logits.shape[1])
        by_p = ~by_k & (host[:, TOP_P] < 1)
        for kind, chosen in ((self._draw_top_k, by_k), (self._draw_top_p, by_p), (self._draw_any, ~by_k & ~by_p)):
            if chosen.any():
                some = rows[chosen]
                index = self._tensor(some)
                values = self.table.on_device().index_select(0, self._tensor(slots[chosen]))
                x = logits if some.size == logits.shape[0] else logits.index_select(0, index)
                x.div_(values[:, TEMPERATURE, None])
                tokens.index_copy_(0, index, kind(x, values, torch.from_numpy(numbers[chosen]).to(x.device)))

    def _draw_top_k(self, x: Tensor, values: Tensor, numbers: Tensor) -> Tensor:
        top_k = values[:, TOP_K].long()
        count = min(int(top_k.max()) + FIRST_CANDIDATES // 4, x.shape[1])
        while True:
            top, ids = x.topk(count, dim=-1)
            # all tokens that tie with the k-th must be candidates, or the choice among them would depend on `count`; forbidden ones are never chosen
            edge = top.gather(1, (top_k - 1)[:, None])
            if count == x.shape[1] or bool(((top[:, -1:] < edge) | (edge == NEGATIVE_INFINITY)).all()):
                break
            count = min(count * 4, x.shape[1])
        top, ids = _canonical(top, ids)
        place = torch.arange(count, device=x.device)
        # float64 and a running sum: what other rows make of `count` must not show in a row's probabilities
        weights = (top.double() - top[:, :1]).exp_().masked_fill_(place >= top_k[:, None], 0.0)
        probs = weights / weights.cumsum(-1)[:, -1:]
        return _inverse_cdf(_keep(probs, values), ids, numbers)

    def _draw_top_p(self, x: Tensor, values: Tensor, numbers: Tensor) -> Tensor:
        """Candidates grow until their mass exceeds top_p; what the whole vocabulary's sort would give, without it as a rule."""
        probs = torch.softmax(x, dim=-1, out=self.scratch.take("probs", *x.shape))
        result = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
        todo, count = torch.arange(x.shape[0], device=x.device), min(FIRST_CANDIDATES, x.shape[1])
        while todo.numel():
            part = probs if todo.numel() == x.shape[0] else probs.index_select(0, todo)
            top, ids = part.topk(count, dim=-1)
            safe = top > top[:, -1:]  # ties with the last candidate may be incomplete
            done = (top * safe).sum(-1, dtype=torch.float64) > values[todo, TOP_P].double() + 1e-9
            if count == x.shape[1]:
                done = torch.ones_like(done)
            top, ids = _canonical(top[done], ids[done])
            now = todo[done]
            result[now] = _inverse_cdf(_keep(top, values[now]), ids, numbers[now])
            todo, count = todo[~done], min(count * 8, x.shape[1])
        return result

    def _draw_any(self, x: Tensor, values: Tensor, numbers: Tensor) -> Tensor:
        """No top-k and no top-p: the CDF runs in the order of the ids, so nothing is sorted."""
        probs = torch.softmax(x, dim=-1, out=self.scratch.take("probs", *x.shape))
        probs.masked_fill_(probs < values[:, MIN_P, None] * probs.amax(-1, keepdim=True), 0.0)
        cdf = torch.cumsum(probs, dim=-1, out=self.scratch.take("work", *x.shape))
        return _search(cdf, numbers)

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return upload(array, self.tokens.device)


def _columns(buffer: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The parts of a byte buffer [slots * 52], so that one copy brings all of them: float32 [slots, 7] and three int64 [slots]."""
    seeds, prompt_len, young_until = buffer[: slots * 24].view(torch.int64).view(3, slots)
    return buffer[slots * 24 :].view(torch.float32).view(slots, 7), seeds, prompt_len, young_until


def _canonical(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates [S, C] by value descending, then id ascending: topk leaves the order of ties open."""
    order = ids.argsort(dim=-1)
    values, ids = values.gather(1, order), ids.gather(1, order)
    order = values.argsort(dim=-1, descending=True, stable=True)
    return values.gather(1, order), ids.gather(1, order)


def _keep(probs: Tensor, values: Tensor) -> Tensor:
    """Top-p, then min-p, of candidates in canonical order: dropped ones get probability 0; the first always stays."""
    before = probs.cumsum(-1, dtype=torch.float64) - probs
    drop = (before > values[:, TOP_P, None]) | (probs < values[:, MIN_P, None] * probs[:, :1])
    drop[:, 0] = False
    return probs.masked_fill(drop, 0.0)


def _inverse_cdf(probs: Tensor, ids: Tensor, numbers: Tensor) -> Tensor:
    place = _search(probs.cumsum(-1, dtype=torch.float64), numbers)
    return ids.gather(1, place[:, None]).squeeze(1)


def _search(cdf: Tensor, numbers: Tensor) -> Tensor:
    """First place whose cumulated mass exceeds numbers * total; the place has mass, for the CDF rises there."""
    total = cdf[:, -1:]
    target = (numbers[:, None] * total.double()).to(cdf.dtype)
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target, right=True).squeeze(1).clamp_(max=cdf.shape[1] - 1)
