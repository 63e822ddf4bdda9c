"""Torch's 16-bit products on CPU, called with few different numbers of rows.

oneDNN keeps compiled code and work memory for every shape it meets: about 2.4 MB for each number of rows of the embedded model, without end
while prompts of new lengths come, which no memory bill can state. So rows are padded to a bucket (at most a quarter more above 512), and the
runner runs every bucket once at start-up. The sums of a row do not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensor = torch.Tensor
Linear = Callable[[Tensor, Tensor, Tensor | None, Tensor], None]


def bucket(rows: int) -> int:
    """The padded number of rows: powers of two to 128, multiples of 128 to 1024, then of 1024."""
    if rows <= 128:
        return 1 << max(rows - 1, 0).bit_length()
    step = 128 if rows <= 1024 else 1024
    return -(-rows // step) * step


def buckets(limit: int) -> list[int]:
    """All of them up to the one that holds `limit` rows, largest first."""
    found, rows = [], 1
    while rows < bucket(limit):
        found.append(rows)
        rows = bucket(rows + 1)
    return [*found, rows][::-1]


def padded(linear: Linear) -> Linear:
    """The same product, its rows padded with zeros to a bucket."""

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        rows = x.shape[0]
        size = bucket(rows)
        if size == rows:
            return linear(x, weight, bias, out)
        wide = x.new_zeros(size, x.shape[1])
        wide[:rows] = x
        result = out.new_empty(size, out.shape[1])
        linear(wide, weight, bias, result)
        out.copy_(result[:rows])
        return None

    return run
