"""Decoding of a row alone, or of a few, over 16-bit caches straight into tensor cores' registers: in Triton's interpreter, which runs the kernel's assembly through a model
of it (`ptx.py`), against the reference. Pieces are short here, and what no sequence wrote is NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmdeploy.kernels.reference import REFERENCE
from tests.kernels.paged import FORMATS, NOWHERE, Shape, error, numbers, one_launch_and_two, paged_case, sequences

attention = pytest.importorskip("lmdeploy.kernels.triton_kernels.attention", reason="triton is not installed")
decode = pytest.importorskip("lmdeploy.kernels.triton_kernels.decode", reason="triton is not installed")
row16 = pytest.importorskip("lmdeploy.kernels.triton_kernels.decode_row16", reason="triton is not installed")
ptx = pytest.importorskip("tests.kernels.triton.ptx", reason="triton is not installed")
TRITON = replace(REFERENCE, attention=attention.attention)

#: one rounding of the result, and of the weights; the interpreter cuts bfloat16 off instead of rounding it
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1e-2}
#: a first token, ends within and at the ends of groups, blocks, parts and pieces, as many pieces as there may be, longer ones
LENGTHS = [(1, 1), (2, 1), (17, 1), (130, 1), (256, 1), (257, 1), (258, 1), (700, 1)]
DECODING = sequences(LENGTHS)
ONE_HEAD = Shape(4, 1, 128, 64, torch.float16)  # where KV heads do not matter: the model of assembly takes as long for each


@pytest.fixture(autouse=True)
def always_here(monkeypatch: pytest.MonkeyPatch) -> None:
    ptx.install()
    for name, value in (("PIECES", 2), ("PIECE", 256), ("CUT", 256), ("PROGRAMS", 24)):
        monkeypatch.setattr(row16, name, value)
    monkeypatch.setattr(decode, "PIECES", 2)
    monkeypatch.setattr(row16, "serves", lambda q, kv, meta: True)
    monkeypatch.setattr(attention, "decode", None)


@pytest.mark.parametrize(("heads", "kv_heads", "dtype"), [(2, 2, torch.bfloat16), (5, 1, torch.float16), (8, 1, torch.bfloat16)])
@pytest.mark.parametrize("slots", [16, 64])
def test_any_number_of_heads_shares_a_kv_head(heads: int, kv_heads: int, dtype: torch.dtype, slots: int) -> None:
    case = paged_case(FORMATS["16"], Shape(heads, kv_heads, 128, slots, dtype), DECODING[::2] if slots == 64 else DECODING[1::2])
    assert error(case.attend(TRITON), case.attend(REFERENCE)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("window", [1, 16, 100, 300])
def test_a_window_hides_the_older_keys_and_blocks_behind_it_are_not_read(window: int) -> None:
    case = paged_case(FORMATS["16"], Shape(2, 1, 128, 16, torch.float16), DECODING)
    wanted = case.attend(REFERENCE, window)
    for row, (length, _) in enumerate(LENGTHS):
        case.meta.block_table[row, : max(length - window, 0) // 16] = NOWHERE
    assert error(case.attend(TRITON, window), wanted) <= TOLERANCE[torch.float16]


def test_the_bits_depend_neither_on_the_batch_nor_on_how_pieces_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = DECODING[1::2]
    found = paged_case(FORMATS["16"], ONE_HEAD, batch).attend(TRITON)
    monkeypatch.setattr(row16, "PROGRAMS", 1)
    assert torch.equal(paged_case(FORMATS["16"], ONE_HEAD, batch).attend(TRITON), found)
    for row in (0, 3):
        assert torch.equal(paged_case(FORMATS["16"], ONE_HEAD, [batch[row]], shuffle=row).attend(TRITON)[0], found[row])


@pytest.mark.parametrize(
    ("heads", "rope", "scaled", "dtype"),
    [(4, 128, True, torch.float16), (4, 64, False, torch.float16), (8, 128, True, torch.bfloat16), (1, 32, True, torch.float16)],
)
def test_rope_and_attention_in_one_launch_store_and_give_what_two_do(heads: int, rope: int, scaled: bool, dtype: torch.dtype) -> None:
    shape, rows = Shape(heads, 1, 128, 64, dtype), len(DECODING)
    case = paged_case(FORMATS["16"], shape, DECODING)
    qkv, angles = numbers(shape, 3, rows, heads + 2, 128), numbers(shape, 4, rows, rope // 2).float()
    factor = numbers(shape, 5, rows).float().abs() if scaled else None
    case.meta.slot_mapping = torch.tensor([int(case.meta.block_table[i, (n - 1) // 64]) * 64 + (n - 1) % 64 for i, (n, _) in enumerate(LENGTHS)])
    layers, outs = one_launch_and_two(attention.rope_attention, REFERENCE, case, shape, qkv, angles, factor, None, 0.1)
    assert error(outs[0], outs[1]) <= 2 * TOLERANCE[dtype]
    for name in ("key", "value"):
        found, wanted = (getattr(layer, name).view(torch.int16).int() for layer in layers)
        assert int((found - wanted).abs().max()) <= (1 if dtype is torch.bfloat16 else 0), name


def test_a_nan_reaches_its_own_sequence_only() -> None:
    case = paged_case(FORMATS["16"], ONE_HEAD, DECODING)
    wanted = case.attend(TRITON)
    case.layer.key[case.meta.block_table[5, 1].item(), :, 3] = float("nan")
    found, others = case.attend(TRITON), [row for row in range(8) if row != 5]
    assert found[5].isnan().all() and torch.equal(found[others], wanted[others])


def test_rows_without_a_token_are_left_alone() -> None:
    case = paged_case(FORMATS["16"], ONE_HEAD, DECODING[:2])
    case.meta.kv_lens[1] = 0
    assert case.attend(TRITON)[1].isnan().all()
