"""Rows of a quantised cache: what is stored, how far it is off, and that attention over it is attention over the dequantised rows."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.kernels.kv_quant import LEVELS, ceil_bf16, dequantise_rows, floor_bf16, quantise_rows
from lmdeploy.kv_layer import KVFormat, rotation_matrix

WIDTHS = ("8", "4", "fp8")


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def test_bfloat16_is_rounded_outwards() -> None:
    x = torch.cat([rows(4096), torch.tensor([0.0, -0.0, 1.0, -1.0, 1e30, -1e30, 1e-30, float("inf")])])
    low, high = floor_bf16(x), ceil_bf16(x)
    assert torch.equal(low, low.bfloat16().float()) and torch.equal(high, high.bfloat16().float())
    assert (low <= x).all() and (x <= high).all() and torch.equal(low[x == 1], x[x == 1])
    assert (high - low <= x.abs() * 2**-7).all() or x.isinf().any()


@pytest.mark.parametrize("head_dim", [2, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("width", ["8", "4"])
def test_no_number_is_further_off_than_half_a_step(width: str, head_dim: int) -> None:
    x = rows(50, 3, head_dim)
    numbers, scales = quantise_rows(x, width)  # type: ignore[arg-type]
    assert numbers.dtype is torch.uint8 and numbers.shape[-1] == head_dim // (2 if width == "4" else 1) and scales.shape == (50, 3, 2)
    error = (dequantise_rows(numbers, scales, width) - x).abs()  # type: ignore[arg-type]
    step = scales[..., :1].float()
    assert (error <= step * 0.5001 + 1e-6).all()
    spread = x.amax(-1) - x.amin(-1)
    assert (step[..., 0] <= 1.02 * spread / LEVELS[width] + 0.01 * x.abs().amax(-1) / LEVELS[width]).all()


def test_half_bytes_hold_dim_j_low_and_dim_j_plus_half_high() -> None:
    numbers, scales = quantise_rows(torch.arange(16.0).view(1, 16), "4")
    assert numbers.tolist() == [[j | (j + 8) << 4 for j in range(8)]] and scales.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("width", WIDTHS)
def test_equal_numbers_come_back_and_nan_is_not_hidden(width: str) -> None:
    numbers, scales = quantise_rows(torch.full((1, 8), -2.5), width)  # type: ignore[arg-type]
    assert torch.allclose(dequantise_rows(numbers, scales, width), torch.full((1, 8), -2.5), rtol=0.04)  # type: ignore[arg-type]
    bad = torch.ones(2, 8)
    bad[1, 3] = float("nan")
    back = dequantise_rows(*quantise_rows(bad, width), width)  # type: ignore[arg-type]
    assert back[0].isfinite().all() and back[1].isnan().any()


@pytest.mark.parametrize("head_dim", [2, 6, 64, 80, 96, 128, 256])
def test_the_rotation_is_its_own_inverse_and_spreads_a_channel(head_dim: int) -> None:
    matrix = rotation_matrix(head_dim)
    assert torch.equal(matrix, matrix.t()) and torch.allclose(matrix @ matrix, torch.eye(head_dim), atol=1e-5)
    assert matrix.abs().max() < 0.8 or head_dim == 2
    assert head_dim < 64 or matrix.abs().max() < 0.25


def test_four_bits_hold_more_than_three_and_a_half_times_the_tokens() -> None:
    sixteen = KVFormat().bytes_per_row(128, torch.bfloat16)
    assert sixteen / KVFormat("4", "4").bytes_per_row(128, torch.bfloat16) > 3.7
    assert sixteen / KVFormat("8", "8").bytes_per_row(128, torch.bfloat16) > 1.9
