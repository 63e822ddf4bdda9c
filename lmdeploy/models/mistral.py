"""Mistral and Ministral: llama with, in its first version, a sliding window in every layer."""

from __future__ import annotations

from lmdeploy.models.decoder import Decoder


class Mistral(Decoder):
    """The window comes from the spec."""
