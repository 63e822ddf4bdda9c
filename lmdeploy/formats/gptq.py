"""GPTQ's layout (AutoGPTQ, GPTQModel): reading it into `Packed4`.

`qweight` int32 [in/8, out], nibble i of row r being input 8r + i; `qzeros` int32 [in/g, out/8], nibble i of column c being output 8c + i, stored minus 1
(modulo 16; not in "gptq_v2" files); `scales` [in/g, out]; `g_idx` [in], the group of each input. Where g_idx says that groups are not neighbours
(act-order), columns are sorted by group once at load, and x is brought into the same order at each product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lmdeploy.checkpoint.source import WeightSource
from lmdeploy.formats import packed4
from lmdeploy.formats.packed4 import Packed4, PackedFormat
from lmdeploy.formats.weight_format import Part, all_cols, all_rows

Tensor = torch.Tensor


class GptqFormat(PackedFormat):
    """Reads the layout; `offset` is what stored zero points lack."""

    def __init__(self, group_size: int, offset: int = 1) -> None:
        super().__init__(group_size)
        self.offset = offset

    def load_numbers(self, source: WeightSource, part: Part, out: Tensor) -> None:
        """A word is four bytes of our layout already: blocks of words are turned and cut to this rank's inputs."""
        rows, cols = all_rows(part), all_cols(part)
        hull = slice(min(r.start for r in rows), max(r.stop for r in rows))
        width = hull.stop - hull.start
        for block in packed4.blocks_of(cols.start // 8, -(-cols.stop // 8), width * 4, step=1):
            words = torch.empty(block.stop - block.start, width, dtype=torch.int32, device=out.device)
            source.take(f"{part.name}.qweight", words, block, hull, shape=(part.in_features // 8, part.out_features))
            data = packed4.pick(words, rows, hull.start).clone(memory_format=torch.contiguous_format).view(torch.uint8)
            first = block.start * 4 - cols.start // 2  # where the block begins in `out`; below 0 where a rank begins inside a word
            start, stop = max(first, 0), min(first + data.shape[1], out.shape[1])
            out[:, start:stop] = data[:, start - first : stop - first]

    def load_zeros(self, source: WeightSource, part: Part, group: int, out: Tensor) -> None:
        """Sixteen numbers fit, so a zero point of 0 is stored as 15."""
        words, place, hull = packed4.load_zero_words(source, part, group, out.shape[1], out.device)
        numbers = packed4.pick(packed4.nibbles(words), all_rows(part), hull.start * 8)[:, place]
        out.copy_((numbers + self.offset) & 15)

    def finish(self, source: WeightSource, parts: Sequence[Part], weight: Packed4) -> None:
        """Sort the columns where groups are not neighbours."""
        packed4.sort_columns(source, parts, weight, "g_idx", self.group_size)
