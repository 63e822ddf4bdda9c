"""Grammar -> token mask, for the slots of one rank.

The forward pass of a step is launched before the tokens of the step before have reached the host; only the choice among its logits waits for masks, in `StepMask.join`.
`follow` hands the tokens of a step on as soon as they are known, to whatever follows the grammars and fills the masks of the step that runs by then (`masks.py`), while
the host plans the next one. Where the step after has been planned, a mask that is not there in time holds up nobody: its row is late, gets its token from the step
after, and loses a step.
What follows a grammar holds nothing that cannot be rebuilt: a sequence that takes a slot again (after a pre-emption, or when its step is repeated alone) replays its
tokens. Slots without a grammar cost one look at an array.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from lmdeploy.engine.device_pace import DevicePace
from lmdeploy.engine.grammar_compiler import GrammarCompiler
from lmdeploy.engine.mask_pool import MaskPool
from lmdeploy.engine.mask_wire import BROKEN, GOES_ON, STOPPED
from lmdeploy.engine.masks import Flags, Ints, Masks, MasksHere, Tensor
from lmdeploy.messages import SamplingParams

#: rows of which the expanded mask is in memory at a time
ROWS_AT_ONCE = 32
#: words of a mask that are looked at first, of tokens that are short and common: as a rule something is allowed there
COMMON = slice(32, 96)
#: float32 [256, 8]: what the eight logits of a byte of a mask may be at most
_LIMITS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.float32("inf"), np.float32("-inf"))
#: stop tokens of an answer; those of answers with more are looked at apart, for all would be as long as the longest
FEW_STOPS = 8
#: seconds that a step waits for masks even where the device has nothing to do
BRIEF = 3e-5
#: seconds in which it is found out of an answer's last token whether the answer is complete, as a rule in 0.1 ms; where a process is busy for longer, the answer was too long
LAST_SECONDS = 2e-3
#: seconds after which it is looked whether the device still has something to do
LOOK = 1e-4


@dataclass(slots=True)
class StepMask:
    """The masks of the guided rows of a step. Bit t % 32 of word t // 32 says that token t may come."""

    rows: Ints  # [G] places among the S sampled rows
    words: Tensor  # int32 [N, W] on the host

    def join(self) -> tuple[Ints, Tensor, Ints]:
        """Wait for the masks. Rows [R] that have one, among the S, int32 words [N, W], and int64 [R] which of them are theirs."""
        return self.rows, self.words, np.arange(self.rows.size)


@dataclass(frozen=True, slots=True)
class _Rows:
    """What there is to know of rows with grammars, G of S, for as long as nobody takes or leaves a slot."""

    among: Ints  # [S] the slots of all rows
    rows: Ints  # [G] places among them
    slots: Ints  # [G]
    epochs: Ints  # [G] by which it is known later whether the same sequences still have the slots
    stops: Ints  # [G, N] tokens that end each answer, some repeated
    eos: Flags  # [G, N] which of them are the library's one EOS, which ends every answer
    own: Flags  # [G, N] which of them the request names
    places: Ints  # [G, N] of their words among all words
    flags: NDArray[np.uint32]  # [G, N] and their bits there
    among_common: Flags  # [G] one of them is in a word that is looked at first
    many: Flags  # [G] there are more than FEW_STOPS


@dataclass(slots=True)
class GuidedStep(StepMask):
    """And what there is to know of the rows."""

    of: _Rows = field(kw_only=True)
    young: Flags = field(kw_only=True)  # [G] the request's stop tokens may not come yet, unless nothing else may
    only_stops: Flags = field(kw_only=True)  # [G] after `join`: nothing else may, so that the answer is complete
    ended: Flags = field(kw_only=True)  # [G] after `join`: nothing may come behind the token before, so that the answer was complete with it
    late: Flags = field(kw_only=True)  # [G] before `join`: those that may be late; after it: those that are
    fill: Callable[[], None] | None = None  # what `join` has to do
    gone: Flags | None = None  # [G] before `join`: those that nobody wants any more
    further: Flags | None = None  # [G] those that the step behind goes on with, of which it can say that they have ended; None: there is none
    busy: Callable[[], bool] | None = None  # whether the device is still at work on what the masks are for, so that nothing waits for them yet
    paced: bool = False  # it takes as long as such steps before; `busy` is about the choice once it is launched
    waited: bool = False  # after the choice: its tokens were waited for
    errors: dict[int, str] = field(default_factory=dict)  # after `join`: place among the G -> why there is no mask

    @property
    def slots(self) -> Ints:
        """[G]"""
        return self.of.slots

    def join(self) -> tuple[Ints, Tensor, Ints]:
        """Without rows that are late."""
        fill, self.fill = self.fill, None
        if fill is not None:
            fill()
        if not self.late.any():
            return self.rows, self.words, self.slots
        there = ~self.late
        return self.rows[there], self.words, self.slots[there]


class GuidedSlots:
    """The grammars of a rank's slots."""

    def __init__(self, masks: Masks, eos_token_id: int, vocab_size: int, num_slots: int) -> None:
        self._masks, self._eos, self._vocab_size = masks, eos_token_id, vocab_size
        self._guided = np.zeros(num_slots, dtype=bool)
        self._epochs = np.zeros(num_slots, dtype=np.int64)  # how often a slot with a grammar was left
        self._count = 0  # slots that have a grammar
        self._stops = np.full((num_slots, 1), eos_token_id, dtype=np.int64)  # [slots, N]
        self._own = np.zeros((num_slots, 1), dtype=bool)
        self._num_stops = np.ones(num_slots, dtype=np.int64)  # of those [N]; the rest repeats the one EOS
        self._rows: _Rows | None = None  # of the step before
        self._open: GuidedStep | None = None  # the last one of all, until its tokens are taken in
        self._pace = DevicePace()

    @classmethod
    def of(cls, grammars: GrammarCompiler | MaskPool, num_slots: int, device: torch.device) -> GuidedSlots:
        """With whatever makes their grammars ready."""
        masks = MasksHere(grammars, num_slots) if isinstance(grammars, GrammarCompiler) else grammars.begin(num_slots, device)
        return cls(masks, grammars.eos_token_id, grammars.vocab_size, num_slots)

    @property
    def used(self) -> bool:
        """Whether any slot has a grammar."""
        return self._count > 0

    def follows(self, slots: Ints) -> bool:
        """Whether any of these slots has a grammar."""
        return self.used and bool(self._guided[slots].any())

    def set(self, slot: int, params: SamplingParams, generated: list[int]) -> None:
        """Set up `slot`, which has generated these tokens so far; raises ValueError (RequestError) for a grammar that cannot be used."""
        self.release(slot)
        if params.grammar is None:
            return
        self._rows = None
        self._masks.take(slot, params.grammar, generated)
        self._set_stops(slot, [t for t in params.stop_token_ids if t < self._vocab_size])
        self._guided[slot] = True
        self._count += 1

    def release(self, slot: int) -> None:
        """Forget the grammar of a slot, if there is one."""
        if self._guided[slot]:
            self._masks.leave(slot)
            self._guided[slot], self._rows, self._num_stops[slot] = False, None, 1
            self._epochs[slot] += 1
            self._count -= 1

    def _set_stops(self, slot: int, stops: list[int]) -> None:
        eos = self._eos
        self._num_stops[slot] = count = len(stops) + (eos not in stops)
        missing = count - self._stops.shape[1]
        if missing > 0:
            self._stops, self._own = (np.pad(array, ((0, 0), (0, missing)), mode="edge") for array in (self._stops, self._own))
        self._stops[slot], self._own[slot] = eos, eos in stops
        self._stops[slot, : len(stops)], self._own[slot, : len(stops)] = stops, True

    def masks(self, slots: Ints, young: Flags) -> GuidedStep | None:
        """The masks of the sampled rows, to be joined after `follow` of the step before; None when no row has a grammar.

        `young` [S]: answers that have not reached `min_new_tokens`.
        """
        of = self._rows
        if of is None or of.among is not slots:  # steps that follow each other have the same
            of = self._rows = self._look_up(slots)
        count = of.rows.size
        if not count:
            self._open = None
            return None
        none = np.zeros(count, dtype=bool)
        step = GuidedStep(
            of.rows, self._masks.words, of=of, young=young if count == slots.size else young[of.rows], only_stops=none, ended=none.copy(), late=none.copy()
        )
        step.fill = partial(self._fill, step)
        if self._open is None:
            self._pace.forget()
        self._pace.goes_on()
        self._open = step
        return step

    def _look_up(self, slots: Ints) -> _Rows:
        rows = np.flatnonzero(self._guided[slots])
        guided = slots[rows]
        counts = self._num_stops[guided]
        most = int(counts.max(initial=1))  # who has many costs the others nothing when he is gone
        stops = self._stops[guided, :most]
        words, flags = stops >> 5, np.uint32(1) << (stops & 31).astype(np.uint32)
        among_common = np.asarray(((words >= COMMON.start) & (words < COMMON.stop)).any(axis=1))
        places = guided[:, None] * self._masks.words.shape[1] + words
        own, many = self._own[guided, :most], counts > FEW_STOPS
        return _Rows(slots, rows, guided, self._epochs[guided], stops, stops == self._eos, own, places, flags, among_common, many)

    def launched(self, mask: GuidedStep) -> None:
        """What waited for these masks has been launched, in a step that is `paced`."""
        self._pace.launched(mask.busy is not None and mask.busy(), bool(mask.late.any()))

    def follow(self, mask: GuidedStep, tokens: Ints) -> Flags:
        """Take in a token for each sampled row (negative: none); True where the answer of a guided row is complete and ends now.

        Of answers that the step behind goes on with, `GuidedStep.ended` of that one says it: nobody waits until a token is taken in.
        """
        if mask.paced:
            self._pace.begins(mask.waited)
        else:
            self._pace.forget()
        chosen = tokens[mask.rows]
        complete: Flags = mask.only_stops.copy()
        if self._open is mask:
            self._open = None
        of = mask.of
        goes_on = (chosen >= 0) & ~mask.only_stops & (of.epochs == self._epochs[of.slots]) & (of.stops != chosen[:, None]).all(axis=1)
        slots = of.slots[goes_on]
        if slots.size:
            last, seconds = (np.ones(slots.size, dtype=bool), math.inf) if mask.further is None else (~mask.further[goes_on], LAST_SECONDS)
            complete[goes_on] = self._masks.advance(slots, chosen[goes_on], last, seconds)
        return complete

    # -- waiting for masks -------------------------------------------------------------------------------------------

    def _fill(self, step: GuidedStep) -> None:
        """What is left to be done of a step's masks, and what a mask of the grammar alone does not say: which tokens end this answer."""
        step.late = self._await(step, step.late)
        self._pace.ends_wait()
        there = np.flatnonzero(~step.late)
        states, bits = self._masks.states(step.slots[there]), step.words.numpy().view(np.uint32)
        if states.any():
            step.ended = np.zeros(step.late.size, dtype=bool)
            step.ended[there] = states == STOPPED
            for place in there[states == BROKEN].tolist():
                slot = step.slots.item(place)
                bits[slot], step.errors[place] = 0, self._masks.reason(slot)  # so that no token is chosen, and the answer fails
            there = there[states == GOES_ON]
        many = step.of.many[there]
        if many.any():
            self._add_stops(step, bits, there[many], step.of.stops.shape[1])
            there = there[~many]
        self._add_stops(step, bits, there, FEW_STOPS)

    def _await(self, step: GuidedStep, may: Flags) -> Flags:
        """Wait for masks, as long as needed for rows that may not be late, and for others while the device is at work; [G] those that are late."""
        masks, slots = self._masks, step.slots
        there = masks.there(slots)
        least = time.perf_counter() + BRIEF
        until = max(self._pace.end() if step.paced else math.inf, least) if step.busy is not None else least
        while not there.all():
            seconds = until - time.perf_counter()
            if seconds <= 0 and (there | may).all():
                break
            masks.wait(min(seconds, LOOK) if seconds > 0 else LOOK)
            there = masks.there(slots)
            if seconds > 0 and step.busy is not None and until > least and not step.busy():
                until = least
                if step.paced:
                    self._pace.idle()
        wanted = np.ones(may.size, dtype=bool) if step.gone is None else ~step.gone
        if step.rows.size == step.of.among.size and wanted.any():  # somebody must get a token from what is launched now
            while not there[wanted].any():
                masks.wait(LOOK)
                there = masks.there(slots)
        late: Flags = ~there
        return late

    def _add_stops(self, mask: GuidedStep, bits: NDArray[np.uint32], there: Ints, most: int) -> None:
        """Where the grammar may end (the library says so by its one EOS), the tokens that end this answer are allowed, if it is old enough. bits [slots, W]; there [R], of
        which none has more than `most`."""
        of, flat, part = mask.of, bits.reshape(-1), there if there.size < mask.rows.size else slice(None)
        named = flat.take(of.places[part, :most]) & of.flags[part, :most] != 0  # [R, N] some grammars name a stop token themselves
        ends = named.any(axis=1)  # others have something to go on with, or nothing at all: then no token is chosen, and the answer fails
        if not ends.any():
            return
        accepting = (named & of.eos[part, :most]).any(axis=1)
        goes_on = bits[of.slots[part], COMMON].any(axis=1) & ~of.among_common[part] & ~mask.young[part]
        both = there[goes_on & accepting]
        if both.size:
            np.bitwise_or.at(flat, of.places[both, :most], of.flags[both, :most])
        ends &= ~goes_on
        if ends.any():
            self._look_at_stops(mask, bits, there[ends], named[ends], accepting[ends])

    def _look_at_stops(self, mask: GuidedStep, bits: NDArray[np.uint32], rows: Ints, named: Flags, accepting: Flags) -> None:
        """The same for rows [R] that perhaps may only end, perhaps may not end yet. named [R, N], accepting [R]."""
        of, flat = mask.of, bits.reshape(-1)
        slots, places, flags, own = of.slots[rows], of.places[rows, : named.shape[1]], of.flags[rows, : named.shape[1]], of.own[rows, : named.shape[1]]
        np.bitwise_and.at(flat, places, ~flags)
        nothing = np.logical_not(bits[slots, COMMON].any(axis=1))
        nothing[nothing] = np.logical_not(bits[slots[nothing]].any(axis=1))
        allowed = (accepting[:, None] | named) & ((~mask.young[rows] | nothing)[:, None] | ~own)
        np.bitwise_or.at(flat, places, np.where(allowed, flags, np.uint32(0)))
        mask.only_stops[rows] = nothing

    def close(self) -> None:
        """End what fills masks."""
        self._masks.close()


def is_among(slots: Ints, others: Ints) -> Flags:
    """bool [N]: which of the slots are among others; numpy's `isin` sorts, and takes ten times as long."""
    if not (slots.size and others.size):
        return np.zeros(slots.size, dtype=bool)
    there = np.zeros(max(slots.max(), others.max()) + 1, dtype=bool)
    there[others] = True
    found: Flags = there[slots]
    return found


def forbid(logits: Tensor, mask: StepMask) -> None:
    """-inf for every token that the masks do not allow, in place. logits float32 [S, V]."""
    guided, table, places = mask.join()
    every = guided.size == logits.shape[0]
    for start in range(0, guided.size, ROWS_AT_ONCE):
        words = table[torch.from_numpy(places[start : start + ROWS_AT_ONCE])]
        if every:
            _close(logits[start : start + ROWS_AT_ONCE], words)
        else:
            rows = torch.from_numpy(guided[start : start + ROWS_AT_ONCE]).to(logits.device)
            logits.index_copy_(0, rows, _close(logits.index_select(0, rows), words))


def _close(x: Tensor, words: Tensor) -> Tensor:
    """The same for x [G, V] and its words [G, W]."""
    if x.device.type == "cpu":  # masked_fill_ branches for each element there: 10 ms instead of 1.5 at 32 x 92,544 and scattered bits
        limits = torch.from_numpy(_LIMITS.take(words.numpy().view(np.uint8), axis=0)).view(words.shape[0], -1)
        return torch.minimum(x, limits[:, : x.shape[1]], out=x)
    octets = words.to(x.device, non_blocking=True).view(torch.uint8)
    bits = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=x.device)
    return x.masked_fill_(((octets[:, :, None] & bits) == 0).flatten(1)[:, : x.shape[1]], float("-inf"))
