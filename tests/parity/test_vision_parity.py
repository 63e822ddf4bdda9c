"""Vision-language models against transformers: the same tiles give the same tokens and log-probabilities, in every layout that we read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

from lmdeploy import GenerationConfig, Pipeline, PytorchEngineConfig, pipeline
from lmdeploy.answer import Prepared
from lmdeploy.vision.policy import OWN
from tests.vision.folders import LAYOUTS, PICTURE, write

NEW = 6


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise, smoothed a little, so that resizing matters."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)


@torch.no_grad()
def expected(model: PreTrainedModel, prepared: Prepared, vision: Any) -> tuple[list[int], list[float]]:
    """Greedy tokens of transformers for the same ids and tiles, and their log-probabilities."""
    ids = list(prepared.token_ids)
    tiles = []
    for p in prepared.pictures:
        ids[p.start : p.start + p.count] = [PICTURE] * p.count
        pixels = torch.frombuffer(bytearray(p.pixels), dtype=torch.uint8).view(p.tiles, p.size, p.size, 3).permute(0, 3, 1, 2).float() / 255
        tiles.append((pixels - torch.tensor(vision.mean).view(3, 1, 1)) / torch.tensor(vision.std).view(3, 1, 1))
    extra: dict[str, Any] = {"pixel_values": torch.cat(tiles)}
    if vision.aspect == "anyres":
        most = max(len(t) for t in tiles)
        padded = [torch.cat((t, torch.zeros(most - len(t), *t.shape[1:]))) for t in tiles]
        extra = {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor([[p.original[1], p.original[0]] for p in prepared.pictures])}
    tokens, logprobs = [], []
    for _ in range(NEW):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False, **extra).logits[0, -1].log_softmax(-1)
        tokens.append(int(logits[:PICTURE].argmax()))
        logprobs.append(float(logits[tokens[-1]]))
        ids.append(tokens[-1])
    return tokens, logprobs


def answer(pipe: Pipeline, prepared: Prepared) -> tuple[list[int], list[float]]:
    """Ours."""
    response = pipe.frontend.generate(prepared)[0]
    assert response.logprobs is not None
    return response.token_ids, [entry[token] for token, entry in zip(response.token_ids, response.logprobs, strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_and_logprobs_are_those_of_transformers(layout: str, tmp_path: Path) -> None:
    model = write(layout, tmp_path / "m")
    config = PytorchEngineConfig(dtype="float32", max_prefill_token_num=32, cache_max_entry_count=200, cache_block_seq_len=8, max_batch_size=4)
    gen = GenerationConfig(max_new_tokens=NEW, do_sample=False, logprobs=1, ignore_eos=True, bad_token_ids=[PICTURE])
    with pipeline(str(tmp_path / "m"), backend_config=config) as pipe:
        vision = pipe.frontend.prompts.vision
        for images in ([picture(40, 30)], [picture(70, 25)], [picture(20, 90, 1), picture(33, 33, 2)]):
            content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "What do you see?"}]
            prepared = pipe.frontend.prepare([{"role": "user", "content": content}], gen, media=OWN)
            assert [p.count for p in prepared.pictures] and len(prepared.pictures) == len(images)
            tokens, logprobs = expected(model, prepared, vision)
            assert answer(pipe, prepared)[0] == tokens  # in chunks of 32 tokens
            again = answer(pipe, prepared)  # from the prefix cache
            assert again[0] == tokens
            assert np.allclose(again[1], logprobs, atol=2e-4)
