"""AWQ's GEMM layout (AutoAWQ, vLLM, transformers): reading it into `Packed4`, and making it.

`qweight` int32 [in, out/8], `qzeros` int32 [in/g, out/8] without an offset, `scales` float16 [in/g, out]. Word c holds outputs 8c .. 8c + 7, in its nibbles
from the lowest: 0, 2, 4, 6, 1, 3, 5, 7. `quantise` is plain rounding to the nearest; what the search for better scales does comes before it.
"""

from __future__ import annotations

import torch

from lmdeploy.checkpoint.source import WeightSource
from lmdeploy.errors import ConfigError
from lmdeploy.formats import packed4
from lmdeploy.formats.packed4 import PackedFormat
from lmdeploy.formats.weight_format import Part, all_cols, all_rows

Tensor = torch.Tensor

LARGEST = 15
#: the smallest range of a group, so that a scale is never zero
MIN_RANGE = 1e-5


def quantise(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(q uint8 [N, K], scales float32 [N, K/g], zeros float32 [N, K/g]) of a weight [N, K], each number rounded to the nearest that 4 bits can say.

    Scales are numbers that float16 can hold, so that `pack` loses nothing. A group's range always includes zero: else one of nearly equal
    numbers would be saturated.
    """
    rows, inner = weight.shape
    if group < 2 or group % 2 or inner % group:
        raise ConfigError(f"{inner} inputs are no multiple of group_size={group} (an even number)")
    grouped = weight.float().view(rows, inner // group, group)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scales = ((high - low).clamp(min=MIN_RANGE) / LARGEST).half().float()
    zeros = (-torch.round(low / scales)).clamp(0, LARGEST)
    numbers = (torch.round(grouped / scales.unsqueeze(-1)) + zeros.unsqueeze(-1)).clamp_(0, LARGEST)
    return numbers.to(torch.uint8).view(rows, inner), scales, zeros


def pack(q: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
    """The tensors of a module ("qweight", "qzeros", "scales"), of q [N, K] in 0..15, scales and zeros [N, K/g]."""
    if q.shape[0] % 8:
        raise ConfigError(f"{q.shape[0]} outputs are no multiple of 8, which AWQ files need; leave this module out")
    turned = scales.t().to(torch.float16).contiguous()
    return {"qweight": _words(q.to(torch.uint8).t()), "qzeros": _words(zeros.to(torch.uint8).t()), "scales": turned}


class AwqFormat(PackedFormat):
    """Reads the layout."""

    def load_numbers(self, source: WeightSource, part: Part, out: Tensor) -> None:
        """Outputs lie along the words, inputs along the rows: blocks of input rows are unpacked, paired and turned."""
        rows, cols = all_rows(part), all_cols(part)
        hull = packed4.words_around(rows)
        width = hull.stop - hull.start
        for block in packed4.blocks_of(cols.start, cols.stop, width * 4, step=2):
            words = torch.empty(block.stop - block.start, width, dtype=torch.int32, device=out.device)
            source.take(f"{part.name}.qweight", words, block, hull, shape=(part.in_features, part.out_features // 8))
            numbers = _numbers(words)
            pairs = numbers[0::2] | numbers[1::2] << 4
            out[:, (block.start - cols.start) // 2 : (block.stop - cols.start) // 2] = packed4.pick(pairs, rows, hull.start * 8)

    def load_zeros(self, source: WeightSource, part: Part, group: int, out: Tensor) -> None:
        """Packed like the numbers."""
        words, place, hull = packed4.load_zero_words(source, part, group, out.shape[1], out.device)
        out.copy_(packed4.pick(_numbers(words), all_rows(part), hull.start * 8)[:, place])


def _words(numbers: Tensor) -> Tensor:
    """int32 [R, N/8] of numbers [R, N]: even outputs of a word first, then odd ones."""
    return packed4.words_of(numbers.reshape(numbers.shape[0], -1, 4, 2).transpose(2, 3).flatten(1))


def _numbers(words: Tensor) -> Tensor:
    """uint8 [R, N] of int32 words [R, N/8]."""
    return packed4.nibbles(words).view(words.shape[0], -1, 2, 4).transpose(2, 3).flatten(1)
