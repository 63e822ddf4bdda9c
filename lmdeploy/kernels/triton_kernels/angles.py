"""Cosines and sines of a step's positions, by every kind of rotary embedding, in one launch: of a dynamic one torch makes sixteen, 37 us of each step on an H200.

The arithmetic is that of `layers/rope.py`, in the same order: float32, powers in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lmdeploy.kernels.api import RopeRule

Tensor = torch.Tensor
ROWS = 4  # of a program


@triton.jit(do_not_specialize=["num_tokens", "limit"])
def _angles_kernel(
    positions_ptr: tl.tensor, lengths_ptr: tl.tensor, frequencies_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, num_tokens: tl.tensor, limit: tl.tensor,
    BY_LENGTH: tl.constexpr, THETA: tl.constexpr, FACTOR: tl.constexpr, SHARE: tl.constexpr, POWER: tl.constexpr, SCALE: tl.constexpr,
    HALF: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """BY_LENGTH: lengths choose between two rows of frequencies or, with a THETA, stretch the base; SHARE is 1 / limit."""
    token, dim = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    live, inside = token < num_tokens, dim < HALF
    position = tl.load(positions_ptr + token, mask=live, other=0).to(tl.float32)
    if not BY_LENGTH:
        frequency = tl.load(frequencies_ptr + dim, mask=inside, other=0.0)[None, :]
    elif THETA == 0.0:
        long = tl.load(lengths_ptr + token, mask=live, other=0) > limit
        frequency = tl.load(frequencies_ptr + long.to(tl.int64)[:, None] * HALF + dim[None, :], mask=inside[None, :], other=0.0)
    else:
        length = tl.maximum(tl.load(lengths_ptr + token, mask=live, other=0), limit).to(tl.float32)
        stretch = FACTOR * length * SHARE - (FACTOR - 1.0)  # 1 up to the limit
        base = THETA * tl.exp2(tl.log2(stretch.to(tl.float64)) * tl.full([1], POWER, tl.float64)).to(tl.float32)
        exponent = tl.load(frequencies_ptr + dim, mask=inside, other=0.0).to(tl.float64)
        spread = tl.exp2(tl.log2(base.to(tl.float64))[:, None] * exponent[None, :]).to(tl.float32)
        frequency = tl.div_rn(tl.full([ROWS, PADDED], 1.0, tl.float32), spread)
    angle = position[:, None] * frequency
    at, wanted = token[:, None] * HALF + dim[None, :], live[:, None] & inside[None, :]
    tl.store(cos_ptr + at, tl.cos(angle) * SCALE, mask=wanted)
    tl.store(sin_ptr + at, tl.sin(angle) * SCALE, mask=wanted)


def rope_angles(positions: Tensor, rule: RopeRule, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [T, R/2], of positions int64 [T]; `lengths` int64 [T] where the rule depends on them."""
    (tokens,), half = positions.shape, rule.frequencies.shape[-1]
    assert (lengths is not None) or not rule.limit, "this rope needs the lengths that its frequencies depend on"
    cos, sin = (torch.empty((tokens, half), dtype=torch.float32, device=positions.device) for _ in range(2))
    if tokens:
        _angles_kernel[(triton.cdiv(tokens, ROWS),)](
            positions, lengths if lengths is not None else positions, rule.frequencies, cos, sin, tokens, rule.limit,
            BY_LENGTH=rule.limit > 0, THETA=rule.theta, FACTOR=rule.factor, SHARE=1.0 / max(rule.limit, 1), POWER=rule.power, SCALE=rule.scale,
            HALF=half, PADDED=triton.next_power_of_2(half), ROWS=ROWS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return cos, sin
