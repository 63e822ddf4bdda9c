"""Renaming wraps a source and changes nothing but names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lmdeploy.checkpoint.rename import Rename, RenamedSource, checkpoint_name
from lmdeploy.checkpoint.source import open_source
from lmdeploy.errors import CheckpointError

RULES = [Rename(r"model\.", "language_model.model."), Rename(r"(lm_head)\.", r"language_model.\1.")]


def test_the_first_rule_that_matches_the_beginning_wins() -> None:
    assert checkpoint_name("model.layers.0.model.x", RULES) == "language_model.model.layers.0.model.x"
    assert checkpoint_name("lm_head.weight", RULES) == "language_model.lm_head.weight"
    assert checkpoint_name("vision.model.x", RULES) == "vision.model.x"
    assert checkpoint_name("model.x", [Rename("model", "a"), Rename("model", "b")]) == "a.x"


def test_a_renamed_source_is_asked_with_the_models_names(tmp_path: Path) -> None:
    save_file({"language_model.model.a": torch.arange(6.0).view(3, 2), "language_model.lm_head.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    source = RenamedSource(open_source(tmp_path), RULES)
    assert source.has("model.a")
    assert (source.shape("model.a"), source.dtype("model.a")) == ((3, 2), torch.float32)
    assert source.names() == {"language_model.model.a", "language_model.lm_head.weight"}
    out = torch.empty(2, 2)
    source.take_ranges("model.a", out, [slice(2, 3), slice(0, 1)])
    assert out.tolist() == [[4.0, 5.0], [0.0, 1.0]]
    with pytest.raises(CheckpointError, match=r"language_model\.lm_head\.weight"):
        source.finish()
    source.take("lm_head.weight", torch.empty(2))
    source.finish()


def test_a_missing_tensor_is_named_as_the_checkpoint_would_name_it(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'language_model\.model\.a' is missing"):
        RenamedSource(open_source(tmp_path), RULES).take("model.a", torch.empty(1))
