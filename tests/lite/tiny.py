"""Tiny folders that the `lite` commands can work on: any model of `tests/helpers.py` or `tests/parity/families.py` with a tokenizer of one token a letter."""

from __future__ import annotations

import hashlib
import json
import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

Tensor = torch.Tensor

WORDS = "the fox ran over a hill and saw one small red boat on its way to far lands, where old kings sing of rain; "


def write_tokenizer(folder: Path) -> Path:
    """Letters, digits and marks: 98 tokens, fewer than any test model has."""
    letters = sorted(set(string.ascii_letters + string.digits + string.punctuation + " "))
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))
    return folder


def write_text(folder: Path, repeats: int = 40) -> str:
    """A calibration text; returns its path."""
    file = folder / "calibration.txt"
    file.write_text(WORDS * repeats, encoding="utf-8")
    return str(file)


def change_tensors(folder: Path, **changes: Any) -> None:
    """Put other values into model.safetensors: name (with `__` for `.`) -> function of the tensor that changes it in place."""
    tensors = load_file(folder / "model.safetensors")
    for name, change in changes.items():
        change(tensors[name.replace("__", ".")])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path below the folder."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}
