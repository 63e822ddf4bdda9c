"""The pictures of the sequences in the slots of one rank: encoded when the first chunk that shows them is computed, forgotten when the last one was.

So the rows of no more pictures are held than the token budget of a step lets begin, whatever waits in the queue.
"""

from __future__ import annotations

import numpy as np
import torch

from lmdeploy.engine.plan import Items
from lmdeploy.inputs import ForwardInputs
from lmdeploy.messages import Picture
from lmdeploy.models.vision import VisionEncoder

Tensor = torch.Tensor


class PictureSlots:
    """Pictures by slot; `encoder` is None for a model that reads text only."""

    def __init__(self, encoder: VisionEncoder | None) -> None:
        self.encoder = encoder
        self._pictures: dict[int, list[Picture]] = {}
        self._rows: dict[tuple[int, int], Tensor] = {}  # slot, number of the picture -> [count, M]

    def set(self, slot: int, pictures: list[Picture], prompt_len: int) -> None:
        """Put a sequence's pictures in a slot. Raises ValueError for pictures that the model cannot have been sent."""
        self.drop(slot)
        if not pictures:
            return
        if self.encoder is None:
            raise ValueError("the request has pictures, but this model reads text only")
        spec, end = self.encoder.spec, 0
        for picture in pictures:
            good = picture.size == spec.tower.image_size and len(picture.pixels) == picture.tiles * picture.size**2 * 3
            if not good or not end <= picture.start < picture.start + picture.count <= prompt_len:
                raise ValueError(f"a picture of {picture.tiles} tiles for tokens {picture.start}..{picture.start + picture.count} does not fit the prompt")
            end = picture.start + picture.count
        self._pictures[slot] = pictures

    def drop(self, slot: int) -> None:
        """Forget the pictures of a slot."""
        for number in range(len(self._pictures.pop(slot, ()))):
            self._rows.pop((slot, number), None)

    def shown_by(self, items: Items) -> bool:
        """Whether a token of these items stands for a part of a picture."""
        for slot, pictures in self._pictures.items():
            for row in np.flatnonzero(items.slots == slot).tolist():
                start = items.starts.item(row)
                end = start + items.counts.item(row)
                if any(picture.start < end and start < picture.start + picture.count for picture in pictures):
                    return True
        return False

    def fill(self, inputs: ForwardInputs, items: Items) -> None:
        """Set what replaces embeddings in this step; `items` in the order of the step's rows."""
        if not self._pictures:
            return
        places, rows, first = [], [], 0
        for item in items:
            end = item.start + item.num_tokens
            for number, picture in enumerate(self._pictures.get(item.slot, ())):
                low, high = max(picture.start, item.start), min(picture.start + picture.count, end)
                if low < high:
                    places.append(torch.arange(first + low - item.start, first + high - item.start))
                    rows.append(self._encoded(item.slot, number, picture)[low - picture.start : high - picture.start])
                    if high == picture.start + picture.count:
                        del self._rows[item.slot, number]
            first += item.num_tokens
        if rows:
            inputs.replaced_rows, inputs.replacements = torch.cat(places).to(rows[0].device), torch.cat(rows)

    def _encoded(self, slot: int, number: int, picture: Picture) -> Tensor:
        assert self.encoder is not None
        if (slot, number) not in self._rows:
            self._rows[slot, number] = self.encoder.encode(picture)
        return self._rows[slot, number]
