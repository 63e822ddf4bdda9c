"""The kernel that reads the slot tables, in Triton's interpreter, against torch."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.engine.batch import _find_places

places = pytest.importorskip("lmdeploy.kernels.triton_kernels.places", reason="triton is not installed")


@pytest.mark.parametrize(("lens", "counts"), [([1], [1]), ([5, 300, 17], [1, 1, 9]), ([200, 1, 64, 65], [200, 1, 64, 1]), ([40, 1], [1, 0])])
def test_a_step_finds_what_torch_finds(lens: list[int], counts: list[int]) -> None:
    """A sequence of no tokens is room that a graph does not fill."""
    generator = torch.Generator().manual_seed(0)
    slots = torch.randperm(7, generator=generator)[: len(lens)]
    tokens = torch.randint(0, 90000, (7, 401), generator=generator, dtype=torch.int32)
    blocks = torch.randint(0, 1000, (7, 13), generator=generator, dtype=torch.int32)
    positions = torch.cat([torch.arange(end - count, end) for end, count in zip(lens, counts, strict=True)])
    token_slots = torch.repeat_interleave(slots, torch.tensor(counts))
    starts = torch.tensor([0, *counts]).cumsum(0)
    arguments = (positions, token_slots, slots, torch.tensor(lens), starts, tokens, blocks, 32, 10)
    for found, wanted in zip(places.find_places(*arguments), _find_places(*arguments), strict=True):
        assert found.dtype is wanted.dtype and torch.equal(found, wanted)
