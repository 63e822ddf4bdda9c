"""The two real checkpoints that lie beside the repository (`shared/models`); skipped where they are not."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.helpers import Harness, load_model

MODELS = Path(__file__).resolve().parents[3] / "shared" / "models"


def answer(name: str, prompt: str, count: int) -> str:
    folder = MODELS / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    harness = Harness(load_model(folder), block_size=64, num_blocks=8)
    return str(tokenizer.decode(harness.greedy(tokenizer.encode(prompt).ids, count)))


def test_stories260k_tells_the_story_of_its_card() -> None:
    story = answer("stories260K-llama", "Once upon a time", 60)
    assert story.startswith(", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball.")
    assert "She wanted to play with it, but it was too high." in story


def test_tiny_internlm2_counts_to_20() -> None:
    said = answer("tiny-internlm2-chat", "<|im_start|>user\nCount from 1 to 20.<|im_end|>\n<|im_start|>assistant\n", 70)
    assert said.strip().startswith(", ".join(map(str, range(1, 21))))
