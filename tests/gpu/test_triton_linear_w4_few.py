"""The Gluon kernel of few rows in 4 bits on the GPU, in the shapes of real models: right, the same bits whatever the other rows, and safe in a captured chain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lmdeploy.kernels.api import After, Before
from tests.kernels import normed_plain

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
few = pytest.importorskip("lmdeploy.kernels.triton_kernels.linear_w4_few", reason="a Triton without Gluon")
normed = pytest.importorskip("lmdeploy.kernels.triton_kernels.normed")

DEVICE = torch.device("cuda", 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.get_device_capability()[0] != 9, reason="its instructions are Hopper's")]
Tensor = torch.Tensor
#: hidden, feed-forward of a 1.8B and a 7B model
MODELS = [(2048, 8192), (4096, 14336)]
#: outer, inner, whether gate and up
SHAPES = [(5120, 5120, False)] + [
    (outer, inner, silu) for h, f in MODELS for outer, inner, silu in ((h, h, False), (2 * f, h, True), (h, f, False), (h + 2048, h, False))
]


def made(outer: int, inner: int) -> tuple[Tensor, Tensor, Tensor]:
    qweight = torch.randint(0, 256, (outer, inner // 2), device=DEVICE, dtype=torch.uint8)
    scales = ((torch.rand(outer, inner // 128, device=DEVICE) * 0.2 + 0.1) * inner**-0.5).half()
    return qweight, scales, torch.randint(0, 16, (outer, inner // 128), device=DEVICE, dtype=torch.uint8)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE).bfloat16()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_it_can_be_used_here() -> None:
    assert few.usable(DEVICE)
    served = [(rows, outer, inner) for rows in (1, 8, 16) for outer, inner, _ in SHAPES if few.serves(random(rows, inner), made(outer, inner))]
    assert (8, 28672, 4096) in served and (1, 28672, 4096) in served


@pytest.mark.parametrize("rows", range(1, 17))
@pytest.mark.parametrize(("outer", "inner", "silu"), SHAPES)
def test_a_product_agrees_with_float32_and_with_itself(outer: int, inner: int, silu: bool, rows: int) -> None:
    weight, x, bias = made(outer, inner), random(rows, inner), random(outer)
    if not few.serves(x, weight):
        pytest.skip("by another kernel")
    given = ((torch.rand(rows, device=DEVICE) + 0.5) * inner * normed_plain.UNIT).long()
    before = Before(given, 1e-5) if silu or outer > inner else None
    residual, gain = random(rows, outer), random(outer)
    results = []
    for product in (few.multiply, normed_plain.product, few.multiply):
        left, squares = residual.clone(), torch.zeros(16, dtype=torch.int64, device=DEVICE)
        out = torch.full((rows, outer // 2 if silu else outer), float("nan"), device=DEVICE).bfloat16()
        product(x, weight, bias, out, silu, before, None if before else After(left, gain, squares))
        results.append((out, left, squares))
    assert error(results[0][0], results[1][0]) < 6e-3 and error(results[0][1], results[1][1]) < 6e-3
    assert all(torch.equal(once, again) for once, again in zip(results[0], results[2], strict=True))
    assert not few.arrivals(DEVICE).any()


@pytest.mark.parametrize(("outer", "inner", "silu"), SHAPES)
def test_a_row_has_the_same_bits_among_others(outer: int, inner: int, silu: bool) -> None:
    weight, x = made(outer, inner), random(16, inner)

    def product(rows: slice) -> Tensor:
        out = torch.empty(len(range(16)[rows]), outer // 2 if silu else outer, device=DEVICE).bfloat16()
        few.multiply(x[rows], weight, None, out, silu)
        return out

    if few.serves(x[:8], weight):
        eight = product(slice(0, 8))
        assert torch.equal(product(slice(2, 5)), eight[2:5]) and torch.equal(product(slice(6, 8)), eight[6:8])
    if few.serves(x, weight):
        assert torch.equal(product(slice(3, 14)), product(slice(None))[3:14])


def chain(rows: int, hidden: int, width: int) -> tuple[Callable[[Callable[[], None]], None], tuple[Tensor, ...]]:
    """Products of a model of three layers, `between` being called after each one, and what they write."""
    shapes = ((hidden, hidden), (2 * width, hidden), (hidden, width), (hidden + 2048, hidden))
    layers = [[made(*shape) for shape in shapes] for _ in range(3)]
    x, start, gain = random(rows, hidden), random(rows, hidden), random(hidden)
    left, ready, act, qkv = start.clone(), *(torch.empty(rows, size, device=DEVICE).bfloat16() for size in (hidden, width, hidden + 2048))
    squares = torch.zeros(6, 16, dtype=torch.int64, device=DEVICE)

    def run(between: Callable[[], None]) -> None:
        left.copy_(start)
        squares.zero_()
        for i, (o, gate_up, down, last) in enumerate(layers):
            for arguments in (
                (x, o, None, ready, False, None, After(left, gain, squares[2 * i])),
                (ready, gate_up, None, act, True, Before(squares[2 * i], 1e-5), None),
                (act, down, None, ready, False, None, After(left, gain, squares[2 * i + 1])),
                (ready, last, None, qkv, False, Before(squares[2 * i + 1], 1e-5), None),
            ):
                normed.product(*arguments)
                between()

    return run, (left, act, qkv, squares)


@pytest.mark.parametrize("rows", [1, 3, 8, 16])
@pytest.mark.parametrize(("hidden", "width"), MODELS)
def test_a_captured_chain_of_kernels_that_overlap_is_that_of_one_after_the_other(rows: int, hidden: int, width: int) -> None:
    run, written = chain(rows, hidden, width)
    run(torch.cuda.synchronize)
    wanted = [part.clone() for part in written]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(lambda: None)
    for _ in range(20):
        for part in written:
            part.zero_()
        graph.replay()
        assert all(torch.equal(found, want) for found, want in zip(written, wanted, strict=True))
    assert wanted[0].isfinite().all() and wanted[2].isfinite().all()
