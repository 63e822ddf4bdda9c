"""InternLM3 (and InternLM 1): llama's names, with biases on q, k, v (and o in version 1) where the config and the file say so."""

from __future__ import annotations

from lmdeploy.models.decoder import Decoder


class InternLM3(Decoder):
    """Biases are found in the file, so nothing differs in code."""
