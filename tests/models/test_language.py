"""Vision-language folders: only the decoder layers of the language model are quantised, whatever the folder calls them; all else is copied bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmdeploy.lite import auto_awq, auto_gptq, smooth_quant
from lmdeploy.models.language import find_language
from tests.helpers import LLAMA_CONFIG, Harness, as_internlm2, llama_tensors, load_model, write_folder
from tests.lite.tiny import checksums, write_text, write_tokenizer
from tests.lite.unpacking import dense_copy, read_folder

Tensor = torch.Tensor

ROOT = Path(__file__).resolve().parents[2] / "../shared/data/configs"
TEXT_CONFIG = {**LLAMA_CONFIG, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
INTERNLM2 = {**TEXT_CONFIG, "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False}
#: of the language model, below which no name of a vision tower may be quantised though it looks like one of a layer
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "model_type": "some_vit"}


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def internvl2(folder: Path) -> Path:
    """InternVL2: `llm_config`, tensors below language_model, vision_model and mlp1."""
    language = as_internlm2(llama_tensors(TEXT_CONFIG), TEXT_CONFIG)
    tensors = {f"language_model.{name}": tensor for name, tensor in language.items()}
    tensors |= {
        "vision_model.embeddings.class_embedding": seeded(1, 1, 32),
        "vision_model.encoder.layers.0.attn.qkv.weight": seeded(96, 32),
        "vision_model.encoder.layers.0.attn.qkv.bias": seeded(96),
        "mlp1.0.weight": seeded(128),
        "mlp1.1.weight": seeded(64, 128),
    }
    config = {"architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "llm_config": INTERNLM2, "vision_config": VISION, "torch_dtype": "float32"}
    return write_folder(folder, config, tensors)


def llava_hf(folder: Path, prefix: str = "language_model.") -> Path:
    """LLaVA as transformers had it (all below language_model.) and, with the other prefix, as transformers 5 has it in memory."""
    language = llama_tensors(TEXT_CONFIG)
    names = {name: f"{prefix}{name}" if prefix == "language_model." else name.replace("model.", prefix, 1) for name in language}
    outer = "" if prefix == "language_model." else "model."
    tensors = {names[name]: tensor for name, tensor in language.items()}
    tensors |= {
        f"{outer}vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": seeded(32, 32),
        f"{outer}multi_modal_projector.linear_1.weight": seeded(64, 32),
        f"{outer}multi_modal_projector.linear_1.bias": seeded(64),
        f"{outer}image_newline": seeded(64),
    }
    text = {key: value for key, value in TEXT_CONFIG.items() if key not in ("architectures", "torch_dtype")}
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": text, "vision_config": VISION, "torch_dtype": "float32"}
    return write_folder(folder, config, tensors)


def llava_original(folder: Path) -> Path:
    """The first LLaVA folders: one flat config, a llama with a vision tower beside its layers."""
    tensors = llama_tensors(TEXT_CONFIG) | {
        "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": seeded(64, 32),
        "model.mm_projector.0.weight": seeded(64, 32),
        "model.image_newline": seeded(64),
    }
    config = {**TEXT_CONFIG, "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    return write_folder(folder, config, tensors)


FOLDERS: dict[str, Any] = {
    "internvl2": internvl2,
    "llava-hf": llava_hf,
    "llava of transformers 5": lambda folder: llava_hf(folder, "model.language_model."),
    "llava, original": llava_original,
}
VISION_MODULES = {
    "internvl2": ["mlp1", "vision_model"],
    "llava-hf": ["multi_modal_projector", "vision_tower"],
    "llava of transformers 5": ["model.multi_modal_projector", "model.vision_tower"],
    "llava, original": ["model.mm_projector", "model.vision_tower"],
}
METHODS: dict[str, Any] = {"awq": (auto_awq, {"w_group_size": 16}), "gptq": (auto_gptq, {"w_group_size": 16}), "w8a8": (smooth_quant, {})}


def quantised(method: str, folder: Path, out: Path, text: str, **more: Any) -> Path:
    run, options = METHODS[method]
    common = {"calib_dataset": text, "calib_samples": 4, "calib_seqlen": 48, "work_dir": str(out), "dtype": "float32"}
    run(str(folder), **{**common, **options, **more})
    return out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", FOLDERS)
def test_only_the_language_models_layers_are_quantised(kind: str, method: str, tmp_path: Path) -> None:
    folder = write_tokenizer(FOLDERS[kind](tmp_path / "model"))
    before = checksums(folder)
    out = quantised(method, folder, tmp_path / "out", write_text(tmp_path), eval_tokens=0)
    source, tensors = load_file(folder / "model.safetensors"), read_folder(out)
    inside = {name for name in source if ".layers." in name and "vision" not in name and "norm" not in name}
    assert len(inside) == 2 * (5 if kind == "internvl2" else 7)
    marker = "scale" if method == "w8a8" else "qweight"
    assert {f"{name.removesuffix('.weight')}.{marker}" for name in inside} == {name for name in tensors if name.endswith(f".{marker}")}
    for name in source.keys() - inside:
        if "layernorm" not in name and "_norm" not in name:
            assert torch.equal(tensors[name], source[name]), name
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"] == VISION_MODULES[kind]
    assert {key: value for key, value in config.items() if key != "quantization_config"} == json.loads((folder / "config.json").read_text())
    assert checksums(folder) == before


@pytest.mark.parametrize("kind", FOLDERS)
def test_it_computes_what_the_same_language_model_alone_becomes(kind: str, tmp_path: Path) -> None:
    """The same llama (as InternLM2 where the folder has one) quantised as a folder of its own gives the same tensors."""
    text = write_text(tmp_path)
    inside = quantised("gptq", write_tokenizer(FOLDERS[kind](tmp_path / "model")), tmp_path / "inside", text, eval_tokens=0)
    language = llama_tensors(TEXT_CONFIG)
    config = INTERNLM2 if kind == "internvl2" else TEXT_CONFIG
    alone = write_folder(tmp_path / "alone-model", config, as_internlm2(language, TEXT_CONFIG) if kind == "internvl2" else language)
    alone = quantised("gptq", write_tokenizer(alone), tmp_path / "alone", text, eval_tokens=0)
    stored = find_language(tmp_path / "model").stored
    found, expected = read_folder(inside), read_folder(alone)
    for name, tensor in expected.items():
        assert torch.equal(found[stored(name)], tensor), name
    prompt = list(range(3, 20))
    logits = [Harness(load_model(path)).step([(0, prompt)])[0] for path in (alone, dense_copy(alone, tmp_path / "dense"))]
    torch.testing.assert_close(logits[0], logits[1], atol=2e-3, rtol=1e-3)


def test_a_folder_that_the_engine_cannot_load_is_written_and_its_report_says_so(tmp_path: Path) -> None:
    folder = write_tokenizer(internvl2(tmp_path / "model"))
    out = quantised("awq", folder, tmp_path / "out", write_text(tmp_path))
    report = json.loads((out / "quantisation_report.json").read_text())
    assert report["perplexity_after"] is None
    assert "vision tower" in report["perplexity_note"]  # whose config says too little


def test_a_nested_config_may_leave_out_what_transformers_takes_for_granted(tmp_path: Path) -> None:
    """llava-1.5-7b-hf's text_config has no hidden_size: it writes only what differs from a llama of 7B."""
    text = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "vocab_size": 32064}
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": text, "torch_dtype": "float16"}
    folder = write_folder(tmp_path / "model", config, {"language_model.model.norm.weight": torch.ones(4096)})
    spec = find_language(folder).spec
    assert (spec.hidden_size, spec.num_layers, spec.num_kv_heads, spec.intermediate_size, spec.vocab_size) == (4096, 32, 32, 11008, 32064)
    assert (spec.architecture, spec.dtype, spec.max_position) == ("LlamaForCausalLM", "float16", 4096)


@pytest.mark.skipif(not ROOT.is_dir(), reason="needs the shared configs")
@pytest.mark.parametrize(
    ("name", "architecture", "layers", "hidden"),
    [("InternVL2-26B", "InternLM2ForCausalLM", 48, 6144), ("InternVL2-1B", "Qwen2ForCausalLM", 24, 896), ("llava-1.5-7b", "LlamaForCausalLM", 32, 4096)],
)
def test_the_language_model_of_real_configs_is_found(name: str, architecture: str, layers: int, hidden: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((ROOT / name / "config.json").read_bytes())
    save_file({"vision_model.x.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    spec = find_language(tmp_path).spec
    assert (spec.architecture, spec.num_layers, spec.hidden_size) == (architecture, layers, hidden)
