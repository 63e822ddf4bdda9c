"""Decoding over quantised caches straight into tensor cores' registers: in Triton's interpreter, which runs the kernel's assembly through a model of it (`ptx.py`),
against the reference. Pieces are short here, and what no sequence wrote is NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.kv_layer import KVFormat
from tests.kernels.paged import FORMATS, NOWHERE, Shape, error, numbers, one_launch_and_two, paged_case, sequences

attention = pytest.importorskip("lmdeploy.kernels.triton_kernels.attention", reason="triton is not installed")
decode = pytest.importorskip("lmdeploy.kernels.triton_kernels.decode", reason="triton is not installed")
direct = pytest.importorskip("lmdeploy.kernels.triton_kernels.decode_direct", reason="triton is not installed")
ptx = pytest.importorskip("tests.kernels.triton.ptx", reason="triton is not installed")
TRITON = replace(REFERENCE, attention=attention.attention)

#: one rounding of the result, and of the weights; the interpreter cuts bfloat16 off instead of rounding it
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
#: a first token, ends within and at the ends of groups, tiles, parts, blocks and pieces, several pieces, those of a long row
LENGTHS = [(1, 1), (16, 1), (33, 1), (64, 1), (130, 1), (256, 1), (300, 1), (1100, 1)]
SHARED, ALONE = 1000, 0  # rows times KV heads up to which programs have several warps: all, none
DECODING = sequences(LENGTHS)
SHAPE = Shape(8, 2, 128, 64, torch.float16)
ONE_HEAD = Shape(4, 1, 128, 64, torch.float16)  # where KV heads do not matter: the model of assembly takes as long for each


@pytest.fixture(autouse=True)
def always_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    ptx.install()
    for name, value in (("PIECES", 2), ("PROGRAMS", 24), ("SHARES", 1), ("FEW", SHARED), ("SHARED", 6)):
        monkeypatch.setattr(direct, name, value)
    monkeypatch.setattr(decode, "PIECES", 2)
    monkeypatch.setattr(direct, "serves", lambda q, kv: True)
    monkeypatch.setattr(attention, "decode", None)


# Two groups a tile are for 4-bit keys and values alone; with other keys they are checked because a width and the groups are chosen apart.
@pytest.mark.parametrize(
    ("key", "value", "groups"), [("8", "8", 1), ("4", "4", 1), ("fp8", "fp8", 1), ("8", "4", 1), ("4", "fp8", 1), ("4", "4", 2), ("8", "fp8", 2)]
)
def test_keys_and_values_of_any_two_widths(key: str, value: str, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "groups_of", lambda kv: groups)
    case = paged_case(KVFormat(key, value, value == "4"), ONE_HEAD, DECODING[1::3])  # type: ignore[arg-type]
    wanted = case.attend(REFERENCE)
    for few in (SHARED, ALONE):
        monkeypatch.setattr(direct, "FEW", few)
        assert error(case.attend(TRITON), wanted) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (5, 1), (8, 1), (11, 1)])
def test_any_number_of_heads_shares_a_kv_head(heads: int, kv_heads: int) -> None:
    case = paged_case(FORMATS["k8v4"], Shape(heads, kv_heads, 128, 64, torch.bfloat16), DECODING[2::3])
    assert error(case.attend(TRITON), case.attend(REFERENCE)) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("block_size", [16, 48, 128])
def test_blocks_of_whole_groups(block_size: int) -> None:
    case = paged_case(FORMATS["4"], Shape(4, 1, 128, block_size, torch.float16), DECODING[2::3])
    assert error(case.attend(TRITON), case.attend(REFERENCE)) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize(("window", "few"), [(1, SHARED), (16, ALONE), (33, SHARED), (100, ALONE), (100, SHARED), (500, SHARED)])
def test_a_window_hides_the_older_keys_and_blocks_behind_it_are_not_read(window: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "FEW", few)
    case = paged_case(FORMATS["4 rotated"], Shape(4, 2, 128, 16, torch.float16), DECODING)
    wanted = case.attend(REFERENCE, window)
    for row, (length, _) in enumerate(LENGTHS):
        case.meta.block_table[row, : max(length - window, 0) // 16] = NOWHERE
    assert error(case.attend(TRITON, window), wanted) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize("few", [SHARED, ALONE])
def test_the_bits_depend_neither_on_the_batch_nor_on_how_pieces_are_shared_out(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = DECODING[1::2]
    monkeypatch.setattr(direct, "FEW", few)
    found = paged_case(FORMATS["4"], ONE_HEAD, batch).attend(TRITON)
    for name in ("PROGRAMS", "SHARED"):
        monkeypatch.setattr(direct, name, 1)
    assert torch.equal(paged_case(FORMATS["4"], ONE_HEAD, batch).attend(TRITON), found)
    for row in (0, 3):
        assert torch.equal(paged_case(FORMATS["4"], ONE_HEAD, [batch[row]], shuffle=row).attend(TRITON)[0], found[row])


# Rows are rotated, scaled and centred before they are stored, each format's way: each value of each, and all at once for each way of storing. The long row,
# which takes longer than all others, is there for int8 and for rotated int4.
@pytest.mark.parametrize("few", [SHARED, ALONE])
@pytest.mark.parametrize(
    ("fmt", "rope", "centred", "scaled"),
    [("8", 128, True, True), ("fp8", 128, True, True), ("4 rotated", 128, True, True), ("8", 64, True, False), ("k8v4", 128, False, False)],
)
def test_rope_and_attention_in_one_launch_store_and_give_what_two_do(
    fmt: str, rope: int, centred: bool, scaled: bool, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "FEW", few)
    batch = DECODING if (fmt, rope) in (("8", 128), ("4 rotated", 128)) else DECODING[:-1]
    rows, case = len(batch), paged_case(FORMATS[fmt], SHAPE, batch)
    qkv, angles, factor = (
        numbers(SHAPE, 3, rows, 12, 128),
        numbers(SHAPE, 4, rows, rope // 2).float(),
        numbers(SHAPE, 5, rows).float().abs() if scaled else None,
    )
    case.meta.slot_mapping = torch.tensor([int(case.meta.block_table[i, (n - 1) // 64]) * 64 + (n - 1) % 64 for i, (n, _) in enumerate(LENGTHS[:rows])])
    center = numbers(SHAPE, 9, 2, 128).float() if centred else None
    layers, outs = one_launch_and_two(attention.rope_attention, REFERENCE, case, SHAPE, qkv, angles, factor, center, 0.1)
    rotated = layers[0].rotation is not None  # a rotation rounds: a number may fall otherwise
    assert error(outs[0], outs[1]) <= (5e-2 if rotated else TOLERANCE[torch.float16])
    for name in ("key", "value"):
        found, wanted = (getattr(layer, name).view(torch.uint8).int() for layer in layers)
        different = (found - wanted).abs()
        assert int(different.max()) <= (16 if rotated else 0) and (different != 0).float().mean() < 1e-3, name


def test_scales_and_queries_of_any_size() -> None:
    """float16 holds weights times scales, and queries, whatever these are."""
    case = paged_case(FORMATS["8"], ONE_HEAD, DECODING)
    assert case.layer.key_scales is not None and case.layer.value_scales is not None
    for scales, factor in ((case.layer.key_scales, 2.0**-12), (case.layer.value_scales, 2.0**-13)):
        scales.mul_(factor)
    case.layer.value_scales[case.meta.block_table[7, 0].item()] *= 2.0**9
    case.q *= 2.0**11
    assert error(case.attend(TRITON), case.attend(REFERENCE)) <= TOLERANCE[torch.float16]


def test_a_nan_reaches_its_own_sequence_only() -> None:
    case = paged_case(FORMATS["4"], ONE_HEAD, DECODING)
    wanted = case.attend(TRITON)
    assert case.layer.key_scales is not None
    case.layer.key_scales[case.meta.block_table[5, 1].item(), :, 3] = float("nan")
    found, others = case.attend(TRITON), [row for row in range(8) if row != 5]
    assert found[5].isnan().all() and torch.equal(found[others], wanted[others])


@pytest.mark.parametrize("value", ["4", "8"])
def test_what_float16_weights_lose_is_not_lost_of_all_dims_alike(value: str) -> None:
    """A rotation would gather that in one dim: 0.003 of the largest number after 700 keys of 4 bits, where rounding alone is 0.0005."""
    case = paged_case(KVFormat("4", value, True), Shape(4, 1, 128, 32, torch.float16), sequences([(100, 1), (700, 1)]))
    found, wanted = case.attend(TRITON), case.attend(REFERENCE)
    assert max(error(found[row], wanted[row]) for row in range(2)) <= 8e-4
