"""The kernel that reads the slot tables, on the device, against torch."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.engine.batch import _find_places

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
places = pytest.importorskip("lmdeploy.kernels.triton_kernels.places")
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("counts", [[1], [1] * 256, [1, 1, 1000, 3], [1] * 64 + [500] + [0] * 15])
def test_a_step_finds_what_torch_finds(counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    lens = [count + int(torch.randint(0, 3000, (1,), generator=generator)) for count in counts]
    slots = torch.randperm(300, generator=generator)[: len(counts)]
    tokens = torch.randint(0, 90000, (300, 4097), generator=generator, dtype=torch.int32)
    blocks = torch.randint(0, 100000, (300, 65), generator=generator, dtype=torch.int32)
    positions = torch.cat([torch.arange(end - count, end) for end, count in zip(lens, counts, strict=True)])
    token_slots, starts = torch.repeat_interleave(slots, torch.tensor(counts)), torch.tensor([0, *counts]).cumsum(0)
    arguments = [x.cuda() for x in (positions, token_slots, slots, torch.tensor(lens), starts, tokens, blocks)]
    for found, wanted in zip(places.find_places(*arguments, 64, 64), _find_places(*arguments, 64, 64), strict=True):
        assert found.dtype is wanted.dtype and torch.equal(found, wanted)
