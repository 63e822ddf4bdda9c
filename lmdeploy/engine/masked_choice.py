"""The choice among the logits that a step's graph has left, for rows with grammars: two copies and one launch, whatever the kernel takes.

Nothing of it can be launched before the tokens of the step before are known, and the device may wait for it, so what the host does here counts.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
import torch
from numpy.typing import NDArray

from lmdeploy.engine.batch import STAGES
from lmdeploy.engine.guided import StepMask
from lmdeploy.engine.plan import Ints
from lmdeploy.engine.sampler import Sampler

Tensor = torch.Tensor
#: the parts of the input: slots, lengths, where tokens go, places of masks
PARTS = 4


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

    def send(self, slots: Ints, lengths: Ints, mask: StepMask, line: int) -> int:
        """Join the masks, and bring them to the device, and what is to be chosen: tokens of rows with these slots and so many known tokens, which arrive on this
        line in order. The size for which `choose` is to be launched."""
        rows, words, at = mask.join()
        count = slots.size
        size = self._sizes[bisect_left(self._sizes, count)]
        stage, self._stage = self._stages[self._stage], (self._stage + 1) % STAGES
        to_slots, to_lengths, where, places = stage.numpy()
        to_slots[:count], to_lengths[:count] = slots, lengths
        where[:count] = np.arange(line * self._lines.shape[1], line * self._lines.shape[1] + count)
        to_slots[count:size], to_lengths[count:size], where[count:size] = self._sampler.table.num_slots, 1, -1  # nobody's
        place: NDArray[np.int32] = places.view(np.int32)
        place[:size] = -1
        place[rows] = at
        self._inputs.copy_(stage, non_blocking=True)
        if at.size:
            first, last = int(at.min()), int(at.max()) + 1
            self._words[first:last].copy_(words[first:last], non_blocking=True)
        return size

    def choose(self, size: int) -> None:
        """Launch the choice; this can be part of a CUDA graph."""
        slots, lengths, where, places = self._inputs[:, :size]
        self._sampler.choose(self._logits[:size], slots, lengths, self._lines, (self._words, places.view(torch.int32)[:size]), where=where)
