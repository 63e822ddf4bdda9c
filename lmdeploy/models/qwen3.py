"""Qwen3: llama with a head_dim of its own and an RMSNorm on each query and key head (`spec.qk_norm`)."""

from __future__ import annotations

from lmdeploy.models.decoder import Decoder


class Qwen3(Decoder):
    """The head norms are `q_norm` and `k_norm`, the decoder's defaults."""
