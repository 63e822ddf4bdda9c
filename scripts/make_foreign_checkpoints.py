"""Make tests/formats/foreign: tiny llama folders that other people's software quantised and packed, and the logits that it says they give.

Each maker runs in a virtual environment of its own (versions and commands: tests/formats/foreign/README.md), never in the project's:

    python scripts/make_foreign_checkpoints.py source|awq|gptq|compressed-tensors SOURCE [TARGET]

`source` writes the float16 model SOURCE first. `expected.safetensors` of a folder holds `tokens`, `logits` (float32, by transformers with the weights that
the maker's own code reads back from the written file) and, where inputs are quantised too, `logits_quantised_inputs`. Nothing here imports lmdeploy.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensor = torch.Tensor

SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
GROUP = 32
#: lengths of rows of calibration tokens, and how many
CALIBRATION = (64, 32)
#: what the logits are of
TOKENS = [1, 17, 94, 3, 150, 61, 61, 28, 159, 7, 112, 45, 80, 5, 133, 99]
KEPT = ("config.json", "model.safetensors", "quantize_config.json", "recipe.yaml")


def calibration() -> list[list[int]]:
    """Random tokens: the same for every maker."""
    length, rows = CALIBRATION
    drawn: list[list[int]] = torch.randint(3, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1)).tolist()
    return drawn


def make_source(source: Path) -> None:
    """The float16 model. Some hidden channels are louder than others, so that scales move (AWQ) and columns change places (act-order)."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_theta=10000.0, bos_token_id=1, eos_token_id=2)).eval()
    generator = torch.Generator().manual_seed(0)
    loud = torch.exp(0.8 * torch.randn(SIZES["hidden_size"], generator=generator))
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim == 1:
            tensor.copy_((1 + 0.1 * noise) * loud)
        else:
            tensor.copy_(noise if "embed" in name else noise * (1.2 / math.sqrt(tensor.shape[1])))
    model.half().save_pretrained(source)
    words = models.WordLevel({f"w{i}": i for i in range(SIZES["vocab_size"])}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w2", pad_token="w0").save_pretrained(source)  # GPTQModel opens no model without one


def quantise_awq(source: Path, target: Path) -> None:
    """AutoAWQ: search for scales and clipping, then its GEMM packing; read back by its own unpacking, with scales in float32."""
    from awq import AutoAWQForCausalLM
    from awq.utils.packing_utils import dequantize_gemm

    folder = target / "awq"
    model = AutoAWQForCausalLM.from_pretrained(str(source), device_map="cpu")
    settings = {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"}
    model.quantize(None, quant_config=settings, calib_data=calibration(), max_calib_seq_len=CALIBRATION[0])
    model.save_quantized(str(folder))
    stored = load_file(folder / "model.safetensors")

    def weight(name: str) -> Tensor:
        words, zeros, scales = (stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
        return dequantize_gemm(words, zeros, scales.float(), 4, GROUP).t()

    expect(folder, weight)


def quantise_gptq(source: Path, target: Path) -> None:
    """GPTQModel: neighbours as groups with zero points, act-order, and the second version of the layout; read back by its plain torch kernel."""
    os.cpu_count = lambda: 4  # GPTQModel 7.7.0 does not start where there are two cores: its pool of loaders wants two threads and its CPU pool has one
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization import FORMAT

    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in calibration()]
    ways = {"gptq": (False, False, FORMAT.GPTQ), "gptq-act-order": (True, True, FORMAT.GPTQ), "gptq-v2": (False, True, FORMAT.GPTQ_V2)}
    for name, (symmetric, act_order, layout) in ways.items():
        settings = QuantizeConfig(bits=4, group_size=GROUP, sym=symmetric, desc_act=act_order, format=layout, offload_to_disk=False)
        model = GPTQModel.load(str(source), settings, device="cpu", dtype=torch.float16)
        model.quantize(rows, batch_size=4, backend=BACKEND.TORCH)
        model.save(str(target / name))
        read = GPTQModel.load(str(target / name), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
        modules = dict(read.model.named_modules())

        def weight(name: str, modules: dict[str, Any] = modules) -> Tensor:
            module = modules[name]
            module.scales = module.scales.float()
            found: Tensor = module.dequantize_weight().t()
            return found

        expect(target / name, weight)


def quantise_compressed(source: Path, target: Path) -> None:
    """llm-compressor, rounding to nearest with its preset schemes; read back in float32 by transformers and compressed-tensors."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    ways = {"w4a16": "W4A16", "w4a16-asym": "W4A16_ASYM", "w8a8": "W8A8", "fp8": "FP8_DYNAMIC"}
    for name, scheme in ways.items():
        folder = target / f"compressed-{name}"
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
        oneshot(model=model, recipe=QuantizationModifier(**recipe(scheme)))
        model.save_pretrained(folder, save_compressed=True)
        read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=CompressedTensorsConfig(run_compressed=False)).eval()
        modules = dict(read.named_modules())
        expect(folder, lambda name, modules=modules: modules[name].weight, read if scheme in ("W8A8", "FP8_DYNAMIC") else None)


def recipe(scheme: str) -> dict[str, Any]:
    """A preset, with groups that fit the small layers where it has groups."""
    from compressed_tensors.quantization import preset_name_to_scheme

    if not scheme.startswith("W4"):
        return {"targets": "Linear", "scheme": scheme, "ignore": ["lm_head"]}
    settings = preset_name_to_scheme(scheme, ["Linear"])
    settings.weights.group_size = GROUP
    return {"config_groups": {"group_0": settings}, "ignore": ["lm_head"]}


@torch.no_grad()
def expect(folder: Path, weight: Callable[[str], Tensor], quantised: Any = None) -> None:
    """Write expected.safetensors beside the model: its logits with the weights [out, in] that `weight` gives, and those of `quantised`, a model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = json.loads((folder / "config.json").read_text())
    settings.pop("quantization_config")
    model = LlamaForCausalLM(LlamaConfig(**{**settings, "torch_dtype": "float32", "dtype": "float32"})).float().eval()
    stored = load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        packed = name not in stored or stored[name].element_size() == 1
        parameter.copy_(weight(name.removesuffix(".weight")) if packed else stored[name])
    tokens = torch.tensor(TOKENS)
    outcome = {"tokens": tokens, "logits": model(tokens[None]).logits[0].float().contiguous()}
    if quantised is not None:
        outcome["logits_quantised_inputs"] = quantised(tokens[None]).logits[0].float().contiguous()
    save_file(outcome, folder / "expected.safetensors")
    for path in folder.iterdir():
        if path.name not in (*KEPT, "expected.safetensors"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> None:
    """One maker a call, for each has an environment of its own."""
    makers = {"awq": quantise_awq, "gptq": quantise_gptq, "compressed-tensors": quantise_compressed}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("maker", choices=["source", *makers])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, nargs="?", default=Path(__file__).resolve().parents[1] / "tests" / "formats" / "foreign")
    options = parser.parse_args()
    if options.maker == "source":
        make_source(options.source)
    else:
        makers[options.maker](options.source, options.target)


if __name__ == "__main__":
    main()
