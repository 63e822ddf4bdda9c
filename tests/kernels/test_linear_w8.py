"""8-bit products on CPU against exact arithmetic for every instruction set of this CPU: weights alone, and with activations quantised
as they come. A row's bits do not depend on the batch or the number of threads."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.kernels.api import Kernels
from lmdeploy.kernels.build import NativeBuild
from lmdeploy.kernels.cpu import MAX_INT8_INPUTS, native_kernels
from lmdeploy.kernels.reference import REFERENCE, dequantise_w8, quantise_activations

Tensor = torch.Tensor
# Largest error relative to the largest result: the order of a float32 sum; one bfloat16 rounding of the result.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 5e-3}
FP8 = torch.float8_e4m3fn
EACH_DTYPE = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
EACH_WIDTH = pytest.mark.parametrize("width", [torch.int8, FP8], ids=str)
SIZES = [(256, 48), (640, 33), (130, 1), (100, 65), (64, 16), (37, 20), (1, 3), (193, 300)]


@pytest.fixture(scope="module")
def kernels(build: NativeBuild) -> Kernels:
    return native_kernels(build, threads=2)


@pytest.fixture(scope="module")
def best(best_build: NativeBuild) -> Kernels:
    return native_kernels(best_build, threads=2)


def make_x(rows: int, inner: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(rows, inner, generator=torch.Generator().manual_seed(seed)).to(dtype)


def every_code(width: torch.dtype) -> Tensor:
    """The 256 numbers of int8, the 254 of float8 that are numbers."""
    codes = torch.arange(256).to(torch.uint8).view(width)
    return codes if width is torch.int8 else codes.view(torch.uint8)[codes.float().isfinite()].view(width)


def make_weight(outer: int, inner: int, groups: int, width: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random codes; scales differ from group to group by a factor of 30, so that a mixed-up group shows."""
    random, codes = torch.Generator().manual_seed(seed), every_code(width)
    picked = torch.randint(0, len(codes), (outer, inner), generator=random)
    return codes.view(torch.uint8)[picked].view(width), torch.rand(outer, groups, generator=random) * 0.3 + 0.01


def empty(rows: int, outer: int, dtype: torch.dtype) -> Tensor:
    return torch.full((rows, outer), float("nan"), dtype=dtype)


def exact(x: Tensor, weight: tuple[Tensor, Tensor], bias: Tensor | None, weight_dtype: torch.dtype = torch.float32) -> Tensor:
    """In float64, with each weight rounded once to the type that it is multiplied in."""
    result = x.double() @ dequantise_w8(*weight, weight_dtype).double().t()
    return result if bias is None else result + bias.double()


def exact_w8a8(x: Tensor, weight: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
    """In float64, from the activations as the definition rounds them."""
    numbers, scale = quantise_activations(x, weight[0].dtype)
    return exact(numbers, weight, None) * scale.double() + (0 if bias is None else bias.double())


def assert_near(found: Tensor, wanted: Tensor) -> None:
    assert not found.isnan().any()
    scale = wanted.abs().max().item() if wanted.numel() else 0.0
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=TOLERANCE[found.dtype] * scale)


@EACH_WIDTH
@EACH_DTYPE
@pytest.mark.parametrize("rows", [0, 1, 3, 7, 16, 17, 33, 70])
def test_products_of_8_bit_weights_agree_with_exact_arithmetic_for_every_group_size_and_tail(
    kernels: Kernels, build: NativeBuild, width: torch.dtype, dtype: torch.dtype, rows: int
) -> None:
    for inner, outer in SIZES:
        for groups in {1, *(g for g in (4, 5) if inner % g == 0)}:
            x, weight = make_x(rows, inner, dtype), make_weight(outer, inner, groups, width)
            bias = make_x(1, outer, dtype, seed=2)[0] if rows % 2 else None
            out = empty(rows, outer, dtype)
            kernels.linear_w8(x, *weight, bias, out)
            assert_near(out, exact(x, weight, bias, dtype if build.variant == "amx" and groups > 1 else torch.float32))


@EACH_WIDTH
@EACH_DTYPE
@pytest.mark.parametrize("rows", [0, 1, 3, 7, 16, 17, 33, 70])
def test_products_of_8_bit_activations_agree_with_the_definition(kernels: Kernels, width: torch.dtype, dtype: torch.dtype, rows: int) -> None:
    for inner, outer in SIZES:
        x, weight = make_x(rows, inner, dtype), make_weight(outer, inner, 1, width)
        bias = make_x(1, outer, dtype, seed=2)[0] if rows % 2 else None
        out = empty(rows, outer, dtype)
        kernels.linear_w8a8(x, *weight, bias, out)
        assert_near(out, exact_w8a8(x, weight, bias))


def test_sums_of_int8_are_exact(kernels: Kernels) -> None:
    """Halves of the inputs cancel but for a few units, each half far beyond 2^24, where float32 sums drop the last bits; and the largest sums."""
    inner = 4096
    weight = torch.full((4, inner), -128, dtype=torch.int8)
    weight[1] = 127
    weight[2, : inner // 2], weight[2, 7] = 127, 126
    weight[2, inner // 2 :] = -127
    weight[3] = make_weight(1, inner, 1, torch.int8)[0]
    x, out = torch.full((1, inner), 127.0), empty(1, 4, torch.float32)
    kernels.linear_w8a8(x, weight, torch.ones(4, 1), None, out)
    assert torch.equal(out[0], (127 * weight.long().sum(-1)).float())
    assert out[0, 2] == -127


@EACH_WIDTH
def test_every_code_at_every_place_of_a_row_is_read(kernels: Kernels, width: torch.dtype) -> None:
    """One input at a time: the results are the weights themselves."""
    codes = every_code(width)
    inner = 192
    places = (torch.arange(len(codes)).unsqueeze(1) + torch.arange(inner)) % len(codes)  # each code in each column
    qweight = codes.view(torch.uint8)[places].view(width)
    for dtype in TOLERANCE:
        for groups in (1, 3, 6):
            scales = make_weight(len(codes), inner, groups, width)[1].to(dtype).float() if groups > 1 else torch.ones(len(codes), 1)
            out = empty(inner, len(codes), dtype)
            kernels.linear_w8(torch.eye(inner, dtype=dtype), qweight, scales, None, out)
            assert torch.equal(out.t(), dequantise_w8(qweight, scales, dtype)), (dtype, groups)


def test_nan_codes_of_float8_are_nan_and_stay_in_their_output(kernels: Kernels) -> None:
    for code in (0x7F, 0xFF):
        for dtype in TOLERANCE:
            for groups in (1, 2, 8):
                qweight, scales = make_weight(20, 128, groups, FP8)
                qweight.view(torch.uint8)[7, 100] = code
                out = empty(3, 20, dtype)
                kernels.linear_w8(make_x(3, 128, dtype), qweight, scales, None, out)
                assert out[:, 7].isnan().all() and not out[:, :7].isnan().any() and not out[:, 8:].isnan().any()


@EACH_WIDTH
@EACH_DTYPE
@pytest.mark.parametrize(("inner", "outer", "groups"), [(1152, 272, 1), (1152, 272, 9), (333, 77, 1), (100, 300, 5)])
def test_a_row_has_the_same_bits_alone_and_anywhere_in_any_batch(
    best: Kernels, width: torch.dtype, dtype: torch.dtype, inner: int, outer: int, groups: int
) -> None:
    weight, bias = make_weight(outer, inner, groups, width), make_x(1, outer, dtype, seed=2)[0]
    x = make_x(520, inner, dtype)
    for operator in (best.linear_w8, best.linear_w8a8)[: 1 + (groups == 1)]:
        wanted = empty(520, outer, dtype)
        for row in range(520):
            operator(x[row : row + 1], *weight, bias, wanted[row : row + 1])
        for rows in (2, 4, 5, 8, 9, 16, 17, 32, 33, 100, 512, 513, 520):
            out = empty(rows, outer, dtype)
            operator(x[520 - rows :], *weight, bias, out)
            assert torch.equal(out, wanted[520 - rows :]), (operator, rows)


@EACH_WIDTH
@EACH_DTYPE
@pytest.mark.parametrize("rows", [1, 20, 70, 300])
def test_the_number_of_threads_changes_no_bit(best_build: NativeBuild, width: torch.dtype, dtype: torch.dtype, rows: int) -> None:
    x, weight = make_x(rows, 2048, dtype), make_weight(1616, 2048, 1, width)  # large enough to be shared
    for name, wanted in (("linear_w8", exact(x, weight, None)), ("linear_w8a8", exact_w8a8(x, weight, None))):
        results = []
        for threads in (1, 2, 3):
            results.append(empty(rows, 1616, dtype))
            getattr(native_kernels(best_build, threads), name)(x, *weight, None, results[-1])
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        assert_near(results[0], wanted)


@EACH_WIDTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rows", [3, 40])
def test_activations_that_are_not_finite_stay_in_their_row(kernels: Kernels, width: torch.dtype, bad: float, rows: int) -> None:
    for dtype in TOLERANCE:
        x, weight = make_x(rows, 200, dtype), make_weight(33, 200, 1, width)
        clean = [empty(rows, 33, dtype) for _ in range(2)]
        kernels.linear_w8(x, *weight, None, clean[0])
        kernels.linear_w8a8(x, *weight, None, clean[1])
        x[1, 150] = bad
        for operator, before in zip((kernels.linear_w8, kernels.linear_w8a8), clean, strict=True):
            out = empty(rows, 33, dtype)
            operator(x, *weight, None, out)
            others = torch.arange(rows) != 1
            assert torch.equal(out[others], before[others])
            assert not out[1].isfinite().any() if operator is kernels.linear_w8 else out[1].isnan().all()


@EACH_WIDTH
def test_rows_of_zeros_and_of_the_smallest_numbers_are_quantised_too(kernels: Kernels, width: torch.dtype) -> None:
    x = torch.zeros(4, 70)
    x[1] = torch.linspace(-1, 1, 70) * 2e-43  # denormal: the scale itself has few bits
    x[2, 3], x[3] = 1e-45, make_x(1, 70, torch.float32)[0] * 1e37
    weight, out, wanted = make_weight(20, 70, 1, width), empty(4, 20, torch.float32), empty(4, 20, torch.float32)
    kernels.linear_w8a8(x, *weight, None, out)
    REFERENCE.linear_w8a8(x, *weight, None, wanted)
    assert not out[0].any()
    for row in range(4):
        assert_near(out[row], wanted[row].double())


@EACH_WIDTH
def test_strided_rows_are_read_and_nothing_around_the_output_is_written(kernels: Kernels, width: torch.dtype) -> None:
    for dtype in TOLERANCE:
        wide, weight = make_x(5, 320, dtype), make_weight(19, 192, 1, width)
        x = wide[:, 16:208]
        for operator, wanted in ((kernels.linear_w8, exact(x, weight, None)), (kernels.linear_w8a8, exact_w8a8(x, weight, None))):
            frame = torch.zeros(5, 40, dtype=dtype)
            operator(x, *weight, None, frame[:, 10:29])
            assert_near(frame[:, 10:29], wanted)
            assert not frame[:, :10].any() and not frame[:, 29:].any()


def test_other_types_layouts_and_sizes_go_to_torch(kernels: Kernels) -> None:
    weight = make_weight(8, 64, 1, torch.int8)
    x, out, wanted = make_x(3, 64, torch.float16), empty(3, 8, torch.float16), empty(3, 8, torch.float16)
    for name in ("linear_w8", "linear_w8a8"):
        getattr(kernels, name)(x, *weight, None, out)
        getattr(REFERENCE, name)(x, *weight, None, wanted)
        assert torch.equal(out, wanted)
    strided = (weight[0].t().contiguous().t(), weight[1])
    out32 = empty(3, 8, torch.float32)
    kernels.linear_w8(x.float(), *strided, None, out32)
    assert_near(out32, exact(x, weight, None))
    long = torch.full((1, MAX_INT8_INPUTS + 64), -128, dtype=torch.int8)
    single = empty(1, 1, torch.float32)
    kernels.linear_w8a8(torch.ones(1, MAX_INT8_INPUTS + 64), long, torch.ones(1, 1), None, single)
    assert single.item() == pytest.approx(-128.0 * (MAX_INT8_INPUTS + 64))
