"""`Running`: the sequences that have a slot, their counts as one table.

A step that only brings each of them its next token is what nearly all steps are; it costs a few operations on the table's columns. Sequences are looked at
one by one only where something else happens to them. Knows no blocks but their number, and decides nothing: the scheduler does.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lmdeploy.engine.plan import ENDED, LATE, ONE, ZERO, Ints, Items, StepResult
from lmdeploy.engine.sequence import BLOCKS, COMPUTED, DONE, INDEX, KNOWN, LIMIT, PENDING, PROMPT, PUBLISHED, REQUEST, SAMPLES, Sequence, TokenLog
from lmdeploy.messages import StepOutputs

#: steps whose tokens are kept side by side before sequences take them over
LOGGED = 128
NO_ROWS: Ints = np.zeros(0, dtype=np.int64)


@dataclass(slots=True)
class _Steady:
    """What the next steps are as long as nobody comes or goes: a token of each answer, neither its first nor its last one.

    Behind the wait for a long step nothing is in the processor's caches any more, so that such a step costs what it touches: here nothing but a few numbers.
    """

    order: Ints
    epochs: Ints
    starts: Ints  # where the first one's tokens are
    ones: Ints
    all: NDArray[np.bool_]
    count: int  # answers
    left: int  # steps until one may have its last token
    room: int  # steps for which all have blocks
    further: int = 0  # steps that were given out
    launched: int = 0  # steps that were launched and are not written down
    arrived: list[bytes] = field(default_factory=list)  # their results that have come: int64 tokens
    stamp: Stamp | None = None  # of all their plans
    names: tuple[list[int], list[int]] | None = None  # the answers' requests and indices, when they were first asked for

    def give_out(self) -> Items:
        """The next step."""
        further = self.further
        self.further, self.left, self.room = further + 1, self.left - 1, self.room - 1
        return Items(self.order, self.starts, self.ones, self.all, {}, further, True)


@dataclass(frozen=True, slots=True)
class Stamp:
    """Who had the slots of a plan's items when it was launched."""

    leavings: int  # until then
    epochs: Ints
    steady: _Steady | None  # of items that are known to be such


class Running:
    """In order of arrival. A slot's epoch grows when its sequence leaves: results of older plans are then void.

    What steady steps change of the counts, and the tokens that they bring, is written down when something else happens: see `write_down`.
    """

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
        self._pending = table[PENDING]
        self._log = TokenLog(LOGGED, num_slots)
        self._order: Ints | None = None  # slots in order of arrival; None = to be made again
        self._stops: Counter[int] = Counter()  # how many sequences a token ends
        self._special = {-1, LATE, ENDED}  # these tokens, and what stands for none
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
        self._special |= seq.stop_ids
        self._order = None

    def leave(self, seq: Sequence) -> None:
        """Take back a slot; nothing of the sequence is computed any more. All must have been written down."""
        self._sequences.remove(seq)
        for token in seq.stop_ids:
            self._stops[token] -= 1
            if not self._stops[token]:
                del self._stops[token]
                self._special.discard(token)
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

    def go_on(self, budget: int) -> Items | None:
        """The next step, which then counts as launched, where it is a steady one for which all have blocks; nobody may be waiting."""
        steady = self._steady
        if steady is None or steady.order is not self._order or not steady.left or steady.room <= 0 or steady.count > budget:
            return None
        steady.launched += 1
        return steady.give_out()

    def shares(self, budget_of: Callable[[int, int], int], num_free: int) -> tuple[Items, list[tuple[int, int]], int]:
        """What each sequence computes next, perhaps no token, in order of arrival; how many blocks the rows that lack some are to get, of so many free ones; and
        the budget that was kept to, which `budget_of` gives for the number of those that want one token, and of the tokens that the others want."""
        steady = self._steady
        if steady is not None and steady.order is self._order and steady.left and (budget := budget_of(steady.count, 0)) >= steady.count:
            items = steady.give_out()
            lacking: list[tuple[int, int]] = []
            if steady.room < 0:
                lacking, steady.room = self._lacking(items.starts + ONE, steady.ones, num_free)
            return items, lacking, budget
        self.write_down()
        order, table = self._standing(), self._table
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
            self._steady = _Steady(order, self._epochs[order], ends, counts, sample, len(order), left, 0)
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
        self.write_down()
        slots = (self._table[DONE] >= (self._table[PUBLISHED] + ONE) * self._size).nonzero()[0]
        return [self._holders[slot] for slot in slots.tolist()]

    def unsettle(self) -> None:
        """Their counts are to be changed from outside."""
        self.write_down()
        self._steady = None

    def write_down(self) -> None:
        """Bring counts and tokens up to date with steady steps: before anything looks at them, or somebody leaves."""
        steady = self._steady
        if steady is None or not (steady.launched or steady.arrived):
            return
        order, table, count = steady.order, self._table, len(steady.arrived)
        if count:
            self._keep(order, np.frombuffer(b"".join(steady.arrived), dtype=np.int64).reshape(count, -1))
            steady.arrived.clear()
            table[KNOWN][order] += count
            table[DONE][order] += count
        table[COMPUTED][order] += steady.launched
        self._pending[order] += steady.launched - count
        steady.launched = 0

    def next_of(self, seq: Sequence, num_tokens: int) -> Items:
        """The next tokens of one sequence, of which the rank knows nothing: all its blocks are new."""
        sample = seq.num_computed + num_tokens == seq.num_tokens and seq.sampling.max_new_tokens > 0
        columns = np.array([[seq.slot], [seq.num_computed], [num_tokens]])
        return Items(columns[0], columns[1], columns[2], np.array([sample]), {seq.slot: seq.blocks.copy()})

    def count_as_computed(self, items: Items) -> None:
        """A plan with these items is launched."""
        if items.again:
            assert self._steady is not None
            self._steady.launched += 1
            return
        self._table[COMPUTED][items.slots] = items.starts + items.counts
        self._pending[items.slots] += items.sample

    # ------------------------------------------------------------------ what it brought

    def take_tokens(self, items: Items, result: StepResult, stamp: Stamp) -> tuple[StepOutputs, list[int], Ints]:
        """Add the tokens of the rows that brought nothing else; the other rows that still count, which are to be looked at; and those that are late."""
        steady, table = stamp.steady, self._table
        listed = result.tokens.tolist()
        usual = not result.more and self._special.isdisjoint(listed)
        if usual and steady is not None and steady is self._steady and stamp.leavings == self._leavings:
            steady.arrived.append(result.tokens.tobytes())
            if len(steady.arrived) == len(self._log.rows):
                self.write_down()
            if steady.names is None:
                steady.names = table[REQUEST][steady.order].tolist(), table[INDEX][steady.order].tolist()
            return StepOutputs(*steady.names, listed), [], NO_ROWS
        self.write_down()
        valid = self.remaining(items, stamp)
        plain = self._only_tokens(items, result, not (usual or self._stops.keys().isdisjoint(listed))) & valid
        slots, done, tokens = items.slots[plain], items.starts[plain] + 1, result.tokens[plain]
        absent = self._taken.copy()
        absent[slots] = False
        for slot in absent.nonzero()[0].tolist():
            self._holders[slot].catch_up()
        self._keep(slots, tokens[None])
        table[DONE][slots] = done
        self._pending[slots] -= 1
        table[KNOWN][slots] += 1
        outputs = StepOutputs(table[REQUEST][slots].tolist(), table[INDEX][slots].tolist(), tokens.tolist())
        others, late = valid & ~plain, NO_ROWS
        if LATE in listed:
            late = (others & (result.tokens == LATE)).nonzero()[0]
            others[late] = False
            assert result.more.keys().isdisjoint(late.tolist()), "a row that is late brings nothing else"
        return outputs, others.nonzero()[0].tolist(), late

    def put_off(self, items: Items, late: Ints, following: Items) -> tuple[Items, list[Sequence]]:
        """The tokens of these rows come with the items of the plan behind instead, or with a later plan's where it has none of them, as behind what was to be
        their last token: what the items are then, and the sequences that still have no token at all.

        Each computes its last known token once more: what is there of it is not counted, so that a sequence always has something to compute.
        """
        self.unsettle()
        table, slots = self._table, items.slots[late]
        table[DONE][slots] = items.starts[late] + items.counts[late] - ONE
        table[COMPUTED][slots] -= 1
        self._pending[slots] -= 1
        are_late = np.zeros(len(self._taken), dtype=bool)
        are_late[slots] = True
        rows = are_late[following.slots]
        prompts = slots[table[KNOWN][slots] == table[PROMPT][slots]]
        instead = Items(following.slots, following.starts - rows, following.counts, following.sample, following.new_blocks)
        return instead, [self._holders[slot] for slot in prompts.tolist()]

    def _keep(self, slots: Ints, tokens: Ints) -> None:
        """Note tokens [steps, slots] that are not counted yet."""
        if self._log.used + len(tokens) > len(self._log.rows):
            for seq in self._sequences:
                seq.catch_up()
            self._log.used = 0
        self._log.add(slots, tokens)

    def _only_tokens(self, items: Items, result: StepResult, stops: bool) -> NDArray[np.bool_]:
        """Rows with the next token of an answer: not its first or last one, no error, nothing that was asked for beside tokens. `stops`: some may end an answer."""
        plain: NDArray[np.bool_] = result.tokens >= 0
        if not items.again:
            slots, ends = items.slots, items.starts + 1
            plain &= (items.counts == 1) & (ends > self._table[PROMPT][slots]) & (ends + 1 < self._table[LIMIT][slots])
        if stops:
            plain &= ~np.isin(result.tokens, list(self._stops))
        if result.more:
            plain[list(result.more)] = False
        return plain

    def check_integrity(self, flights: list[tuple[Items, Stamp]]) -> None:
        """Slots, order and counts agree with the sequences, and with the plans in flight, oldest first."""
        self.write_down()
        self._check_flights(flights)
        assert [s.arrival for s in self] == sorted(s.arrival for s in self)
        assert sorted([s.slot for s in self] + self._free_slots) == list(range(self._table.shape[1])), "slots are lost or doubled"
        assert self._stops == Counter(token for s in self for token in s.stop_ids) and self._special == {-1, LATE, ENDED, *self._stops}
        assert {s.slot: s for s in self} == self._holders and self._taken.nonzero()[0].tolist() == sorted(self._holders)
        assert [s.slot for s in self] == self._standing().tolist()
        if (steady := self._steady) is not None and steady.order is self._order and steady.left:
            table, order, starts = self._table, steady.order, steady.starts + steady.further
            assert (starts == table[COMPUTED][order]).all() and (starts + 1 == table[KNOWN][order] + table[PENDING][order]).all()
            assert steady.room <= (table[BLOCKS][order] * self._size - starts).min()
            assert (starts >= table[PROMPT][order]).all() and (starts + steady.left + 1 < table[LIMIT][order]).all()
        for seq in self:
            assert np.shares_memory(seq.counts, self._table[:, seq.slot]) and seq.counts.item(BLOCKS) == len(seq.blocks)
            assert 0 <= seq.num_behind <= self._log.used and seq.counts.item(LIMIT) == seq.max_tokens

    def _check_flights(self, flights: list[tuple[Items, Stamp]]) -> None:
        """Each item goes on where all is done, or where the one before it ends."""
        reached, sampled = self._table[DONE].copy(), np.zeros_like(self._pending)
        for items, stamp in flights:
            rows = self.remaining(items, stamp)
            slots = items.slots[rows]
            assert (items.starts[rows] == reached[slots]).all(), "an item in flight begins elsewhere"
            reached[slots] += items.counts[rows]
            sampled[slots] += items.sample[rows]
        assert (reached == self._table[COMPUTED])[self._taken].all() and (sampled == self._pending)[self._taken].all()


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
