"""Grammar -> token mask, for the slots of one rank: one matcher a slot, advanced with each token that was sampled.

All work on matchers is done by one thread, in the order it was asked for: `follow` takes in the tokens of a step as soon as they are known, `start` fills the masks
of the next one behind it, by the library's own parallel loop and without the interpreter's lock. So the forward pass of a step can be launched before the tokens
of the step before have reached the host; only the choice among its logits waits, by `StepMask.join`. Matchers hold nothing that cannot be rebuilt: a sequence that
takes a slot again (after a pre-emption, or when its step is repeated alone) replays its tokens. Slots without a grammar cost one look at an array.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import llguidance
import numpy as np
import torch
from numpy.typing import NDArray

from lmdeploy.engine.grammar_compiler import MOST_LEXERS, GrammarCompiler, reason_of
from lmdeploy.grammar import Grammar
from lmdeploy.messages import SamplingParams

Tensor = torch.Tensor
Ints = NDArray[np.int64]

#: rows of which the expanded mask is in memory at a time
ROWS_AT_ONCE = 32
#: float32 [256, 8]: what the eight logits of a byte of a mask may be at most
_LIMITS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.float32("inf"), np.float32("-inf"))


@dataclass(slots=True)
class StepMask:
    """The masks of the guided rows of a step. After `join`: `words` int32 [G, W], bit t % 32 of word t // 32 says that token t may come."""

    rows: Ints  # [G] places among the S sampled rows
    words: Tensor  # on the host
    filling: Future[None]
    only_stops: NDArray[np.bool_]  # [G] nothing but tokens that end the answer may come: they may, whatever min_new_tokens says
    matchers: list[Any] = field(default_factory=list)  # [G] of the sequences that had the slots when the step began
    stops: list[list[int]] = field(default_factory=list)  # [G] tokens that end each answer
    errors: dict[int, str] = field(default_factory=dict)  # place among the G -> why there is no mask

    def join(self) -> StepMask:
        """Wait until the masks are filled."""
        self.filling.result()
        return self


class GuidedSlots:
    """The matchers of a rank's slots."""

    def __init__(self, compiler: GrammarCompiler, num_slots: int, device: torch.device) -> None:
        self._compiler, self._num_slots, self._device = compiler, num_slots, device
        self._matchers: list[Any] = [None] * num_slots
        self._grammars: list[Grammar | None] = [None] * num_slots
        self._users: Counter[Grammar] = Counter()  # slots
        self._stops: list[list[int]] = [[]] * num_slots
        self._guided = np.zeros(num_slots, dtype=bool)
        self._masks: Tensor | None = None  # made with the first grammar
        self._executor = llguidance.LLExecutor(MOST_LEXERS)  # more threads than locks only wait
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar-mask")

    def set(self, slot: int, params: SamplingParams, generated: list[int]) -> None:
        """Set up `slot`, which has generated these tokens so far; raises ValueError (RequestError) for a grammar that cannot be used."""
        self.release(slot)
        if params.grammar is None:
            return
        matcher = self._compiler.matcher(params.grammar, self._users[params.grammar])
        if generated and not matcher.consume_tokens(generated):
            raise ValueError(f"the grammar does not fit the tokens generated so far: {reason_of(matcher.get_error())}")
        stops = [t for t in params.stop_token_ids if t < self._compiler.vocab_size]
        self._stops[slot] = sorted({*stops, self._compiler.eos_token_id})
        self._matchers[slot], self._grammars[slot] = matcher, params.grammar
        self._users[params.grammar] += 1
        self._guided[slot] = True

    def release(self, slot: int) -> None:
        """Forget the matcher of a slot, if there is one."""
        if self._guided[slot]:
            grammar = self._grammars[slot]
            assert grammar is not None
            self._users[grammar] -= 1
            if not self._users[grammar]:
                del self._users[grammar]
            self._matchers[slot] = self._grammars[slot] = None
            self._guided[slot] = False

    def start(self, slots: Ints) -> StepMask | None:
        """Begin to fill the masks of the sampled rows, behind all that was asked for before; None when no row has a grammar.

        Join it, and use its words, before the next `start`; with what is then chosen, call `follow` before it too.
        """
        rows = np.flatnonzero(self._guided[slots])
        if not rows.size:
            return None
        if self._masks is None:
            width = -(-self._compiler.vocab_size // 32)
            self._masks = torch.zeros((self._num_slots, width), dtype=torch.int32, pin_memory=self._device.type == "cuda")
        guided = slots[rows].tolist()
        matchers, stops = [self._matchers[slot] for slot in guided], [self._stops[slot] for slot in guided]
        mask = StepMask(rows, self._masks[: rows.size], Future(), np.zeros(rows.size, dtype=bool), matchers, stops)
        mask.filling = self._pool.submit(self._fill, mask)
        return mask

    def follow(self, mask: StepMask, tokens: Callable[[], Ints]) -> Future[list[bool]]:
        """Take in the tokens that `tokens` waits for, one for each sampled row (-1: none); True where the answer of a guided row is complete and ends now."""
        return self._pool.submit(self._advance, mask, tokens)

    def _fill(self, mask: StepMask) -> None:
        """Thread: masks, then what a mask of the grammar alone does not say: which tokens end this answer."""
        matchers, words = mask.matchers, mask.words
        self._executor.unsafe_compute_mask_ptr(list(zip(matchers, range(len(matchers)), strict=True)), words.data_ptr(), words.shape[1] * 4, len(matchers))
        bits: NDArray[np.uint32] = words.numpy().view(np.uint32)
        for place, matcher in enumerate(matchers):
            if matcher.is_error():
                bits[place] = 0
                mask.errors[place] = f"the grammar's next tokens could not be worked out: {reason_of(matcher.get_error())}"
        self._add_stops(mask, bits)

    def _add_stops(self, mask: StepMask, bits: NDArray[np.uint32]) -> None:
        """Where the grammar may end (the library says so by its one EOS), the tokens that end this answer are allowed. bits [G, W]."""
        place = np.arange(len(bits))
        end_word, end_bit = divmod(self._compiler.eos_token_id, 32)
        accepting = (bits[:, end_word] >> np.uint32(end_bit) & 1).astype(bool)
        most = max(len(stops) for stops in mask.stops)
        tokens = np.array([stops + stops[-1:] * (most - len(stops)) for stops in mask.stops])  # [G, most], one of them repeated
        word, flag = tokens // 32, np.uint32(1) << (tokens % 32).astype(np.uint32)
        allowed = [accepting | ((bits[place, word[:, i]] & flag[:, i]) != 0) for i in range(most)]  # some grammars name a stop token themselves
        for i in range(most):
            bits[place, word[:, i]] &= ~flag[:, i]
        ends = np.flatnonzero(np.any(allowed, axis=0))  # others have something to go on with, or nothing at all: then no token is chosen, and the answer fails
        mask.only_stops[ends] = ~bits[ends].any(axis=1)
        for i in range(most):
            bits[place, word[:, i]] |= np.where(allowed[i], flag[:, i], np.uint32(0))
        mask.only_stops[list(mask.errors)] = False

    def _advance(self, mask: StepMask, tokens: Callable[[], Ints]) -> list[bool]:
        """Thread: see `follow`."""
        chosen = tokens()[mask.rows].tolist()
        complete: list[bool] = mask.only_stops.tolist()
        todo = [(place, token) for place, token in enumerate(chosen) if token >= 0 and not complete[place] and token not in mask.stops[place]]
        for place, token in todo:  # some microseconds each: waking other threads costs more
            matcher = mask.matchers[place]
            complete[place] = matcher.consume_token(token) and matcher.is_stopped()
        return complete

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=True)


def forbid(logits: Tensor, mask: StepMask) -> None:
    """-inf for every token that the masks do not allow, in place. logits float32 [S, V]."""
    every = mask.rows.size == logits.shape[0]
    for start in range(0, mask.rows.size, ROWS_AT_ONCE):
        words = mask.words[start : start + ROWS_AT_ONCE]
        if every:
            _close(logits[start : start + ROWS_AT_ONCE], words)
        else:
            rows = torch.from_numpy(mask.rows[start : start + ROWS_AT_ONCE]).to(logits.device)
            logits.index_copy_(0, rows, _close(logits.index_select(0, rows), words))


def _close(x: Tensor, words: Tensor) -> Tensor:
    """The same for x [G, V] and its words [G, W]."""
    if x.device.type == "cpu":  # masked_fill_ branches for each element there: 10 ms instead of 1.5 at 32 x 92,544 and scattered bits
        limits = torch.from_numpy(_LIMITS.take(words.numpy().view(np.uint8), axis=0)).view(words.shape[0], -1)
        return torch.minimum(x, limits[:, : x.shape[1]], out=x)
    octets = words.to(x.device, non_blocking=True).view(torch.uint8)
    bits = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=x.device)
    return x.masked_fill_(((octets[:, :, None] & bits) == 0).flatten(1)[:, : x.shape[1]], float("-inf"))
