"""What a user may write for a model, without a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import ModelInfo
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils._paths import filter_repo_objects

from lmdeploy.checkpoint.hub import UNWANTED, WANTED, resolve_model
from lmdeploy.errors import CheckpointError


def message(path: str, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve_model(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_model_means_the_embedded_one() -> None:
    folder = resolve_model(None)
    assert (folder / "config.json").is_file()
    assert list(folder.glob("*.safetensors"))


def test_a_model_folder_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model(tmp_path) == tmp_path


def test_paths_that_are_no_model_say_why(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    assert "found a.txt" in message(str(tmp_path))
    assert "is a file" in message(str(tmp_path / "a.txt"))
    assert "no such folder" in message(str(tmp_path / "x" / "y"))
    assert "no such folder" in message("no_slash")
    assert "empty" in message(" ")
    assert "no such folder" in message("../a/b")


class Hub:
    """Stands in for the network: remembers what was asked for, answers or fails."""

    def __init__(self, answer: Path | Exception, files: list[str] | Exception) -> None:
        self.answer, self.files = answer, files
        self.asked: dict[str, Any] = {}

    def snapshot_download(self, name: str, **options: Any) -> str:
        self.asked = {"name": name, **options}
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)

    def model_info(self, name: str, revision: str | None = None) -> ModelInfo:
        if isinstance(self.files, Exception):
            raise self.files
        return ModelInfo(id=name, siblings=[{"rfilename": file} for file in self.files])


def use(monkeypatch: pytest.MonkeyPatch, answer: Path | Exception, files: list[str] | Exception) -> Hub:
    hub = Hub(answer, files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return hub


def test_a_hub_id_is_downloaded_without_code_and_without_second_copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = use(monkeypatch, tmp_path, ["model.safetensors", "pytorch_model.bin"])
    assert resolve_model("org/name", "/downloads", "v1") == tmp_path
    assert (hub.asked["name"], hub.asked["cache_dir"], hub.asked["revision"]) == ("org/name", "/downloads", "v1")
    kept = list(
        filter_repo_objects(
            ["model.safetensors", "a.pth", "modeling.py", "tokenizer.model", "config.json", "pytorch_model.bin", "qwen.tiktoken", "original/params.json"],
            allow_patterns=hub.asked["allow_patterns"],
            ignore_patterns=hub.asked["ignore_patterns"],
        )
    )
    assert kept == ["model.safetensors", "tokenizer.model", "config.json", "qwen.tiktoken"]


def test_where_configs_are_enough_no_weights_are_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = ["config.json", "generation_config.json", "quantize_config.json", "preprocessor_config.json", "model.safetensors", "tokenizer.json", "a.py"]
    hub = use(monkeypatch, tmp_path, files)
    assert resolve_model("org/name", configs_only=True) == tmp_path
    kept = filter_repo_objects(files, allow_patterns=hub.asked["allow_patterns"], ignore_patterns=hub.asked["ignore_patterns"])
    assert list(kept) == files[:4]


def test_bin_files_are_downloaded_when_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = use(monkeypatch, tmp_path, ["pytorch_model.bin"])
    resolve_model("org/name")
    assert hub.asked["ignore_patterns"] == list(UNWANTED)
    assert hub.asked["allow_patterns"] == list(WANTED)


RESPONSE = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co/org/name"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LocalEntryNotFoundError("offline\nand more"), "the hub cannot be reached; give a local folder"),
        (RepositoryNotFoundError("404\nlong text", response=RESPONSE), "no such model on the hub"),  # type: ignore[arg-type]
        (GatedRepoError("403\nlong text", response=RESPONSE), "licence"),  # type: ignore[arg-type]
        (RevisionNotFoundError("404\nlong text", response=RESPONSE), "no such revision"),  # type: ignore[arg-type]
        (OSError("disk full\nand more"), "OSError: disk full"),
    ],
)
def test_hub_failures_are_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    use(monkeypatch, error, ConnectionError("no network"))
    text = message("org/name", revision="v1")
    assert words in text
    assert text.startswith("org/name at v1")


@pytest.mark.parametrize("network", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:1"}], ids=["offline mode", "nothing answers"])
def test_no_hub_is_one_line_at_once_with_the_real_library(network: dict[str, str], tmp_path: Path) -> None:
    code = "from lmdeploy.checkpoint.hub import resolve_model\ntry:\n    resolve_model('org/name')\nexcept Exception as e:\n    print(type(e).__name__, e)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**network, "HF_HOME": str(tmp_path), "NO_PROXY": "*", "PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=15,
        check=True,
    )
    assert result.stdout.startswith("CheckpointError org/name: ")
    assert "cannot be reached" in result.stdout
    assert result.stdout.count("\n") == 1
    assert not result.stderr


def test_the_hub_library_is_not_imported_for_a_local_model() -> None:
    code = "import sys\nfrom lmdeploy.checkpoint.hub import resolve_model\nresolve_model(None)\n"
    code += "assert 'huggingface_hub' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env={"PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))}, timeout=60, check=True)
