"""RMSNorm without a kernel of its own, for few rows: the product before adds to the residual and multiplies by the norm's weight, the product after by 1 / rms.

`after` stands for the end of a product whose result is added to the residual: the sum is rounded and stored, the sum times the norm's weight is stored as the
next product's input, and the sum's squares are added up for each row. `before` stands for a product of such an input: its results are multiplied by what
those squares say. Squares are added as whole numbers of 2^-24, so that a row's sum does not depend on the order in which programs end; there is room for rows of
4,096 numbers whose root mean square is 11,000, and one of 0.001 is right to a thousandth.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lmdeploy.kernels.api import After, Before

Tensor = torch.Tensor
UNIT = tl.constexpr(16777216.0)


@triton.jit
def inverse(squares: tl.tensor, rows: tl.tensor, count: tl.tensor, width: tl.tensor, eps: tl.tensor) -> tl.tensor:
    """1 / rms of rows below `count`."""
    return tl.math.rsqrt(tl.load(squares + rows, mask=rows < count, other=0).to(tl.float32) / UNIT / width + eps)


@triton.jit
def added(residual: tl.tensor, old: tl.tensor, total: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Store old + total, both rounded as by kernels apart, at `residual`; the sum in float32, zero outside of the mask."""
    dtype: tl.constexpr = residual.dtype.element_ty
    summed = (old.to(tl.float32) + total.to(dtype).to(tl.float32)).to(dtype)
    tl.store(residual, summed, mask=mask)
    return tl.where(mask, summed.to(tl.float32), 0.0)


@triton.jit
def note_squares(squares: tl.tensor, rows: tl.tensor, sums: tl.tensor, mask: tl.tensor) -> None:
    """Add this program's sums of squares to those of the rows."""
    tl.atomic_add(squares + rows, (sums * UNIT + 0.5).to(tl.int64), mask=mask, sem="relaxed")


def arguments(unused: Tensor, before: Before | None, after: After | None) -> tuple[tuple[Any, ...], dict[str, bool]]:
    """(squares before, eps, residual, weight, squares after) for a launch, `unused` where there is none, and its flags."""
    squares, eps = before or (unused, 0.0)
    return (squares, eps, *(after or (unused, unused, unused))), {"BEFORE": before is not None, "AFTER": after is not None}
