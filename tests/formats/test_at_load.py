"""16-bit checkpoints quantised while they are loaded: rounding is the nearest, blocks and ranks change nothing, and the output head does it too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmdeploy.checkpoint.source import open_source
from lmdeploy.errors import CheckpointError
from lmdeploy.formats import at_load
from lmdeploy.formats.at_load import FP8, HEADS, AtLoadFormat, fitting_group
from lmdeploy.formats.packed4 import Packed4
from lmdeploy.formats.packed8 import Packed8
from lmdeploy.formats.weight_format import Part
from tests.formats.packing import Module, by_rows, meaning
from tests.helpers import Harness, load_model, write_folder, write_llama

CPU = torch.device("cpu")
PROMPT = [1, 5, 77, 20, 9, 130, 3]
WAYS = {"fp8": FP8, "head8": HEADS[8], "head4": HEADS[4]}


def weight_of(rows: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)).bfloat16()


def expected(way: str, weight: torch.Tensor) -> torch.Tensor:
    """What the rounded weight means, by the tests' own rounding."""
    inputs = weight.shape[1]
    group = fitting_group(inputs, 128)
    if way == "head4":
        return Module.of(weight, group).weight
    blocks = (1, group if way == "fp8" else inputs)
    return meaning(*by_rows(weight.float(), torch.int8 if way == "head8" else torch.float8_e4m3fn, blocks), blocks)


def load(made: AtLoadFormat, tensors: dict[str, torch.Tensor], folder: Path, *parts: Part) -> Packed8 | Packed4:
    source = open_source(write_folder(folder, {}, tensors))
    weight = made.load(source, parts, any(name.endswith("bias") for name in tensors), torch.bfloat16, CPU)
    source.finish()
    assert isinstance(weight, (Packed8, Packed4))
    return weight


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inputs", [256, 192, 88, 130])
def test_every_number_is_rounded_to_the_nearest(tmp_path: Path, way: str, inputs: int) -> None:
    weight = weight_of(24, inputs)
    found = load(WAYS[way], {"a.weight": weight, "a.bias": torch.arange(24.0)}, tmp_path, Part("a", 24, inputs))
    assert torch.equal(found.dequantised(torch.float32), expected(way, weight))
    assert found.bias is not None and torch.equal(found.bias, torch.arange(24.0).bfloat16())


@pytest.mark.parametrize(("inputs", "group"), [(4096, 128), (192, 96), (88, 88), (130, 130), (1376, 32), (16 * 17, 16)])
def test_the_group_is_the_largest_that_fits(inputs: int, group: int) -> None:
    assert fitting_group(inputs, 128) == group


@pytest.mark.parametrize("way", WAYS)
def test_blocks_and_fused_rows_change_nothing(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = weight_of(24, 256, 1), weight_of(16, 256, 2)
    parts = [Part("a", 24, 256, [slice(16, 24), slice(0, 11)]), Part("b", 16, 256)]
    wanted = torch.cat([expected(way, t) for t in (first[16:], first[:11], second)])
    monkeypatch.setattr(at_load, "BLOCK_NUMBERS", 3 * 256)
    found = load(WAYS[way], {"a.weight": first, "b.weight": second}, tmp_path, *parts)
    assert torch.equal(found.dequantised(torch.float32), wanted)


@pytest.mark.parametrize("way", ["fp8", "head4"])
def test_two_ranks_hold_the_two_halves_of_the_whole(tmp_path: Path, way: str) -> None:
    weight = weight_of(24, 512, 3)
    halves = [load(WAYS[way], {"a.weight": weight}, tmp_path / str(i), Part("a", 24, 512, None, slice(256 * i, 256 * i + 256))) for i in range(2)]
    assert torch.equal(torch.cat([half.dequantised(torch.float32) for half in halves], dim=1), expected(way, weight))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_named(tmp_path: Path, way: str, bad: float) -> None:
    weight = weight_of(24, 256)
    weight[7, 200] = bad
    with pytest.raises(CheckpointError, match=r"'a\.weight' holds NaN or infinite"):
        load(WAYS[way], {"a.weight": weight}, tmp_path, Part("a", 24, 256))


def test_a_row_of_zeros_stays_zeros(tmp_path: Path) -> None:
    for way, made in WAYS.items():
        found = load(made, {"a.weight": torch.zeros(8, 64)}, tmp_path / way, Part("a", 8, 64))
        assert not found.dequantised(torch.float32).any()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_head_computes_what_its_numbers_mean(tmp_path: Path, bits: int, tied: bool) -> None:
    folder = write_llama(tmp_path, tie_word_embeddings=tied)
    plain, found = load_model(folder), load_model(folder, head_bits=bits)
    table = next(plain.head.tensors())
    wanted = expected(f"head{bits}", table)
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.logits(hidden), hidden @ wanted.t(), rtol=1e-4, atol=1e-4)
    assert torch.equal(found.embedding.weight, plain.embedding.weight), "rows are still looked up as they were"
    size = 131 * (64 * bits // 8 + (4 if bits == 8 else 3))
    assert found.weight_bytes == plain.weight_bytes + size - (0 if tied else 131 * 64 * 4), "the bill counts the head as it is"
    logits = [Harness(model).step([(0, PROMPT)])[0] for model in (plain, found)]
    assert (logits[0] - logits[1]).norm() / logits[0].norm() < (0.02 if bits == 8 else 0.2)


def test_a_16_bit_model_runs_as_fp8(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    plain, found = load_model(folder), load_model(folder, model_format="fp8")
    for layer, dense in zip(found.layers, plain.layers, strict=True):
        for name in ("qkv", "out"):
            weight, before = getattr(layer.attention, name).weight, getattr(dense.attention, name).weight
            assert isinstance(weight, Packed8) and torch.equal(weight.dequantised(torch.float32), expected("fp8", before.weight))
    logits = [Harness(model).step([(0, PROMPT)])[0] for model in (plain, found)]
    assert 1e-3 < (logits[0] - logits[1]).norm() / logits[0].norm() < 0.1
    assert found.weight_bytes < 0.5 * plain.weight_bytes


def test_an_odd_number_of_inputs_cannot_be_held_in_4_bits(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a: 63 inputs .* use 8 or 16 bits"):
        load(HEADS[4], {"a.weight": weight_of(8, 63)}, tmp_path, Part("a", 8, 63))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("way", WAYS)
def test_weights_are_rounded_on_the_gpu_as_on_the_cpu(tmp_path: Path, way: str) -> None:
    weight = weight_of(24, 256)
    source = open_source(write_folder(tmp_path, {}, {"a.weight": weight}))
    found = WAYS[way].load(source, [Part("a", 24, 256)], False, torch.bfloat16, torch.device("cuda"))
    assert isinstance(found, (Packed8, Packed4)) and all(t.is_cuda for t in found.memory())
    torch.testing.assert_close(found.dequantised(torch.float32).cpu(), expected(way, weight), rtol=0.07, atol=1e-3)  # a tie may fall the other way
