"""Qwen1.5, Qwen2, Qwen2.5: llama with biases on q, k and v and, where the config switches it on, a window in the upper layers."""

from __future__ import annotations

from lmdeploy.models.decoder import Decoder


class Qwen2(Decoder):
    """Biases come from the file, window layers from the spec."""
