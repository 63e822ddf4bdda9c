"""Grammar -> token mask, for the slots of one rank: one matcher a slot, advanced with each token that was sampled.

The forward pass of a step is launched before the tokens of the step before have reached the host; only the choice among its logits waits for masks, in `StepMask.join`.
`follow` takes in the tokens of a step as soon as they are known, and has the library's threads fill the masks of the step that runs by then, while the host plans the
next one. Matchers hold nothing that cannot be rebuilt: a sequence that takes a slot again (after a pre-emption, or when its step is repeated alone) replays its tokens.
Slots without a grammar cost one look at an array.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import llguidance
import numpy as np
import torch
from numpy.typing import NDArray

from lmdeploy.engine.grammar_compiler import MASK_THREADS, GrammarCompiler, reason_of
from lmdeploy.grammar import Grammar
from lmdeploy.messages import SamplingParams

Tensor = torch.Tensor
Ints = NDArray[np.int64]

#: rows of which the expanded mask is in memory at a time
ROWS_AT_ONCE = 32
#: words of a mask that are looked at first: as a rule something is allowed there
FIRST_WORDS = 64
#: float32 [256, 8]: what the eight logits of a byte of a mask may be at most
_LIMITS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.float32("inf"), np.float32("-inf"))


@dataclass(slots=True)
class StepMask:
    """The masks of the guided rows of a step. `words` int32 [G, W]: bit t % 32 of word t // 32 says that token t may come, after `join`."""

    rows: Ints  # [G] places among the S sampled rows
    words: Tensor  # on the host
    fill: Callable[[], None] | None = None  # what `join` has to do

    def join(self) -> StepMask:
        """Fill the masks, if that was not done."""
        fill, self.fill = self.fill, None
        if fill is not None:
            fill()
        return self


@dataclass(slots=True)
class GuidedStep(StepMask):
    """And what there is to know of the rows."""

    matchers: list[Any] = field(kw_only=True)  # [G] of the sequences that had the slots when the step began
    stops: Ints = field(kw_only=True)  # [G, N] tokens that end each answer, some repeated
    own: NDArray[np.bool_] = field(kw_only=True)  # [G, N] the request names them; the library's one EOS ends every answer
    young: NDArray[np.bool_] = field(kw_only=True)  # [G] the request's stop tokens may not come yet, unless nothing else may
    only_stops: NDArray[np.bool_] = field(kw_only=True)  # [G] after `join`: nothing else may, so that the answer is complete
    errors: dict[int, str] = field(default_factory=dict)  # after `join`: place among the G -> why there is no mask


class _Filler:
    """A thread for one call that gives the interpreter's lock up at once and is long: the library's own."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], None], queue.SimpleQueue[Exception | None]] | None] = queue.SimpleQueue()
        self._entered: queue.SimpleQueue[None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="grammar-masks", daemon=True).start()

    def begin(self, call: Callable[[], None]) -> Callable[[], None]:
        """Start a call; the returned function waits for it. It is let in first: a thread that wakes up gets the lock from a busy one after 5 ms only."""
        done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._calls.put((call, done))
        self._entered.get()

        def wait() -> None:
            if (error := done.get()) is not None:
                raise error

        return wait

    def _run(self) -> None:
        while (todo := self._calls.get()) is not None:
            call, done = todo
            self._entered.put(None)
            try:
                call()
            except BaseException as e:  # a panic of the library is no Exception; whoever waits must hear of it
                done.put(RuntimeError(f"the grammar library failed: {type(e).__name__}: {e}"))
            else:
                done.put(None)

    def close(self) -> None:
        """End the thread."""
        self._calls.put(None)


class GuidedSlots:
    """The matchers of a rank's slots."""

    def __init__(self, compiler: GrammarCompiler, num_slots: int, device: torch.device) -> None:
        self._compiler, self._num_slots, self._device = compiler, num_slots, device
        self._matchers: list[Any] = [None] * num_slots
        self._grammars: list[Grammar | None] = [None] * num_slots
        self._users: Counter[Grammar] = Counter()  # slots
        self._stops = np.full((num_slots, 1), compiler.eos_token_id, dtype=np.int64)  # [slots, N]
        self._own = np.zeros((num_slots, 1), dtype=bool)
        self._guided = np.zeros(num_slots, dtype=bool)
        self._masks: Tensor | None = None  # made with the first grammar
        self._executor = llguidance.LLExecutor(MASK_THREADS)
        self._filler: _Filler | None = None  # with the first grammar
        self._last: GuidedStep | None = None  # whose masks nobody has begun to fill

    @property
    def used(self) -> bool:
        """Whether any slot has a grammar."""
        return bool(self._users)

    def set(self, slot: int, params: SamplingParams, generated: list[int]) -> None:
        """Set up `slot`, which has generated these tokens so far; raises ValueError (RequestError) for a grammar that cannot be used."""
        self.release(slot)
        if params.grammar is None:
            return
        matcher = self._compiler.matcher(params.grammar, self._users[params.grammar])
        if generated and not matcher.consume_tokens(generated):
            raise ValueError(f"the grammar does not fit the tokens generated so far: {reason_of(matcher.get_error())}")
        self._set_stops(slot, [t for t in params.stop_token_ids if t < self._compiler.vocab_size])
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

    def _set_stops(self, slot: int, stops: list[int]) -> None:
        eos, missing = self._compiler.eos_token_id, len(stops) + 1 - self._stops.shape[1]
        if missing > 0:  # one more EOS behind
            self._stops, self._own = (np.pad(array, ((0, 0), (0, missing)), mode="edge") for array in (self._stops, self._own))
        self._stops[slot], self._own[slot] = eos, eos in stops
        self._stops[slot, : len(stops)], self._own[slot, : len(stops)] = stops, True

    def masks(self, slots: Ints, young: NDArray[np.bool_]) -> GuidedStep | None:
        """The masks of the sampled rows, to be joined after `follow` of the step before; None when no row has a grammar.

        `young` [S]: answers that have not reached `min_new_tokens`. Its words have been used when the next one is joined.
        """
        rows = np.flatnonzero(self._guided[slots])
        if not rows.size:
            self._last = None
            return None
        if self._masks is None:
            self._filler = _Filler()
            width = -(-self._compiler.vocab_size // 32)
            self._masks = torch.zeros((self._num_slots, width), dtype=torch.int32, pin_memory=self._device.type == "cuda")
        guided = slots[rows]
        matchers, stops, own = [self._matchers[slot] for slot in guided.tolist()], self._stops[guided], self._own[guided]
        nothing = np.zeros(rows.size, dtype=bool)
        step = GuidedStep(rows, self._masks[: rows.size], matchers=matchers, stops=stops, own=own, young=young[rows], only_stops=nothing)
        step.fill = partial(self._fill, step)
        self._last = step
        return step

    def follow(self, mask: GuidedStep, tokens: Ints) -> list[bool]:
        """Take in a token for each sampled row (-1: none); True where the answer of a guided row is complete and ends now."""
        chosen = tokens[mask.rows]
        complete: list[bool] = mask.only_stops.tolist()
        goes_on = (chosen >= 0) & ~mask.only_stops & (mask.stops != chosen[:, None]).all(axis=1)
        for place, token in zip(np.flatnonzero(goes_on).tolist(), chosen[goes_on].tolist(), strict=True):
            matcher = mask.matchers[place]  # some microseconds each: waking other threads costs more
            complete[place] = matcher.consume_token(token) and matcher.is_stopped()
        last, self._last = self._last, None
        if last is not None and last is not mask and last.fill is not None:
            last.fill = partial(self._finish, last, self._begin(last))
        return complete

    def _begin(self, mask: GuidedStep) -> Callable[[], None]:
        rows, words = list(zip(mask.matchers, range(len(mask.matchers)), strict=True)), mask.words
        assert self._filler is not None
        return self._filler.begin(partial(self._executor.unsafe_compute_mask_ptr, rows, words.data_ptr(), words.shape[1] * 4, len(rows)))

    def _fill(self, mask: GuidedStep) -> None:
        self._last = None
        self._finish(mask, self._begin(mask))

    def _finish(self, mask: GuidedStep, wait: Callable[[], None]) -> None:
        """Masks, then what a mask of the grammar alone does not say: which tokens end this answer."""
        wait()
        matchers, words = mask.matchers, mask.words
        bits: NDArray[np.uint32] = words.numpy().view(np.uint32)
        for place, matcher in enumerate(matchers):
            if matcher.is_error():
                bits[place] = 0
                mask.errors[place] = f"the grammar's next tokens could not be worked out: {reason_of(matcher.get_error())}"
        self._add_stops(mask, bits)

    def _add_stops(self, mask: GuidedStep, bits: NDArray[np.uint32]) -> None:
        """Where the grammar may end (the library says so by its one EOS), the tokens that end this answer are allowed, if it is old enough. bits [G, W]."""
        word, flag = mask.stops >> 5, np.uint32(1) << (mask.stops & 31).astype(np.uint32)
        named = bits[np.arange(len(bits))[:, None], word] & flag != 0  # [G, N] some grammars name a stop token themselves
        accepting = (named & (mask.stops == self._compiler.eos_token_id)).any(axis=1)
        # others have something to go on with, or nothing at all: then no token is chosen, and the answer fails
        ends = np.flatnonzero(named.any(axis=1))
        if not ends.size:
            return
        word, flag, allowed = word[ends].T, flag[ends].T, (accepting[:, None] | named)[ends].T  # [N, E]
        for at, on in zip(word, flag, strict=True):
            bits[ends, at] &= ~on
        nothing = np.logical_not(bits[ends, :FIRST_WORDS].any(axis=1))
        nothing[nothing] = np.logical_not(bits[ends[nothing]].any(axis=1))
        mask.only_stops[ends] = nothing
        allowed &= ~mask.young[ends] | nothing | ~mask.own[ends].T
        for at, on, may in zip(word, flag, allowed, strict=True):
            bits[ends, at] |= np.where(may, on, np.uint32(0))
        mask.only_stops[list(mask.errors)] = False

    def close(self) -> None:
        """End the thread."""
        if self._filler is not None:
            self._filler.close()


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
