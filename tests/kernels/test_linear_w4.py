"""4-bit products on CPU against exact arithmetic for every instruction set of this CPU, and the promise of the native kernels:
a row's bits do not depend on the batch or the number of threads."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.kernels.api import Kernels
from lmdeploy.kernels.build import NativeBuild
from lmdeploy.kernels.cpu import native_kernels
from lmdeploy.kernels.reference import REFERENCE, dequantise_w4

Tensor = torch.Tensor
# Largest error relative to the largest result: the order of a float32 sum; one bfloat16 rounding of the result.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 5e-3}
EACH_DTYPE = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


@pytest.fixture(scope="module")
def kernels(build: NativeBuild) -> Kernels:
    return native_kernels(build, threads=2)


@pytest.fixture(scope="module")
def best(best_build: NativeBuild) -> Kernels:
    return native_kernels(best_build, threads=2)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_x(rows: int, inner: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(rows, inner, generator=seeded(seed)).to(dtype)


def make_weight(outer: int, inner: int, group: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes; scales differ from group to group by a factor of 30, so that a mixed-up group shows; some are below float16's normal numbers."""
    random = seeded(seed)
    qweight = torch.randint(0, 256, (outer, inner // 2), generator=random, dtype=torch.uint8)
    scales = (torch.rand(outer, inner // group, generator=random) * 0.3 + 0.01).half()
    scales[::7] *= 1e-4
    return qweight, scales, torch.randint(0, 17, scales.shape, generator=random, dtype=torch.uint8)


def empty(rows: int, outer: int, dtype: torch.dtype) -> Tensor:
    return torch.full((rows, outer), float("nan"), dtype=dtype)


def exact(x: Tensor, weight: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, weight_dtype: torch.dtype) -> Tensor:
    """In float64, with each weight rounded once to the type that it is multiplied in."""
    result = x.double() @ dequantise_w4(*weight, weight_dtype).double().t()
    return result if bias is None else result + bias.double()


def assert_near(found: Tensor, wanted: Tensor) -> None:
    assert not found.isnan().any()
    scale = wanted.abs().max().item() if wanted.numel() else 0.0
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=TOLERANCE[found.dtype] * scale)


@EACH_DTYPE
@pytest.mark.parametrize("rows", [0, 1, 3, 16, 17, 33, 70])
@pytest.mark.parametrize(
    ("inner", "outer", "group"),
    [
        (256, 48, 128),
        (512, 33, 256),
        (128, 1, 64),
        (320, 65, 64),
        (192, 20, 32),
        (96, 16, 32),
        (224, 300, 224),
        (160, 31, 2),
        (144, 17, 48),
        (30, 5, 10),
        (2, 3, 2),
    ],
)
def test_products_agree_with_exact_arithmetic_for_every_group_size_and_tail(
    kernels: Kernels, build: NativeBuild, dtype: torch.dtype, rows: int, inner: int, outer: int, group: int
) -> None:
    x, weight = make_x(rows, inner, dtype), make_weight(outer, inner, group)
    bias = make_x(1, outer, dtype, seed=2)[0] if rows % 2 else None
    out = empty(rows, outer, dtype)
    kernels.linear_w4(x, *weight, bias, out)
    rounded = dtype if build.variant == "amx" else torch.float32
    assert_near(out, exact(x, weight, bias, rounded))


def test_every_code_at_every_place_of_a_row_is_read(kernels: Kernels) -> None:
    """One input at a time: the results are the weights themselves."""
    for dtype in TOLERANCE:
        for inner, group in ((384, 128), (128, 64), (160, 32), (36, 12)):
            weight = make_weight(40, inner, group, seed=inner)
            out = empty(inner, 40, dtype)
            kernels.linear_w4(torch.eye(inner, dtype=dtype), *weight, None, out)
            assert torch.equal(out.t(), dequantise_w4(*weight, dtype)), (dtype, inner, group)


@EACH_DTYPE
@pytest.mark.parametrize(("inner", "outer", "group"), [(1152, 272, 128), (320, 77, 64), (160, 300, 32), (100, 40, 20)])
def test_a_row_has_the_same_bits_alone_and_anywhere_in_any_batch(best: Kernels, dtype: torch.dtype, inner: int, outer: int, group: int) -> None:
    weight, bias = make_weight(outer, inner, group), make_x(1, outer, dtype, seed=2)[0]
    x, wanted = make_x(600, inner, dtype), empty(600, outer, dtype)
    for row in range(600):
        best.linear_w4(x[row : row + 1], *weight, bias, wanted[row : row + 1])
    for rows in (2, 5, 15, 16, 17, 31, 32, 33, 64, 100, 511, 512, 513, 600):
        out = empty(rows, outer, dtype)
        best.linear_w4(x[600 - rows :], *weight, bias, out)
        assert torch.equal(out, wanted[600 - rows :]), rows


@EACH_DTYPE
@pytest.mark.parametrize("rows", [1, 20, 70])
def test_the_number_of_threads_changes_no_bit(best_build: NativeBuild, dtype: torch.dtype, rows: int) -> None:
    x, weight = make_x(rows, 2048, dtype), make_weight(1616, 2048, 128)  # large enough to be shared
    results = []
    for threads in (1, 2, 3):
        results.append(empty(rows, 1616, dtype))
        native_kernels(best_build, threads).linear_w4(x, *weight, None, results[-1])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert_near(results[0], exact(x, weight, None, dtype))


@EACH_DTYPE
@pytest.mark.parametrize(("inner", "group"), [(256, 128), (192, 64), (160, 32), (72, 36)])
def test_scales_and_zeros_may_be_float32(kernels: Kernels, build: NativeBuild, dtype: torch.dtype, inner: int, group: int) -> None:
    qweight, scales, zeros = make_weight(37, inner, group)
    wide = (qweight, scales.float() * 1.0001, zeros.float() + 0.3)
    x, out = make_x(5, inner, dtype), empty(5, 37, dtype)
    kernels.linear_w4(x, *wide, None, out)
    assert_near(out, exact(x, wide, None, dtype if build.variant == "amx" else torch.float32))


def test_strided_rows_are_read_and_nothing_around_the_output_is_written(kernels: Kernels) -> None:
    for dtype in TOLERANCE:
        wide, weight, frame = make_x(5, 320, dtype), make_weight(19, 192, 64), torch.zeros(5, 40, dtype=dtype)
        kernels.linear_w4(wide[:, 16:208], *weight, None, frame[:, 10:29])
        assert_near(frame[:, 10:29], exact(wide[:, 16:208], weight, None, torch.float32))
        assert not frame[:, :10].any() and not frame[:, 29:].any()


def test_other_types_and_layouts_go_to_torch(kernels: Kernels) -> None:
    weight = make_weight(8, 64, 32)
    x, out, wanted = make_x(3, 64, torch.float16), empty(3, 8, torch.float16), empty(3, 8, torch.float16)
    kernels.linear_w4(x, *weight, None, out)
    REFERENCE.linear_w4(x, *weight, None, wanted)
    assert torch.equal(out, wanted)
    strided, mixed = (weight[0].t().contiguous().t(), *weight[1:]), (*weight[:2], weight[2].float())
    for other in (strided, mixed):
        out32 = empty(3, 8, torch.float32)
        kernels.linear_w4(x.float(), *other, None, out32)
        assert_near(out32, exact(x, weight, None, torch.float32))
