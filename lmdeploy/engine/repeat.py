"""What is kept of a step so that the next one can be launched without being looked at whole: each of its sequences a token further,
but for those whose tokens were late."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lmdeploy.engine.batch import LENGTH_STEP
from lmdeploy.engine.late import Held
from lmdeploy.engine.plan import Ints, StepPlan

Tensor = torch.Tensor

#: so many steps in a row leave sequences in an order: it is one of lengths, and only roughly
REPEATS = LENGTH_STEP // 8


@dataclass(frozen=True, slots=True)
class GuidedRows:
    """The rows of a step with grammars, in its order."""

    slots: Ints
    lengths: Ints  # tokens known after it, which is where the next step begins
    order: Ints  # their places in its plan


@dataclass(frozen=True, slots=True)
class Repeat:
    """What lets the next step be the last one once more: a graph computed it, its tokens were taken as they came, or with masks, on its line."""

    count: int  # of tokens
    left: int  # times that it may be repeated; then sequences are put in the order of their lengths again
    guided: GuidedRows | None = None  # where some have a grammar

    @classmethod
    def of(
        cls, count: int, left: int, guided: GuidedRows | None = None, held: Held | None = None, stay: Callable[[Tensor], None] | None = None
    ) -> Repeat | None:
        """None where it may not be repeated any more. `held`: what the step before has left to it; the next one, if it is launched as this one was, has these
        sequences no further than this one, which `stay` tells the device of rows."""
        if not left:
            return None
        if held is not None:
            assert guided is not None and stay is not None
            stay(held.rows(guided.slots))
        return cls(count, left, guided)

    def is_before(self, plan: StepPlan) -> bool:
        """Whether a plan has the same rows, each a token further, but for those that stay where they are. Where none has to, the plan says so itself."""
        items, rows = plan.items, self.guided
        if items.again or rows is None:
            return items.again
        if plan.released or plan.new or len(items) != self.count or not items.sample.all():
            return False
        found = items.slots[rows.order] == rows.slots, items.starts[rows.order] == rows.lengths, items.counts == 1
        return all(part.all() for part in found)
