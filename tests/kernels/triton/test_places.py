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
    lengths = torch.randint(1, 5000, (7,), generator=generator)
    arguments = (positions, token_slots, slots, torch.tensor(lens), starts, tokens, blocks, lengths, 32, 10)
    for found, wanted in zip(places.find_places(*arguments), _find_places(*arguments), strict=True):
        assert found.dtype is wanted.dtype and torch.equal(found, wanted)


def test_without_a_rope_that_depends_on_lengths_there_are_none() -> None:
    one = torch.zeros(1, dtype=torch.int64)
    tables = torch.ones((2, 70), dtype=torch.int32), torch.ones((2, 3), dtype=torch.int32)
    *_, ropes = places.find_places(one, one, one, one + 1, torch.tensor([0, 1]), *tables, None, 32, 3)
    assert ropes is None
