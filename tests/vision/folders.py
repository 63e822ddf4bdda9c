"""Tiny random vision-language models, made by transformers and written in every layout that we read; the tokenizer is the embedded model's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 5121  # the embedded model's, and one more that stands for pictures
PICTURE = VOCABULARY - 1
SIZE, PATCH = 28, 7
CLIP = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIZE, "patch_size": PATCH,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28]]
#: of LLaVA's own layout, where the grid is (width, height); transformers has (height, width)
FLAT = {
    **TEXT, "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "torch_dtype": "float32", "mm_projector_type": "mlp2x_gelu", "rope_theta": 10000.0,
    "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_vision_tower": "tower", "hidden_act": "silu",
}  # fmt: skip
LAYOUTS = ("llava 1.5", "llava 1.6", "llava of transformers", "llava next of transformers", "internvl")


@torch.no_grad()
def write(layout: str, folder: Path) -> PreTrainedModel:
    """A model folder in `layout`, and the same model in transformers."""
    torch.manual_seed(0)
    model = _model(layout)
    for name, tensor in model.named_parameters():  # large enough that every part changes the logits
        if tensor.dim() > 1 and "embed" not in name:
            tensor.normal_(0, 1.2 / tensor[0].numel() ** 0.5)
        elif "newline" in name or "lambda" in name:
            tensor.normal_(0.5, 0.2)
    model.get_input_embeddings().weight.normal_(0, 1)
    model = model.float().eval()
    folder.mkdir(parents=True, exist_ok=True)
    if layout.endswith("of transformers"):
        model.save_pretrained(folder)
    else:
        tensors, config = (_internvl if layout == "internvl" else _llava)(model, layout)
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
    if layout in ("llava 1.5", "llava 1.6"):
        (folder / "tower").mkdir()
        (folder / "tower" / "config.json").write_text(json.dumps({"vision_config": CLIP}))
    for file in (ROOT / "lmdeploy" / "assets" / "tiny-internlm2-chat").glob("*token*.json"):
        shutil.copy(file, folder)
    return model


def _model(layout: str) -> PreTrainedModel:
    text = LlamaConfig(**TEXT)
    if layout == "internvl":
        vision = InternVLVisionConfig(**{**CLIP, "image_size": [SIZE, SIZE], "patch_size": [PATCH, PATCH], "num_hidden_layers": 2}, attention_bias=True)
        return InternVLForConditionalGeneration(InternVLConfig(vision_config=vision, text_config=text, image_token_id=PICTURE))
    clip = CLIPVisionConfig(**CLIP)
    if layout in ("llava 1.6", "llava next of transformers"):
        grid = [[h, w] for w, h in PINPOINTS]
        config = LlavaNextConfig(vision_config=clip, text_config=text, image_token_index=PICTURE, image_grid_pinpoints=grid)
        return LlavaNextForConditionalGeneration(config)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=clip, text_config=text, image_token_index=PICTURE))


def _llava(model: PreTrainedModel, layout: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """LLaVA's own names."""
    renamed = (
        ("model.language_model.", "model."), ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("model.multi_modal_projector.linear_1", "model.mm_projector.0"), ("model.multi_modal_projector.linear_2", "model.mm_projector.2"),
    )  # fmt: skip
    config = {**FLAT, "image_aspect_ratio": "pad"}
    if layout == "llava 1.6":
        config |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS}
    return _renamed(model, renamed), config


def _internvl(model: PreTrainedModel, layout: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """InternVL2's own names; q, k and v in one tensor."""
    renamed = (
        ("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."), ("model.vision_tower.", "vision_model."),
        ("vision_model.encoder.layer.", "vision_model.encoder.layers."), ("embeddings.cls_token", "embeddings.class_embedding"),
        ("embeddings.position_embeddings", "embeddings.position_embedding"), ("embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
        ("lambda_1", "ls1"), ("lambda_2", "ls2"), ("attention.projection_layer", "attn.proj"), ("layernorm_before", "norm1"), ("layernorm_after", "norm2"),
        ("model.multi_modal_projector.layer_norm", "mlp1.0"), ("model.multi_modal_projector.linear_1", "mlp1.1"),
        ("model.multi_modal_projector.linear_2", "mlp1.3"),
    )  # fmt: skip
    tensors = _renamed(model, renamed)
    for name in [n for n in tensors if ".attention.q_proj" in n]:
        parts = [tensors.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        tensors[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    llm = {**TEXT, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rope_theta": 10000.0, "torch_dtype": "float32"}
    config = {
        "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "llm_config": llm, "torch_dtype": "float32", "downsample_ratio": 0.5,
        "dynamic_image_size": True, "force_image_size": SIZE, "min_dynamic_patch": 1, "max_dynamic_patch": 6, "use_thumbnail": True, "ps_version": "v2",
        "select_layer": -1, "vision_config": {**CLIP, "num_hidden_layers": 2, "model_type": "intern_vit_6b", "hidden_act": "gelu", "qkv_bias": True},
    }  # fmt: skip
    return tensors, config


def _renamed(model: PreTrainedModel, rules: tuple[tuple[str, str], ...]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, tensor in model.state_dict().items():
        for old, new in rules:
            name = name.replace(old, new)
        tensors[name] = tensor
    return tensors
