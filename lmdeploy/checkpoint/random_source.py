"""`RandomSource`: a `WeightSource` that invents the weights of a config folder, for benchmarks (`--random-weights`).

One block of normal numbers is drawn for each type and device and then copied at offsets that depend on the tensor's name: a memory copy, about as
fast as reading real weights from the page cache. Norm weights are near 1, so that activations keep their size through any number of layers.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from lmdeploy.errors import CheckpointError

#: A prime, so that no row length divides it and the rows of a matrix differ.
BLOCK = 4_194_301
#: Eight nibbles of 8 in an int32 word, and the standard deviation of 0..15.
MIDDLE = -(0x77777778)
SPREAD = 4.61
#: Names that packed zero points end with.
ZEROS = ("qzeros", "zero_point")
#: Standard deviation and largest of 8-bit numbers; names that their scales end with.
SPREAD8, LARGEST8 = 40.0, 127.0
SCALES8 = (".scale", ".weight_scale", ".weight_scale_inv")


class RandomSource:
    """Fills any tensor that a module asks for; the same seed gives the same numbers."""

    def __init__(self, seed: int = 0, scale: float = 0.02) -> None:
        self.seed, self.scale = seed, scale
        self._blocks: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    def names(self) -> set[str]:
        """No names: there is no list of what can be asked for."""
        return set()

    def has(self, name: str) -> bool:
        """Any tensor can be made; but a bias that config.json does not ask for is not offered, nor an order of groups."""
        return not name.endswith((".bias", "g_idx"))

    def shape(self, name: str) -> tuple[int, ...]:
        """Unknown here; callers that must know say so in `shape=`. But scales of 8-bit weights may be a single one."""
        if name.endswith(SCALES8):
            return ()
        raise CheckpointError(f"random weights: the shape of '{name}' is not stored anywhere")

    def dtype(self, name: str) -> torch.dtype:
        """Unknown here."""
        raise CheckpointError(f"random weights: the type of '{name}' is not stored anywhere")

    def take(self, name: str, out: torch.Tensor, rows: slice | None = None, cols: slice | None = None, *, shape: Sequence[int] | None = None) -> None:
        """Fill `out`; the slice only varies the numbers. Packed integers and their scales mean numbers of the usual size around zero."""
        if not out.is_floating_point() and out.dtype.itemsize > 1 and name.endswith(ZEROS):
            out.fill_(MIDDLE)
            return
        offset = zlib.crc32(f"{name}:{rows.start if rows else 0}:{cols.start if cols else 0}".encode()) % BLOCK
        self._fill(out, offset)
        if out.dim() == 1 and name.endswith("weight"):  # a norm
            out.add_(1.0)
        elif name.endswith(".scales"):
            # of both signs: numbers 0..15 around 8 (or 9) are less than zero in the mean, which adds up to more with each layer
            out.copy_((out * 0.01 + self.scale / SPREAD).copysign_(out))
        elif name.endswith(SCALES8):
            out.fill_(self.scale / SPREAD8)

    def take_ranges(self, name: str, out: torch.Tensor, ranges: Sequence[slice], cols: slice | None = None, *, shape: Sequence[int] | None = None) -> None:
        """Fill `out`."""
        self.take(name, out, ranges[0] if ranges else None, cols)

    def finish(self, ignore: Sequence[str] = ()) -> None:
        """Nothing can be left over; the blocks are freed."""
        self._blocks.clear()

    def _fill(self, out: torch.Tensor, offset: int) -> None:
        """Fill `out`, row by row where its rows do not follow each other in memory."""
        if out.is_contiguous() or out.dim() == 1:
            self._tile(out.view(-1) if out.is_contiguous() else out, offset)
            return
        for row in out:
            self._fill(row, offset)
            offset = (offset + row.numel()) % BLOCK

    def _tile(self, out: torch.Tensor, offset: int) -> None:
        """Copy the block again and again into the flat `out`, beginning at `offset` of the block."""
        block, position = self._block(out), 0
        while position < out.numel():
            count = min(BLOCK - offset, out.numel() - position)
            out[position : position + count].copy_(block[offset : offset + count])
            position, offset = position + count, 0

    def _block(self, out: torch.Tensor) -> torch.Tensor:
        """The block in the type and on the device of `out`."""
        key = (out.dtype, out.device)
        if key not in self._blocks:
            self._blocks[key] = self._draw(out.dtype).to(out.device, out.dtype)
        return self._blocks[key]

    def _draw(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers of a block: words of random nibbles, 8-bit numbers or small ones."""
        generator = torch.Generator().manual_seed(self.seed)
        if not dtype.is_floating_point and dtype.itemsize > 1:
            return torch.randint(-(1 << 31), 1 << 31, (BLOCK,), generator=generator, dtype=dtype)
        numbers = torch.randn(BLOCK, generator=generator)
        return numbers.mul_(SPREAD8).clamp_(-LARGEST8, LARGEST8).round_() if dtype.itemsize == 1 else numbers.mul_(self.scale)
