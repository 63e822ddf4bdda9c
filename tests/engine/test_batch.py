"""Plans become flat tensors: compared with the same written one token at a time."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.engine.batch import BatchBuilder, SlotTables
from lmdeploy.engine.host_memory import host_free
from lmdeploy.engine.plan import Items, NewSequence, PlanItem
from lmdeploy.inputs import Scratch
from lmdeploy.messages import SamplingParams

CPU = torch.device("cpu")
BLOCK = 4


def tables_with(items: list[PlanItem]) -> SlotTables:
    """Tables in which slot s holds tokens 1000 s + position and, in order, the blocks 100 s, 100 s + 1, ..."""
    tables = SlotTables(8, 40, BLOCK, CPU)
    for item in items:
        length = item.start + item.num_tokens
        ids = [1000 * item.slot + p for p in range(length)]
        tables.set(NewSequence(item.slot, ids, length, SamplingParams(max_new_tokens=1), 7 + item.slot))
        tables.append_blocks([(item.slot, [100 * item.slot + i for i in range(-(-length // BLOCK))])])
    return tables


items_strategy = st.lists(
    st.tuples(st.integers(0, 7), st.integers(0, 20), st.one_of(st.just(1), st.integers(1, 19)), st.booleans(), st.booleans()),
    min_size=1,
    max_size=8,
    unique_by=lambda t: t[0],
)


@settings(deadline=None, max_examples=80)
@given(items_strategy)
def test_a_batch_equals_its_definition_token_by_token(raw: list[tuple[int, int, int, bool, bool]]) -> None:
    items = [PlanItem(slot, start, count, [], sample) for slot, start, count, sample, _ in raw]
    everything = [all_rows for *_, all_rows in raw]
    tables = tables_with(items)
    builder = BatchBuilder(tables, [], Scratch(640, torch.float32, CPU), uses_rope_lengths=True)
    with patch("lmdeploy.engine.batch.LENGTH_STEP", 8):
        batch = builder.build(Items.of(items), everything)
    ordered = sorted(range(len(items)), key=lambda i: 1 if items[i].num_tokens > 1 else -(items[i].start // 8))
    assert batch.order.tolist() == ordered and list(batch.items) == [items[i] for i in ordered]
    inputs = builder.inputs(batch.layout)
    meta = inputs.attention
    row, rows, sampled = 0, [], []
    for number, i in enumerate(ordered):
        item = items[i]
        assert meta.query_start[number] == row and meta.query_lens[number] == item.num_tokens
        assert meta.kv_lens[number] == meta.kv_lens_host[number] == item.start + item.num_tokens
        assert batch.first_row[number] == len(rows)
        for position in range(item.start, item.start + item.num_tokens):
            block = 100 * item.slot + position // BLOCK
            assert inputs.token_ids[row] == 1000 * item.slot + position and inputs.positions[row] == position
            assert meta.slot_mapping[row] == block * BLOCK + position % BLOCK
            assert meta.block_table[number, position // BLOCK] == block
            assert inputs.rope_lengths is not None and inputs.rope_lengths[row] == 7 + item.slot
            last = position == item.start + item.num_tokens - 1
            if everything[i] or (item.sample and last):
                rows.append(row)
            if item.sample and last:
                sampled.append(len(rows) - 1)
            row += 1
        assert batch.num_rows[number] == len(rows) - batch.first_row[number]
    assert inputs.logit_rows.tolist() == rows
    assert (batch.sample_rows.tolist() if batch.sample_rows is not None else list(range(len(rows)))) == sampled
    assert batch.slots.tolist() == [items[i].slot for i in ordered if items[i].sample]
    assert batch.lengths.tolist() == [items[i].start + items[i].num_tokens for i in ordered if items[i].sample]
    assert meta.num_decode == sum(i.num_tokens == 1 for i in items)
    assert all(count == 1 for count in meta.query_lens[: meta.num_decode]) and meta.query_start.shape == (len(items) + 1,)


def test_types_are_those_of_the_contract() -> None:
    items = [PlanItem(0, 0, 5, [], True), PlanItem(1, 3, 1, [], True)]
    builder = BatchBuilder(tables_with(items), [], Scratch(640, torch.float32, CPU), uses_rope_lengths=False)
    inputs = builder.inputs(builder.build(Items.of(items), None).layout)
    meta = inputs.attention
    assert {inputs.token_ids.dtype, inputs.positions.dtype, inputs.logit_rows.dtype, meta.slot_mapping.dtype} == {torch.int64}
    assert {meta.query_start.dtype, meta.kv_lens.dtype, meta.block_table.dtype} == {torch.int32}
    assert meta.block_table.is_contiguous() and meta.block_table.shape == (2, 2)
    assert inputs.rope_lengths is None


def test_blocks_are_appended_and_forgotten_with_the_sequence() -> None:
    tables = SlotTables(2, 40, BLOCK, CPU)
    new = NewSequence(1, [5, 6, 7], 3, SamplingParams(max_new_tokens=1), 0)
    tables.set(new)
    tables.append_blocks([(1, [9])])
    tables.append_blocks([(1, [3, 4])])
    tables.append_blocks([(1, [])])
    assert tables.blocks[1, :3].tolist() == [9, 3, 4] and tables.rope_lengths[1] == 3
    tables.set(new)
    tables.append_blocks([(1, [2])])
    assert tables.blocks[1, 0] == 2 and tables.num_blocks == [0, 1]


def test_more_blocks_or_tokens_than_a_session_has_are_a_broken_promise() -> None:
    tables = SlotTables(1, 8, BLOCK, CPU)
    with pytest.raises(AssertionError, match="session_len 8"):
        tables.set(NewSequence(0, list(range(9)), 9, SamplingParams(max_new_tokens=1), 0))
    with pytest.raises(AssertionError, match="slot 0: 4 blocks"):
        tables.append_blocks([(0, [1, 2, 3, 4])])


def test_a_step_of_single_tokens_is_built_as_any_other() -> None:
    """It has a way of its own, which remembers an order; `[False]` for every item takes the usual one."""
    items = [PlanItem(slot, start, 1, [], True) for slot, start in enumerate((3, 30, 17, 5, 16))]
    builder = BatchBuilder(tables_with(items), [], Scratch(640, torch.float32, CPU), uses_rope_lengths=True)
    slots = Items.of(items).slots
    with patch("lmdeploy.engine.batch.LENGTH_STEP", 8):
        for step in range(4):  # the order changes twice
            starts = np.array([item.start for item in items]) + 2 * step
            plan = Items(slots, starts, np.ones(5, dtype=np.int64), np.ones(5, dtype=bool), {})
            found, wanted = builder.build(plan, None), builder.build(plan, [False] * 5)
            for name in ("order", "first_row", "num_rows", "slots", "lengths"):
                assert np.array_equal(getattr(found, name), getattr(wanted, name)), name
            assert found.sample_rows is wanted.sample_rows is None and found.layout.num_decode == 5
            for name in ("positions", "token_slots", "slots", "ends", "query_start", "rows", "chosen"):
                assert np.array_equal(getattr(found.layout, name), getattr(wanted.layout, name)), name


def test_tables_beyond_the_free_memory_are_refused_before_the_system_kills_whoever_fills_them() -> None:
    rows = 1 << 16
    with pytest.raises(MemoryError, match=f"{rows} sequences"):
        SlotTables(rows, host_free() // (rows * 4), BLOCK, CPU)
