"""compressed-tensors: numbers in words and as they are, with and without zero points, groups of modules; and a model computes what its numbers mean.

The library itself (0.20.0, not needed here) agreed bit for bit with what is read; scales of 4-bit weights are kept in float16 since then.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lmdeploy.checkpoint.source import WeightSource, open_source
from lmdeploy.errors import CheckpointError
from lmdeploy.formats.choose import Formats, choose_formats
from lmdeploy.formats.packed4 import Packed4
from lmdeploy.formats.packed8 import Packed8
from lmdeploy.formats.weight_format import Part
from lmdeploy.kernels.reference import REFERENCE
from tests.formats.packing import Stored, compressed4, compressed8, compressed_entry, stored_folder
from tests.helpers import Harness, load_model, write_folder, write_internlm2, write_llama

CPU, E4M3, INT8 = torch.device("cpu"), torch.float8_e4m3fn, torch.int8
PROMPT = [1, 5, 77, 20, 9, 130, 3]
INT4: dict[str, Any] = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
W8: dict[str, Any] = {"num_bits": 8, "type": "int", "strategy": "channel"}
FP8: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "channel"}
WAYS: dict[str, tuple[dict[str, Any], Any]] = {
    "int4": (compressed_entry("pack-quantized", INT4), lambda w: compressed4(w, 32)),
    "int4 asymmetric": (compressed_entry("pack-quantized", {**INT4, "symmetric": False}), lambda w: compressed4(w, 32, symmetric=False)),
    "int4 rows": (compressed_entry("pack-quantized", {**INT4, "strategy": "channel", "group_size": None}), lambda w: compressed4(w, w.shape[1])),
    "int8 in words": (compressed_entry("pack-quantized", {**W8, "strategy": "group", "group_size": 32}), lambda w: compressed8(w, INT8, (1, 32), packed=True)),
    "int8": (compressed_entry("int-quantized", W8, activations=True), lambda w: compressed8(w, INT8, (1, w.shape[1]))),
    "fp8 rows": (compressed_entry("float-quantized", FP8, activations=True), lambda w: compressed8(w, E4M3, (1, w.shape[1]))),
    "fp8 tensors": (compressed_entry("float-quantized", {**FP8, "strategy": "tensor"}), lambda w: compressed8(w, E4M3, (w.shape[0], w.shape[1]))),
    "fp8 blocks": (
        compressed_entry("float-quantized", {**FP8, "strategy": "block", "block_structure": [64, 32]}, activations=True),
        lambda w: compressed8(w, E4M3, (64, 32)),
    ),
}


def weight_of(rows: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


def source_of(folder: Path, **modules: dict[str, torch.Tensor]) -> WeightSource:
    tensors = {f"model.layers.0.{name}.{suffix}": t for name, tensors in modules.items() for suffix, t in tensors.items()}
    return open_source(write_folder(folder, {}, tensors))


def load(formats: Formats, source: WeightSource, *parts: Part) -> Packed4 | Packed8:
    weight = formats.of(source, parts).load(source, parts, False, torch.float32, CPU)
    assert isinstance(weight, (Packed4, Packed8))
    return weight


@pytest.mark.parametrize("way", WAYS)
def test_the_slices_of_two_ranks_are_the_whole(tmp_path: Path, way: str) -> None:
    entry, store = WAYS[way]
    (first, one), (second, other) = (store(weight_of(rows, 128, rows)) for rows in (48, 16))
    source, formats = source_of(tmp_path, a=first, b=second), choose_formats(entry)
    names = [("model.layers.0.a", 48, [slice(24, 48), slice(0, 5)]), ("model.layers.0.b", 16, None)]
    wanted = torch.cat((one[24:], one[:5], other))
    whole = load(formats, source, *(Part(name, rows, 128, ranges) for name, rows, ranges in names))
    assert torch.equal(whole.dequantised(torch.float32), wanted)
    halves = [load(formats, source, *(Part(name, rows, 128, ranges, cols) for name, rows, ranges in names)) for cols in (slice(0, 64), slice(64, 128))]
    assert torch.equal(torch.cat([half.dequantised(torch.float32) for half in halves], dim=1), wanted)
    source.finish(formats.unused)


def test_a_rank_may_begin_and_end_inside_a_word(tmp_path: Path) -> None:
    stored, wanted = compressed4(weight_of(8, 72), 36)
    formats = choose_formats(compressed_entry("pack-quantized", {**INT4, "group_size": 36}))
    found = load(formats, source_of(tmp_path, a=stored), Part("model.layers.0.a", 8, 72, None, slice(36, 72)))
    assert torch.equal(found.dequantised(torch.float32), wanted[:, 36:])


@pytest.mark.parametrize("quantise_activations", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_activations_are_rounded_where_the_file_was_made_for_it(tmp_path: Path, way: str, quantise_activations: bool) -> None:
    entry, store = WAYS[way]
    stored, wanted = store(weight_of(16, 64))
    weight = load(choose_formats(entry, quantise_activations=quantise_activations), source_of(tmp_path, a=stored), Part("model.layers.0.a", 16, 64))
    x, out = weight_of(5, 64, 9), torch.empty(5, 16)
    weight.matmul(x, out, REFERENCE)
    error = float((out - x @ wanted.t()).norm() / out.norm())
    made_for_it = way in ("int8", "fp8 rows")
    assert (1e-3 < error < 0.05) if made_for_it and quantise_activations else error < 1e-5, f"{error:.2e}"


@pytest.mark.parametrize("symmetric", [True, False])
def test_act_order_multiplies_each_input_by_its_own_column(tmp_path: Path, symmetric: bool) -> None:
    order = torch.arange(128)[torch.randperm(128, generator=torch.Generator().manual_seed(3))] // 32
    stored, wanted = compressed4(weight_of(16, 128), 32, symmetric=symmetric, group=order)
    formats = choose_formats(compressed_entry("pack-quantized", {**INT4, "symmetric": symmetric, "actorder": "group"}))
    weight = load(formats, source_of(tmp_path, a=stored), Part("model.layers.0.a", 16, 128))
    x, out = weight_of(5, 128, 9), torch.empty(5, 16)
    weight.matmul(x, out, REFERENCE)
    torch.testing.assert_close(out, x @ wanted.t())


def test_an_order_of_minus_one_is_none(tmp_path: Path) -> None:
    stored, wanted = compressed4(weight_of(16, 128), 32)
    stored["weight_g_idx"] = torch.full((128,), -1, dtype=torch.int32)
    weight = load(choose_formats(compressed_entry("pack-quantized", INT4)), source_of(tmp_path, a=stored), Part("model.layers.0.a", 16, 128))
    assert torch.equal(weight.dequantised(torch.float32), wanted)
    assert isinstance(weight, Packed4) and weight.order is None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("write", [write_llama, write_internlm2], ids=["llama", "internlm2"])
def test_a_model_computes_what_its_numbers_mean(tmp_path: Path, write: type[write_llama], way: str) -> None:
    packed, plain = stored_folder(write(tmp_path / "dense", intermediate_size=96, head_dim=16), tmp_path, *WAYS[way])
    found, wanted = (Harness(load_model(folder, quantise_activations=False)).step([(0, PROMPT)])[0] for folder in (packed, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["int4", "int8", "fp8 rows"])
def test_a_head_that_is_quantised_in_the_files_stays_so(tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture) -> None:
    entry, store = WAYS[way]
    packed, plain = stored_folder(write_llama(tmp_path / "dense", intermediate_size=96, vocab_size=136), tmp_path, {**entry, "ignore": []}, store, ("lm_head",))
    models = [load_model(packed, quantise_activations=False, head_bits=bits) for bits in (16, 8)]
    wanted = Harness(load_model(plain)).step([(0, PROMPT)])[0]
    for model in models:
        torch.testing.assert_close(Harness(model).step([(0, PROMPT)])[0], wanted, rtol=1e-4, atol=1e-4)
    assert "lm_head is quantised in the files; head_bits has no effect" in caplog.text


def mixed(**targets: tuple[str, Any]) -> dict[str, Any]:
    """Two groups with formats of their own."""
    groups = {f"group_{i}": {"targets": [target], "weights": weights, "format": stored} for i, (target, (stored, weights)) in enumerate(targets.items())}
    return {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}


def test_groups_of_modules_have_settings_of_their_own(tmp_path: Path) -> None:
    entry = mixed(**{"Linear": ("pack-quantized", INT4), r"re:.*\.down": ("float-quantized", FP8), "model.layers.0.up": ("int-quantized", W8)})
    stored: dict[str, Stored] = {"down": compressed8(weight_of(16, 64), E4M3, (1, 64)), "up": compressed8(weight_of(16, 64), INT8, (1, 64))}
    stored["gate"] = compressed4(weight_of(16, 64), 32)
    source, formats = source_of(tmp_path, **{name: tensors for name, (tensors, _) in stored.items()}), choose_formats(entry)
    for name, (_, wanted) in stored.items():
        assert torch.equal(load(formats, source, Part(f"model.layers.0.{name}", 16, 64)).dequantised(torch.float32), wanted)
    with pytest.raises(CheckpointError, match=r"gate and model\.layers\.0\.up are quantised in different ways"):
        load(formats, source, *(Part(f"model.layers.0.{name}", 16, 64) for name in ("gate", "up")))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (compressed_entry("nvfp4-pack-quantized", INT4), ["format='nvfp4-pack-quantized'", "pack-quantized, int-quantized"]),
        (compressed_entry("pack-quantized", {**INT4, "num_bits": 3}), ["'num_bits': 3"]),
        (compressed_entry("int-quantized", INT4), ["'num_bits': 4"]),
        (compressed_entry("float-quantized", W8), ["'type': 'int'"]),
        (compressed_entry("int-quantized", {**W8, "symmetric": False}), ["symmetric=False"]),
        (compressed_entry("pack-quantized", {**INT4, "strategy": "tensor_group"}), ["strategy='tensor_group'"]),
        (compressed_entry("pack-quantized", {**INT4, "group_size": "32"}), ["group_size='32'"]),
        (compressed_entry("float-quantized", {**FP8, "strategy": "block"}), ["block_structure=None"]),
        (compressed_entry("int-quantized", W8, sparsity_config={"format": "sparse-24-bitmask"}), ["sparsity_config"]),
        (compressed_entry("int-quantized", W8, transform_config={"config_groups": {"R1": {}}}), ["transform_config"]),
        (compressed_entry("int-quantized", W8, config_groups=None), ["config_groups=None"]),
        (compressed_entry("int-quantized", W8, config_groups={"a": {"targets": "Linear"}}), ["targets='Linear'"]),
        (compressed_entry("int-quantized", W8, config_groups={"a": {"targets": ["Linear"], "weights": None}}), ["weights=None"]),
    ],
)
def test_what_is_not_supported_is_named(entry: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(CheckpointError) as error:
        choose_formats(entry, None, "/m")
    text = str(error.value)
    assert all(word in text for word in ["/m", *words]), text
    assert len(text) < 300 and "\n" not in text


@pytest.mark.parametrize(
    ("entry", "part", "words"),
    [
        (compressed_entry("pack-quantized", {**INT4, "group_size": 48}), Part("model.layers.0.a", 16, 64), ["64 inputs", "group_size=48"]),
        (
            compressed_entry("pack-quantized", {**INT4, "group_size": 16}),
            Part("model.layers.0.a", 16, 64),
            ["'model.layers.0.a.weight_scale'", "[16, 2]", "[16, 4]"],
        ),
        (compressed_entry("pack-quantized", INT4), Part("model.layers.0.a", 16, 128), ["'model.layers.0.a.weight_packed'", "[16, 8]", "[16, 16]"]),
        (
            compressed_entry("pack-quantized", {**INT4, "symmetric": False}),
            Part("model.layers.0.a", 16, 64),
            ["'model.layers.0.a.weight_zero_point' is missing"],
        ),
        (compressed_entry("pack-quantized", INT4), Part("model.layers.0.a", 16, 60), ["60 inputs", "multiples of 8"]),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, entry: dict[str, Any], part: Part, words: list[str]) -> None:
    source = source_of(tmp_path, a=compressed4(weight_of(16, 64), 32)[0])
    with pytest.raises(CheckpointError) as error:
        load(choose_formats(entry), source, part)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(("value", "words"), [(1e6, "beyond 65504"), (float("nan"), "infinite numbers or NaN")])
def test_scales_that_cannot_be_kept_are_named(tmp_path: Path, value: float, words: str) -> None:
    stored, _ = compressed4(weight_of(16, 64), 32)
    stored["weight_scale"][3, 1] = value
    with pytest.raises(CheckpointError, match=rf"'model\.layers\.0\.a\.weight_scale' .*{words}"):
        load(choose_formats(compressed_entry("pack-quantized", INT4)), source_of(tmp_path, a=stored), Part("model.layers.0.a", 16, 64))


def test_zero_points_and_activation_scales_that_older_files_repeat_are_left_alone(tmp_path: Path) -> None:
    entry, store = WAYS["int8"]

    def older(weight: torch.Tensor) -> Stored:
        stored, wanted = store(weight)
        return {**stored, "weight_zero_point": torch.zeros(weight.shape[0], 1, dtype=torch.int8), "input_scale": torch.tensor([0.1])}, wanted

    packed, plain = stored_folder(write_llama(tmp_path / "dense"), tmp_path, entry, older)
    found, wanted = (Harness(load_model(folder, quantise_activations=False)).step([(0, PROMPT)])[0] for folder in (packed, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_land_on_the_gpu_and_multiply_there(tmp_path: Path, dtype: torch.dtype, way: str) -> None:
    entry, store = WAYS[way]
    stored, wanted = store(weight_of(16, 64))
    formats, parts = choose_formats(entry, quantise_activations=False), [Part("model.layers.0.a", 16, 64)]
    source = source_of(tmp_path, a=stored)
    weight = formats.of(source, parts).load(source, parts, False, dtype, torch.device("cuda"))
    assert isinstance(weight, (Packed4, Packed8)) and all(t.is_cuda for t in weight.memory())
    assert torch.equal(weight.dequantised(torch.float32).cpu(), wanted)
    x, out = weight_of(5, 64, 9).to(dtype), torch.empty(5, 16, dtype=dtype, device="cuda")
    weight.matmul(x.cuda(), out, REFERENCE)
    torch.testing.assert_close(out.cpu().float(), x.float() @ wanted.to(dtype).float().t(), rtol=2e-2, atol=5e-2)
