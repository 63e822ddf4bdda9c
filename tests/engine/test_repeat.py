"""Which plans are the step before once more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lmdeploy.engine.late import Held
from lmdeploy.engine.plan import Items, NewSequence, PlanItem, StepPlan
from lmdeploy.engine.repeat import GuidedRows, Repeat
from lmdeploy.messages import SamplingParams

#: rows of a step whose plan has the slots 4, 2 and 7, in this order
ROWS = GuidedRows(np.array([2, 7, 4]), np.array([31, 20, 9]), np.array([1, 2, 0]))
NEW = NewSequence(5, [300], 1, SamplingParams(max_new_tokens=4), 0)


def plan_of(*items: tuple[int, int, int, bool], **options: Any) -> StepPlan:
    return StepPlan(
        9, options.get("released", []), options.get("new", []), Items.of([PlanItem(slot, start, count, [], sample) for slot, start, count, sample in items])
    )


@pytest.mark.parametrize(
    ("plan", "is_it"),
    [
        (plan_of((4, 9, 1, True), (2, 31, 1, True), (7, 20, 1, True)), True),
        (plan_of((4, 9, 1, True), (2, 32, 1, True), (7, 20, 1, True)), False),
        (plan_of((4, 9, 1, True), (2, 30, 1, True), (7, 20, 1, True)), False),
        (plan_of((2, 31, 1, True), (4, 9, 1, True), (7, 20, 1, True)), False),
        (plan_of((4, 9, 1, True), (3, 31, 1, True), (7, 20, 1, True)), False),
        (plan_of((4, 9, 1, True), (2, 31, 2, True), (7, 20, 1, True)), False),
        (plan_of((4, 9, 1, True), (2, 31, 1, False), (7, 20, 1, True)), False),
        (plan_of((4, 9, 1, True), (2, 31, 1, True)), False),
        (plan_of((4, 9, 1, True), (2, 31, 1, True), (7, 20, 1, True), (1, 3, 1, True)), False),
        (plan_of((4, 9, 1, True), (2, 31, 1, True), (7, 20, 1, True), released=[5]), False),
        (plan_of((4, 9, 1, True), (2, 31, 1, True), (7, 20, 1, True), new=[NEW]), False),
    ],
    ids=[
        "it is",
        "further",
        "less far",
        "other order",
        "other slot",
        "two tokens",
        "no token",
        "one is gone",
        "one has come",
        "one was released",
        "one is new",
    ],
)
def test_a_plan_is_the_step_before_once_more_where_each_row_begins_where_that_one_left_it(plan: StepPlan, is_it: bool) -> None:
    assert Repeat(3, 5, ROWS).is_before(plan) == is_it
    assert not Repeat(3, 5).is_before(plan), "without grammars nothing is late"
    plan.items.again = True
    assert Repeat(3, 5, ROWS).is_before(plan) and Repeat(3, 5).is_before(plan), "as is known"


def test_rows_whose_tokens_were_late_stay_where_they_are() -> None:
    held, stayed = Held(np.array([4, 7]), torch.zeros((2, 8))), list[list[int]]()
    lengths = held.lengths(ROWS.lengths, ROWS.slots)
    assert lengths.tolist() == [31, 19, 8]
    found = Repeat.of(3, 2, GuidedRows(ROWS.slots, lengths, ROWS.order), held, lambda rows: stayed.append(rows.tolist()))
    assert found is not None and stayed == [[2, 1]]
    assert found.is_before(plan_of((4, 8, 1, True), (2, 31, 1, True), (7, 19, 1, True)))
    assert Repeat.of(3, 0, ROWS, held, lambda rows: stayed.append(rows.tolist())) is None and len(stayed) == 1, "the next step is looked at whole"
