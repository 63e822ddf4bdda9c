"""fp8 folders: blocks that end ragged, scales of rows and tensors, ranks; and a model computes what its numbers mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.checkpoint.source import WeightSource, open_source
from lmdeploy.errors import CheckpointError
from lmdeploy.formats.choose import choose_formats
from lmdeploy.formats.packed8 import Packed8, ScaledFormat
from lmdeploy.formats.weight_format import Part
from tests.formats.packing import Stored, by_rows, fp8, meaning, stored_folder
from tests.helpers import Harness, load_model, write_folder, write_internlm2, write_llama

CPU, E4M3 = torch.device("cpu"), torch.float8_e4m3fn
PROMPT = [1, 5, 77, 20, 9, 130, 3]
ENTRY: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def weight_of(rows: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


def source_of(folder: Path, **modules: dict[str, torch.Tensor]) -> WeightSource:
    return open_source(write_folder(folder, {}, {f"{name}.{suffix}": t for name, tensors in modules.items() for suffix, t in tensors.items()}))


def load(source: WeightSource, *parts: Part, block: tuple[int, int] | None = None) -> Packed8:
    return ScaledFormat(("weight_scale_inv", "weight_scale"), E4M3, True, block).load(source, parts, False, torch.float32, CPU)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_rows_and_columns_of_ragged_blocks_are_found(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    block = (data.draw(st.sampled_from([3, 16, 128]), "block rows"), data.draw(st.sampled_from([16, 32, 128]), "block inputs"))
    rows, inputs = data.draw(st.integers(2, 50), "rows"), 8 * data.draw(st.integers(1, 40), "inputs / 8")
    stored, wanted = fp8(weight_of(rows, inputs), block)
    low = data.draw(st.integers(0, rows - 2), "first row")
    middle = data.draw(st.integers(low, rows - 1), "second row")
    ranges = [slice(middle, rows), slice(low, middle)]
    first = 8 * data.draw(st.integers(0, inputs // 8 - 1), "first input / 8")
    cols = slice(first, 8 * data.draw(st.integers(first // 8 + 1, inputs // 8), "last input / 8"))
    source = source_of(tmp_path_factory.mktemp("fp8"), a=stored)
    weight = load(source, Part("a", rows, inputs, ranges, cols), block=block)
    source.finish()
    assert torch.equal(weight.dequantised(torch.float32), torch.cat([wanted[r] for r in ranges])[:, cols])


@pytest.mark.parametrize(("inputs", "groups"), [(256, 2), (192, 3), (88, 1), (128, 1), (24, 1)])
def test_scales_take_as_little_memory_as_the_blocks_allow(tmp_path: Path, inputs: int, groups: int) -> None:
    stored, _ = fp8(weight_of(16, inputs), (128, 128))
    weight = load(source_of(tmp_path, a=stored), Part("a", 16, inputs), block=(128, 128))
    assert weight.scales.shape == (16, groups) and weight.nbytes == 16 * (inputs + 4 * groups)
    assert weight.quantise_inputs == (groups == 1)


@pytest.mark.parametrize("shape", ["[]", "[1]", "[N]", "[N, 1]", "[N, K/g]"])
def test_scales_of_any_shape_are_told_apart(tmp_path: Path, shape: str) -> None:
    weight = weight_of(12, 64)
    block = {"[]": (12, 64), "[1]": (12, 64), "[N, K/g]": (1, 16)}.get(shape, (1, 64))
    numbers, scales = by_rows(weight, E4M3, block)
    stored = {"weight": numbers, "weight_scale": scales.view(()) if shape == "[]" else scales.flatten() if shape in ("[1]", "[N]") else scales}
    found = load(source_of(tmp_path, a=stored), Part("a", 12, 64))
    assert torch.equal(found.dequantised(torch.float32), meaning(numbers, scales, block))


def test_fused_modules_keep_the_scale_of_each(tmp_path: Path) -> None:
    (first, one), (second, other) = fp8(weight_of(8, 32, 1), None), fp8(5 * weight_of(4, 32, 2), None)
    found = load(source_of(tmp_path, a=first, b=second), Part("a", 8, 32), Part("b", 4, 32))
    assert torch.equal(found.dequantised(torch.float32), torch.cat((one, other))) and found.scales.unique().numel() == 2


@pytest.mark.parametrize(
    ("part", "block", "words"),
    [
        (Part("a", 16, 64), (16, 16), ["'a.weight_scale_inv'", "[1, 2]", "[1, 4]"]),
        (Part("a", 16, 64), None, ["'a.weight_scale_inv'", "[1, 2]", "16 outputs and 64 inputs"]),
        (Part("a", 24, 64), (128, 32), ["'a.weight'", "[16, 64]", "[24, 64]"]),
        (Part("a", 16, 64, None, slice(30, 34)), (128, 32), ["a: inputs 30..34", "common group"]),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, part: Part, block: tuple[int, int] | None, words: list[str]) -> None:
    stored, _ = fp8(weight_of(16, 64), (128, 32))
    with pytest.raises(CheckpointError) as error:
        load(source_of(tmp_path, a=stored), part, block=block)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_scales_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    stored, _ = fp8(weight_of(16, 64), (16, 16))
    stored["weight_scale_inv"][0, 1] = float("nan")
    with pytest.raises(CheckpointError, match=r"'a\.weight_scale_inv' holds infinite numbers or NaN"):
        load(source_of(tmp_path, a=stored), Part("a", 16, 64), block=(16, 16))


def static(weight: torch.Tensor) -> Stored:
    """As tools with static activation scales write it, with those of the KV cache too."""
    stored, wanted = fp8(weight, None, suffix="weight_scale")
    return {**stored, "input_scale": torch.tensor(0.01), "k_scale": torch.tensor(1.0)}, wanted


WAYS: dict[str, tuple[dict[str, Any], Any]] = {
    "blocks": ({**ENTRY, "weight_block_size": [32, 32]}, lambda w: fp8(w, (32, 32))),
    "blocks of 128": ({**ENTRY, "weight_block_size": [128, 128]}, lambda w: fp8(w, (128, 128))),
    "rows": (ENTRY, lambda w: fp8(w, (1, w.shape[1]), suffix="weight_scale")),
    "tensors": ({**ENTRY, "activation_scheme": "static"}, static),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("write", [write_llama, write_internlm2], ids=["llama", "internlm2"])
def test_a_model_computes_what_its_numbers_mean(tmp_path: Path, write: type[write_llama], way: str) -> None:
    packed, plain = stored_folder(write(tmp_path / "dense"), tmp_path, *WAYS[way])
    wanted = Harness(load_model(plain)).step([(0, PROMPT)])[0]
    found = Harness(load_model(packed, quantise_activations=False)).step([(0, PROMPT)])[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    rounded = Harness(load_model(packed)).step([(0, PROMPT)])[0]
    error = float((rounded - wanted).norm() / wanted.norm())
    if "blocks" in way:
        assert error < 1e-4, "activations are rounded only where rows have one scale"
    else:
        assert 1e-3 < error < 0.15


@pytest.mark.parametrize(("change", "words"), [({"fmt": "e5m2"}, "fmt='e5m2'"), ({"weight_block_size": [128]}, r"weight_block_size=\[128\]")])
def test_what_is_not_supported_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        choose_formats({**ENTRY, **change}, None, "/m")
