"""4-bit folders end to end: the embedded model rounded to 4 bits still counts, options and the memory bill tell the truth, mistakes are named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import lmdeploy
from lmdeploy import GenerationConfig, PytorchEngineConfig, TurbomindEngineConfig, pipeline
from lmdeploy.errors import CheckpointError, ConfigError
from tests.formats.packing import quantised_folder

EMBEDDED = Path(lmdeploy.__file__).parent / "assets" / "tiny-internlm2-chat"
COUNT, TWENTY = "Count from 1 to 20.", ", ".join(map(str, range(1, 21)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded model in both layouts, with its tokenizer."""
    found = {}
    for method in ("awq", "gptq"):
        folder, _ = quantised_folder(EMBEDDED, tmp_path_factory.mktemp(method), method, 64)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
            shutil.copy(EMBEDDED / name, folder)
        found[method] = folder
    return found


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_embedded_model_in_4_bits_counts(folders: dict[str, Path], method: str, dtype: str) -> None:
    with pipeline(str(folders[method]), TurbomindEngineConfig(model_format=method, dtype=dtype, session_len=256)) as pipe:
        assert TWENTY in pipe(COUNT).text


def test_plain_torch_finds_the_format_by_itself_and_says_the_same(folders: dict[str, Path]) -> None:
    configs = (PytorchEngineConfig(dtype="float32", session_len=256), TurbomindEngineConfig(dtype="float32", session_len=256))
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
    ("folder", "asked", "holds"), [("awq", "hf", "AWQ 4-bit weights"), ("gptq", "awq", "GPTQ 4-bit weights"), ("dense", "awq", "unquantised")]
)
def test_a_wrong_flag_is_an_error_that_says_what_the_folder_holds(folders: dict[str, Path], folder: str, asked: str, holds: str) -> None:
    path = folders.get(folder, EMBEDDED)
    with pytest.raises(ConfigError, match=f"model_format='{asked}', but {path} holds {holds}"):
        pipeline(str(path), TurbomindEngineConfig(model_format=asked))


def test_packed_files_without_a_quantization_config_are_called_so(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["awq"], tmp_path, dirs_exist_ok=True)
    shutil.copy(EMBEDDED / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="the weights are quantised"):
        pipeline(str(tmp_path), TurbomindEngineConfig())
