"""`Running`: the sequences that have a slot, their counts as one table.

A step that only brings each of them its next token is what nearly all steps are; it costs a few operations on the table's columns. Sequences are looked at
one by one only where something else happens to them. Knows no blocks but their number, and decides nothing: the scheduler does.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmdeploy.engine.plan import ONE, ZERO, Ints, Items, StepResult, any_of
from lmdeploy.engine.sequence import BLOCKS, COMPUTED, DONE, INDEX, KNOWN, LIMIT, PENDING, PROMPT, PUBLISHED, REQUEST, SAMPLES, Sequence, TokenLog
from lmdeploy.messages import StepOutputs

#: so many tokens that end answers are looked for one by one
FEW_STOPS = 4
#: steps whose tokens are kept side by side before sequences take them over
LOGGED = 128
#: what changes of a sequence's counts when its next token is launched, COMPUTED and PENDING, and when it comes, PENDING, KNOWN and DONE
LAUNCHED, ARRIVED = np.array([[1], [1]]), np.array([[-1], [1], [1]])


@dataclass(slots=True)
class _Steady:
    """What the next steps are as long as nobody comes or goes: a token of each answer, neither its first nor its last one."""

    order: Ints
    epochs: Ints
    starts: Ints  # where the next tokens are
    ones: Ints
    all: NDArray[np.bool_]
    launched: Ints  # what a launch changes of the counts of all slots, as they lie in the table
    arrived: Ints  # and what a result does
    left: int  # steps until one may have its last token
    room: int  # steps for which all have blocks
    stamp: Stamp | None = None  # of all their plans
    names: tuple[list[int], list[int]] | None = None  # the answers' requests and indices, when they were first asked for


@dataclass(frozen=True, slots=True)
class Stamp:
    """Who had the slots of a plan's items when it was launched."""

    leavings: int  # until then
    epochs: Ints
    steady: _Steady | None  # of items that are known to be such


class Running:
    """In order of arrival. A slot's epoch grows when its sequence leaves: results of older plans are then void."""

    def __init__(self, num_slots: int, block_size: int) -> None:
        self._size = np.array(block_size)
        self._ahead = np.array(max(block_size // 2, 1) - 1)  # steps after the next one for which sequences get blocks together with others
        self._sequences: list[Sequence] = []
        self._holders: dict[int, Sequence] = {}  # by slot
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._taken = np.zeros(num_slots, dtype=bool)
        self._epochs = np.zeros(num_slots, dtype=np.int64)
        self._leavings = 0
        self._table = table = np.zeros((INDEX + 1, num_slots), dtype=np.int64)  # each count of all slots; see `Sequence`
        self._launched, self._pending, self._arrived = table[COMPUTED : PENDING + 1], table[PENDING], table[PENDING : DONE + 1]
        self._log = TokenLog(LOGGED, num_slots)
        self._order: Ints | None = None  # slots in order of arrival; None = to be made again
        self._stops: Counter[int] = Counter()  # how many sequences a token ends
        self._stop_arrays: list[Ints] | None = None  # these tokens; None = to be made again
        self._steady: _Steady | None = None  # holds while `_order` is its order

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, place: int) -> Sequence:
        return self._sequences[place]

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def has_room(self) -> bool:
        """Whether a slot is free."""
        return bool(self._free_slots)

    def at(self, slot: int) -> Sequence:
        """Who has a slot."""
        return self._holders[slot]

    def enter(self, seq: Sequence) -> None:
        """Give a sequence a slot."""
        slot = self._free_slots.pop()
        seq.take_slot(slot, self._table[:, slot], self._log)
        self._holders[slot], self._taken[slot] = seq, True
        insort(self._sequences, seq, key=_arrival)
        self._stops.update(seq.stop_ids)
        self._stop_arrays = None
        self._order = None

    def leave(self, seq: Sequence) -> None:
        """Take back a slot; nothing of the sequence is computed any more."""
        self._sequences.remove(seq)
        for token in seq.stop_ids:
            self._stops[token] -= 1
            if not self._stops[token]:
                del self._stops[token]
                self._stop_arrays = None
        slot = seq.slot
        seq.leave_slot()
        del self._holders[slot]
        self._free_slots.append(slot)
        self._taken[slot], self._table[DONE, slot] = False, 0
        self._epochs[slot] += 1
        self._leavings += 1
        self._order = None

    def stamp(self, items: Items) -> Stamp:
        """To know later who of these still has his slot."""
        steady = self._steady if items.again else None
        if steady is None:
            return Stamp(self._leavings, self._epochs[items.slots], None)
        if steady.stamp is None:
            steady.stamp = Stamp(self._leavings, steady.epochs, steady)
        return steady.stamp

    def remaining(self, items: Items, stamp: Stamp) -> NDArray[np.bool_]:
        """Which of these still have their slots."""
        found: NDArray[np.bool_] = self._epochs[items.slots] == stamp.epochs
        return found

    # ------------------------------------------------------------------ what to compute

    def _standing(self) -> Ints:
        if self._order is None:
            self._order = np.array([seq.slot for seq in self._sequences], dtype=np.int64)
        return self._order

    def shares(self, budget_of: Callable[[int, int], int], num_free: int) -> tuple[Items, list[tuple[int, int]], int]:
        """What each sequence computes next, perhaps no token, in order of arrival; how many blocks the rows that lack some are to get, of so many free ones; and
        the budget that was kept to, which `budget_of` gives for the number of those that want one token, and of the tokens that the others want."""
        order, table, steady = self._standing(), self._table, self._steady
        if steady is not None and steady.order is order and steady.left and (budget := budget_of(len(order), 0)) >= len(order):
            starts = steady.starts
            steady.starts, steady.left, steady.room = starts + ONE, steady.left - 1, steady.room - 1
            lacking: list[tuple[int, int]] = []
            if steady.room < 0:
                lacking, steady.room = self._lacking(steady.starts, steady.ones, num_free)
            return Items(order, starts, steady.ones, steady.all, {}, again=True), lacking, budget
        pending, computed = table[PENDING][order], table[COMPUTED][order]
        known, limit = table[KNOWN][order] + pending, table[LIMIT][order]
        todo = known - computed
        todo[(pending > 0) & (known >= limit)] = 0  # complete as soon as the results in flight are seen
        ones = int(np.count_nonzero(todo == 1))
        budget = budget_of(ones, int(todo.sum()) - ones)
        counts = _shared_out(todo, budget)
        ends = computed + counts
        sample = (ends == known) & (table[SAMPLES][order] > 0)
        if ones == len(order) and sample.all():
            left = max(int((limit - known).min()) - 2, 0)
            self._steady = _Steady(order, self._epochs[order], ends, counts, sample, LAUNCHED * self._taken, ARRIVED * self._taken, left, 0)
        lacking, _ = self._lacking(ends, counts, num_free)
        return Items(order, computed, counts, sample, {}), lacking, budget

    def _lacking(self, ends: Ints, counts: Ints, num_free: int) -> tuple[list[tuple[int, int]], int]:
        """How many blocks the rows that lack some are to get, when `counts` tokens up to `ends` are computed; and for how many more steps of a token all then
        have blocks. Where there are plenty, those that will lack one soon get it, too: a few hundred sequences are looked at together every few steps, not a few in each."""
        order, size = self._standing(), self._size
        room = self._table[BLOCKS][order] * size - ends
        if (least := int(room.min())) >= 0:
            return [], least
        soon = np.maximum(np.minimum(self._ahead, self._table[LIMIT][order] - ends - ONE), ZERO)  # tokens after these
        lack = (soon - room + (size - ONE)) // size
        lack *= (lack > ZERO) & (counts > ZERO)
        if int(lack.sum()) + len(order) > num_free:
            lack = np.maximum(size - ONE - room, ZERO) // size
        rows = lack.nonzero()[0]
        return list(zip(rows.tolist(), lack[rows].tolist(), strict=True)), int((room + lack * size).min())

    def hand_out(self, lacking: list[tuple[int, int]], blocks: list[int]) -> dict[int, list[int]]:
        """Give the rows that are left of these so many blocks each; what each got, by slot."""
        slots, given, at = self._standing().tolist(), {}, 0
        held = self._table[BLOCKS]
        for row, count in lacking[: bisect_left(lacking, (len(slots), 0))]:
            given[slots[row]] = new = blocks[at : at + count]
            self._sequences[row].blocks += new
            held[slots[row]] += count
            at += count
        return given

    def unpublished(self) -> list[Sequence]:
        """Those with full blocks that the prefix cache was not offered."""
        slots = (self._table[DONE] >= (self._table[PUBLISHED] + ONE) * self._size).nonzero()[0]
        return [self._holders[slot] for slot in slots.tolist()]

    def unsettle(self) -> None:
        """Their counts were changed from outside."""
        self._steady = None

    def next_of(self, seq: Sequence, num_tokens: int) -> Items:
        """The next tokens of one sequence, of which the rank knows nothing: all its blocks are new."""
        sample = seq.num_computed + num_tokens == seq.num_tokens and seq.sampling.max_new_tokens > 0
        columns = np.array([[seq.slot], [seq.num_computed], [num_tokens]])
        return Items(columns[0], columns[1], columns[2], np.array([sample]), {seq.slot: seq.blocks.copy()})

    def count_as_computed(self, items: Items) -> None:
        """A plan with these items is launched."""
        if items.again:
            assert self._steady is not None
            self._launched += self._steady.launched
            return
        self._table[COMPUTED][items.slots] = items.starts + items.counts
        self._pending[items.slots] += items.sample

    # ------------------------------------------------------------------ what it brought

    def take_tokens(self, items: Items, result: StepResult, stamp: Stamp) -> tuple[StepOutputs, list[int]]:
        """Add the tokens of the rows that brought nothing else; the other rows that still count, which are to be looked at."""
        tokens, steady, table = result.tokens, stamp.steady, self._table
        if steady is not None and stamp.leavings == self._leavings and not result.more and not self._any_stops(tokens):
            self._keep(items.slots, tokens)
            self._arrived += steady.arrived
            if steady.names is None:
                steady.names = table[REQUEST][steady.order].tolist(), table[INDEX][steady.order].tolist()
            return StepOutputs(*steady.names, tokens.tolist()), []
        valid = self.remaining(items, stamp)
        plain = self._only_tokens(items, result) & valid
        slots, done, tokens = items.slots[plain], items.starts[plain] + 1, tokens[plain]
        absent = self._taken.copy()
        absent[slots] = False
        for slot in absent.nonzero()[0].tolist():
            self._holders[slot].catch_up()
        self._keep(slots, tokens)
        table[DONE][slots] = done
        self._pending[slots] -= 1
        table[KNOWN][slots] += 1
        outputs = StepOutputs(table[REQUEST][slots].tolist(), table[INDEX][slots].tolist(), tokens.tolist())
        return outputs, (valid & ~plain).nonzero()[0].tolist()

    def _keep(self, slots: Ints, tokens: Ints) -> None:
        """Note tokens that are not counted yet."""
        if self._log.used == len(self._log.rows):
            for seq in self._sequences:
                seq.catch_up()
            self._log.used = 0
        self._log.add(slots, tokens)

    def _any_stops(self, tokens: Ints) -> bool:
        """Whether one of the tokens may end an answer."""
        if len(self._stops) > FEW_STOPS:
            return not self._stops.keys().isdisjoint(tokens.tolist())
        if self._stop_arrays is None:
            self._stop_arrays = [np.array(token) for token in self._stops]
        return any(any_of(tokens == stop) for stop in self._stop_arrays)

    def _only_tokens(self, items: Items, result: StepResult) -> NDArray[np.bool_]:
        """Rows with the next token of an answer: not its first or last one, no error, nothing that was asked for beside tokens."""
        plain: NDArray[np.bool_] = result.tokens >= 0
        if not items.again:
            slots, ends = items.slots, items.starts + 1
            plain &= (items.counts == 1) & (ends > self._table[PROMPT][slots]) & (ends + 1 < self._table[LIMIT][slots])
        if self._any_stops(result.tokens):
            plain &= ~np.isin(result.tokens, list(self._stops))
        if result.more:
            plain[list(result.more)] = False
        return plain

    def check_integrity(self) -> None:
        """Slots, order and counts agree with the sequences."""
        assert [s.arrival for s in self] == sorted(s.arrival for s in self)
        assert sorted([s.slot for s in self] + self._free_slots) == list(range(self._table.shape[1])), "slots are lost or doubled"
        assert self._stops == Counter(token for s in self for token in s.stop_ids)
        assert {s.slot: s for s in self} == self._holders and self._taken.nonzero()[0].tolist() == sorted(self._holders)
        assert [s.slot for s in self] == self._standing().tolist()
        if (steady := self._steady) is not None and steady.order is self._order and steady.left:
            table, order = self._table, steady.order
            assert (steady.starts == table[COMPUTED][order]).all() and (steady.starts + 1 == table[KNOWN][order] + table[PENDING][order]).all()
            assert steady.room <= (table[BLOCKS][order] * self._size - steady.starts).min()
            assert (steady.starts >= table[PROMPT][order]).all() and (steady.starts + steady.left + 1 < table[LIMIT][order]).all()
        for seq in self:
            assert np.shares_memory(seq.counts, self._table[:, seq.slot]) and seq.counts.item(BLOCKS) == len(seq.blocks)
            assert 0 <= seq.num_behind <= self._log.used and seq.counts.item(LIMIT) == seq.max_tokens


def _arrival(seq: Sequence) -> int:
    return seq.arrival


def _shared_out(todo: Ints, budget: int) -> Ints:
    """How many of its `todo` tokens each sequence gets: every one a token, older ones that have more to compute the rest of the budget.

    Of a budget too small for that the oldest get their token, and the first is never left out.
    """
    counts = np.minimum(todo, 1)
    if len(todo) and todo.max() > 1:
        spare = budget - int((todo == 1).sum())
        for i in np.flatnonzero(todo > 1).tolist():
            counts[i] = max(min(todo.item(i), spare), 0 if i else 1)
            spare -= counts.item(i)
    if counts.sum() > budget:
        counts[np.cumsum(counts) > budget] = 0
    return counts
