"""SmoothQuant folders: numbers arrive as they are, activations are rounded or not as the option says, and a model computes what its numbers mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmdeploy.checkpoint.source import open_source
from lmdeploy.errors import CheckpointError
from lmdeploy.formats.choose import choose_formats
from lmdeploy.formats.packed8 import Packed8, ScaledFormat
from lmdeploy.formats.weight_format import Part
from lmdeploy.kernels.reference import REFERENCE
from tests.formats.packing import smooth_quant, stored_folder
from tests.helpers import Harness, load_model, write_folder, write_internlm2, write_llama

CPU = torch.device("cpu")
DTYPES = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}
PROMPT = [1, 5, 77, 20, 9, 130, 3]


def weight_of(rows: int, inputs: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", DTYPES)
def test_numbers_scales_and_bias_arrive_bit_for_bit(tmp_path: Path, name: str) -> None:
    stored, wanted = smooth_quant(weight_of(24, 40, 1), DTYPES[name])
    stored["bias"] = torch.arange(24.0)
    source = open_source(write_folder(tmp_path, {}, {f"a.{suffix}": t for suffix, t in stored.items()}))
    rows = [slice(8, 24), slice(0, 4)]
    weight = ScaledFormat(("scale",), DTYPES[name]).load(source, [Part("a", 24, 40, rows)], True, torch.bfloat16, CPU)
    source.finish()
    assert weight.qweight.dtype is DTYPES[name] and weight.bias is not None
    picked = [torch.cat([t[r] for r in rows]) for t in (stored["weight"].float(), stored["scale"], stored["bias"].bfloat16(), wanted)]
    assert torch.equal(weight.qweight.float(), picked[0]) and torch.equal(weight.scales, picked[1]) and torch.equal(weight.bias, picked[2])
    assert torch.equal(weight.dequantised(torch.float32), picked[3])
    assert weight.nbytes == 20 * 40 + 20 * 4 + 20 * 2


@pytest.mark.parametrize("quantise_activations", [True, False])
def test_the_option_decides_whether_activations_are_rounded(tmp_path: Path, quantise_activations: bool) -> None:
    stored, wanted = smooth_quant(weight_of(24, 64, 2), torch.int8)
    source = open_source(write_folder(tmp_path, {}, {f"model.layers.0.a.{suffix}": t for suffix, t in stored.items()}))
    formats = choose_formats({"quant_method": "smooth_quant", "quant_dtype": "int8"}, quantise_activations=quantise_activations)
    parts = [Part("model.layers.0.a", 24, 64)]
    weight = formats.of(source, parts).load(source, parts, False, torch.float32, CPU)
    x, out = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)), torch.empty(5, 24)
    weight.matmul(x, out, REFERENCE)
    scale = x.abs().amax(1, keepdim=True) / 127
    seen = (x / scale).round() * scale if quantise_activations else x
    torch.testing.assert_close(out, seen @ wanted.t(), rtol=1e-5, atol=1e-5)
    assert (out - x @ wanted.t()).abs().max() > 1e-3 or not quantise_activations


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("write", [write_llama, write_internlm2], ids=["llama", "internlm2"])
def test_a_model_computes_what_its_numbers_mean(tmp_path: Path, write: type[write_llama], name: str) -> None:
    entry = {"quant_method": "smooth_quant", "quant_dtype": name}
    packed, plain = stored_folder(write(tmp_path / "dense"), tmp_path, entry, lambda w: smooth_quant(w, DTYPES[name]))
    model = load_model(packed, quantise_activations=False)
    assert isinstance(model.layers[0].attention.qkv.weight, Packed8)
    wanted = Harness(load_model(plain)).step([(0, PROMPT)])[0]
    torch.testing.assert_close(Harness(model).step([(0, PROMPT)])[0], wanted, rtol=1e-4, atol=1e-4)
    rounded = Harness(load_model(packed)).step([(0, PROMPT)])[0]  # activations too
    error = (rounded - wanted).norm() / wanted.norm()
    assert 1e-4 < error < (0.03 if name == "int8" else 0.12), f"{error:.4f}"


def test_a_type_that_is_not_supported_is_named() -> None:
    with pytest.raises(CheckpointError, match="quant_dtype='float8_e5m2'.*known: int8, float8_e4m3fn"):
        choose_formats({"quant_method": "smooth_quant", "quant_dtype": "float8_e5m2"}, None, "/m")


def test_numbers_of_another_type_than_config_says_are_not_cast(tmp_path: Path) -> None:
    stored, _ = smooth_quant(weight_of(8, 16, 3), torch.float8_e4m3fn)
    stored["weight"] = stored["weight"].float().to(torch.float8_e5m2)
    source = open_source(write_folder(tmp_path, {}, {f"a.{suffix}": t for suffix, t in stored.items()}))
    for dtype in DTYPES.values():
        with pytest.raises(CheckpointError, match=r"'a\.weight' is float8_e5m2 where"):
            ScaledFormat(("scale",), dtype).load(source, [Part("a", 8, 16)], False, torch.float32, CPU)
