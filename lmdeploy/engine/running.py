"""`Running`: the sequences that have a slot, their counts as one table.

A step that only brings each of them its next token is what nearly all steps are; it costs a few operations on the table's columns. Sequences are looked at
one by one only where something else happens to them. Knows no blocks but their number, and decides nothing: the scheduler does.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from lmdeploy.engine.plan import Ints, Items, StepResult
from lmdeploy.engine.sequence import BLOCKS, COMPUTED, DONE, INDEX, KNOWN, LIMIT, PENDING, PROMPT, REQUEST, SAMPLES, Sequence
from lmdeploy.messages import StepOutputs


class Running:
    """In order of arrival. A slot's epoch grows when its sequence leaves: results of older plans are then void."""

    def __init__(self, num_slots: int, block_size: int) -> None:
        self._block_size = block_size
        self._sequences: list[Sequence] = []
        self._holders: dict[int, Sequence] = {}  # by slot
        self._tokens: dict[int, list[int]] = {}  # by slot, `token_ids` of its holder
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._epochs = np.zeros(num_slots, dtype=np.int64)
        self._table = np.zeros((num_slots, INDEX + 1), dtype=np.int64)  # by slot; see `Sequence`
        self._order: Ints | None = None  # slots in order of arrival; None = to be made again
        self._stops: Counter[int] = Counter()  # how many sequences a token ends

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
        seq.take_slot(slot, self._table[slot])
        self._holders[slot], self._tokens[slot] = seq, seq.token_ids
        insort(self._sequences, seq, key=_arrival)
        self._stops.update(seq.stop_ids)
        self._order = None

    def leave(self, seq: Sequence) -> None:
        """Take back a slot; nothing of the sequence is computed any more."""
        self._sequences.remove(seq)
        for token in seq.stop_ids:
            self._stops[token] -= 1
            if not self._stops[token]:
                del self._stops[token]
        del self._holders[seq.slot], self._tokens[seq.slot]
        self._free_slots.append(seq.slot)
        self._epochs[seq.slot] += 1
        seq.leave_slot()
        self._order = None

    def epochs(self, items: Items) -> Ints:
        """Of the items' slots."""
        return self._epochs[items.slots]

    # ------------------------------------------------------------------ what to compute

    def _standing(self) -> Ints:
        if self._order is None:
            self._order = np.array([seq.slot for seq in self._sequences], dtype=np.int64)
        return self._order

    def shares(self, budget_of: Callable[[int, int], int]) -> tuple[Items, Ints, int]:
        """What each sequence computes next, perhaps no token, in order of arrival; how many blocks that takes; and the budget that was kept to, which
        `budget_of` gives for the number of those that want one token, and of the tokens that the others want."""
        order = self._standing()
        table = self._table[order]
        pending, computed = table[:, PENDING], table[:, COMPUTED]
        known = table[:, KNOWN] + pending
        todo = known - computed
        todo[(pending > 0) & (known >= table[:, LIMIT])] = 0  # complete as soon as the results in flight are seen
        ones = int(np.count_nonzero(todo == 1))
        budget = budget_of(ones, int(todo.sum()) - ones)
        counts = _shared_out(todo, budget)
        ends = computed + counts
        sample = (ends == known) & (table[:, SAMPLES] > 0)
        return Items(order, computed, counts, sample, {}), -(-ends // self._block_size) - table[:, BLOCKS], budget

    def next_of(self, seq: Sequence, num_tokens: int) -> Items:
        """The next tokens of one sequence, of which the rank knows nothing: all its blocks are new."""
        sample = seq.num_computed + num_tokens == seq.num_tokens and seq.sampling.max_new_tokens > 0
        columns = np.array([[seq.slot], [seq.num_computed], [num_tokens]])
        return Items(columns[0], columns[1], columns[2], np.array([sample]), {seq.slot: seq.blocks.copy()})

    def count_as_computed(self, items: Items) -> None:
        """A plan with these items is launched."""
        self._table[items.slots, COMPUTED] = items.starts + items.counts
        self._table[items.slots, PENDING] += items.sample

    # ------------------------------------------------------------------ what it brought

    def take_tokens(self, items: Items, result: StepResult, valid: NDArray[np.bool_]) -> tuple[StepOutputs, list[Sequence], Ints]:
        """Add the tokens of the rows that brought nothing else; whose of these have filled a block, and the other valid rows, which are to be looked at."""
        plain = self._only_tokens(items, result) & valid
        slots, done, tokens = items.slots[plain], items.starts[plain] + 1, result.tokens[plain].tolist()
        table = self._table
        table[slots, DONE] = done
        table[slots, PENDING] -= 1
        table[slots, KNOWN] += 1
        for slot, token in zip(slots.tolist(), tokens, strict=True):
            self._tokens[slot].append(token)
        outputs = StepOutputs(table[slots, REQUEST].tolist(), table[slots, INDEX].tolist(), tokens)
        full = [self._holders[slot] for slot in slots[done % self._block_size == 0].tolist()]
        return outputs, full, np.flatnonzero(valid & ~plain)

    def _only_tokens(self, items: Items, result: StepResult) -> NDArray[np.bool_]:
        """Rows with the next token of an answer: not its first or last one, no error, nothing that was asked for beside tokens."""
        table, ends = self._table[items.slots], items.starts + 1
        plain: NDArray[np.bool_] = (items.counts == 1) & (result.tokens >= 0)
        plain &= (ends > table[:, PROMPT]) & (ends + 1 < table[:, LIMIT])
        if not self._stops.keys().isdisjoint(result.tokens.tolist()):
            plain &= ~np.isin(result.tokens, list(self._stops))
        if result.more:
            plain[list(result.more)] = False
        return plain

    def check_integrity(self) -> None:
        """Slots, order and counts agree with the sequences."""
        assert [s.arrival for s in self] == sorted(s.arrival for s in self)
        assert sorted([s.slot for s in self] + self._free_slots) == list(range(len(self._table))), "slots are lost or doubled"
        assert self._stops == Counter(token for s in self for token in s.stop_ids)
        assert {s.slot: s for s in self} == self._holders and [s.slot for s in self] == self._standing().tolist()
        for seq in self:
            assert np.shares_memory(seq.counts, self._table[seq.slot]) and seq.counts.item(BLOCKS) == len(seq.blocks)
            assert seq.counts.item(KNOWN) == len(seq.token_ids) and seq.counts.item(LIMIT) == seq.max_tokens


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
