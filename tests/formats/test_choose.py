"""The choice of a weight format: what config.json says, what the option says, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.formats.awq import AwqFormat
from lmdeploy.formats.choose import choose_formats
from lmdeploy.formats.gptq import GptqFormat
from tests.formats.packing import configuration


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
