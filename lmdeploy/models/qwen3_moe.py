"""Qwen3-MoE: Qwen3's attention with experts, save for the layers that the config keeps dense."""

from __future__ import annotations

from lmdeploy.models.moe import MoEDecoder


class Qwen3Moe(MoEDecoder):
    """The names are the defaults."""
