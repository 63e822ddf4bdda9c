"""Triton's product with 16-bit weights, in its interpreter, against the reference. (bfloat16 is met on the GPU: the interpreter cannot multiply it.)"""

from __future__ import annotations

import pytest
import torch

from lmdeploy.kernels.reference import REFERENCE

linear16 = pytest.importorskip("lmdeploy.kernels.triton_kernels.linear16", reason="triton is not installed")

Tensor = torch.Tensor
#: rows, inputs, outputs: one row, ragged edges of tiles in both directions, each bucket of rows, inputs that no tile divides, and those that cuBLAS computes
SHAPES = [(1, 64, 40), (1, 4104, 12), (3, 264, 48), (16, 512, 24), (17, 136, 72), (33, 1024, 200), (64, 72, 16), (70, 64, 32), (5, 60, 12)]


def numbers(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: Tensor, wanted: Tensor) -> None:
    assert (found.float() - wanted.float()).abs().max() <= 2e-3 * wanted.float().abs().max()


@pytest.mark.parametrize(("rows", "inner", "outer"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_agree_with_the_reference(rows: int, inner: int, outer: int, with_bias: bool) -> None:
    x, weight = numbers(rows, inner + 8, 0)[:, :inner], numbers(outer, inner, 1)
    bias = numbers(1, outer, 2)[0] if with_bias else None
    found, wanted = (torch.full((rows, outer), float("nan"), dtype=torch.float16) for _ in range(2))
    for _ in range(2):  # what joins parts must be ready for the next call
        linear16.linear(x, weight, bias, found)
    REFERENCE.linear(x, weight, bias, wanted)
    close(found, wanted)


@pytest.mark.parametrize(("inner", "outer"), [(512, 48), (2048, 64)])
def test_a_row_has_the_same_bits_alone_and_among_sixteen(inner: int, outer: int) -> None:
    x, weight = numbers(16, inner, 0), numbers(outer, inner, 1)
    alone, together = torch.empty(1, outer, dtype=torch.float16), torch.empty(16, outer, dtype=torch.float16)
    linear16.linear(x[5:6], weight, None, alone)
    linear16.linear(x, weight, None, together)
    assert torch.equal(alone[0], together[5])


def test_a_row_of_nan_stays_alone() -> None:
    x, weight = numbers(4, 64, 0), numbers(24, 64, 1)
    x[1, 7] = float("nan")
    found = torch.empty(4, 24, dtype=torch.float16)
    linear16.linear(x, weight, None, found)
    assert found[1].isnan().all() and not found[[0, 2, 3]].isnan().any()


def test_float32_and_no_rows() -> None:
    x, weight, out = numbers(3, 64, 0, torch.float32), numbers(8, 64, 1, torch.float32), torch.empty(3, 8)
    linear16.linear(x, weight, None, out)
    assert torch.allclose(out, x @ weight.T, rtol=1e-5)
    linear16.linear(x[:0].half(), weight.half(), None, out[:0].half())


@pytest.mark.parametrize(("rows", "inner", "width"), [(1, 64, 20), (1, 4104, 8), (2, 264, 72), (20, 136, 24), (64, 72, 16), (70, 64, 16), (3, 60, 12)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gated_products_agree_with_the_reference(rows: int, inner: int, width: int, with_bias: bool) -> None:
    x, weight = numbers(rows, inner + 8, 0)[:, :inner], numbers(2 * width, inner, 1) * 0.1
    bias = numbers(1, 2 * width, 2)[0] if with_bias else None
    both, found = torch.empty(rows, 2 * width, dtype=torch.float16), torch.full((rows, width), float("nan"), dtype=torch.float16)
    linear16.linear_silu(x, weight, bias, both, found)
    wanted = torch.empty(rows, width)
    REFERENCE.linear_silu(x.float(), weight.float(), None if bias is None else bias.float(), torch.empty(rows, 2 * width), wanted)
    close(found, wanted)


@pytest.mark.parametrize(
    ("rows", "dtype", "serves"), [(70, torch.float16, True), (64, torch.float16, False), (0, torch.float16, False), (70, torch.float32, False)]
)
def test_products_that_add_are_for_rows_without_a_kernel_here(rows: int, dtype: torch.dtype, serves: bool) -> None:
    x, weight, residual = numbers(rows, 64, 0, dtype), numbers(32, 64, 1, dtype), numbers(rows, 32, 2, dtype)
    found = residual.clone()
    assert linear16.linear_add(x, weight, found) is serves
    close(found, residual.float() + x.float() @ weight.float().t()) if serves else torch.testing.assert_close(found, residual, rtol=0, atol=0)
