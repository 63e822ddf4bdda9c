"""Triton's paged attention, in its interpreter, against the reference; the GPU's own run is tests/gpu/test_triton.py. Splits are short here, so that
few keys have several; all memory that no sequence wrote is NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.kv_layer import KVFormat
from tests.kernels.paged import FORMATS, NOWHERE, Case, Sequence, Shape, error, paged_case, sequences

attention = pytest.importorskip("lmdeploy.kernels.triton_kernels.attention", reason="triton is not installed")
TRITON = replace(REFERENCE, attention=attention.attention)

# float32: the order of sums. 16 bit: one rounding of the result; the interpreter cuts bfloat16 off instead of rounding it.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
#: decode: a first token, a few keys, full splits and blocks, several chunks of splits; a fresh prompt, a chunk, a chunk of two
FEW = sequences([(9, 1), (40, 1), (23, 5)])
MIXED = sequences([(1, 1), (9, 1), (32, 1), (81, 1), (19, 19), (43, 5), (70, 2)])
WIDTHS = ("16", "8", "4", "fp8")


@pytest.fixture(autouse=True)
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SPLIT", 16)
    monkeypatch.setattr(attention, "CHUNK", 2)


def agree(case: Case, window: int = 0, factor: float = 1.0) -> None:
    assert error(case.attend(TRITON, window), case.attend(REFERENCE, window)) <= factor * TOLERANCE[case.q.dtype]


@pytest.mark.parametrize("key", WIDTHS)
@pytest.mark.parametrize("value", WIDTHS)
def test_keys_and_values_of_any_two_widths(key: str, value: str) -> None:
    rotated = (key, value) in (("4", "4"), ("8", "4"), ("16", "16"), ("fp8", "16"))
    agree(paged_case(KVFormat(key, value, rotated), Shape(4, 2, 16), FEW))  # type: ignore[arg-type]


@pytest.mark.parametrize("head_dim", [20, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("fmt", ["16", "k8v4"])
def test_any_head_dim(head_dim: int, fmt: str) -> None:
    agree(paged_case(FORMATS[fmt], Shape(2, 1, head_dim), FEW))


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (7, 1), (20, 1), (70, 1)])
def test_any_number_of_heads_shares_a_kv_head(heads: int, kv_heads: int) -> None:
    agree(paged_case(FORMATS["16"], Shape(heads, kv_heads, 16), FEW))


@pytest.mark.parametrize("window", [1, 5, 16, 33, 500])
@pytest.mark.parametrize("fmt", ["16", "4 rotated"])
def test_a_window_hides_the_older_keys(window: int, fmt: str) -> None:
    agree(paged_case(FORMATS[fmt], Shape(4, 2, 16), MIXED), window)


def test_blocks_that_the_window_left_behind_are_not_read() -> None:
    case, window = paged_case(FORMATS["8"], Shape(2, 1, 16), sequences([(81, 1), (60, 6)])), 12
    wanted = case.attend(REFERENCE, window)
    case.meta.block_table[0, : (81 - window) // 8] = NOWHERE
    case.meta.block_table[1, : (60 - 5 - window) // 8] = NOWHERE
    assert error(case.attend(TRITON, window), wanted) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("block_size", [1, 5, 16, 64])
def test_any_block_size(block_size: int) -> None:
    agree(paged_case(FORMATS["k4v8"], Shape(2, 1, 16, block_size), MIXED))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fmt", FORMATS)
def test_16_bit_activations(dtype: torch.dtype, fmt: str) -> None:
    agree(paged_case(FORMATS[fmt], Shape(2, 1, 32, dtype=dtype), MIXED[1::2]))


@pytest.mark.parametrize("fmt", ["16", "4 rotated"])
@pytest.mark.parametrize("window", [0, 20])
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(fmt: str, window: int) -> None:
    together = paged_case(FORMATS[fmt], Shape(4, 2, 16), MIXED)
    found = together.attend(TRITON, window)
    for i, s in enumerate(MIXED):
        alone = paged_case(FORMATS[fmt], Shape(4, 2, 16), [s], shuffle=i + 1).attend(TRITON, window)
        assert torch.equal(alone, found[together.rows(i)]), s


@pytest.mark.parametrize("window", [0, 20])
def test_a_prompt_has_the_same_result_in_any_chunks(window: int) -> None:
    """The same bits on a GPU (tests/gpu/test_triton.py); the interpreter multiplies with numpy, whose bits depend on a row's place on some processors."""
    shape = Shape(3, 1, 16)
    whole = paged_case(FORMATS["8"], shape, [Sequence(150, 150, 3)]).attend(TRITON, window)
    for start, end in ((0, 2), (2, 71), (71, 140), (140, 150)):
        case = paged_case(FORMATS["8"], shape, [Sequence(150, 150 - start, 3)])
        case.meta.query_start[1], case.meta.kv_lens[0] = end - start, end
        case.meta.query_lens[0], case.meta.kv_lens_host[0] = end - start, end
        assert error(case.attend(TRITON, window)[: end - start], whole[start:end]) <= 1e-6, (start, end)


def test_a_nan_reaches_its_own_sequence_only() -> None:
    case = paged_case(FORMATS["4"], Shape(2, 1, 16), sequences([(20, 1), (40, 1), (23, 5)]))
    wanted = case.attend(TRITON)
    assert case.layer.key_scales is not None
    case.layer.key_scales[case.meta.block_table[1, 1].item(), 0, 3] = float("nan")
    found = case.attend(TRITON)
    assert found[1].isnan().all() and torch.equal(found[[0, 2, 3, 4, 5, 6]], wanted[[0, 2, 3, 4, 5, 6]])


def test_queries_may_be_a_part_of_qkv() -> None:
    case = paged_case(FORMATS["16"], Shape(4, 2, 16), MIXED)
    wanted = case.attend(TRITON)
    qkv = torch.zeros(case.q.shape[0], 8, 16)
    qkv[:, :4] = case.q
    case.q = qkv[:, :4]
    assert torch.equal(case.attend(TRITON), wanted)


def test_huge_scores_do_not_overflow() -> None:
    case = paged_case(FORMATS["16"], Shape(2, 1, 16), MIXED)
    case.q *= 1e4
    agree(case, factor=10)
