"""From a `StepPlan`'s items to `ForwardInputs`: the only place that knows that some sequences decode and others prefill.

`SlotTables` keep each slot's tokens and block table on the device, so a plan carries differences only and input ids are
gathered where they are. Nothing is done per token in Python. Items are reordered: those with one token come first, the longest
of them before others, so that kernels begin with what takes longest and end together.
Invariant: tables, scratch and KV stay where they are from start-up on, as CUDA graphs need.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lmdeploy.engine.host_memory import host_free
from lmdeploy.engine.plan import Ints, Items, NewSequence
from lmdeploy.inputs import AttentionMeta, ForwardInputs, Scratch
from lmdeploy.kernels.select import places_kernel
from lmdeploy.kv_layer import KVLayer

Tensor = torch.Tensor

#: prompts that a CUDA graph has room for beside sequences with one token
MOST_PROMPTS = 16
#: sequences with one token are in order of their lengths in such units: exactly in order, programs of one length would wait for memory all at the same time
LENGTH_STEP = 256
#: steps whose inputs may be on their way to the device
STAGES = 4


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """A small array on the device, behind what was launched before and without waiting for it: pageable memory has been read when the call returns."""
    return torch.from_numpy(array).to(device, non_blocking=True)


class SlotTables:
    """What a rank knows of the sequence in each slot: its tokens, its blocks, its length for a dynamic rope."""

    def __init__(self, num_slots: int, session_len: int, block_size: int, device: torch.device, *, keeps_rope_lengths: bool = True) -> None:
        self.width, self.block_size, self.device = session_len + 1, block_size, device
        self._keeps_rope_lengths = keeps_rope_lengths
        self.max_blocks = -(-session_len // block_size) + 1
        needed = num_slots * (self.width + self.max_blocks) * 4
        if device.type == "cpu" and needed > host_free():  # the system would give it, and kill the process that uses it
            raise MemoryError(f"tried to allocate {needed} bytes for the tables of {num_slots} sequences of up to {session_len} tokens")
        # zero_() rather than zeros(): the pages must be resident before the memory bill is written
        self.tokens = torch.empty((num_slots, self.width), dtype=torch.int32, device=device).zero_()
        self.blocks = torch.empty((num_slots, self.max_blocks), dtype=torch.int32, device=device).zero_()
        self.num_blocks = [0] * num_slots
        self.rope_lengths = torch.zeros(num_slots, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.tokens.nbytes + self.blocks.nbytes

    def set(self, new: NewSequence, ids: Ints | None = None) -> None:
        """Forget what `new.slot` held and put the sequence there, without blocks. `ids`: its tokens, where the caller has them as an array already."""
        count = len(new.token_ids)
        assert 0 < count < self.width, f"slot {new.slot}: {count} tokens do not fit session_len {self.width - 1}"
        numbers = np.array(new.token_ids, dtype=np.int32) if ids is None else ids.astype(np.int32)
        self.tokens[new.slot, :count].copy_(torch.from_numpy(numbers), non_blocking=True)  # has been read when the call returns, as in `upload`
        self.num_blocks[new.slot] = 0
        if self._keeps_rope_lengths:
            self.rope_lengths[new.slot].fill_(new.rope_length or count)

    @torch.inference_mode()
    def append_blocks(self, new: Iterable[tuple[int, list[int]]]) -> None:
        """Append (slot, blocks) to the slots' block tables, in one copy to the device."""
        places: list[range] = []
        numbers: list[int] = []
        for slot, blocks in new:
            if blocks:
                start = self.num_blocks[slot]
                end = self.num_blocks[slot] = start + len(blocks)
                assert end <= self.max_blocks, f"slot {slot}: {end} blocks, the table has {self.max_blocks}"
                places.append(range(slot * self.max_blocks + start, slot * self.max_blocks + end))
                numbers += blocks
        table = self.blocks.view(-1)
        if len(places) == 1:  # a prompt alone: straight to its place
            table[places[0].start : places[0].stop].copy_(torch.from_numpy(np.array(numbers, dtype=np.int32)), non_blocking=True)
        elif numbers:
            both = upload(np.array([list(chain.from_iterable(places)), numbers], dtype=np.int64), self.device)
            table.index_copy_(0, both[0], both[1].int())


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Where everything of a step is, on the host: T tokens of B sequences, those with one token first. All int64."""

    positions: Ints  # [T]
    token_slots: Ints  # [T]
    slots: Ints  # [B]
    ends: Ints  # [B] keys that the last token of each sequence sees
    query_start: Ints  # [B + 1] rows query_start[b]..query_start[b + 1] of the step are sequence b's
    rows: Ints  # [R] rows of the step whose hidden state is wanted
    chosen: Ints  # [S] the sequences that are sampled
    arrive: Ints  # [S] the place of each one's token among those that are handed over
    num_decode: int  # leading sequences with one token


@dataclass(frozen=True, slots=True)
class Places:
    """The same on the device, as far as the model needs it."""

    positions: Tensor
    token_slots: Tensor
    slots: Tensor
    ends: Tensor
    query_start: Tensor
    rows: Tensor


@dataclass(slots=True)
class StepBatch:
    """A step in batch order: `order[i]` is the place of items[i] in the plan; S of its R wanted rows are sampled."""

    layout: StepLayout
    items: Items
    order: Ints
    first_row: Ints  # first of each item's rows among the R rows
    num_rows: Ints
    sample_rows: Ints | None  # [S], rows among R; None = all of them, in order

    @property
    def slots(self) -> Ints:
        """[S] of the sampled items."""
        return self.layout.slots[self.layout.chosen]

    @property
    def lengths(self) -> Ints:
        """[S] tokens known after this step's, i.e. the place where the next one goes."""
        return self.layout.ends[self.layout.chosen]


class BatchBuilder:
    """Builds the steps of one rank."""

    def __init__(self, tables: SlotTables, kv: list[KVLayer], scratch: Scratch, *, uses_rope_lengths: bool) -> None:
        self.tables, self.kv, self.scratch, self.uses_rope_lengths = tables, kv, scratch, uses_rope_lengths
        # pinned: pageable memory of this size is copied while the host waits
        most, pinned = 3 * scratch.max_rows + 3 * len(tables.num_blocks) + 1, tables.device.type == "cuda"
        self._stages = [torch.empty(most, dtype=torch.int64, pin_memory=pinned) for _ in range(STAGES if pinned else 1)]
        self._stage = 0
        self._find_places = places_kernel(tables.device.type) or _find_places

    def build(self, items: Items, all_rows: Sequence[bool] | None) -> StepBatch:
        """`all_rows[i]`: the hidden rows of all of items[i]'s tokens are wanted, not only of a sampled last one; None = of no item."""
        if all_rows is None and (items.again or (items.sample.all() and (items.counts == 1).all())):
            return self._next_tokens(items)
        order = np.arange(len(items))
        place = np.where(items.counts > 1, 1, -(items.starts // LENGTH_STEP))
        if (place[1:] < place[:-1]).any():
            order = np.argsort(place, kind="stable")
            items = items.take(order)
        slots, starts, counts, sampled = items.slots, items.starts, items.counts, items.sample.astype(np.int64)
        query_start = np.zeros(len(items) + 1, dtype=np.int64)
        np.cumsum(counts, out=query_start[1:])
        positions, token_slots = _per_token(slots, starts, counts, query_start)
        wanted = sampled.copy()
        rows = query_start[1:][sampled > 0] - 1
        if all_rows is not None and any(all_rows):
            wanted, rows = _wanted_rows(np.array(all_rows, dtype=bool)[order], sampled, counts, query_start)
        first_row = np.cumsum(wanted) - wanted
        chosen = np.flatnonzero(sampled)
        return StepBatch(
            layout=StepLayout(positions, token_slots, slots, starts + counts, query_start, rows, chosen, np.arange(len(chosen)), int((counts == 1).sum())),
            items=items,
            order=order,
            first_row=first_row,
            num_rows=wanted,
            sample_rows=None if len(chosen) == len(rows) else (first_row + wanted - 1)[chosen],
        )

    def _next_tokens(self, items: Items) -> StepBatch:
        """`build` where every sequence has one token and gets one: nearly all steps are such. Tokens arrive in the order of the items."""
        starts = np.arange(len(items) + 1)
        order = rows = starts[:-1]
        place = items.starts // LENGTH_STEP
        if (place[1:] > place[:-1]).any():
            order = np.argsort(-place, kind="stable")
            items = items.take(order)
        layout = StepLayout(items.starts, items.slots, items.slots, items.starts + 1, starts, rows, rows, order, len(items))
        return StepBatch(layout, items, order, rows, np.ones(len(items), dtype=np.int64), None)

    def inputs(self, layout: StepLayout) -> ForwardInputs:
        """The step on the device, in one copy."""
        parts = (layout.positions, layout.token_slots, layout.slots, layout.ends, layout.query_start, layout.rows)
        sizes = [len(part) for part in parts]
        stage = self._stages[self._stage][: sum(sizes)]
        self._stage = (self._stage + 1) % len(self._stages)
        np.concatenate(parts, out=stage.numpy())
        device = stage.to(self.tables.device, non_blocking=True, copy=True)
        places = Places(*torch.split(device, sizes))
        return self.on_device(places, np.diff(layout.query_start).tolist(), layout.ends.tolist(), layout.num_decode)

    def on_device(self, places: Places, query_lens: list[int], kv_lens: list[int], num_decode: int) -> ForwardInputs:
        """The step whose places are on the device; the lists are empty where the host does not know, as in a CUDA graph."""
        tables, size, positions = self.tables, self.tables.block_size, places.positions
        most_blocks = -(-max(kv_lens) // size) if kv_lens else tables.max_blocks
        lengths = tables.rope_lengths if self.uses_rope_lengths else None
        token_ids, slot_mapping, lens, query_start, block_table, rope = self._find_places(
            positions, places.token_slots, places.slots, places.ends, places.query_start, tables.tokens, tables.blocks, lengths, size, most_blocks
        )
        meta = AttentionMeta(
            query_start=query_start,
            kv_lens=lens,
            block_table=block_table,
            slot_mapping=slot_mapping,
            query_lens=query_lens,
            kv_lens_host=kv_lens,
            num_decode=num_decode,
        )
        every_row = num_decode == len(places.slots) and len(places.rows) == len(positions)
        return ForwardInputs(token_ids, positions, rope, meta, self.kv, places.rows, self.scratch, every_row=every_row)


def _find_places(
    positions: Tensor, token_slots: Tensor, slots: Tensor, ends: Tensor, query_start: Tensor, tokens: Tensor, blocks: Tensor, rope_lengths: Tensor | None,
    block_size: int, context: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """As the kernel of that name, in torch."""
    ropes = None if rope_lengths is None else rope_lengths.index_select(0, token_slots)
    block = blocks.view(-1).index_select(0, token_slots * blocks.shape[1] + positions // block_size).long()
    token_ids = tokens.view(-1).index_select(0, token_slots * tokens.shape[1] + positions).long()
    return token_ids, block * block_size + positions % block_size, ends.int(), query_start.int(), blocks[:, :context].index_select(0, slots), ropes


def _per_token(slots: Ints, starts: Ints, counts: Ints, query_start: Ints) -> tuple[Ints, Ints]:
    total = int(query_start[-1])
    if total == len(slots):
        return starts, slots
    positions = np.arange(total, dtype=np.int64) - np.repeat(query_start[:-1] - starts, counts)
    return positions, np.repeat(slots, counts)


def _wanted_rows(everything: NDArray[np.bool_], sampled: Ints, counts: Ints, query_start: Ints) -> tuple[Ints, Ints]:
    """How many hidden rows each item wants, and which rows of the step these are."""
    wanted = np.where(everything, counts, sampled)
    ends = np.cumsum(wanted)
    rows = np.arange(int(ends[-1]), dtype=np.int64) - np.repeat(ends, wanted) + np.repeat(query_start[1:], wanted)
    return wanted, rows
