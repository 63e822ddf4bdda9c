"""`NormedProducts` in plain torch, as their definition says it: what the kernels and the decoder are compared with."""

from __future__ import annotations

import torch

from lmdeploy.kernels.api import After, Before
from lmdeploy.kernels.reference import dequantise_w4

Tensor = torch.Tensor
UNIT = 2.0**24


def dense(weight: tuple[Tensor, ...]) -> Tensor:
    """The weight in float32."""
    return weight[0].float() if len(weight) == 1 else dequantise_w4(*weight, torch.float32)


def product(
    x: Tensor, weight: tuple[Tensor, ...], bias: Tensor | None, out: Tensor, silu: bool, before: Before | None = None, after: After | None = None
) -> None:
    """See `kernels.api`."""
    total = x.float() @ dense(weight).t()
    if before is not None:
        total *= torch.rsqrt(before.squares[: x.shape[0], None] / UNIT / x.shape[1] + before.eps).float()
    if bias is not None:
        total += bias.float()
    if silu:
        gate, up = total.chunk(2, dim=-1)
        total = torch.nn.functional.silu(gate) * up
    if after is not None:
        after.residual.add_(total.to(out.dtype))
        total = after.residual.float()
        after.squares[: x.shape[0]] += (total.double().pow(2).sum(1) * UNIT + 0.5).long()
        total = total * after.weight.float()
    out.copy_(total)
