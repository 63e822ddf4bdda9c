"""Logits of rows whose masks are late: the step behind computes these rows for nothing, and chooses their tokens among the logits that were kept. What would have
had its last token, of which the step behind has nothing, is computed once more. See `executor/contract.py`."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lmdeploy.engine.batch import upload
from lmdeploy.engine.guided import GuidedStep, is_among
from lmdeploy.engine.plan import Ints, Rows, StepPlan

Tensor = torch.Tensor
DEAD_END = "no token satisfies the grammar and the request's other limits (logit_bias, bad_words) at once, or the logits are not numbers"


class Held:
    """Kept logits."""

    def __init__(self, slots: Ints, logits: Tensor) -> None:
        self._slots, self._logits = slots, logits  # [L], and [L, V] of any floating type
        self._found: tuple[Ints, Ints, Tensor] | None = None

    @classmethod
    def of(cls, mask: GuidedStep, kept: NDArray[np.bool_], logits: Tensor) -> Held | None:
        """Of these rows [G], if there are any, of logits [S, V]."""
        return cls(mask.slots[kept], logits.index_select(0, upload(mask.rows[kept], logits.device))) if kept.any() else None

    def _find(self, slots: Ints) -> tuple[Ints, Tensor]:
        """Which rows of the step behind these are, among those with these slots; and the same on the device."""
        if self._found is None or self._found[0] is not slots:
            places = _places(self._slots, slots)
            self._found = slots, places, upload(places, self._logits.device)
        return self._found[1:]

    def lengths(self, lengths: Ints, slots: Ints) -> Ints:
        """How many tokens of each row of the step behind are known: one less than its plan says where the last one was late."""
        found: Ints = lengths.copy()
        found[self._find(slots)[0]] -= 1
        return found

    def rows(self, slots: Ints) -> Tensor:
        """int64 [L] on the device: which rows of the step behind these are, among those with these slots."""
        return self._find(slots)[1]

    def put_back(self, logits: Tensor, slots: Ints) -> None:
        """Into the logits [S, V] of the step behind, whose rows have these slots."""
        logits.index_copy_(0, self.rows(slots), self._logits)


def join_in_time(mask: GuidedStep, plan: StepPlan, plain: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Join the masks that are there; [G] rows that have to wait for theirs, and whose logits are to be kept.

    A row may be late if `plan`, which is launched next, goes on with its sequence by one token, or has nothing of it, or forgets it. `plain` [G]: rows that bring
    nothing but a token and its log-probabilities, now or next time.
    """
    items = plan.items
    if items.again:  # of the same rows
        mask.further, mask.late = np.ones(mask.rows.size, dtype=bool), plain
    else:
        gone = is_among(mask.slots, np.array(plan.released, dtype=np.int64))
        stays = ~gone
        if plan.new:
            stays &= ~is_among(mask.slots, np.array([new.slot for new in plan.new]))
        mask.gone, mask.further = gone, stays & is_among(mask.slots, items.slots[items.sample & (items.counts == 1)])
        mask.late = gone | (plain & stays & (mask.further | ~is_among(mask.slots, items.slots)))
    mask.join()
    kept: NDArray[np.bool_] = mask.late & mask.further
    return kept


def _places(slots: Ints, among: Ints) -> Ints:
    """Where these slots are among others, of which none is there twice."""
    order = among.argsort()
    found: Ints = order[np.searchsorted(among, slots, sorter=order)]
    return found


def note_ends(mask: GuidedStep, complete: NDArray[np.bool_], results: Rows) -> None:
    """Say which guided answers are complete, and why some have no token."""
    failed = results.result.tokens[results.places[mask.rows]] == -1
    for place in np.flatnonzero(failed | complete).tolist():
        result = results[mask.rows.item(place)]
        result.complete = bool(complete[place])
        if failed[place]:
            result.error, result.error_code = mask.errors.get(place, DEAD_END), "grammar_failed"
