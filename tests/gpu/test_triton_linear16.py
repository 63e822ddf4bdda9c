"""Triton's products with 16-bit weights on the GPU, in the shapes of real models: right, the same bits whatever the other rows, and safe in a chain."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
linear16 = pytest.importorskip("lmdeploy.kernels.triton_kernels.linear16")
norms = pytest.importorskip("lmdeploy.kernels.triton_kernels.norms")

pytestmark = pytest.mark.gpu
Tensor = torch.Tensor
DEVICE = torch.device("cuda", 0)
#: inputs, outputs: qkv, o, gate_up, down and head of a 1.8B and a 7B model, ragged ones, and one that cuBLAS computes
SHAPES = [(2048, 4096), (2048, 2048), (2048, 16384), (8192, 2048), (2048, 92544), (4096, 6144), (4096, 28672), (14336, 4096), (3080, 1000), (72, 40), (172, 72)]
STEP = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def made(rows: int, inner: int, outer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, a part of a wider buffer; weight; bias."""
    x, weight = torch.randn(rows, inner + 8, device=DEVICE).to(dtype)[:, :inner], torch.randn(outer, inner, device=DEVICE).to(dtype) * 0.05
    return x, weight, torch.randn(outer, device=DEVICE).to(dtype)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.full((x.shape[0], weight.shape[0]), float("nan"), dtype=x.dtype, device=DEVICE)
    linear16.linear(x, weight, bias, out)
    return out


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 65])
@pytest.mark.parametrize(("inner", "outer", "dtype"), [*((*shape, torch.bfloat16) for shape in SHAPES), (2048, 4096, torch.float16)])
def test_products_agree_with_float32(rows: int, inner: int, outer: int, dtype: torch.dtype) -> None:
    """Odd numbers of rows with a bias: each variant is compiled, which takes most of the time."""
    x, weight, bias = made(rows, inner, outer, dtype)
    wanted = x.float() @ weight.float().T + (bias.float() if rows % 2 else 0)
    assert (product(x, weight, bias if rows % 2 else None).float() - wanted).abs().max() <= STEP[dtype] * wanted.abs().max()


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 65])
@pytest.mark.parametrize(("inner", "width"), [(2048, 8192), (4096, 14336), (8192, 1000), (72, 40), (172, 36)])
def test_gated_products_agree_with_float32(rows: int, inner: int, width: int) -> None:
    x, weight, bias = made(rows, inner, 2 * width, torch.bfloat16)
    both, out = (torch.full((rows, size), float("nan"), dtype=x.dtype, device=DEVICE) for size in (2 * width, width))
    linear16.linear_silu(x, weight, bias if rows % 2 else None, both, out)
    gate, up = (x.float() @ weight.float().T + (bias.float() if rows % 2 else 0)).chunk(2, dim=1)
    wanted = torch.nn.functional.silu(gate) * up
    assert (out.float() - wanted).abs().max() <= STEP[torch.bfloat16] * wanted.abs().max()


@pytest.mark.parametrize("rows", [129, 700, 4096])
@pytest.mark.parametrize(("inner", "outer", "dtype"), [(2048, 2048, torch.bfloat16), (14336, 4096, torch.bfloat16), (172, 72, torch.float16)])
def test_products_that_add_agree_with_float32(rows: int, inner: int, outer: int, dtype: torch.dtype) -> None:
    (x, weight, _), residual = made(rows, inner, outer, dtype), torch.randn(rows, outer, device=DEVICE).to(dtype)
    wanted = residual.float() + x.float() @ weight.float().T
    assert linear16.linear_add(x, weight, residual)
    assert (residual.float() - wanted).abs().max() <= STEP[dtype] * wanted.abs().max()


@pytest.mark.parametrize(("inner", "outer"), SHAPES[:8])
def test_a_row_has_the_same_bits_whatever_the_others_of_its_bucket(inner: int, outer: int) -> None:
    x, weight, _ = made(64, inner, outer, torch.bfloat16)
    for few, many in ((2, 16), (17, 32), (33, 64)):
        assert torch.equal(product(x[:few], weight, None), product(x[:many], weight, None)[:few])


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_a_chain_in_a_graph_gives_the_bits_of_calls_one_by_one(rows: int) -> None:
    """Kernels that start early must neither read too early nor overwrite what is still read: many products on the same few buffers, some of them split."""
    width, layers = 2048, 24
    weights = [torch.randn(width, width, device=DEVICE).bfloat16() * 0.05 for _ in range(layers)]
    scale, first = torch.ones(width, device=DEVICE).bfloat16(), torch.randn(rows, width, device=DEVICE).bfloat16()
    residual, normed, mixed = (torch.empty_like(first) for _ in range(3))

    def chain(between: object) -> None:
        torch.mul(first, 1, out=residual)
        norms.rms_norm(residual, scale, 1e-5, normed)
        for weight in weights:
            for call in (lambda w=weight: linear16.linear(normed, w, None, mixed), lambda: norms.add_rms_norm(mixed, residual, scale, 1e-5, normed)):
                call()
                if between is not None:
                    torch.cuda.synchronize()

    chain("wait")
    wanted = normed.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(None)
    for _ in range(20):
        normed.fill_(float("nan"))
        mixed.fill_(float("nan"))
        graph.replay()
        assert torch.equal(normed, wanted)
