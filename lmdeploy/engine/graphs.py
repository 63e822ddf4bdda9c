"""CUDA graphs of whole decode steps: embedding to the chosen token is one launch, whatever the number of kernels.

A graph serves a number of rows and a longest context, both rounded up; graphs are captured when first needed and share one memory pool. Rows that
fill up a bucket belong to a slot of their own and write to a block of their own, so they change nothing. Everything that a step needs is read on the
device from the slot tables: the host sends slots and lengths only, and need not have seen the tokens of the step before.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from lmdeploy.engine.batch import SlotTables
from lmdeploy.engine.model import Model
from lmdeploy.inputs import AttentionMeta, ForwardInputs, Scratch
from lmdeploy.kv_layer import KVLayer
from lmdeploy.log import get_logger

logger = get_logger(__name__)
Tensor = torch.Tensor
Ints = NDArray[np.int64]

#: steps whose inputs may be on their way to the device
STAGES = 4
#: keys in the shortest context bucket; the next ones are twice as long each
SHORTEST = 256


def row_buckets(most: int) -> list[int]:
    """Numbers of rows that have a graph: dense where a row more costs much, sparse above."""
    sizes = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, *range(48, 129, 16), *range(160, 257, 32), *range(320, most + 64, 64)]
    return sorted({min(size, most) for size in sizes})


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures of a device: cuBLAS keeps a workspace for each stream that it has seen, as long as the process lives."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@dataclass(slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits: Tensor  # float32 [rows, V]
    tokens: Tensor  # int64 [rows], -1 where none can be chosen


class DecodeGraphs:
    """Decode steps of one rank. `tables` has one slot more than can be used: the last one belongs to rows that fill up."""

    def __init__(self, model: Model, tables: SlotTables, kv: list[KVLayer], scratch: Scratch, most_rows: int, *, uses_rope_lengths: bool) -> None:
        self._model, self._tables, self._kv, self._scratch = model, tables, kv, scratch
        self._uses_rope_lengths = uses_rope_lengths
        self._sizes = row_buckets(most_rows)
        self._filler = tables.tokens.shape[0] - 1
        device = tables.device
        self._inputs = torch.zeros((2, most_rows), dtype=torch.int64, device=device)  # slots, lengths
        self._stages = [torch.zeros((2, most_rows), dtype=torch.int64, pin_memory=True) for _ in range(STAGES)]
        self._stage = 0
        self._starts = torch.arange(most_rows + 1, dtype=torch.int32, device=device)
        self._rows = torch.arange(most_rows, dtype=torch.int64, device=device)
        self._graphs: dict[tuple[int, int], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, slots: Ints, lengths: Ints) -> tuple[Tensor, Tensor]:
        """Compute the last known token of each row. slots, lengths [S], the length being the number of known tokens.

        float32 logits [S, V], which the caller may overwrite, and the likeliest token of each row, already in the token table; both last until the next run.
        """
        count = len(slots)
        rows = next(size for size in self._sizes if size >= count)
        captured = self._captured(rows, self._context(int(lengths.max())))
        self._send(slots, lengths, rows)
        captured.graph.replay()
        return captured.logits[:count], captured.tokens[:count]

    def warm_up(self) -> None:
        """Capture the largest step, whose memory all others share."""
        self._captured(self._sizes[-1], self._context(self._tables.width - 1))

    def _context(self, longest: int) -> int:
        """The context bucket in tokens."""
        context = SHORTEST
        while context < longest:
            context *= 2
        return min(context, self._tables.max_blocks * self._tables.block_size)

    def _send(self, slots: Ints, lengths: Ints, rows: int) -> None:
        stage = self._stages[self._stage]
        self._stage = (self._stage + 1) % STAGES
        host = stage.numpy()
        host[0, : len(slots)], host[1, : len(slots)] = slots, lengths
        host[0, len(slots) : rows], host[1, len(slots) : rows] = self._filler, 1
        self._inputs.copy_(stage, non_blocking=True)

    def _captured(self, rows: int, context: int) -> _Captured:
        found = self._graphs.get((rows, context))
        if found is None:
            self._send(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), rows)
            torch.cuda.current_stream().synchronize()
            side = _side_stream(self._inputs.device)
            with torch.cuda.stream(side):
                self._step(rows, context)  # compiles kernels and lets libraries take their buffers
            side.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=side):
                logits, tokens = self._step(rows, context)
            found = self._graphs[rows, context] = _Captured(graph, logits, tokens)
            logger.debug("captured a decode graph of %d rows and %d tokens of context", rows, context)
        return found

    def _step(self, rows: int, context: int) -> tuple[Tensor, Tensor]:
        """The whole step, from the device's own tables."""
        tables, size = self._tables, self._tables.block_size
        slots, lengths = self._inputs[0, :rows], self._inputs[1, :rows]
        positions = lengths - 1
        row = slots * tables.width
        block = tables.blocks.view(-1).index_select(0, slots * tables.max_blocks + positions // size).long()
        meta = AttentionMeta(
            query_start=self._starts[: rows + 1],
            kv_lens=lengths.int(),
            block_table=tables.blocks[:, : -(-context // size)].index_select(0, slots),
            slot_mapping=block * size + positions % size,
            query_lens=[1] * rows,
            kv_lens_host=[context] * rows,
            num_decode=rows,
        )
        rope = tables.rope_lengths_device.index_select(0, slots) if self._uses_rope_lengths else None
        token_ids = tables.tokens.view(-1).index_select(0, row + positions).long()
        hidden = self._model.forward(ForwardInputs(token_ids, positions, rope, meta, self._kv, self._rows[:rows], self._scratch))
        logits = self._model.logits(hidden)
        best, tokens = logits.max(dim=-1)
        tables.tokens.view(-1).index_copy_(0, row + lengths, tokens.int())
        return logits, torch.where(best.isfinite(), tokens, -1)
