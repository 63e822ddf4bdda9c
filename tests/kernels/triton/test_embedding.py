"""Triton's `embed_norm` in its interpreter: the same bits as from operators of their own."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.paged import Shape, numbers

embedding = pytest.importorskip("lmdeploy.kernels.triton_kernels.embedding", reason="triton is not installed")
norms = pytest.importorskip("lmdeploy.kernels.triton_kernels.norms")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "width", "zeros"), [(5, 123, 700), (1, 512, 4096), (3, 640, None), (0, 8, 3)])
def test_embedding_norm_and_zeros_in_one_launch(dtype: torch.dtype, rows: int, width: int, zeros: int | None) -> None:
    shape = Shape(1, 1, 1, dtype=dtype)
    table, weight, ids = numbers(shape, 0, 50, width), numbers(shape, 1, width), torch.arange(49, 49 - rows, -1)
    residual, found, wanted = (torch.full((rows, width), float("nan"), dtype=dtype) for _ in range(3))
    counts = None if zeros is None else torch.ones(zeros, dtype=torch.int64)
    embedding.embed_norm(ids, table, weight, 1e-5, residual, found, counts)
    norms.rms_norm(table[ids], weight, 1e-5, wanted)
    assert torch.equal(residual, table[ids]) and torch.equal(found, wanted)
    assert counts is None or rows == 0 or not counts.any()
