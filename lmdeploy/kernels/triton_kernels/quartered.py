"""The operators that hand rows on in quarters (`quarters.py`), which saves a pass over x before three of a layer's four 4-bit products."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from lmdeploy.kernels.api import Kernels, Quarters
from lmdeploy.kernels.triton_kernels import linear_w4
from lmdeploy.kernels.triton_kernels.activation import silu_mul
from lmdeploy.kernels.triton_kernels.norms import add_rms_norm, rms_norm

Tensor = torch.Tensor


def rows_served(weight: tuple[Tensor, ...], dtype: torch.dtype) -> range:
    """The rows that `linear_w4` multiplies by a kernel that reads quarters."""
    return linear_w4.rows_in_quarters((weight[0], weight[1], weight[2]), dtype) if len(weight) == 3 else range(0)


def in_quarters(kernels: Kernels) -> Quarters:
    """That set, with rows in quarters."""
    norm, add, silu = partial(rms_norm, quarters=True), partial(add_rms_norm, quarters=True), partial(silu_mul, quarters=True)
    return Quarters(rows_served, replace(kernels, rms_norm=norm, add_rms_norm=add, silu_mul=silu, linear_w4=linear_w4.multiply_quarters))
