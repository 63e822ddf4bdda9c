"""Phi-3 and Phi-3.5 mini: llama with q, k, v stacked in one tensor, gate and up in another, and longrope in the long-context versions."""

from __future__ import annotations

from lmdeploy.layers.attention import AttentionNames
from lmdeploy.layers.mlp import MLPNames
from lmdeploy.models.decoder import Decoder, DecoderNames


class Phi3(Decoder):
    """Stacked tensors are read by row ranges."""

    names = DecoderNames(in_attention=AttentionNames(qkv=("qkv_proj",)), in_mlp=MLPNames(gate_up=("gate_up_proj",)))
