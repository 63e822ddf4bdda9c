"""Checkpoints that AutoAWQ, GPTQModel and llm-compressor made (tests/formats/foreign) run here and give the logits that those programs say they give.

The folders and what was expected of them were written by scripts/make_foreign_checkpoints.py, which imports nothing of this package.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lmdeploy.config import PytorchEngineConfig
from lmdeploy.errors import ConfigError
from lmdeploy.formats.awq import AwqFormat
from lmdeploy.formats.choose import choose_formats
from lmdeploy.formats.compressed_tensors import CompressedFormat
from lmdeploy.formats.gptq import GptqFormat
from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.kernels.select import select
from lmdeploy.spec import load_spec
from tests.helpers import Harness, load_model

Tensor = torch.Tensor

FOLDERS = Path(__file__).parent / "foreign"
#: folder -> (its --model-format, its reader)
MADE: dict[str, tuple[str, type]] = {
    "awq": ("awq", AwqFormat),
    "gptq": ("gptq", GptqFormat),
    "gptq-act-order": ("gptq", GptqFormat),
    "gptq-v2": ("gptq", GptqFormat),
    "compressed-w4a16": ("compressed-tensors", CompressedFormat),
    "compressed-w4a16-asym": ("compressed-tensors", CompressedFormat),
    "compressed-w8a8": ("compressed-tensors", CompressedFormat),
    "compressed-fp8": ("compressed-tensors", CompressedFormat),
}
#: Float32 sums in another order; measured: up to 3e-5 where logits spread by 2.5. Quantising itself moved them by 0.4 to 7.
CLOSE = 2e-4


def expected(name: str) -> tuple[list[int], dict[str, Tensor]]:
    stored = load_file(FOLDERS / name / "expected.safetensors")
    return stored.pop("tokens").tolist(), stored


def logits(name: str, **options: Any) -> Tensor:
    return Harness(load_model(FOLDERS / name, **options)).step([(0, expected(name)[0])])[0]


def divergence(reference: Tensor, found: Tensor) -> float:
    """Mean KL divergence in nats."""
    p, q = reference.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def as_compressed_tensors_rounds(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """The W8A8 product with that library's scale of an int8 row: its largest number is 127.5, where ours is 127."""
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    result = ((x / scale).round().clamp(-128, 127) * scale) @ (qweight.float() * scales).t()
    out.copy_(result if bias is None else result + bias)


def test_every_folder_is_tested() -> None:
    assert {path.name for path in FOLDERS.iterdir() if path.is_dir()} == set(MADE)


@pytest.mark.parametrize("name", MADE)
def test_the_format_is_found_and_the_weights_are_those_that_their_maker_reads(name: str) -> None:
    assert isinstance(choose_formats(load_spec(FOLDERS / name).quantization).packed, MADE[name][1])
    torch.testing.assert_close(logits(name, quantise_activations=False), expected(name)[1]["logits"], rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", MADE)
def test_only_its_own_model_format_is_accepted(name: str) -> None:
    folder, (right, _) = FOLDERS / name, MADE[name]
    quantization = load_spec(folder).quantization
    for wrong in ("hf", "awq", "gptq", "fp8", "smooth-quant", "compressed-tensors"):
        PytorchEngineConfig(model_format=wrong)  # it is a value of the option
        if wrong != right:
            with pytest.raises(ConfigError, match=rf"model_format='{wrong}', but .*{name} holds .*; use model_format='{right}'"):
                choose_formats(quantization, wrong, str(folder))
    assert isinstance(choose_formats(quantization, right, str(folder)).packed, MADE[name][1])


def test_fp8_inputs_are_quantised_as_their_maker_does() -> None:
    torch.testing.assert_close(logits("compressed-fp8"), expected("compressed-fp8")[1]["logits_quantised_inputs"], rtol=0, atol=CLOSE)


def test_int8_inputs_differ_from_their_makers_by_the_largest_number_alone() -> None:
    """Ours and theirs are both within what int8 inputs do to the logits (0.012 nats by their account; ours measured 0.006 from theirs)."""
    theirs = expected("compressed-w8a8")[1]
    same = logits("compressed-w8a8", kernels=replace(REFERENCE, linear_w8a8=as_compressed_tensors_rounds))
    torch.testing.assert_close(same, theirs["logits_quantised_inputs"], rtol=0, atol=CLOSE)
    assert divergence(theirs["logits_quantised_inputs"], logits("compressed-w8a8")) < divergence(theirs["logits"], theirs["logits_quantised_inputs"])


@pytest.mark.parametrize("name", MADE)
def test_the_fast_kernels_of_this_machine_run_it_in_bfloat16(name: str) -> None:
    """Measured with AMX: 0.0005 to 0.008 nats, 0.034 where inputs are fp8 (0.028 in plain torch: bfloat16 flips roundings that cost 0.019 themselves)."""
    found = logits(name, kernels=select("turbomind", "cpu", torch.bfloat16), dtype=torch.bfloat16)
    want = expected(name)[1]
    assert divergence(want.get("logits_quantised_inputs", want["logits"]), found.float()) < 0.05


def test_zero_points_read_without_their_offset_would_be_seen() -> None:
    """The comparison can fail: the second layout's zero points are stored as they are, the first one's less 1."""
    quantization = load_spec(FOLDERS / "gptq").quantization
    assert quantization is not None and quantization["checkpoint_format"] == "gptq"
    overrides = {"quantization_config": {**quantization, "checkpoint_format": "gptq_v2"}}
    assert divergence(expected("gptq")[1]["logits"], logits("gptq", overrides=overrides)) > 0.5
