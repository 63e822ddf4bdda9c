"""Triton's `silu_mul` in its interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.kernels.reference import REFERENCE
from tests.kernels.paged import Shape, error, numbers
from tests.kernels.quarters_plain import quarters

activation = pytest.importorskip("lmdeploy.kernels.triton_kernels.activation", reason="triton is not installed")

# The interpreter cuts bfloat16 off instead of rounding it.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(5, 123), (1, 1), (2, 2500), (0, 8)])
def test_silu_mul_gates_the_second_half_with_the_first(dtype: torch.dtype, rows: int, width: int) -> None:
    both = 8 * numbers(Shape(1, 1, 1, dtype=dtype), 0, rows, 2 * width)
    found, wanted = torch.full((rows, width), float("nan"), dtype=dtype), torch.empty(rows, width, dtype=dtype)
    activation.silu_mul(both, found)
    REFERENCE.silu_mul(both, wanted)
    assert rows == 0 or error(found, wanted) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(5, 128), (3, 1024), (2, 1024 + 384), (0, 128)])
def test_silu_mul_writes_quarters(rows: int, width: int, dtype: torch.dtype) -> None:
    both = 8 * numbers(Shape(1, 1, 1, dtype=dtype), 0, rows, 2 * width)
    plain, found = torch.empty(rows, width, dtype=dtype), torch.full((rows, width), float("nan"), dtype=dtype)
    activation.silu_mul(both, plain)
    activation.silu_mul(both, found, quarters=True)
    assert torch.equal(found, quarters(plain))
