"""Rows in quarters (`kernels.api.Quarters`) in plain torch: what the kernels and the decoder are compared with."""

from __future__ import annotations

from dataclasses import replace

import torch

from lmdeploy.kernels.api import Kernels, Quarters

Tensor = torch.Tensor


def quarters(x: Tensor) -> Tensor:
    """x [T, K] in quarters, in a tensor of its shape."""
    return x.view(x.shape[0], x.shape[1] // 128, 32, 4).permute(1, 3, 0, 2).reshape(x.shape)


def rows_of(x: Tensor) -> Tensor:
    """The inverse of `quarters`."""
    return x.view(x.shape[1] // 128, 4, x.shape[0], 32).permute(2, 0, 3, 1).reshape(x.shape)


def in_quarters(kernels: Kernels, rows: range, calls: list[tuple[str, int]]) -> Kernels:
    """That set, able to hand rows on in quarters to products of 4-bit weights with groups of 128; what it is asked for then is noted."""

    def norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        calls.append(("norm", x.shape[0]))
        kernels.rms_norm(x, weight, eps, out)
        out.copy_(quarters(out))

    def add(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        calls.append(("add", x.shape[0]))
        kernels.add_rms_norm(x, residual, weight, eps, out)
        out.copy_(quarters(out))

    def silu(both: Tensor, out: Tensor) -> None:
        calls.append(("silu", both.shape[0]))
        kernels.silu_mul(both, out)
        out.copy_(quarters(out))

    def product(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, out: Tensor) -> None:
        calls.append(("product", x.shape[0]))
        kernels.linear_w4(rows_of(x), qweight, scales, zeros, bias, out)

    def served(weight: tuple[Tensor, ...], dtype: torch.dtype) -> range:
        return rows if len(weight) == 3 and 2 * weight[0].shape[1] // weight[1].shape[1] == 128 else range(0)

    return replace(kernels, quarters=Quarters(served, replace(kernels, rms_norm=norm, add_rms_norm=add, silu_mul=silu, linear_w4=product)))
