"""Triton's experts in its interpreter against the reference in float32. (bfloat16 is met on the GPU: the interpreter cannot multiply it.)"""

from __future__ import annotations

import pytest
import torch

from lmdeploy.kernels.reference import REFERENCE

experts = pytest.importorskip("lmdeploy.kernels.triton_kernels.experts", reason="triton is not installed")

Tensor = torch.Tensor
#: rows, experts, choices, model width, inner width: one row, ragged edges of tiles in all directions, one expert only, every tile, more pairs
#: than a program of the sort looks at together
SHAPES = [(1, 5, 2, 24, 36), (1, 12, 9, 12, 140), (1, 1, 1, 40, 130), (3, 8, 2, 72, 20), (7, 128, 8, 40, 24), (16, 6, 3, 130, 68),
          (40, 3, 3, 64, 72), (24, 3, 2, 64, 20), (70, 1, 1, 20, 12), (200, 4, 2, 36, 150), (1100, 40, 2, 8, 12), (2600, 5, 2, 8, 12)]  # fmt: skip
STEP = {torch.float32: 1e-5, torch.float16: 4e-3}


def made(rows: int, count: int, choices: int, width: int, inner: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, gate_up, down, ids, weights; a token's choices differ, and the last expert has none where there are enough."""
    g = torch.Generator().manual_seed(rows + count)
    x, gate_up, down = (torch.randn(*size, generator=g) for size in ((rows, width), (count, 2 * inner, width), (count, width, inner)))
    ids = torch.rand(rows, max(count - 1, choices), generator=g).topk(choices).indices
    return x.to(dtype), (gate_up / width**0.5).to(dtype), (down / inner**0.5).to(dtype), ids, torch.rand(rows, choices, generator=g)


def run(x: Tensor, *others: Tensor) -> Tensor:
    out = torch.full_like(x, float("nan"))
    experts.experts(x, *others, out)
    return out


def close(found: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> None:
    wanted = torch.empty(x.shape)
    REFERENCE.experts(x.float(), gate_up.float(), down.float(), ids, weights, wanted)
    assert (found.float() - wanted).abs().max() <= STEP[x.dtype] * wanted.abs().max()


@pytest.mark.parametrize("dtype", STEP, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_experts_agree_with_the_reference(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    inputs = made(*shape, dtype)
    close(run(*inputs), *inputs)


def test_one_row_may_be_longer_than_a_program_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "WHOLE_ROWS", 512)
    inputs = made(1, 3, 2, 1040, 6, torch.float16)
    close(run(*inputs), *inputs)


@pytest.mark.parametrize("expert", [0, 3, 4])
def test_all_tokens_may_choose_one_expert_and_the_same_twice(expert: int) -> None:
    x, gate_up, down, ids, weights = made(37, 5, 2, 24, 20, torch.float16)
    ids.fill_(expert)
    close(run(x, gate_up, down, ids, weights), x, gate_up, down, ids, weights)


def test_every_bucket_of_pairs_is_met() -> None:
    """The shapes above use every tile there is."""
    for dtype in STEP:
        used = {experts._shape(rows * choices, count, dtype, True) for rows, count, choices, _, _ in SHAPES if rows > 1}
        assert used == {experts._shape(pairs, 1, dtype, True) for pairs in range(300)}


@pytest.mark.parametrize(("count", "pairs", "height"), [(5, 2, 16), (128, 800, 16), (3, 5000, 64), (1, 3000, 128)])
def test_every_pair_is_in_one_tile_of_its_expert(count: int, pairs: int, height: int) -> None:
    chosen = torch.randint(0, count, (pairs, 1), generator=torch.Generator().manual_seed(pairs))
    order, tiles = experts._sorted(chosen, count, height)
    seen: list[int] = []
    for expert, first, end in tiles.T.tolist():
        if expert >= 0:
            assert 0 < end - first <= height and (chosen[order[first:end].long()] == expert).all()
            seen += order[first:end].tolist()
    assert sorted(seen) == list(range(pairs)) and set(tiles[0].tolist()) <= {-1, *range(count)}


def test_a_row_has_the_same_bits_whatever_the_others_choose() -> None:
    x, gate_up, down, ids, weights = made(12, 8, 2, 72, 40, torch.float16)
    once = run(x, gate_up, down, ids, weights)
    others = torch.arange(12) != 5
    x[others], ids[others] = x[others].flip(0) * 2, ids[5].clone()
    assert torch.equal(run(x, gate_up, down, ids, weights)[5], once[5])


def test_a_row_of_nan_stays_alone() -> None:
    x, gate_up, down, ids, weights = made(6, 3, 2, 24, 20, torch.float16)
    x[2, 7] = float("nan")
    found = run(x, gate_up, down, ids, weights)
    assert found[2].isnan().all() and not found[[0, 1, 3, 4, 5]].isnan().any()


def test_rows_of_x_may_be_strided_and_there_may_be_none() -> None:
    x, *others = made(5, 4, 2, 24, 20, torch.float32)
    wide = torch.zeros(5, 40)
    wide[:, :24] = x
    out = torch.empty(5, 24)
    experts.experts(wide[:, :24], *others, out)
    assert torch.equal(out, run(x, *others))
    gate_up, down, ids, weights = others
    experts.experts(x[:0], gate_up, down, ids[:0], weights[:0], out[:0])
