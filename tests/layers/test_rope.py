"""Every rope kind against transformers' own frequencies, and the length rules against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lmdeploy.layers.rope import build_rope, logn_scale
from lmdeploy.spec import RopeSpec

CPU = torch.device("cpu")
SHORT, LONG = tuple(1.0 + 0.1 * i for i in range(12)), tuple(1.5 + 0.7 * i for i in range(12))

#: what transformers is told, and what our spec says
KINDS = {
    "default": ({"rope_type": "default"}, {}),
    "linear": ({"rope_type": "linear", "factor": 3.0}, {"factor": 3.0}),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.5}, {"factor": 2.5}),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, {"factor": 4.0}),
    "yarn, mscale": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "mscale": 0.7,
            "mscale_all_dim": 1.2,
            "beta_fast": 20,
            "beta_slow": 2,
            "truncate": False,
        },
        {"factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.2, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
    ),
    "yarn, attention factor": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 0.9},
        {"factor": 4.0, "attention_factor": 0.9},
    ),
    "longrope": (
        {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64, "short_factor": list(SHORT), "long_factor": list(LONG)},
        {"factor": 4.0, "short_factor": SHORT, "long_factor": LONG},
    ),
}


def theirs(parameters: dict[str, object], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of transformers for a fresh prompt of `length`, [length, R/2]."""
    config = LlamaConfig(hidden_size=96, num_attention_heads=4, max_position_embeddings=64, rope_parameters={**parameters, "rope_theta": 10000.0})
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, length, 96), torch.arange(length).unsqueeze(0))
    return cos[0, :, :12], sin[0, :, :12]


@pytest.mark.parametrize("length", [1, 50, 64, 65, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_cos_and_sin_are_those_of_transformers(kind: str, length: int) -> None:
    parameters, numbers = KINDS[kind]
    spec = RopeSpec(kind=kind.split(",")[0], theta=10000.0, rotary_dim=24, original_max_position=64, **numbers)  # type: ignore[arg-type]
    positions = torch.arange(length)
    lengths = torch.full((length,), length) if spec.depends_on_length else None
    found, wanted = build_rope(spec, CPU).cos_sin(positions, lengths), theirs(parameters, length)
    for ours, reference in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, reference, rtol=0, atol=3e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_each_sequence_of_a_batch_has_its_own_base(kind: str) -> None:
    _, numbers = KINDS[kind]
    rope = build_rope(RopeSpec(kind=kind, rotary_dim=24, original_max_position=64, **numbers), CPU)  # type: ignore[arg-type]
    positions, lengths = torch.tensor([5, 5, 70, 70]), torch.tensor([10, 100, 64, 100])
    cos, _ = rope.cos_sin(positions, lengths)
    for row in range(4):
        alone, _ = rope.cos_sin(positions[row : row + 1], lengths[row : row + 1])
        assert torch.equal(cos[row], alone[0])
    assert not torch.equal(cos[0], cos[1]) and not torch.equal(cos[2], cos[3])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_mere_shapes_has_its_numbers(kind: str) -> None:
    """Arithmetic on the device "meta" makes torch import its compiler: a second of every `lmdeploy lite` command."""
    _, numbers = KINDS[kind]
    spec = RopeSpec(kind=kind.split(",")[0], rotary_dim=24, original_max_position=64, **numbers)  # type: ignore[arg-type]
    positions, lengths = torch.arange(5), torch.full((5,), 90)
    found, wanted = (build_rope(spec, torch.device(device)).cos_sin(positions, lengths) for device in ("meta", "cpu"))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_dynamic_base_follows_the_formula() -> None:
    rope = build_rope(RopeSpec(kind="dynamic", theta=10000.0, rotary_dim=24, original_max_position=64, factor=2.0), CPU)
    cos, _ = rope.cos_sin(torch.tensor([77]), torch.tensor([192]))
    base = 10000.0 * (2.0 * 192 / 64 - 1.0) ** (24 / 22)
    wanted = [math.cos(77 / base ** (2 * i / 24)) for i in range(12)]
    torch.testing.assert_close(cos[0], torch.tensor(wanted), rtol=0, atol=3e-5)


def test_logn_grows_only_past_the_training_length() -> None:
    scale = logn_scale(torch.tensor([0, 62, 63, 64, 4095]), 64)
    torch.testing.assert_close(scale, torch.tensor([1.0, 1.0, 1.0, math.log(65) / math.log(64), 2.0]))
