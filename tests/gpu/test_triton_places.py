"""The kernel that reads the slot tables, on the device, against torch."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.engine.batch import _find_places
from lmdeploy.layers.rope import build_rope
from lmdeploy.spec import RopeSpec

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
places = pytest.importorskip("lmdeploy.kernels.triton_kernels.places")
angles = pytest.importorskip("lmdeploy.kernels.triton_kernels.angles")
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
    lengths = torch.randint(1, 5000, (300,), generator=generator)
    arguments = [x.cuda() for x in (positions, token_slots, slots, torch.tensor(lens), starts, tokens, blocks, lengths)]
    for found, wanted in zip(places.find_places(*arguments, 64, 64), _find_places(*arguments, 64, 64), strict=True):
        assert found.dtype is wanted.dtype and torch.equal(found, wanted)


@pytest.mark.parametrize("tokens", [1, 8, 4096])
@pytest.mark.parametrize("kind", ["default", "dynamic", "yarn"])
def test_cosines_and_sines_are_those_of_torch_on_the_device(kind: str, tokens: int) -> None:
    """But for the last bit of a frequency, at the longest positions, too; and a token alone has the bits that it has in a batch."""
    spec = RopeSpec(kind=kind, theta=1e6, rotary_dim=128, factor=2.0, original_max_position=32768)
    device, generator = torch.device("cuda"), torch.Generator().manual_seed(0)
    positions, lengths = (torch.randint(0, 262144, (tokens,), generator=generator).cuda() for _ in range(2))
    rope = build_rope(spec, device)
    wanted = rope.cos_sin(positions, lengths)
    rope.kernel = angles.rope_angles
    found = rope.cos_sin(positions, lengths)
    for ours, right in zip(found, wanted, strict=True):
        assert ((ours - right).abs() <= 1.2e-7 * positions[:, None] + 1e-6).all()
    alone = rope.cos_sin(positions[-1:], lengths[-1:])
    assert all(torch.equal(one[0], many[-1]) for one, many in zip(alone, found, strict=True))
