"""InternLM2 and 2.5: llama under other names, with q, k and v of each KV group fused in one tensor `wqkv`."""

from __future__ import annotations

from lmdeploy.layers.attention import AttentionNames
from lmdeploy.layers.mlp import MLPNames
from lmdeploy.models.decoder import Decoder, DecoderNames


class InternLM2(Decoder):
    """`wqkv` is cut into [q | k | v] while it is copied in."""

    names = DecoderNames(
        embedding="model.tok_embeddings",
        head="output",
        input_norm="attention_norm",
        attention="attention",
        post_norm="ffn_norm",
        mlp="feed_forward",
        in_attention=AttentionNames(qkv=("wqkv",), out="wo", interleaved=True),
        in_mlp=MLPNames(gate_up=("w1", "w3"), down="w2"),
    )
