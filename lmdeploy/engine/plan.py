"""What the scheduler tells a rank to compute, and what comes back: small plain data that can cross a process.

A rank keeps, per slot, the token table row, the block table row and the sampling parameters. So a plan sends a new
sequence whole, once, and afterwards only differences. A rank reads input tokens from its own token table, where it also
writes the tokens it samples: that is what lets step N+1 be launched before the host has seen the tokens of step N.
What every row of a step has is a column, so that a decode step costs a few vector operations however many rows it has.

A sampled row may be `LATE`: its token is not chosen yet (the mask of its grammar is not there), and nobody waits for it. The plan behind, which was submitted
already, goes on with the same sequence: it chooses this token instead of the one that it was to bring, see `executor.contract`. Or its sequence has `ENDED`: with
the token before, which was taken in by its grammar while this plan was under way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from lmdeploy.messages import Picture, SamplingParams, TokenLogprobs

Ints = NDArray[np.int64]


class NewSequence(msgspec.Struct, array_like=True):
    """A sequence that takes `slot`: everything that the rank needs to know of it (again, after a pre-emption)."""

    slot: int
    token_ids: list[int]  # prompt, and what was generated before a pre-emption
    prompt_len: int
    sampling: SamplingParams  # seed already offset by the answer's index
    rope_length: int
    pictures: list[Picture] = []


class PlanItem(msgspec.Struct, array_like=True):
    """Compute tokens `start .. start + num_tokens` of `slot`; they see keys 0 .. start + num_tokens.

    `new_blocks` are appended to the slot's block table before the step. `sample`: the chunk reaches the end of the
    known tokens, so a next token is drawn from its last row and written to the slot's token table.
    """

    slot: int
    start: int
    num_tokens: int
    new_blocks: list[int]
    sample: bool


class Items(msgspec.Struct):
    """The `PlanItem`s of a step as columns; new blocks, which few rows have, by slot."""

    slots: Ints
    first: Ints
    counts: Ints
    sample: NDArray[np.bool_]
    new_blocks: dict[int, list[int]]
    further: int = 0
    again: bool = False  # known: the rows of the plan before, each one token further, none of them the first or the last one of its answer

    @property
    def starts(self) -> Ints:
        """Of each row: `first`, and so many tokens `further`, which few ask for."""
        return self.first + self.further if self.further else self.first

    @classmethod
    def of(cls, items: Sequence[PlanItem]) -> Items:
        """The same as columns."""
        columns = np.array([(i.slot, i.start, i.num_tokens, i.sample) for i in items], dtype=np.int64).reshape(-1, 4)
        return cls(columns[:, 0], columns[:, 1], columns[:, 2], columns[:, 3].astype(bool), {i.slot: i.new_blocks for i in items if i.new_blocks})

    def joined(self, others: Sequence[Items]) -> Items:
        """With those of others behind."""
        parts = [self, *others]
        slots, starts, counts, sample = (np.concatenate(c) for c in zip(*((p.slots, p.starts, p.counts, p.sample) for p in parts), strict=True))
        return Items(slots, starts, counts, sample, {slot: blocks for part in parts for slot, blocks in part.new_blocks.items()})

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, row: int) -> PlanItem:
        slot = self.slots.item(row)
        return PlanItem(slot, self.starts.item(row), self.counts.item(row), self.new_blocks.get(slot, []), bool(self.sample[row]))

    def __iter__(self) -> Iterator[PlanItem]:
        return (self[row] for row in range(len(self)))

    def take(self, rows: Ints) -> Items:
        """Some rows, each once, in the order of `rows`."""
        slots = self.slots[rows]
        blocks = self.new_blocks
        if blocks and len(rows) < len(self):
            blocks = {slot: blocks[slot] for slot in slots.tolist() if slot in blocks}
        return Items(slots, self.starts[rows], self.counts[rows], self.sample[rows], blocks)


class StepPlan(msgspec.Struct):
    """One step. `released` slots are forgotten first, then `new` ones set up, then `items` computed together."""

    step: int
    released: list[int]
    new: list[NewSequence]
    items: Items


class SlotResult(msgspec.Struct):
    """What a step brought one row beside its token. `error`: there is none, and the sequence ends."""

    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None  # for prompt positions start+1 .. start+num_tokens of this chunk
    error: str | None = None  # why, where it is not that no token can be chosen among the logits
    logits: object = None  # float32 [n, V] on request: rows of this chunk ('all') or its sampled row ('generation')
    last_hidden_state: object = None
    embedding: bytes | None = None  # float64 [M] of a request that embeds: the sum over this chunk's hidden rows, or the prompt's last row
    complete: bool = False  # the sequence's grammar allows nothing behind this token: the answer ends
    error_code: str = "step_failed"


#: in place of a token: it comes with the next plan, see above; there is none, as the sequence's grammar allows nothing behind the token before
LATE, ENDED = -2, -3
#: arrays, as numpy takes longer to make one of a number than to compare or add a few hundred
ZERO, ONE = np.array(0), np.array(1)


#: of a row that brought nothing but its token
NOTHING_MORE = SlotResult()


class StepResult(msgspec.Struct):
    """Results in the order of the plan's items: a token each (-1 of an item that is not sampled or for which none could be chosen, or LATE, or ENDED), and of few rows more."""

    step: int
    tokens: Ints
    more: dict[int, SlotResult] = {}

    @classmethod
    def of(cls, plan: StepPlan) -> StepResult:
        """Nothing known yet."""
        return cls(plan.step, np.full(len(plan.items), -1, dtype=np.int64))

    def rows(self) -> Rows:
        """All rows, to be filled in."""
        return Rows(self, np.arange(len(self.tokens)))


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a result, in an order of their own."""

    result: StepResult
    places: Ints  # of each in the result

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: int) -> SlotResult:
        """What one row brought beside its token, to be filled in."""
        return self.result.more.setdefault(self.places.item(row), SlotResult())

    def failed(self, row: int) -> bool:
        """Whether a row whose token was noted has none, or not yet."""
        return self.result.tokens.item(self.places.item(row)) < 0

    def take(self, rows: Ints) -> Rows:
        """Rows of these."""
        return Rows(self.result, self.places[rows])

    def note_tokens(self, tokens: Ints) -> None:
        """The token of each row, -1 where there is none."""
        self.result.tokens[self.places] = tokens
