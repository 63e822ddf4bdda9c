"""`choose_experts` in one launch instead of torch's half dozen: softmax of the router's scores, the likeliest experts, and their shares."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lmdeploy.kernels.triton_kernels.overlap import after_previous, overlaps

Tensor = torch.Tensor


@triton.jit
def _choose_kernel(
    scores: tl.tensor, chosen: tl.tensor, weights: tl.tensor, score_row: tl.tensor,
    COUNT: tl.constexpr, CHOICES: tl.constexpr, NORMALISE: tl.constexpr, BINS: tl.constexpr, PLACES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One token. Of equal scores the first expert comes first; a row that holds NaN chooses somehow, and all its weights are NaN."""
    after_previous(PDL)
    token, bins, places = tl.program_id(0).to(tl.int64), tl.arange(0, BINS), tl.arange(0, PLACES)
    score = tl.load(scores + token * score_row + bins, mask=bins < COUNT, other=-float("inf")).to(tl.float32)
    share = tl.exp(score - tl.max(score, 0))
    share = share / tl.sum(share, 0)
    bad = tl.max(((share != share) & (bins < COUNT)).to(tl.int32), 0) > 0
    share = tl.where(bins < COUNT, tl.where(share != share, 0.0, share), -1.0)
    best, which = tl.zeros((PLACES,), dtype=tl.float32), tl.zeros((PLACES,), dtype=tl.int64)
    for place in tl.static_range(CHOICES):
        most, expert = tl.max(share, 0, return_indices=True)
        best, which = tl.where(places == place, most, best), tl.where(places == place, expert.to(tl.int64), which)
        share = tl.where(bins == expert, -1.0, share)  # below all that are left
    if NORMALISE:
        best = best / tl.sum(best, 0)
    tl.store(weights + token * CHOICES + places, tl.where(bad, float("nan"), best), mask=places < CHOICES)
    tl.store(chosen + token * CHOICES + places, which, mask=places < CHOICES)


def choose_experts(scores: Tensor, normalise: bool, chosen: Tensor, weights: Tensor) -> None:
    """The experts of each token, likeliest first, and their weights; see `api.Kernels`."""
    (rows, count), choices, pdl = scores.shape, chosen.shape[1], overlaps(scores.device)
    assert scores.stride(1) == 1 and chosen.is_contiguous() and weights.is_contiguous()
    if rows:
        _choose_kernel[(rows,)](
            scores, chosen, weights, scores.stride(0), COUNT=count, CHOICES=choices, NORMALISE=normalise, BINS=triton.next_power_of_2(count),
            PLACES=triton.next_power_of_2(choices), PDL=pdl, launch_pdl=pdl, num_warps=1 if count <= 128 else 4,
        )  # fmt: skip
