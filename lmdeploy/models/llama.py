"""Llama 1 to 3.2, and every checkpoint published under its name: the decoder as it is."""

from __future__ import annotations

from lmdeploy.models.decoder import Decoder


class Llama(Decoder):
    """Llama's names are the decoder's defaults."""
