"""Triton's choice of experts, in its interpreter, against torch's softmax and topk."""

from __future__ import annotations

import pytest
import torch

routing = pytest.importorskip("lmdeploy.kernels.triton_kernels.routing", reason="triton is not installed")

Tensor = torch.Tensor


def run(scores: Tensor, choices: int, normalise: bool) -> tuple[Tensor, Tensor]:
    chosen, weights = torch.full((len(scores), choices), -1), torch.full((len(scores), choices), float("nan"))
    routing.choose_experts(scores, normalise, chosen, weights)
    return chosen, weights


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "count", "choices"), [(1, 8, 2), (5, 128, 8), (3, 5, 5), (2, 1, 1), (4, 60, 4), (2, 300, 6), (0, 8, 2)])
def test_the_choice_is_that_of_torch(rows: int, count: int, choices: int, dtype: torch.dtype, normalise: bool) -> None:
    g = torch.Generator().manual_seed(count)
    scores = torch.stack([torch.randperm(count, generator=g) for _ in range(rows)]).to(dtype) * 0.1 if rows else torch.empty(0, count, dtype=dtype)
    wide = torch.zeros(rows, count + 3, dtype=dtype)
    wide[:, :count] = scores
    chosen, weights = run(wide[:, :count], choices, normalise)
    wanted, experts = torch.topk(torch.softmax(scores, dim=-1, dtype=torch.float32), choices, dim=-1)
    if normalise:
        wanted = wanted / wanted.sum(dim=-1, keepdim=True)
    assert torch.equal(chosen, experts)
    torch.testing.assert_close(weights, wanted, rtol=1e-5, atol=1e-7)


def test_of_equal_scores_the_first_experts_are_chosen() -> None:
    chosen, weights = run(torch.zeros(2, 6), 4, True)
    assert chosen.tolist() == [[0, 1, 2, 3]] * 2 and weights.tolist() == [[0.25] * 4] * 2


def test_experts_without_a_chance_may_be_chosen_and_a_row_of_nan_chooses_experts_that_exist() -> None:
    scores = torch.tensor([[0.0, -float("inf"), -float("inf")], [0.0, float("nan"), 1.0], [1.0, 2.0, 3.0]])
    chosen, weights = run(scores, 3, True)
    assert all(sorted(row) == [0, 1, 2] for row in chosen.tolist())
    assert weights[0].tolist() == [1, 0, 0] and weights[1].isnan().all() and not weights[2].isnan().any()
