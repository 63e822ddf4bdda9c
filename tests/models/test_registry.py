"""Finding the class of a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lmdeploy.errors import CheckpointError
from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.models.internlm2 import InternLM2
from lmdeploy.models.names import MODEL_TYPES, MODELS
from lmdeploy.models.registry import build_model, model_class
from lmdeploy.parallel import Parallel
from lmdeploy.spec import ModelSpec, load_spec
from tests.helpers import write_internlm2


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    return load_spec(write_internlm2(tmp_path))


def test_the_architecture_chooses_the_class(spec: ModelSpec) -> None:
    assert model_class(spec) is InternLM2
    assert isinstance(build_model(spec, torch.float32, "cpu", REFERENCE, Parallel()), InternLM2)


def test_the_model_type_chooses_when_there_is_no_architecture(spec: ModelSpec) -> None:
    assert model_class(replace(spec, architecture="")) is InternLM2


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("InternLM4ForCausalLM", "InternLM3ForCausalLM"), ("QwenForCausalLM", "Qwen2ForCausalLM"), ("Qwen3MoeForCausalLm", "Qwen3MoeForCausalLM")],
)
def test_an_unknown_architecture_names_itself_and_the_nearest(spec: ModelSpec, name: str, nearest: str) -> None:
    with pytest.raises(CheckpointError, match=f"'{name}' is not supported.*{nearest}"):
        model_class(replace(spec, architecture=name))


def test_an_unknown_model_type_is_an_error_too(spec: ModelSpec) -> None:
    with pytest.raises(CheckpointError, match="mamba"):
        model_class(replace(spec, architecture="", model_type="mamba"))


@pytest.mark.parametrize("architecture", MODELS)
def test_every_registered_class_exists(spec: ModelSpec, architecture: str) -> None:
    assert model_class(replace(spec, architecture=architecture)).__doc__


def test_every_architecture_has_a_model_type() -> None:
    assert sorted(MODEL_TYPES.values()) == sorted(MODELS)


def test_a_llama_like_model_takes_at_most_60_lines() -> None:
    import lmdeploy.models

    folder = Path(next(iter(lmdeploy.models.__path__)))
    shared = {
        "__init__.py",
        "decoder.py",
        "moe.py",
        "names.py",
        "language.py",
        "language_spec.py",
        "weight_bytes.py",
        "registry.py",
        "vision.py",
        "vision_tower.py",
    }
    sizes = {p.name: len(p.read_text().splitlines()) for p in folder.glob("*.py") if p.name not in shared}
    assert sizes and max(sizes.values()) <= 60, sizes
