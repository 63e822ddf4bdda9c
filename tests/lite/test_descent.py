"""Rounding in view of the outputs never makes a row worse, and ends where no single change helps."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.formats.awq import quantise
from lmdeploy.lite import descent
from lmdeploy.lite.awq import dequantised
from lmdeploy.lite.descent import damped, descend, row_errors

Tensor = torch.Tensor


def problem(seed: int, rows: int, inner: int, tokens: int) -> tuple[Tensor, Tensor]:
    """A weight [rows, inner] and H of inputs that depend on one another."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inner, inner, generator=generator)
    x = torch.randn(tokens, inner, generator=generator) @ mix
    return torch.randn(rows, inner, generator=generator), damped(x.t() @ x)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 20), st.sampled_from([8, 24, 136]), st.sampled_from([2, 8]), st.integers(1, 50))
def test_no_row_gets_worse_and_numbers_stay_in_range(seed: int, inner: int, group: int, tokens: int) -> None:
    weight, gram = problem(seed, 5, inner, tokens)
    q, scales, zeros = quantise(weight, group)
    last = row_errors(dequantised(q, scales, zeros) - weight, gram)
    for _ in range(3):
        q = descend(weight, gram, q, scales, zeros, 1)
        error = row_errors(dequantised(q, scales, zeros) - weight, gram)
        assert q.dtype == torch.uint8
        assert int(q.max()) <= 15
        assert bool((error <= last * (1 + 1e-4) + 1e-4).all())
        last = error


def test_where_it_ends_no_single_change_helps() -> None:
    weight, gram = problem(3, 6, 16, 40)
    q, scales, zeros = quantise(weight, 8)
    q = descend(weight, gram, q, scales, zeros, 50)
    least = row_errors(dequantised(q, scales, zeros) - weight, gram)
    for k, change in itertools.product(range(16), (-1, 1)):
        other = q.int()
        other[:, k] = (other[:, k] + change).clamp(0, 15)
        assert bool((row_errors(dequantised(other, scales, zeros) - weight, gram) >= least - 1e-4).all())


def test_it_is_much_better_than_nearest_rounding_when_inputs_depend_on_one_another() -> None:
    weight, gram = problem(1, 64, 96, 200)
    numbers = quantise(weight, 32)
    before = row_errors(dequantised(*numbers) - weight, gram).sum()
    after = row_errors(dequantised(descend(weight, gram, *numbers), *numbers[1:]) - weight, gram).sum()
    assert after < 0.6 * before


def test_independent_inputs_keep_nearest_rounding() -> None:
    weight, _ = problem(2, 7, 32, 10)
    numbers = quantise(weight, 16)
    assert torch.equal(descend(weight, damped(torch.diag(torch.rand(32) + 0.5)), *numbers), numbers[0])
    assert torch.equal(descend(weight, damped(torch.zeros(32, 32)), *numbers), numbers[0]), "inputs that were always zero"


@pytest.mark.parametrize("block", [1, 5, 4096])
def test_the_size_of_blocks_changes_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(4, 9, 64, 30)
    weight, gram = weight.double(), gram.double()
    numbers = tuple(n if n.dtype == torch.uint8 else n.double() for n in quantise(weight.float(), 16))
    expected = descend(weight, gram, *numbers)
    monkeypatch.setattr(descent, "BLOCK", block)
    assert torch.equal(descend(weight, gram, *numbers), expected)


def test_damping_is_a_share_of_the_mean_diagonal() -> None:
    gram = torch.tensor([[3.0, 1.0], [1.0, 5.0]])
    torch.testing.assert_close(damped(gram), gram / 4 + descent.RIDGE * torch.eye(2))
    assert torch.equal(gram, torch.tensor([[3.0, 1.0], [1.0, 5.0]])), "the statistics stay as they are"
