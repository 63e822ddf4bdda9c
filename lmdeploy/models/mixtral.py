"""Mixtral: Mistral's attention with experts named w1 (gate), w3 (up) and w2 (down)."""

from __future__ import annotations

from lmdeploy.layers.experts import ExpertNames
from lmdeploy.models.decoder import DecoderNames
from lmdeploy.models.moe import MoEDecoder


class Mixtral(MoEDecoder):
    """Every layer has experts."""

    names = DecoderNames(mlp="block_sparse_moe")
    in_experts = ExpertNames(gate="w1", up="w3", down="w2")
