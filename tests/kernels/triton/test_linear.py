"""Triton's products with quantised weights, in its interpreter, against the reference. (bfloat16 is met on the GPU: the interpreter cannot multiply it.)"""

from __future__ import annotations

import pytest
import torch

from lmdeploy.kernels.reference import REFERENCE

linear = pytest.importorskip("lmdeploy.kernels.triton_kernels.linear", reason="triton is not installed")
linear_w8 = pytest.importorskip("lmdeploy.kernels.triton_kernels.linear_w8")

Tensor = torch.Tensor
#: rows, inputs, outputs, group: one row, ragged edges, groups below and above a tile, several tiles of rows
SHAPES = [(1, 64, 40, 32), (17, 128, 24, 64), (5, 172, 30, 86), (3, 40, 16, 2), (70, 256, 72, 128), (2, 96, 130, 96), (9, 384, 33, 128), (33, 512, 72, 256)]
DTYPES = [torch.float32, torch.float16]


def activations(rows: int, inner: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows that are parts of wider ones."""
    return torch.randn(rows, inner + 8, generator=torch.Generator().manual_seed(seed)).to(dtype)[:, :inner]


def numbers(shape: tuple[int, int], kind: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind is torch.float8_e4m3fn:
        return (torch.randn(shape, generator=generator) * 30).to(kind)
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


def close(found: Tensor, wanted: Tensor) -> None:
    step = {torch.float32: 1e-5, torch.float16: 2e-3}[wanted.dtype]
    assert (found.float() - wanted.float()).abs().max() <= step * wanted.float().abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner", "outer", "group"), SHAPES)
def test_w4(rows: int, inner: int, outer: int, group: int, dtype: torch.dtype) -> None:
    x, bias = activations(rows, inner, dtype), activations(1, outer, dtype, 2)[0].contiguous()
    qweight = torch.randint(0, 256, (outer, inner // 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    scales = torch.rand(outer, inner // group, generator=torch.Generator().manual_seed(4)) * 0.1
    zeros = torch.randint(0, 16, scales.shape, generator=torch.Generator().manual_seed(5)).float()
    found, wanted = (torch.full((rows, outer), float("nan"), dtype=dtype) for _ in range(2))
    for extra in (bias, None):
        linear.linear_w4(x, qweight, scales, zeros, extra, found)
        REFERENCE.linear_w4(x, qweight, scales, zeros, extra, wanted)
        close(found, wanted)


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner", "outer", "group"), SHAPES)
def test_w8(rows: int, inner: int, outer: int, group: int, dtype: torch.dtype, kind: torch.dtype) -> None:
    x, weight, bias = activations(rows, inner, dtype), numbers((outer, inner), kind), activations(1, outer, dtype, 2)[0].contiguous()
    for groups in (inner // group, 1):
        scales = torch.rand(outer, groups, generator=torch.Generator().manual_seed(4)) * 0.01
        found, wanted = (torch.full((rows, outer), float("nan"), dtype=dtype) for _ in range(2))
        for product in (linear.linear_w8, linear_w8.linear_w8):
            product(x, weight, scales, bias, found.fill_(float("nan")))
            REFERENCE.linear_w8(x, weight, scales, bias, wanted)
            close(found, wanted)


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner", "outer", "group"), SHAPES)
def test_w8a8(rows: int, inner: int, outer: int, group: int, dtype: torch.dtype, kind: torch.dtype) -> None:
    x, weight = activations(rows, inner, dtype), numbers((outer, inner), kind)
    scales, bias = torch.rand(outer, 1, generator=torch.Generator().manual_seed(4)) * 0.01, activations(1, outer, dtype, 2)[0].contiguous()
    found, wanted = (torch.full((rows, outer), float("nan"), dtype=dtype) for _ in range(2))
    linear.linear_w8a8(x, weight, scales, bias, found)
    REFERENCE.linear_w8a8(x, weight, scales, bias, wanted)
    close(found, wanted)


def test_a_row_of_nan_or_zeros_stays_alone() -> None:
    x, weight, scales = activations(4, 64, torch.float32), numbers((24, 64), torch.int8), torch.rand(24, 1)
    x[1, 7], x[2] = float("nan"), 0
    found, wanted = (torch.zeros(4, 24) for _ in range(2))
    linear.linear_w8a8(x, weight, scales, None, found)
    REFERENCE.linear_w8a8(x, weight, scales, None, wanted)
    assert found[1].isnan().all() and torch.equal(found[2], torch.zeros(24))
    close(found[[0, 3]], wanted[[0, 3]])


@pytest.mark.parametrize(("rows", "dtype"), [(16, torch.float32), (8, torch.float16)])
def test_a_row_has_the_same_bits_alone_and_among_others(rows: int, dtype: torch.dtype) -> None:
    weight, scales = numbers((40, 128), torch.int8), torch.rand(40, 2)
    x = activations(rows, 128, dtype)
    alone, together = torch.empty(1, 40, dtype=dtype), torch.empty(rows, 40, dtype=dtype)
    linear_w8.linear_w8(x[5:6], weight, scales, None, alone)
    linear_w8.linear_w8(x, weight, scales, None, together)
    assert torch.equal(alone[0], together[5])


def test_no_rows_are_no_work() -> None:
    for product in (linear.linear_w8, linear_w8.linear_w8):
        product(torch.empty(0, 64).half(), numbers((8, 64), torch.int8), torch.rand(8, 1), None, torch.empty(0, 8).half())


def test_every_number_rounds_to_the_nearest_float8() -> None:
    x = torch.cat([activations(1, 4096, torch.float32)[0] * torch.logspace(-8, 2, 4096), torch.tensor([448.0, -448.0, 2**-9, 2**-10, 0.0])]).clamp(-448, 448)
    scales, weight = torch.ones(1, 1), torch.ones(1, x.numel()).to(torch.float8_e4m3fn)
    for row in x.view(-1, 1)[::97]:  # each alone with 448, so that its scale is 1
        pair = torch.tensor([[448.0, float(row)]])
        found, wanted = torch.empty(1, 1), torch.empty(1, 1)
        linear.linear_w8a8(pair, weight[:, :2].contiguous(), scales, None, found)
        REFERENCE.linear_w8a8(pair, weight[:, :2].contiguous(), scales, None, wanted)
        assert torch.equal(found, wanted), float(row)
