"""`embed_norm` on the GPU: the same bits as three operators give, also in a captured step whose first product overlaps with it."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.kernels.api import After

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
embedding = pytest.importorskip("lmdeploy.kernels.triton_kernels.embedding", reason="triton is not installed")
linear16 = pytest.importorskip("lmdeploy.kernels.triton_kernels.linear16")
norms = pytest.importorskip("lmdeploy.kernels.triton_kernels.norms")

DEVICE = torch.device("cuda", 0)
pytestmark = pytest.mark.gpu
EPS = 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 2048), (7, 4096), (300, 123)])
def test_it_does_what_three_operators_do(rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table, weight, ids = (
        torch.randn(1000, width, device=DEVICE).to(dtype),
        torch.randn(width, device=DEVICE).to(dtype),
        torch.randint(0, 1000, (rows,), device=DEVICE),
    )
    residual, found, wanted = (torch.full((rows, width), float("nan"), device=DEVICE).to(dtype) for _ in range(3))
    zeros = torch.ones(64, 64, dtype=torch.int64, device=DEVICE)
    embedding.embed_norm(ids, table, weight, EPS, residual, found, zeros)
    norms.rms_norm(table[ids], weight, EPS, wanted)
    assert torch.equal(residual, table[ids]) and torch.equal(found, wanted) and not zeros.any()


def test_steps_that_follow_each_other_begin_with_what_they_are_given() -> None:
    """The first product, and one that adds to what was set to zero, start while the embedding runs, and the embedding when all before has ended."""
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("kernels overlap from Hopper on")
    torch.manual_seed(0)
    table, weight, matrix = (torch.randn(*shape, device=DEVICE).bfloat16() for shape in ((1000, 2048), (2048,), (2048, 2048)))
    residual, normed, out = (torch.empty(1, 2048, device=DEVICE).bfloat16() for _ in range(3))
    squares, ids = torch.zeros(16, dtype=torch.int64, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def step() -> None:
        embedding.embed_norm(ids, table, weight, EPS, residual, normed, squares)
        linear16.launch(normed, matrix, None, out, False, None, After(residual, weight, squares))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(5):
            step()
    for token in range(20):
        ids.fill_(token)
        graph.replay()
        found = out.clone(), residual.clone(), squares.clone()
        embedding.embed_norm(ids, table, weight, EPS, residual, normed, squares)
        torch.cuda.synchronize()
        linear16.launch(normed, matrix, None, out, False, None, After(residual, weight, squares))
        assert all(torch.equal(one, other) for one, other in zip(found, (out, residual, squares), strict=True))
