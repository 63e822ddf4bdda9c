"""Weights arrive on the device as they are in the file, whatever their size, shape and type, however fast one follows the other."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.checkpoint.staging import Staging

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_tensors_of_any_kind_arrive_whole() -> None:
    staging = Staging(4 << 20)
    generator = torch.Generator().manual_seed(1)
    kinds = [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]
    pairs = []
    for count in (1, 1000, 300_000, 900_000, 3_000_000):  # below, within and above what is staged
        for stored, wanted in kinds * 3:
            source = torch.randn(count, 2, generator=generator).to(stored)
            view = source[:, 0] if count % 7 == 1 else source
            out = torch.empty(view.shape, dtype=wanted, device="cuda")
            staging.copy(out, view)
            pairs.append((out, view.to(wanted)))
            source = None
    for out, expected in pairs:
        assert torch.equal(out.cpu(), expected)
    staging.close()
    out = torch.empty(400_000, device="cuda")
    staging.copy(out, torch.ones(400_000))  # may be used again
    assert bool((out == 1).all())
