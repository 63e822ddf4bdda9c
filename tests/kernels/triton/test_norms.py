"""Triton's norms in its interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.kernels.reference import REFERENCE
from tests.kernels.paged import Shape, error, numbers
from tests.kernels.quarters_plain import quarters

norms = pytest.importorskip("lmdeploy.kernels.triton_kernels.norms", reason="triton is not installed")

# The interpreter cuts bfloat16 off instead of rounding it.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
EACH_DTYPE = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@EACH_DTYPE
@pytest.mark.parametrize(("rows", "width"), [(5, 123), (1, 1), (3, 4096), (0, 8)])
def test_rms_norm(dtype: torch.dtype, rows: int, width: int) -> None:
    shape = Shape(1, 1, 1, dtype=dtype)
    x, weight = 30 * numbers(shape, 0, rows, width), numbers(shape, 1, width)
    found, wanted = torch.empty_like(x), torch.empty_like(x)
    norms.rms_norm(x, weight, 1e-5, found)
    REFERENCE.rms_norm(x, weight, 1e-5, wanted)
    assert rows == 0 or error(found, wanted) <= TOLERANCE[dtype]


@EACH_DTYPE
def test_add_rms_norm_stores_the_sum_and_normalises_what_it_stored(dtype: torch.dtype) -> None:
    shape = Shape(1, 1, 1, dtype=dtype)
    x, residual, weight = numbers(shape, 0, 5, 123), numbers(shape, 1, 5, 123), numbers(shape, 2, 123)
    other, found, wanted = residual.clone(), torch.empty_like(x), torch.empty_like(x)
    norms.add_rms_norm(x, residual, weight, 1e-6, found)
    REFERENCE.add_rms_norm(x, other, weight, 1e-6, wanted)
    assert torch.equal(residual, other) if dtype is not torch.bfloat16 else error(residual, other) <= TOLERANCE[dtype]
    assert error(found, wanted) <= 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(5, 128), (1, 512), (3, 640), (0, 128)])
def test_norms_write_quarters(rows: int, width: int, dtype: torch.dtype) -> None:
    shape = Shape(1, 1, 1, dtype=dtype)
    x, residual, weight = numbers(shape, 0, rows, width), numbers(shape, 1, rows, width), numbers(shape, 2, width)
    other, plain, found = residual.clone(), torch.empty_like(x), torch.full_like(x, float("nan"))
    norms.rms_norm(x, weight, 1e-5, plain)
    norms.rms_norm(x, weight, 1e-5, found, quarters=True)
    assert torch.equal(found, quarters(plain))
    norms.add_rms_norm(x, residual, weight, 1e-5, plain)
    norms.add_rms_norm(x, other, weight, 1e-5, found.fill_(float("nan")), quarters=True)
    assert torch.equal(found, quarters(plain)) and torch.equal(other, residual)


@EACH_DTYPE
@pytest.mark.parametrize("head_dim", [20, 128])
def test_head_norm_works_in_place_on_a_part_of_qkv(dtype: torch.dtype, head_dim: int) -> None:
    shape = Shape(1, 1, 1, dtype=dtype)
    qkv, weight = numbers(shape, 0, 5, 7, head_dim), numbers(shape, 1, head_dim)
    wanted = qkv.clone()
    norms.head_norm(qkv[:, 2:5], weight, 1e-6)
    REFERENCE.head_norm(wanted[:, 2:5], weight, 1e-6)
    assert error(qkv, wanted) <= TOLERANCE[dtype]
    assert torch.equal(qkv[:, :2], wanted[:, :2]) and torch.equal(qkv[:, 5:], wanted[:, 5:])
