"""Grammar -> token mask, for the slots of one rank: one matcher a slot, advanced with each token that was sampled.

The forward pass of a step is launched before the tokens of the step before have reached the host; only the choice among its logits waits for masks, in `StepMask.join`.
`follow` takes in the tokens of a step as soon as they are known, and has the library's threads fill the masks of the step that runs by then, while the host plans the
next one. Masks that may take long are begun first, in calls of their own. Where the step after has been planned, a mask that is not there in time holds up nobody: its
row is late, gets its token from the step after, and loses a step.
Matchers hold nothing that cannot be rebuilt: a sequence that takes a slot again (after a pre-emption, or when its step is repeated alone) replays its tokens.
Slots without a grammar cost one look at an array.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import llguidance
import numpy as np
import torch
from numpy.typing import NDArray

from lmdeploy.engine.device_pace import DevicePace
from lmdeploy.engine.grammar_compiler import MASK_THREADS, GrammarCompiler, reason_of
from lmdeploy.engine.mask_calls import Callers, MaskCall
from lmdeploy.grammar import Grammar
from lmdeploy.messages import SamplingParams

Tensor = torch.Tensor
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

#: rows of which the expanded mask is in memory at a time
ROWS_AT_ONCE = 32
#: words of a mask that are looked at first, of tokens that are short and common: as a rule something is allowed there
COMMON = slice(32, 96)
#: float32 [256, 8]: what the eight logits of a byte of a mask may be at most
_LIMITS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.float32("inf"), np.float32("-inf"))
#: seconds that a step waits for masks even where the device has nothing to do: what has been done has to get the interpreter's lock to say so
BRIEF = 3e-5
#: seconds after which it is looked whether the device still has something to do
LOOK = 1e-4
#: seconds from which on a call takes long
LONG = 0.003
#: a grammar in a call that takes LONG gets calls of its own until it has had so many quick ones in a row
FORGIVEN = 32
#: calls at a time: of masks that were not expected to take long (the second where the first does, after all), and of others
USUAL_CALLS, OTHER_CALLS = 2, 4


@dataclass(slots=True)
class StepMask:
    """The masks of the guided rows of a step. Bit t % 32 of word t // 32 says that token t may come."""

    rows: Ints  # [G] places among the S sampled rows
    words: Tensor  # int32 [N, W] on the host

    def join(self) -> tuple[Ints, Tensor, Ints]:
        """Wait for the masks. Rows [R] that have one, among the S, int32 words [N, W], and int64 [R] which of them are theirs."""
        return self.rows, self.words, np.arange(self.rows.size)


@dataclass(slots=True)
class GuidedStep(StepMask):
    """And what there is to know of the rows."""

    slots: Ints = field(kw_only=True)  # [G]
    among: int = field(kw_only=True)  # S
    matchers: list[Any] = field(kw_only=True)  # [G] of the sequences that had the slots when the step began
    stops: Ints = field(kw_only=True)  # [G, N] tokens that end each answer, some repeated
    places: Ints = field(kw_only=True)  # [G, N] of their words among all words
    flags: NDArray[np.uint32] = field(kw_only=True)  # [G, N] and their bits there
    own: Flags = field(kw_only=True)  # [G, N] the request names them; the library's one EOS ends every answer
    young: Flags = field(kw_only=True)  # [G] the request's stop tokens may not come yet, unless nothing else may
    only_stops: Flags = field(kw_only=True)  # [G] after `join`: nothing else may, so that the answer is complete
    late: Flags = field(kw_only=True)  # [G] before `join`: those that may be late; after it: those that are
    fill: Callable[[], None] | None = None  # what `join` has to do
    gone: Flags | None = None  # [G] before `join`: those that nobody wants any more
    busy: Callable[[], bool] | None = None  # whether the device is still at work on what the masks are for, so that nothing waits for them yet
    paced: bool = False  # it takes as long as such steps before; `busy` is about the choice once it is launched
    waited: bool = False  # after the choice: its tokens were waited for
    errors: dict[int, str] = field(default_factory=dict)  # after `join`: place among the G -> why there is no mask

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
    """The matchers of a rank's slots."""

    def __init__(self, compiler: GrammarCompiler, num_slots: int, device: torch.device) -> None:
        self._compiler, self._num_slots, self._device = compiler, num_slots, device
        self._overlaps = device.type == "cuda"  # the host runs ahead: masks that take long must not hold up others
        self._matchers: list[Any] = [None] * num_slots
        self._grammars: list[Grammar | None] = [None] * num_slots
        self._lexers = np.full(num_slots, -1, dtype=np.int64)
        self._users: dict[Grammar, Counter[int]] = {}  # of grammars that slots have, how many each of its lexers has
        self._stops = np.full((num_slots, 1), compiler.eos_token_id, dtype=np.int64)  # [slots, N]
        self._own = np.zeros((num_slots, 1), dtype=bool)
        self._guided = np.zeros(num_slots, dtype=bool)
        self._words: Tensor | None = None  # int32 [slots, W], made with the first grammar
        self._calls: list[MaskCall | None] = [None] * num_slots  # that fill the words of a slot, until they are joined
        self._former: dict[int, MaskCall] = {}  # of who had a slot before, and may still write there
        usual = llguidance.LLExecutor(MASK_THREADS)
        # the second for calls that are not usual: a pool's threads finish what they have begun before they look at another call
        self._executors = (usual, llguidance.LLExecutor(MASK_THREADS) if self._overlaps else usual)
        self._callers = (Callers(USUAL_CALLS), Callers(OTHER_CALLS))
        self._last: GuidedStep | None = None  # whose masks nobody has begun to fill
        self._open: GuidedStep | None = None  # the last one of all, until its tokens are taken in
        self._left = np.zeros(num_slots, dtype=np.int64)  # characters that a string may still have, as the slot's last mask tells
        self._near = np.zeros(num_slots, dtype=bool)  # the slot's next mask may take long
        self._joined: GuidedStep | None = None  # whose masks `_left` does not know yet
        self._slow: dict[Grammar, int] = {}  # that need calls of their own -> quick ones until they need them no more
        self._pace = DevicePace()

    @property
    def used(self) -> bool:
        """Whether any slot has a grammar."""
        return bool(self._users)

    def set(self, slot: int, params: SamplingParams, generated: list[int]) -> None:
        """Set up `slot`, which has generated these tokens so far; raises ValueError (RequestError) for a grammar that cannot be used."""
        self.release(slot)
        if params.grammar is None:
            return
        users = self._users.get(params.grammar, Counter())
        matcher, lexer = self._compiler.matcher_and_lexer(params.grammar, users)
        if generated and not matcher.consume_tokens(generated):
            raise ValueError(f"the grammar does not fit the tokens generated so far: {reason_of(matcher.get_error())}")
        self._set_stops(slot, [t for t in params.stop_token_ids if t < self._compiler.vocab_size])
        self._matchers[slot], self._grammars[slot], self._lexers[slot] = matcher, params.grammar, lexer
        users[lexer] += 1
        self._users[params.grammar] = users
        self._guided[slot] = True

    def release(self, slot: int) -> None:
        """Forget the matcher of a slot, if there is one."""
        if self._guided[slot]:
            self._look_back()
            grammar = self._grammars[slot]
            assert grammar is not None
            users = self._users[grammar]
            users -= Counter([self._lexers.item(slot)])  # and forget those that have none any more: numbers of lexers are never used again
            if not users.total():
                del self._users[grammar]
                self._slow.pop(grammar, None)
            self._matchers[slot] = self._grammars[slot] = None
            self._guided[slot] = self._near[slot] = False
            self._left[slot] = 0
            call, self._calls[slot] = self._calls[slot], None
            if call is not None and not call.over:
                self._former[slot] = call

    def _set_stops(self, slot: int, stops: list[int]) -> None:
        eos, missing = self._compiler.eos_token_id, len(stops) + 1 - self._stops.shape[1]
        if missing > 0:  # one more EOS behind
            self._stops, self._own = (np.pad(array, ((0, 0), (0, missing)), mode="edge") for array in (self._stops, self._own))
        self._stops[slot], self._own[slot] = eos, eos in stops
        self._stops[slot, : len(stops)], self._own[slot, : len(stops)] = stops, True

    def masks(self, slots: Ints, young: Flags) -> GuidedStep | None:
        """The masks of the sampled rows, to be joined after `follow` of the step before; None when no row has a grammar.

        `young` [S]: answers that have not reached `min_new_tokens`. A slot's words have been used when its next ones are begun, in `follow` or `join`.
        """
        self._look_back()
        rows = np.flatnonzero(self._guided[slots])
        if not rows.size:
            self._last = None
            return None
        if self._words is None:
            width = -(-self._compiler.vocab_size // 32)
            self._words = torch.zeros((self._num_slots, width), dtype=torch.int32, pin_memory=self._device.type == "cuda")
        guided = slots[rows]
        stops, none = self._stops[guided], np.zeros(rows.size, dtype=bool)
        step = GuidedStep(
            rows, self._words, slots=guided, among=slots.size, matchers=[self._matchers[slot] for slot in guided.tolist()], stops=stops,
            places=guided[:, None] * self._words.shape[1] + (stops >> 5), flags=np.uint32(1) << (stops & 31).astype(np.uint32),
            own=self._own[guided], young=young[rows], only_stops=none, late=none.copy(),
        )  # fmt: skip
        step.fill = partial(self._fill, step)
        if self._open is None:
            self._pace.forget()
        if self._overlaps and self._open is None:  # grammars know all tokens: the first step, or one behind a step that was waited for
            near = self._near[guided]
            self._begin(step, np.flatnonzero(near), usual=False)
            self._begin(step, np.flatnonzero(~near), usual=True)
        else:
            self._last = step
        self._open = step
        return step

    def launched(self, mask: GuidedStep) -> None:
        """What waited for these masks has been launched, in a step that is `paced`."""
        self._pace.launched(mask.busy is not None and mask.busy())

    def follow(self, mask: GuidedStep, tokens: Ints) -> list[bool]:
        """Take in a token for each sampled row (negative: none); True where the answer of a guided row is complete and ends now."""
        self._pace.begins(mask.waited)
        chosen = tokens[mask.rows]
        complete: list[bool] = mask.only_stops.tolist()
        goes_on = (chosen >= 0) & ~mask.only_stops & (mask.stops != chosen[:, None]).all(axis=1)
        last, self._last = self._last, None
        self._open = None if self._open is mask else self._open
        self._look_back()
        self._near[mask.slots[goes_on]] = self._compiler.ends.near(self._left[mask.slots[goes_on]], chosen[goes_on])
        if last is None or last is mask or last.fill is None:
            self._consume(mask, chosen, goes_on, complete)
            return complete
        near = self._near[last.slots]
        if near.any():  # first of all, and whoever would wait for a lexer that they use
            lexers = self._lexers[last.slots]
            near |= is_among(lexers, lexers[near])
            first = is_among(mask.slots, last.slots[near])
            self._consume(mask, chosen, goes_on & first, complete)
            self._begin(last, np.flatnonzero(near), usual=False)
            goes_on &= ~first
        self._consume(mask, chosen, goes_on, complete)
        self._begin(last, np.flatnonzero(~near), usual=True)
        return complete

    def _consume(self, mask: GuidedStep, chosen: Ints, which: Flags, complete: list[bool]) -> None:
        for place, token in zip(np.flatnonzero(which).tolist(), chosen[which].tolist(), strict=True):
            matcher = mask.matchers[place]  # some microseconds each: waking other threads costs more
            complete[place] = matcher.consume_token(token) and matcher.is_stopped()

    # -- filling masks -----------------------------------------------------------------------------------------------

    def _begin(self, step: GuidedStep, places: Ints, *, usual: bool) -> None:
        """Have the masks of some of the rows filled, but those that are being filled; slow grammars each in a call of its own."""
        groups: dict[Grammar | None, list[int]] = {}
        for place, slot in zip(places.tolist(), step.slots[places].tolist(), strict=True):
            former = self._former.get(slot)
            if self._calls[slot] is None and (former is None or former.over):
                grammar = self._grammars[slot] if self._slow else None
                groups.setdefault(grammar if grammar in self._slow else None, []).append(place)
        for grammar, some in groups.items():
            call = MaskCall(step.slots[some].tolist(), [step.matchers[place] for place in some], usual=usual and grammar is None)
            if self._callers[not call.usual].begin(call, partial(self._fill_words, call)):
                for slot in call.slots:
                    self._former.pop(slot, None)
                    self._calls[slot] = call

    def _fill_words(self, call: MaskCall) -> None:
        assert self._words is not None
        rows = list(zip(call.matchers, call.slots, strict=True))
        self._executors[not call.usual].unsafe_compute_mask_ptr(rows, self._words.data_ptr(), self._words.shape[1] * 4, self._num_slots)

    def _fill(self, step: GuidedStep) -> None:
        """What is left to be done of a step's masks, and what a mask of the grammar alone does not say: which tokens end this answer."""
        if self._last is step:
            self._last = None
        if any(self._calls[slot] is None for slot in step.slots.tolist()):
            self._begin(step, np.arange(step.rows.size), usual=True)
        step.late = self._await(step, step.late)
        self._pace.ends_wait()
        there = np.flatnonzero(~step.late)
        for slot in step.slots[there].tolist():
            self._calls[slot] = None
        self._add_stops(step, step.words.numpy().view(np.uint32), there)
        self._joined = step

    def _await(self, step: GuidedStep, may: Flags) -> Flags:
        """Wait for masks, as long as needed for rows that may not be late, and for others while the device is at work; [G] those that are late."""
        calls: dict[MaskCall, list[int]] = {}
        for place, slot in enumerate(step.slots.tolist()):
            call = self._calls[slot]
            if call is not None:
                calls.setdefault(call, []).append(place)
            elif not may[place]:  # all threads are busy
                self._fill_here(step, place)
        late: Flags = may.copy()
        least = time.perf_counter() + BRIEF
        until = max(self._pace.end() if step.paced else math.inf, least) if step.busy is not None else least
        for call, places in calls.items():
            if not may[places].all():
                call.wait()
            elif not call.over:
                until = self._wait(call, step.busy, until, least)
        if step.rows.size == step.among:
            self._wait_for_somebody(step, calls, late)
        for call, places in calls.items():
            if call.over and call.wait():  # also while others were waited for
                late[places] = False
                if not call.usual and self._slow:
                    self._forgive(call)
            elif call.age > LONG:
                self._slow |= dict.fromkeys((g for slot in call.slots if (g := self._grammars[slot]) is not None), FORGIVEN)
        return late

    def _wait(self, call: MaskCall, busy: Callable[[], bool] | None, until: float, least: float) -> float:
        """Wait for a call `until` the device would have to wait for what is launched behind it, or is found to have nothing to do; until when it would now."""
        while (seconds := until - time.perf_counter()) > 0 and not call.wait(min(seconds, LOOK)):
            if busy is not None and until > least and not busy():
                self._pace.idle()
                until = least
        return until

    def _wait_for_somebody(self, step: GuidedStep, calls: dict[MaskCall, list[int]], late: Flags) -> None:
        """Where nobody would get a token from what is launched now, wait for the first mask that comes."""
        wanted = np.ones(late.size, dtype=bool) if step.gone is None else ~step.gone
        some = [call for call, places in calls.items() if wanted[places].any()]
        if not wanted.any() or not late[wanted].all() or any(call.over for call in some):
            return
        if not some:
            place = int(np.flatnonzero(wanted)[0])
            self._fill_here(step, place)
            late[place] = False
        while some and not any(call.over for call in some):
            some[0].wait(LOOK if len(some) > 1 else None)

    def _fill_here(self, step: GuidedStep, place: int) -> None:
        slot = step.slots.item(place)
        if (former := self._former.pop(slot, None)) is not None:
            former.wait()
        call = MaskCall([slot], [step.matchers[place]], usual=False)
        call.run(partial(self._fill_words, call))
        call.wait()

    def _forgive(self, call: MaskCall) -> None:
        """Count a quick call of a slow grammar, or begin to count anew."""
        for grammar in {self._grammars[slot] for slot in call.slots}:
            if grammar is not None and grammar in self._slow:
                self._slow[grammar] = self._slow[grammar] - 1 if call.seconds < LONG else FORGIVEN
                if not self._slow[grammar]:
                    del self._slow[grammar]

    def _look_back(self) -> None:
        """What the last masks tell of the next ones; while nobody waits for it."""
        step, self._joined = self._joined, None
        if step is not None:
            slots = step.slots[~step.late]
            self._left[slots] = self._compiler.ends.left(step.words.numpy().view(np.uint32), slots)

    def _add_stops(self, mask: GuidedStep, bits: NDArray[np.uint32], there: Ints) -> None:
        """Where the grammar may end (the library says so by its one EOS), the tokens that end this answer are allowed, if it is old enough. bits [slots, W]; there [R]."""
        flat = bits.reshape(-1)
        named = flat.take(mask.places[there]) & mask.flags[there] != 0  # [R, N] some grammars name a stop token themselves
        ends = np.flatnonzero(named.any(axis=1))  # others have something to go on with, or nothing at all: then no token is chosen, and the answer fails
        if not ends.size:
            return
        named, rows = named[ends], there[ends]
        slots, stops = mask.slots[rows], mask.stops[rows]
        accepting = (named & (stops == self._compiler.eos_token_id)).any(axis=1)
        among_common = ((stops >= COMMON.start * 32) & (stops < COMMON.stop * 32)).any(axis=1)
        goes_on = ~mask.young[rows] & ~among_common & bits[slots, COMMON].any(axis=1)
        both = rows[goes_on & accepting]
        for at, on in zip(mask.places[both].T, mask.flags[both].T, strict=True):
            flat[at] |= on
        if not goes_on.all():
            self._look_at_stops(mask, bits, rows[~goes_on], named[~goes_on], accepting[~goes_on])

    def _look_at_stops(self, mask: GuidedStep, bits: NDArray[np.uint32], rows: Ints, named: Flags, accepting: Flags) -> None:
        """The same for rows [R] that perhaps may only end, perhaps may not end yet. named [R, N], accepting [R]."""
        flat, slots, places, flags = bits.reshape(-1), mask.slots[rows], mask.places[rows].T, mask.flags[rows].T
        for at, on in zip(places, flags, strict=True):
            flat[at] &= ~on
        nothing = np.logical_not(bits[slots, COMMON].any(axis=1))
        nothing[nothing] = np.logical_not(bits[slots[nothing]].any(axis=1))
        allowed = (accepting[:, None] | named) & ((~mask.young[rows] | nothing)[:, None] | ~mask.own[rows])
        for at, on, may in zip(places, flags, allowed.T, strict=True):
            flat[at] |= np.where(may, on, np.uint32(0))
        mask.only_stops[rows] = nothing
        for place in rows[nothing].tolist():
            if mask.matchers[place].is_error():  # of which the library says the same
                slot = mask.slots[place]
                bits[slot], mask.only_stops[place] = 0, False
                mask.errors[place] = f"the grammar's next tokens could not be worked out: {reason_of(mask.matchers[place].get_error())}"

    def close(self) -> None:
        """End the threads."""
        for callers in self._callers:
            callers.close()


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
