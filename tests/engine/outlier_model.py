"""The embedded model as a Qwen2 checkpoint whose keys have huge biases, as Qwen2 and 2.5 have them: a trained model that any cache of few bits destroys.

The biases sit on the pairs that the rope turns slowest, so they add nearly one vector to all keys, which softmax does not see: with a 16-bit cache the model is as
good as before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import lmdeploy

Tensor = torch.Tensor
EMBEDDED = Path(lmdeploy.__file__).parent / "assets" / "tiny-internlm2-chat"
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 64
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
RENAMED = (
    ("model.tok_embeddings", "model.embed_tokens"), ("output.weight", "lm_head.weight"), ("attention_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"), ("attention.wo", "self_attn.o_proj"), ("feed_forward.w1", "mlp.gate_proj"),
    ("feed_forward.w3", "mlp.up_proj"), ("feed_forward.w2", "mlp.down_proj"),
)  # fmt: skip


def write_outlier_model(folder: Path, bias: float, pairs: Sequence[int] = (28, 31)) -> Path:
    """Key biases of about `bias`, of any sign, in these of the 32 pairs (31 turns slowest) of every KV head and layer."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for file in sorted(EMBEDDED.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            for old, new in RENAMED:
                name = name.replace(old, new)
            if name.endswith("attention.wqkv.weight"):
                tensors |= _attention(name.replace("attention.wqkv.weight", "self_attn"), tensor, bias, list(pairs), generator)
            else:
                tensors[name] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((EMBEDDED / "config.json").read_text())
    config.update(architectures=["Qwen2ForCausalLM"], model_type="qwen2", use_sliding_window=False)
    (folder / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER:
        shutil.copy(EMBEDDED / name, folder)
    save_file(tensors, folder / "model.safetensors")
    return folder


def _attention(prefix: str, fused: Tensor, bias: float, pairs: list[int], generator: torch.Generator) -> dict[str, Tensor]:
    groups = fused.view(KV_HEADS, HEADS // KV_HEADS + 2, HEAD_DIM, -1)
    tensors: dict[str, Tensor] = {}
    for name, rows in (("q", groups[:, :-2]), ("k", groups[:, -2]), ("v", groups[:, -1])):
        weight = rows.reshape(-1, fused.shape[1]).contiguous()
        tensors[f"{prefix}.{name}_proj.weight"] = weight
        tensors[f"{prefix}.{name}_proj.bias"] = torch.zeros(weight.shape[0], dtype=weight.dtype)
    key = tensors[f"{prefix}.k_proj.bias"].view(KV_HEADS, HEAD_DIM)
    for dim in [*pairs, *(p + HEAD_DIM // 2 for p in pairs)]:
        size = torch.rand(KV_HEADS, generator=generator) * 0.5 + 0.75
        sign = torch.randint(0, 2, (KV_HEADS,), generator=generator) * 2 - 1
        key[:, dim] = (bias * size * sign).to(key.dtype)
    return tensors
