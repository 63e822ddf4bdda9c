"""Triton's paged attention, in its interpreter, against the reference; the GPU's own run is tests/gpu/test_triton.py. Pieces are short here, so that
few keys have several; all memory that no sequence wrote is NaN."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch

from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.kv_layer import KVFormat
from tests.kernels.paged import FORMATS, NOWHERE, Case, Sequence, Shape, error, numbers, one_launch_and_two, paged_case, sequences

attention = pytest.importorskip("lmdeploy.kernels.triton_kernels.attention", reason="triton is not installed")
decode = pytest.importorskip("lmdeploy.kernels.triton_kernels.decode", reason="triton is not installed")
kv_write = pytest.importorskip("lmdeploy.kernels.triton_kernels.kv_write", reason="triton is not installed")
TRITON = replace(REFERENCE, attention=attention.attention)

# float32: the order of sums. 16 bit: one rounding of the result; the interpreter cuts bfloat16 off instead of rounding it.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
#: decode: a first token, a few keys, full pieces and blocks, as many pieces as there may be, longer ones; a fresh prompt, a chunk, a chunk of two
FEW = sequences([(9, 1), (140, 1), (23, 5)])
MIXED = sequences([(1, 1), (9, 1), (64, 1), (128, 1), (330, 1), (19, 19), (43, 5), (70, 2)])
WIDTHS = ("16", "8", "4", "fp8")


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PIECES", 4), ("PIECE", 64), ("CUT", 64), ("PROGRAMS", 24), ("SHARES", 1), ("JOINED", 64)):
        monkeypatch.setattr(decode, name, value)


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


@pytest.mark.parametrize("lengths", [[32], [21], [32, 5, 16], [1, 1, 21, 32]], ids=str)
def test_whole_prompts_read_parts_of_qkv_in_place_and_nothing_of_their_neighbours(monkeypatch: pytest.MonkeyPatch, lengths: list[int]) -> None:
    """cuDNN's part: who is given to it, from where, and where its result goes."""
    seen: list[torch.Tensor] = []
    attend, decoding, total = torch.nn.functional.scaled_dot_product_attention, lengths.count(1), sum(lengths)

    def noted(q: torch.Tensor, *others: torch.Tensor, **options: object) -> torch.Tensor:
        seen.append(q)
        return attend(q, *others, **options).transpose(1, 2).contiguous().transpose(1, 2)  # cuDNN lays its result out as the queries are

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", noted)
    monkeypatch.setattr(attention, "sdpa_kernel", lambda backend: nullcontext())
    monkeypatch.setattr(attention, "ROUNDED", 16)
    qkv = numbers(Shape(4, 2, 16), 1, total, 8, 16)
    out, meta = torch.full((total, 4 * 16), float("nan")), SimpleNamespace(num_decode=decoding, query_lens=lengths)
    parts = torch.split(qkv, [4, 2, 2], 1)
    wanted = out.clone()
    for start, count in zip(accumulate(lengths, initial=0), lengths, strict=False):
        if count > 1:
            q, k, v = (part[start : start + count].transpose(0, 1) for part in parts)
            wanted[start : start + count] = attend(q, k, v, is_causal=True, scale=0.3, enable_gqa=True).transpose(0, 1).flatten(1)
    found = attention._whole_prompts(*parts, meta, 0.3, out)
    assert torch.allclose(found, wanted, atol=1e-5, equal_nan=True) and (found is out) == (len(lengths) > 1)
    assert [q.data_ptr() in range(qkv.data_ptr(), qkv.data_ptr() + qkv.nbytes) for q in seen] == [n % 16 == 0 for n in lengths if n > 1]


DECODING = [s for s in MIXED if s.new == 1]


# Rows are rotated, scaled and centred before any format stores them: every format at every width, half of them centred and scaled, so that each format and
# each width is met with both. A sequence of long pieces is among the heads of 16 dims, where each format has one.
@pytest.mark.parametrize(
    ("fmt", "head_dim", "rope", "centred", "scaled"),
    [
        (fmt, head_dim, rope, (i + j) % 2 == 1, (i + j) % 2 == 1)
        for i, fmt in enumerate(["16", "8", "4", "fp8", "k8v16", "4 rotated"])
        for j, (head_dim, rope) in enumerate([(16, 16), (20, 12), (80, 80), (32, 0)])
    ],
)
def test_rope_and_attention_in_one_launch_store_and_give_what_two_do(fmt: str, head_dim: int, rope: int, centred: bool, scaled: bool) -> None:
    shape, batch = Shape(4, 2, head_dim), DECODING if head_dim == 16 else DECODING[:-1]
    case, rows = paged_case(FORMATS[fmt], shape, batch), len(batch)
    qkv = numbers(shape, 3, rows, 8, head_dim)
    angles = numbers(shape, 4, rows, rope // 2)
    factor = numbers(shape, 5, rows).abs() if scaled else None
    places = [int(case.meta.block_table[i, (s.length - 1) // 8]) * 8 + (s.length - 1) % 8 for i, s in enumerate(batch)]
    case.meta.slot_mapping = torch.tensor(places)
    center = numbers(shape, 9, 2, head_dim) if centred else None
    layers, outs = one_launch_and_two(attention.rope_attention, REFERENCE, case, shape, qkv, angles, factor, center, 0.3)
    assert error(outs[0], outs[1]) <= TOLERANCE[torch.float32] * (2 if layers[0].rotation is None else 1e4)  # a rotation rounds: a number may fall otherwise
    if layers[0].rotation is None:
        for name in ("key", "value", "key_scales", "value_scales"):
            found, wanted = getattr(layers[0], name), getattr(layers[1], name)
            assert found is None or torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)), name


@pytest.mark.parametrize("window", [0, 70])
def test_a_new_key_gives_the_same_bits_from_registers_early_or_late_and_from_the_cache(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    shape, rows = Shape(4, 2, 16, 64, torch.float16), sequences([(1, 1), (2, 1), (64, 1), (65, 1), (129, 1), (330, 1)])
    qkv, angles = numbers(shape, 3, len(rows), 8, 16), numbers(shape, 4, len(rows), 8).float()
    results = []
    for few in (0, 264):
        monkeypatch.setattr(decode, "FEW", few)
        for fused in (True, False):
            case, out = paged_case(FORMATS["16"], shape, rows), torch.full((len(rows), 64), float("nan"), dtype=shape.dtype)
            q, k, v = torch.split(qkv.clone(), [4, 2, 2], 1)
            rope = decode.Rope(k, v, angles.cos(), angles.sin(), None) if fused else None
            if not fused:
                slots = [int(case.meta.block_table[i, (s.length - 1) // 64]) * 64 + (s.length - 1) % 64 for i, s in enumerate(rows)]
                kv_write.rope_write_kv(q, k, v, angles.cos(), angles.sin(), None, case.layer, torch.tensor(slots))
            decode.decode(q, case.layer, case.meta, 0.3, window, out, rope)
            results.append((out, case.layer.key, case.layer.value))
    assert results[0][0].isfinite().all()
    for result in results[1:]:
        assert all(torch.equal(found.nan_to_num(), wanted.nan_to_num()) for found, wanted in zip(result, results[0], strict=True))
    for i, row in enumerate(rows):
        case, out = paged_case(FORMATS["16"], shape, [row]), torch.full((1, 64), float("nan"), dtype=shape.dtype)
        q, k, v = torch.split(qkv[i : i + 1].clone(), [4, 2, 2], 1)
        decode.decode(q, case.layer, case.meta, 0.3, window, out, decode.Rope(k, v, angles[i : i + 1].cos(), angles[i : i + 1].sin(), None))
        assert torch.equal(out[0], results[0][0][i]), "alone"


def test_the_bits_do_not_depend_on_how_pieces_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for programs, few, full, whole in ((1, 0, 512, 3), (24, 0, 512, 3), (1000, 264, 512, 3), (1000, 264, 1, 2), (1000, 0, 1, 3)):
        for name, value in (("PROGRAMS", programs), ("FEW", few), ("FULL", full), ("WHOLE", whole)):
            monkeypatch.setattr(decode, name, value)
        results.append([paged_case(FORMATS[fmt], Shape(4, 2, 16), DECODING).attend(TRITON) for fmt in ("8", "16")])
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


def test_a_captured_step_has_bounds_only() -> None:
    """Lists of the host are empty; among the prompts are sequences of one token and of none, behind them rows that belong to nobody."""
    plain = paged_case(FORMATS["8"], Shape(4, 2, 16), MIXED)
    wanted = plain.attend(REFERENCE)
    meta, decoding = plain.meta, 3  # two of the rows that decode come as prompts of one token
    starts = [*meta.query_start[: decoding + 1].tolist(), 3, *meta.query_start[decoding + 1 :].tolist(), 33, 33]
    lengths = [*meta.kv_lens[:decoding].tolist(), 0, *meta.kv_lens[decoding:].tolist(), 0, 7]
    table = torch.full((len(lengths), meta.block_table.shape[1]), NOWHERE, dtype=torch.int32)
    table[:decoding], table[decoding + 1 : -2] = meta.block_table[:decoding], meta.block_table[decoding:]
    starts[-2:] = [starts[-3]] * 2
    captured = replace(
        meta, query_start=torch.tensor(starts, dtype=torch.int32), kv_lens=torch.tensor(lengths, dtype=torch.int32), block_table=table,
        query_lens=[], kv_lens_host=[], num_decode=decoding, workspace={},
    )  # fmt: skip
    q = torch.cat([plain.q, torch.full((5, 4, 16), float("nan"))])
    found = Case(q, plain.layer, captured, q, q).attend(TRITON)
    assert error(found[:-5], wanted) <= TOLERANCE[torch.float32] and found[-5:].isnan().all()
