"""The choice among the logits that a step's graph has left, for rows with grammars: two copies and one launch, whatever the kernel takes.

Nothing of it can be launched before the tokens of the step before are known, and the device may wait for it, so what the host does here counts.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray

from lmdeploy.engine.batch import STAGES
from lmdeploy.engine.guided import GuidedStep
from lmdeploy.engine.plan import Ints
from lmdeploy.engine.sampler import Sampler

Tensor = torch.Tensor
#: the parts of the input: slots, lengths, where tokens go, places of masks
PARTS = 4


@dataclass(frozen=True, slots=True)
class Prepared:
    """A choice that waits for its masks."""

    size: int  # for which `choose` is to be launched
    stage: Tensor  # its input on the host
    place: NDArray[np.int32]  # in it, of each row's mask
    to_words: Tensor  # where all masks go
    words: Tensor


@cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class _Beside:
    """A stream for copies beside what is computed; what is launched afterwards waits for them."""

    def __init__(self, device: torch.device) -> None:
        self._stream, self._current = _stream_beside(device), torch.cuda.current_stream(device)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # what torch's own methods call; they, and its context of a stream, take several times as long
        self._copied = partial(super(torch.cuda.Event, event).record, self._stream)
        self._wait = partial(super(torch.cuda.Event, event).wait, self._current)

    def copy(self, to: Tensor, words: Tensor) -> None:
        torch.cuda.set_stream(self._stream)
        try:
            to.copy_(words, non_blocking=True)
        finally:
            torch.cuda.set_stream(self._current)
        self._copied()
        self._wait()


class MaskedChoice:
    """For the first so many rows of `logits` [B, V], whose tokens arrive in `lines` [L, N]. Nothing here waits for the device."""

    def __init__(self, sampler: Sampler, logits: Tensor, lines: Tensor, sizes: list[int]) -> None:
        """`sizes`: numbers of rows for which a graph may be captured, in order."""
        self._sampler, self._logits, self._lines, self._sizes = sampler, logits, lines, sizes
        table, most = sampler.table, sizes[-1]
        self._inputs = torch.zeros((PARTS, most), dtype=torch.int64, device=logits.device)
        self._stages = [torch.zeros((PARTS, most), dtype=torch.int64, pin_memory=True) for _ in range(STAGES)]
        self._stage = 0
        self._words = torch.zeros((table.num_slots, table.young_words.shape[1]), dtype=torch.int32, device=logits.device)
        self._beside = _Beside(logits.device) if logits.device.type == "cuda" else None

    def prepare(self, slots: Ints, lengths: Ints, mask: GuidedStep, places: Ints) -> Prepared:
        """What can be done before masks are there, for rows with these slots and so many known tokens, whose tokens arrive at these places of all lines together.
        Behind what was launched with what was prepared before."""
        count, rows = slots.size, mask.rows
        size = self._sizes[bisect_left(self._sizes, count)]
        stage, self._stage = self._stages[self._stage], (self._stage + 1) % STAGES
        to_slots, to_lengths, where, at = stage.numpy()
        place: NDArray[np.int32] = at.view(np.int32)
        guided = mask.slots
        to_slots[:count], to_lengths[:count], where[:count] = slots, lengths, places
        to_slots[count:size], to_lengths[count:size], where[count:size] = self._sampler.table.num_slots, 1, -1  # nobody's
        place[:size] = -1
        place[rows] = guided
        self._inputs.copy_(stage, non_blocking=True)
        first, last = int(guided.min()), int(guided.max()) + 1
        return Prepared(size, stage, place, self._words[first:last], mask.words[first:last])

    def bring(self, mask: GuidedStep, prepared: Prepared) -> None:
        """Join the masks, and bring them to the device."""
        mask.join()
        if mask.late.any():
            prepared.place[mask.rows[mask.late]] = -1
            self._inputs.copy_(prepared.stage, non_blocking=True)
        if self._beside is not None and mask.busy is not None and mask.busy():
            self._beside.copy(prepared.to_words, prepared.words)
        else:
            prepared.to_words.copy_(prepared.words, non_blocking=True)

    def choose(self, size: int) -> None:
        """Launch the choice; this can be part of a CUDA graph."""
        slots, lengths, where, places = self._inputs[:, :size]
        self._sampler.choose(self._logits[:size], slots, lengths, self._lines, (self._words, places.view(torch.int32)[:size]), where=where)
