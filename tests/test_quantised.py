"""Quantised folders end to end: the embedded model rounded to 4 or 8 bits still counts, options and the memory bill tell the truth, mistakes are named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lmdeploy
from lmdeploy import GenerationConfig, PytorchEngineConfig, TurbomindEngineConfig, pipeline
from lmdeploy.errors import CheckpointError, ConfigError
from tests.formats.packing import compressed4, compressed8, compressed_entry, fp8, quantised_folder, smooth_quant, stored_folder

EMBEDDED = Path(lmdeploy.__file__).parent / "assets" / "tiny-internlm2-chat"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
COUNT, TWENTY = "Count from 1 to 20.", ", ".join(map(str, range(1, 21)))
COUNT_TO_12, TWELVE = "Count from 1 to 12.", ", ".join(map(str, range(1, 13)))
#: little to compute at start-up: some formats run in plain torch
SMALL: dict[str, Any] = {"session_len": 256, "max_batch_size": 2, "max_prefill_token_num": 64}


def of_rows(dtype: torch.dtype) -> Any:
    return lambda w: compressed8(w, dtype, (1, w.shape[1]))


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": False}
#: how the embedded model is written: --model-format, quantization_config, and the packer of one linear layer
WAYS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "smooth_quant int8": ("smooth-quant", {"quant_method": "smooth_quant", "quant_dtype": "int8"}, lambda w: smooth_quant(w, torch.int8)),
    "smooth_quant fp8": ("smooth-quant", {"quant_method": "smooth_quant", "quant_dtype": "float8_e4m3fn"}, lambda w: smooth_quant(w, torch.float8_e4m3fn)),
    "fp8": ("fp8", {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, lambda w: fp8(w, (128, 128))),
    "compressed int4": ("compressed-tensors", compressed_entry("pack-quantized", INT4), lambda w: compressed4(w, 64, symmetric=False)),
    "compressed int8": (
        "compressed-tensors",
        compressed_entry("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, activations=True),
        of_rows(torch.int8),
    ),
    "compressed fp8": (
        "compressed-tensors",
        compressed_entry("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, activations=True),
        of_rows(torch.float8_e4m3fn),
    ),
}


def with_tokenizer(folder: Path) -> Path:
    """The folder, and in it the embedded model's tokenizer."""
    for name in TOKENIZER:
        shutil.copy(EMBEDDED / name, folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded model in all layouts, with its tokenizer."""
    found = {method: quantised_folder(EMBEDDED, tmp_path_factory.mktemp(method), method, 64)[0] for method in ("awq", "gptq")}
    found |= {way: stored_folder(EMBEDDED, tmp_path_factory.mktemp("eight"), entry, store)[0] for way, (_, entry, store) in WAYS.items()}
    return {way: with_tokenizer(folder) for way, folder in found.items()}


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_embedded_model_in_4_bits_counts(folders: dict[str, Path], method: str, dtype: str) -> None:
    with pipeline(str(folders[method]), TurbomindEngineConfig(model_format=method, dtype=dtype, session_len=256)) as pipe:
        assert TWENTY in pipe(COUNT).text


@pytest.mark.parametrize("way", WAYS)
def test_the_embedded_model_in_any_layout_counts(folders: dict[str, Path], way: str) -> None:
    with pipeline(str(folders[way]), TurbomindEngineConfig(model_format=WAYS[way][0], **SMALL)) as pipe:
        assert TWELVE in pipe(COUNT_TO_12).text


def test_plain_torch_multiplies_8_bit_weights_too(folders: dict[str, Path]) -> None:
    with pipeline(str(folders["smooth_quant int8"]), PytorchEngineConfig(**SMALL)) as pipe:
        assert pipe(COUNT_TO_12, GenerationConfig(max_new_tokens=8)).text.startswith(TWELVE[:8])


def test_activations_in_8_bits_are_the_default_and_switchable(folders: dict[str, Path]) -> None:
    logits = []
    for options in ({}, {"quantise_activations": True}, {"quantise_activations": False}):
        with pipeline(str(folders["smooth_quant int8"]), TurbomindEngineConfig(dtype="float32", **SMALL, **options)) as pipe:
            answer = pipe(COUNT, GenerationConfig(max_new_tokens=8, output_logits="generation"))
            assert answer.logits is not None
            logits.append(answer.logits)
    assert torch.equal(logits[0], logits[1])
    error = float((logits[0] - logits[2]).norm() / logits[2].norm())
    assert 1e-4 < error < 0.05, f"{error:.5f}"


@pytest.mark.parametrize(
    ("options", "share"),
    [({"model_format": "fp8"}, 0.63), ({"head_bits": 8}, 0.96), ({"head_bits": 4}, 0.93), ({"model_format": "fp8", "head_bits": 4}, 0.55)],
    ids=str,
)
def test_a_16_bit_model_is_quantised_while_it_is_loaded(options: dict[str, Any], share: float) -> None:
    sizes = []
    for given in ({}, options):
        with pipeline(str(EMBEDDED), TurbomindEngineConfig(**SMALL, **given)) as pipe:
            assert TWELVE in pipe(COUNT_TO_12).text
            sizes.append(pipe.frontend.info.memory.weights)
    assert share - 0.02 < sizes[1] / sizes[0] < share


def test_a_quantised_head_goes_with_quantised_layers(folders: dict[str, Path]) -> None:
    with pipeline(str(folders["awq"]), TurbomindEngineConfig(**SMALL, head_bits=4)) as pipe:
        assert TWELVE in pipe(COUNT_TO_12).text


def test_plain_torch_finds_the_format_by_itself_and_says_the_same(folders: dict[str, Path]) -> None:
    configs = (PytorchEngineConfig(dtype="float32", **SMALL), TurbomindEngineConfig(dtype="float32", **SMALL))
    answers = []
    for config in configs:
        with pipeline(str(folders["awq"]), config) as pipe:
            answers.append(pipe([COUNT, "Count from 1 to 5."], GenerationConfig(max_new_tokens=20), use_tqdm=False))
    assert [a.text for a in answers[0]] == [a.text for a in answers[1]]


def test_the_memory_bill_counts_packed_bytes(folders: dict[str, Path]) -> None:
    sizes = []
    for folder in (EMBEDDED, folders["awq"]):
        with pipeline(str(folder), TurbomindEngineConfig(dtype="float32", session_len=256)) as pipe:
            sizes.append(pipe.frontend.info.memory.weights)
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize(
    ("folder", "asked", "holds"),
    [
        ("awq", "hf", "AWQ 4-bit weights"),
        ("gptq", "awq", "GPTQ 4-bit weights"),
        ("dense", "awq", "unquantised"),
        ("dense", "smooth-quant", "unquantised"),
        ("awq", "fp8", "AWQ 4-bit weights"),
        ("fp8", "hf", "fp8 weights"),
        ("smooth_quant int8", "fp8", "SmoothQuant 8-bit weights"),
        ("compressed int4", "gptq", "weights of compressed-tensors"),
    ],
)
def test_a_wrong_flag_is_an_error_that_says_what_the_folder_holds(folders: dict[str, Path], folder: str, asked: str, holds: str) -> None:
    path = folders.get(folder, EMBEDDED)
    with pytest.raises(ConfigError, match=f"model_format='{asked}', but {path} holds {holds}"):
        pipeline(str(path), TurbomindEngineConfig(model_format=asked))


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("awq", "the weights are quantised"),
        ("compressed int4", "the weights are quantised"),
        ("fp8", "is float8_e4m3fn where .* is expected; 8-bit weights need their scales"),
        ("smooth_quant int8", "is int8 where .* is expected; 8-bit weights need their scales"),
    ],
)
def test_packed_files_without_a_quantization_config_are_called_so(folders: dict[str, Path], tmp_path: Path, way: str, words: str) -> None:
    shutil.copytree(folders[way], tmp_path, dirs_exist_ok=True)
    shutil.copy(EMBEDDED / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=words):
        pipeline(str(tmp_path), TurbomindEngineConfig())
