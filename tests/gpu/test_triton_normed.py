"""Triton's products with norms inside on the GPU, in the shapes of real models: right, the same bits whatever the other rows, and safe in a chain."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.kernels.api import After, Before
from tests.kernels import normed_plain

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
normed = pytest.importorskip("lmdeploy.kernels.triton_kernels.normed")
norms = pytest.importorskip("lmdeploy.kernels.triton_kernels.norms")

DEVICE = torch.device("cuda", 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.get_device_capability() < (9, 0), reason="norms are operators of their own before Hopper")]
Tensor = torch.Tensor
#: hidden, feed-forward of a 1.8B and a 7B model
MODELS = [(2048, 8192), (4096, 14336)]


def made(outer: int, inner: int, bits: int = 16) -> tuple[Tensor, ...]:
    if bits == 16:
        return ((torch.randn(outer, inner, device=DEVICE) * inner**-0.5).bfloat16(),)
    qweight = torch.randint(0, 256, (outer, inner // 2), device=DEVICE, dtype=torch.uint8)
    scales = ((torch.rand(outer, inner // 128, device=DEVICE) * 0.2 + 0.1) * inner**-0.5).half()
    return qweight, scales, torch.randint(0, 16, (outer, inner // 128), device=DEVICE, dtype=torch.uint8)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("rows", "bits"), [(1, 16), (3, 16), (8, 16), (16, 16), (33, 16), (64, 16), (1, 4), (3, 4), (8, 4), (16, 4)])
@pytest.mark.parametrize(("hidden", "width"), MODELS)
def test_a_layer_of_products_agrees_with_plain_torch(bits: int, rows: int, hidden: int, width: int) -> None:
    """attention output -> residual -> gate_up -> down -> residual -> qkv, twice with the same buffers."""
    weights = [made(*shape, bits) for shape in ((hidden, hidden), (2 * width, hidden), (hidden, width), (hidden + 2048, hidden))]
    assert all(normed.rows_served(weight, weight[0].shape[0] // (2 if i == 1 else 1), torch.bfloat16) >= rows for i, weight in enumerate(weights))
    x, residual = torch.randn(rows, hidden, device=DEVICE).bfloat16(), torch.randn(rows, hidden, device=DEVICE).bfloat16()
    gains = [(torch.rand(hidden, device=DEVICE) + 0.5).bfloat16() for _ in range(2)]
    results = []
    for product in (normed.product, normed_plain.product, normed.product):
        left, squares = residual.clone(), torch.zeros(2, 64, dtype=torch.int64, device=DEVICE)
        ready, act, qkv = (torch.full((rows, n), float("nan"), device=DEVICE).bfloat16() for n in (hidden, width, hidden + 2048))
        product(x, weights[0], None, ready, False, None, After(left, gains[0], squares[0]))
        product(ready, weights[1], None, act, True, Before(squares[0], 1e-5), None)
        product(act, weights[2], None, ready, False, None, After(left, gains[1], squares[1]))
        product(ready, weights[3], None, qkv, False, Before(squares[1], 1e-5), None)
        results.append((left, act, qkv, squares))
    for found, wanted in zip(results[0][:3], results[1][:3], strict=True):
        assert error(found, wanted) < 6e-3
    assert all(torch.equal(once, again) for once, again in zip(results[0], results[2], strict=True))


@pytest.mark.parametrize(("rows", "bits"), [(1, 16), (8, 16), (64, 16), (1, 4), (8, 4), (16, 4)])
def test_it_agrees_with_the_operators_that_it_replaces(rows: int, bits: int) -> None:
    weight, gain = made(2048, 2048, bits), (torch.rand(2048, device=DEVICE) + 0.5).bfloat16()
    x, residual = (torch.randn(rows, 2048, device=DEVICE).bfloat16() for _ in range(2))
    ready, plain, wanted = (torch.empty_like(x) for _ in range(3))
    mine, theirs, squares = residual.clone(), residual.clone(), torch.zeros(64, dtype=torch.int64, device=DEVICE)
    normed.product(x, weight, None, ready, False, None, After(mine, gain, squares))
    normed.product(x, weight, None, plain, False)
    norms.add_rms_norm(plain, theirs, gain, 1e-5, wanted)
    assert torch.equal(mine, theirs)
    inverse = torch.rsqrt(squares[:rows, None] / normed_plain.UNIT / 2048 + 1e-5)
    assert error(ready * inverse, wanted) < 4e-3


@pytest.mark.parametrize(("inner", "outer"), [(2048, 2048), (2048, 4096), (4096, 6144), (4096, 4096)])
def test_a_row_has_the_same_bits_among_others(inner: int, outer: int) -> None:
    weight, x = made(outer, inner), torch.randn(8, inner, device=DEVICE).bfloat16()
    together, pair = (torch.empty(rows, outer, device=DEVICE, dtype=torch.bfloat16) for rows in (8, 2))
    normed.product(x, weight, None, together, False)
    normed.product(x[3:5], weight, None, pair, False)
    assert torch.equal(together[3:5], pair)
