"""Triton's products with norms inside, in its interpreter, against plain torch. (It multiplies no bfloat16 with `tl.dot`, and cuts what others round to it.)"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lmdeploy.kernels.api import After, Before
from tests.kernels import normed_plain

linear16 = pytest.importorskip("lmdeploy.kernels.triton_kernels.linear16", reason="triton is not installed")
normed = pytest.importorskip("lmdeploy.kernels.triton_kernels.normed", reason="triton is not installed")

Tensor = torch.Tensor
STEP = {torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of numbers that the interpreter cuts instead of rounding, twice
#: inputs, outputs: one row's whole weight rows and long ones, split sums, ragged edges
SHAPES = [(1024, 32), (4104, 12), (264, 48)]


def made(dtype: torch.dtype, rows: int, inner: int, outer: int) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """x, weight, bias."""
    generator = torch.Generator().manual_seed(rows)
    x, bias = torch.randn(rows, inner, generator=generator).to(dtype), torch.randn(outer, generator=generator).to(dtype)
    return x, ((torch.randn(outer, inner, generator=generator) * inner**-0.5).to(dtype),), bias


def close(found: Tensor, wanted: Tensor) -> None:
    assert (found.float() - wanted.float()).abs().max() <= STEP[found.dtype] * wanted.float().abs().max()


def check_before(inner: int, outer: int, rows: int) -> None:
    for silu in (False, True):
        x, weight, bias = made(torch.float16, rows, inner, outer * (2 if silu else 1))
        squares = (x.double().pow(2).sum(1) * normed_plain.UNIT).long()
        found, wanted = (torch.full((rows, outer), float("nan"), dtype=x.dtype) for _ in range(2))
        for more in (bias, None):
            normed.product(x, weight, more, found, silu, Before(squares, 1e-5))
            normed_plain.product(x, weight, more, wanted, silu, Before(squares, 1e-5))
            close(found, wanted)


def check_after(inner: int, outer: int, rows: int) -> None:
    x, weight, bias = made(torch.float16, rows, inner, outer)
    gain, residual = torch.rand(outer).to(x.dtype), torch.randn(rows, outer, generator=torch.Generator().manual_seed(9)).to(x.dtype)
    ours, theirs = (After(residual.clone(), gain, torch.full((rows,), 7, dtype=torch.int64)) for _ in range(2))
    found, wanted = (torch.full((rows, outer), float("nan"), dtype=x.dtype) for _ in range(2))
    normed.product(x, weight, bias, found, False, None, ours)
    normed_plain.product(x, weight, bias, wanted, False, None, theirs)
    close(found, wanted)
    close(ours.residual, theirs.residual)
    exact = 7 + (ours.residual.double().pow(2).sum(1) * normed_plain.UNIT).long()
    assert ((ours.squares - exact).abs() <= 1e-5 * exact).all()


@pytest.mark.parametrize(("inner", "outer"), SHAPES)
@pytest.mark.parametrize("check", [check_before, check_after])
def test_products_with_norms_agree_with_plain_torch(check: Callable[..., None], inner: int, outer: int) -> None:
    for rows in (1, 5, 17):
        check(inner, outer, rows)


@pytest.mark.parametrize("scale", [1e-3, 8000.0])
def test_rows_of_any_size_that_models_have_are_normalised(scale: float) -> None:
    """Massive activations, and hardly any: the squares' whole numbers neither overflow nor vanish."""
    x, weight, _ = made(torch.bfloat16, 1, 512, 2048)
    residual, gain = (torch.randn(1, 2048, generator=torch.Generator().manual_seed(9)) * scale).to(x.dtype), torch.ones(2048, dtype=x.dtype)
    after = After(residual, gain, torch.zeros(1, dtype=torch.int64))
    normed.product((x.float() * 1e-6).to(x.dtype), weight, None, torch.empty(1, 2048, dtype=x.dtype), False, None, after)
    exact = after.residual.double().pow(2).sum(1)
    assert ((after.squares / normed_plain.UNIT - exact).abs() <= 2e-3 * exact).all() and (after.squares > 0).all()


def test_a_row_has_the_same_bits_among_others() -> None:
    x, weight, bias = made(torch.float16, 8, 1024, 32)
    together, pair = torch.empty(8, 32, dtype=x.dtype), torch.empty(2, 32, dtype=x.dtype)
    normed.product(x, weight, bias, together, False)
    normed.product(x[3:5], weight, bias, pair, False)
    assert torch.equal(together[3:5], pair)


def test_only_bfloat16_on_a_chip_that_overlaps_kernels_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = made(torch.bfloat16, 1, 256, 32)[1]
    assert normed.rows_served(dense, 32, torch.bfloat16) == 0  # a CPU
    monkeypatch.setattr(normed, "overlaps", lambda device: True)
    assert normed.rows_served(dense, 32, torch.bfloat16) == linear16.MAX_ROWS
    none = [((dense[0].half(),), torch.bfloat16), (dense, torch.float16), ((), torch.bfloat16), ((dense[0][:, :252].contiguous(),), torch.bfloat16)]
    assert all(normed.rows_served(weight, 32, dtype) == 0 for weight, dtype in none)


def packed(outer: int, inner: int, group: int) -> tuple[Tensor, ...]:
    """qweight, scales, zeros."""
    generator = torch.Generator().manual_seed(outer + inner)
    qweight = torch.randint(0, 256, (outer, inner // 2), generator=generator).byte()
    scales = (torch.rand(outer, inner // group, generator=generator) * 0.2 + 0.1).half() * inner**-0.5
    return qweight, scales, torch.randint(0, 16, (outer, inner // group), generator=generator).byte()


# Few rows and more of small weights; of weights that are streamed one row and a full tile of them; of long rows one, for the kernel of one.
@pytest.mark.parametrize(
    ("hidden", "width", "group", "rows"),
    [(256, 384, 128, 1), (256, 384, 128, 5), (256, 384, 128, 16), (192, 448, 64, 1), (192, 448, 64, 5), (192, 448, 64, 16)]
    + [(2304, 128, 128, 1), (2304, 128, 128, 16), (1024, 4096, 128, 1)],
)
def test_a_layer_of_4_bit_products_agrees_with_plain_torch(rows: int, hidden: int, width: int, group: int) -> None:
    """Output -> residual -> gate_up -> down -> residual -> qkv: by all their kernels, split sums and not."""
    weights = [packed(*shape, group) for shape in ((hidden, hidden), (2 * width, hidden), (hidden, width), (hidden + 64, hidden))]
    generator = torch.Generator().manual_seed(rows)
    x, first = (torch.randn(rows, hidden, generator=generator).half() for _ in range(2))
    gains, bias = [torch.rand(hidden, generator=generator).half() for _ in range(2)], torch.randn(2 * width, generator=generator).half()
    results = []
    for product in (normed.product, normed_plain.product):
        left, squares = first.clone(), torch.zeros(2, rows, dtype=torch.int64)
        ready, act, qkv = (torch.full((rows, size), float("nan"), dtype=torch.float16) for size in (hidden, width, hidden + 64))
        product(x, weights[0], None, ready, False, None, After(left, gains[0], squares[0]))
        product(ready, weights[1], bias, act, True, Before(squares[0], 1e-5), None)
        product(act, weights[2], bias[:hidden] if hidden <= 2 * width else None, ready, False, None, After(left, gains[1], squares[1]))
        product(ready, weights[3], None, qkv, False, Before(squares[1], 1e-5), None)
        results.append((left, qkv, squares))
    close(results[0][0], results[1][0])
    close(results[0][1], results[1][1])
    assert ((results[0][2] / results[1][2] - 1).abs() < 4e-3).all()


def test_which_4_bit_weights_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normed, "overlaps", lambda device: True)
    for group, rows in ((128, 16), (64, 16), (96, 16), (48, 0)):
        assert normed.rows_served(packed(64, group * 2, group), 64, torch.bfloat16) == rows
    assert normed.rows_served(packed(64, 256, 128), 64, torch.float16) == 0
    qweight, scales, zeros = packed(64, 256, 128)
    assert normed.rows_served((qweight, scales.float(), zeros.float()), 64, torch.bfloat16) == 0
