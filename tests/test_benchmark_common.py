"""Random 4-bit weights for a folder of a 16-bit model."""

from __future__ import annotations

import dataclasses

import pytest

from benchmark import common
from lmdeploy.formats.choose import choose_formats
from lmdeploy.formats.packed4 import PackedFormat
from lmdeploy.spec import ModelSpec
from tests.helpers import LLAMA_CONFIG

TINY_SPEC = ModelSpec.from_config(LLAMA_CONFIG)


@pytest.mark.parametrize("name", ["awq", "gptq"])
def test_a_16_bit_folder_serves_for_random_4_bit_weights(name: str) -> None:
    told = common.overrides(TINY_SPEC, name, random_weights=True)
    assert told is not None
    formats = choose_formats(told["quantization_config"], name)
    assert isinstance(formats.packed, PackedFormat) and formats.packed.group_size == 128


def test_nothing_is_overridden_that_the_files_say() -> None:
    quantised = dataclasses.replace(TINY_SPEC, quantization={"quant_method": "awq"})
    assert common.overrides(quantised, "awq", random_weights=True) is None
    assert common.overrides(TINY_SPEC, "awq", random_weights=False) is None
    assert common.overrides(TINY_SPEC, None, random_weights=True) is None


def test_a_step_reads_no_embedding_table_unless_it_is_the_head() -> None:
    table = TINY_SPEC.vocab_size * TINY_SPEC.hidden_size * 2
    assert common.read_each_step(dataclasses.replace(TINY_SPEC, tie_embeddings=False), 10 * table, 2) == 9 * table
    assert common.read_each_step(dataclasses.replace(TINY_SPEC, tie_embeddings=True), 10 * table, 2) == 10 * table
