"""The kernel for cosines and sines, in Triton's interpreter, against what torch computes for every kind of rotary embedding."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.layers.rope import build_rope
from lmdeploy.spec import RopeSpec

angles = pytest.importorskip("lmdeploy.kernels.triton_kernels.angles", reason="triton is not installed")

FACTORS = tuple(1 + i / 6 for i in range(6))
KINDS = {
    "fixed": RopeSpec(rotary_dim=12, theta=10000.0),
    "with an attention factor": RopeSpec(kind="yarn", rotary_dim=12, theta=10000.0, factor=4.0, original_max_position=64),
    "dynamic": RopeSpec(kind="dynamic", rotary_dim=12, theta=1000000.0, factor=2.5, original_max_position=64),
    "longrope": RopeSpec(kind="longrope", rotary_dim=12, theta=10000.0, factor=4.0, original_max_position=64, short_factor=FACTORS, long_factor=FACTORS[::-1]),
}  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 4, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_cosines_and_sines_are_torchs(kind: str, tokens: int) -> None:
    spec = KINDS[kind]
    rope = build_rope(spec, torch.device("cpu"))
    positions = torch.tensor([100, 0, 5, 3000, 63, 64, 65])[:tokens]
    lengths = torch.tensor([4096, 1, 64, 65, 100, 3, 128])[:tokens] if spec.depends_on_length else None
    wanted = rope.cos_sin(positions, lengths)
    rope.kernel = angles.rope_angles
    for found, right in zip(rope.cos_sin(positions, lengths), wanted, strict=True):
        assert found.dtype is torch.float32 and found.shape == (tokens, 6)
        # an angle is a frequency, right to its last bit or so, times a position
        assert ((found - right).abs() <= 3e-7 * (1 + positions[:, None])).all()


def test_a_token_has_the_same_bits_in_any_batch() -> None:
    rope = build_rope(KINDS["dynamic"], torch.device("cpu"), angles.rope_angles)
    positions, lengths = torch.arange(300, 309), torch.arange(60, 96, 4)
    together = rope.cos_sin(positions, lengths)
    for row in range(9):
        alone = rope.cos_sin(positions[row : row + 1], lengths[row : row + 1])
        assert all(torch.equal(all_rows[row], one[0]) for all_rows, one in zip(together, alone, strict=True))


def test_a_rope_that_needs_lengths_says_so() -> None:
    rope = build_rope(KINDS["dynamic"], torch.device("cpu"), angles.rope_angles)
    with pytest.raises(AssertionError, match="lengths"):
        rope.cos_sin(torch.tensor([1]), None)
