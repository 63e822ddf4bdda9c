"""Products with the RMSNorm before or after them inside (`deferred.py`): which kernel, by the weight and the number of rows."""

from __future__ import annotations

import torch

from lmdeploy.kernels.api import After, Before, NormedProducts
from lmdeploy.kernels.triton_kernels import linear16, linear_w4
from lmdeploy.kernels.triton_kernels.linear_w4 import Inside
from lmdeploy.kernels.triton_kernels.overlap import overlaps

Tensor = torch.Tensor


def rows_served(weight: tuple[Tensor, ...], outer: int, dtype: torch.dtype) -> int:
    """Up to how many rows of bfloat16 x; 0 where the weight's product has no place for norms. (float16 would have too little range.)"""
    if not weight or not overlaps(weight[0].device) or dtype is not torch.bfloat16:
        return 0
    if len(weight) == 3:
        return linear_w4.rows_served((weight[0], weight[1], weight[2]))
    return linear16.MAX_ROWS if weight[0].dtype is dtype and linear16.serves(weight[0][:1], weight[0], weight[0]) else 0


def product(
    x: Tensor, weight: tuple[Tensor, ...], bias: Tensor | None, out: Tensor, silu: bool, before: Before | None = None, after: After | None = None
) -> None:
    """out = x @ W.T + bias, with `silu` silu(first half) * second half of it; `before` and `after` it as they say. At most `rows_served` rows."""
    if len(weight) == 3:
        linear_w4.multiply(x, (weight[0], weight[1], weight[2]), bias, out, Inside(silu, before, after))
    else:
        linear16.launch(x, weight[0], bias, out, silu, before, after)


NORMED = NormedProducts(rows_served, product)
