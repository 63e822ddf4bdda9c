"""The choice of a weight format: what config.json says, what the option says, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lmdeploy.checkpoint.source import open_source
from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.formats.at_load import AtLoadFormat
from lmdeploy.formats.awq import AwqFormat
from lmdeploy.formats.choose import choose_formats
from lmdeploy.formats.compressed_tensors import CompressedFormat
from lmdeploy.formats.dense import DenseFormat
from lmdeploy.formats.gptq import GptqFormat
from lmdeploy.formats.packed8 import ScaledFormat
from lmdeploy.formats.weight_format import Part
from tests.formats.packing import compressed_entry, configuration
from tests.helpers import write_folder


@pytest.mark.parametrize("option", [None, "awq"])
def test_awq_is_found_with_its_group(option: str | None) -> None:
    packed = choose_formats(configuration("awq", 64), option).packed
    assert isinstance(packed, AwqFormat) and packed.group_size == 64


@pytest.mark.parametrize("option", [None, "gptq"])
@pytest.mark.parametrize(("extra", "offset"), [({}, 1), ({"checkpoint_format": "gptq"}, 1), ({"checkpoint_format": "gptq_v2"}, 0)])
def test_gptq_is_found_with_the_offset_of_its_zeros(option: str | None, extra: dict[str, Any], offset: int) -> None:
    packed = choose_formats(configuration("gptq", -1, **extra), option).packed
    assert isinstance(packed, GptqFormat) and (packed.group_size, packed.offset) == (-1, offset)


def test_old_spellings_of_awq_are_read() -> None:
    packed = choose_formats({"quant_method": "AWQ", "w_bit": 4, "q_group_size": 128, "version": "GEMM"}).packed
    assert isinstance(packed, AwqFormat) and packed.group_size == 128


SMOOTH = {"quant_method": "smooth_quant", "quant_dtype": "float8_e4m3fn"}
COMPRESSED = compressed_entry("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32})


@pytest.mark.parametrize("named", [False, True])
def test_smooth_quant_is_found_with_its_type(named: bool) -> None:
    packed = choose_formats(SMOOTH, "smooth-quant" if named else None).packed
    assert isinstance(packed, ScaledFormat) and (packed.suffixes, packed.dtype, packed.quantise_inputs) == (("scale",), torch.float8_e4m3fn, True)
    assert choose_formats({"quant_method": "smooth_quant"}).packed == ScaledFormat(("scale",), torch.int8, True)


@pytest.mark.parametrize("named", [False, True])
def test_fp8_is_found_with_its_blocks(named: bool) -> None:
    packed = choose_formats({"quant_method": "fp8", "weight_block_size": [64, 128]}, "fp8" if named else None).packed
    assert isinstance(packed, ScaledFormat) and packed.block == (64, 128) and not packed.quantise_inputs


@pytest.mark.parametrize("named", [False, True])
def test_compressed_tensors_are_found_with_their_groups(named: bool) -> None:
    packed = choose_formats(COMPRESSED, "compressed-tensors" if named else None).packed
    assert isinstance(packed, CompressedFormat) and len(packed.groups) == 1


def test_fp8_is_made_of_16_bits_in_the_layers_of_the_decoder_only(tmp_path: Path) -> None:
    formats = choose_formats(None, "fp8")
    source = open_source(write_folder(tmp_path, {}, {"a": torch.zeros(1)}))
    kinds = {name: type(formats.of(source, [Part(name, 8, 8)])) for name in ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate", "lm_head")}
    assert list(kinds.values()) == [AtLoadFormat, DenseFormat, DenseFormat]


@pytest.mark.parametrize("option", [None, "hf"])
@pytest.mark.parametrize("quantization", [None, {}])
def test_without_a_quantization_config_nothing_is_packed(option: str | None, quantization: dict[str, Any] | None) -> None:
    assert choose_formats(quantization, option).packed is None


@pytest.mark.parametrize(
    ("quantization", "option", "words"),
    [
        (None, "awq", ["model_format='awq'", "/m holds unquantised weights", "'hf'"]),
        (configuration("awq", 128), "hf", ["model_format='hf'", "/m holds AWQ 4-bit weights", "'awq'"]),
        (configuration("awq", 128), "gptq", ["model_format='gptq'", "AWQ", "'awq'"]),
        (configuration("gptq", 128), "awq", ["model_format='awq'", "GPTQ", "'gptq'"]),
        (configuration("gptq", 128), "fp8", ["model_format='fp8'", "GPTQ 4-bit weights", "'gptq'"]),
        (None, "smooth-quant", ["model_format='smooth-quant'", "unquantised", "'hf'"]),
        (SMOOTH, "fp8", ["/m holds SmoothQuant 8-bit weights", "use model_format='smooth-quant'"]),
        ({"quant_method": "fp8"}, "hf", ["/m holds fp8 weights", "'fp8'"]),
        (COMPRESSED, "awq", ["/m holds weights of compressed-tensors", "use model_format='compressed-tensors'"]),
    ],
)
def test_an_option_that_contradicts_the_folder_says_what_it_holds(quantization: dict[str, Any] | None, option: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        choose_formats(quantization, option, "/m")
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["quant_method='bitsandbytes'", "awq, gptq"]),
        ({"bits": 4}, ["quant_method=None"]),
        (configuration("awq", 128, bits=8), ["bits=8", "known: 4"]),
        (configuration("gptq", 128, bits=3), ["bits=3"]),
        (configuration("gptq", 128, bits="4"), ["bits='4'", "whole numbers"]),
        (configuration("awq", 128, version="gemv"), ["version='gemv'", "gemm"]),
        (configuration("gptq", 128, checkpoint_format="marlin"), ["checkpoint_format='marlin'"]),
        (configuration("awq", None), ["group_size=None"]),  # type: ignore[arg-type]
        (configuration("awq", 128, modules_to_not_convert="lm_head"), ["modules_to_not_convert='lm_head'"]),
        ({"quant_method": "x" * 500}, ["quant_method='xxx"]),
    ],
)
def test_what_is_not_supported_is_named(quantization: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(CheckpointError) as error:
        choose_formats(quantization, None, "/m")
    text = str(error.value)
    assert all(word in text for word in ["/m", *words]), text
    assert len(text) < 300 and "\n" not in text
