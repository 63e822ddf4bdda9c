"""Tiny random models on disk, and a direct way to run a model without the engine.

`write_llama` makes a folder that any part of the system can load. `Harness` keeps a paged KV cache whose blocks are
handed out in random order, so that a kernel that ignores the block table cannot pass.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lmdeploy.checkpoint.source import open_source
from lmdeploy.formats.choose import choose_formats
from lmdeploy.inputs import AttentionMeta, ForwardInputs, Scratch
from lmdeploy.kernels.api import Kernels
from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.kv_layer import KVLayer
from lmdeploy.models.decoder import Decoder
from lmdeploy.models.registry import build_model
from lmdeploy.parallel import Parallel
from lmdeploy.spec import load_spec

Tensor = torch.Tensor
SHALLOW = 2  # layers of a real model that `write_shallow` keeps

LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def llama_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a llama checkpoint, large enough that every part of the model changes the logits."""
    generator = torch.Generator().manual_seed(seed)
    width, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]

    def matrix(rows: int, cols: int) -> Tensor:
        return torch.randn(rows, cols, generator=generator) * (1.5 / cols**0.5)

    def norm() -> Tensor:
        return 1 + 0.1 * torch.randn(width, generator=generator)

    tensors = {"model.embed_tokens.weight": torch.randn(config["vocab_size"], width, generator=generator), "model.norm.weight": norm()}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = norm()
        tensors[f"{prefix}.post_attention_layernorm.weight"] = norm()
        for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = matrix(rows * dim, width)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = matrix(width, heads * dim)
        for name in ("gate", "up"):
            tensors[f"{prefix}.mlp.{name}_proj.weight"] = matrix(inner, width)
        tensors[f"{prefix}.mlp.down_proj.weight"] = matrix(width, inner)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], width)
    return tensors


def as_internlm2(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The same weights under InternLM2's names, q, k and v interleaved per KV group as its files have them."""
    dim, kv_heads = config["head_dim"], config["num_key_value_heads"]
    group = config["num_attention_heads"] // kv_heads
    renamed = (
        ("model.embed_tokens", "model.tok_embeddings"), ("lm_head", "output"), ("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attention.wo"), ("mlp.gate_proj", "feed_forward.w1"), ("mlp.up_proj", "feed_forward.w3"), ("mlp.down_proj", "feed_forward.w2"),
    )  # fmt: skip
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if any(f"{part}_proj" in name and "self_attn" in name for part in "qkv"):
            continue
        for old, new in renamed:
            name = name.replace(old, new)
        out[name] = tensor
    for layer in range(config["num_hidden_layers"]):
        q, k, v = (tensors[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkv")
        rows: list[Tensor] = []
        for kv_head in range(kv_heads):
            rows += [q[kv_head * group * dim : (kv_head + 1) * group * dim]]
            rows += [k[kv_head * dim : (kv_head + 1) * dim], v[kv_head * dim : (kv_head + 1) * dim]]
        out[f"model.layers.{layer}.attention.wqkv.weight"] = torch.cat(rows)
    return out


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """A model folder of config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def write_shallow(folder: Path, model: Path, layers: int = SHALLOW) -> Path:
    """The first layers of a real model, with its tokenizer: what a command does with one layer it does with ten."""
    source, config = open_source(model), json.loads((model / "config.json").read_text())
    deeper = tuple(f"model.layers.{i}." for i in range(layers, config["num_hidden_layers"]))
    tensors = {name: torch.empty(source.shape(name), dtype=torch.bfloat16) for name in source.names() if not name.startswith(deeper)}
    for name, tensor in tensors.items():
        source.take(name, tensor)
    write_folder(folder, {**config, "num_hidden_layers": layers}, tensors)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(model / name, folder / name)
    return folder


def write_llama(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A tiny random llama; `changes` replace keys of its config."""
    config = {**LLAMA_CONFIG, **changes}
    return write_folder(folder, config, llama_tensors(config, seed))


def write_internlm2(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """The InternLM2 checkpoint that computes the same as `write_llama` of the same seed and changes."""
    config = {**LLAMA_CONFIG, "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False, **changes}
    return write_folder(folder, config, as_internlm2(llama_tensors(config, seed), config))


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    kernels: Kernels = REFERENCE,
    overrides: dict[str, Any] | None = None,
    **options: Any,
) -> Decoder:
    """The model of a folder, loaded; `options` are those of `choose_formats`."""
    spec = load_spec(folder, overrides)
    model = build_model(spec, dtype, torch.device(device), kernels, Parallel(), choose_formats(spec.quantization, **options))
    model.load(open_source(folder))
    return model


@dataclass
class _Stored:
    """One sequence of the harness."""

    blocks: list[int] = field(default_factory=list)
    length: int = 0
    rope_length: int = 0


class Harness:
    """A model with a paged cache of its own; `step` runs any mix of sequences and returns the logits of every new token."""

    def __init__(self, model: Decoder, *, block_size: int = 4, num_blocks: int = 256, max_rows: int = 512) -> None:
        spec, self.device = model.spec, model.ctx.device
        self.model, self.block_size = model, block_size
        self.free = list(range(num_blocks))
        random.Random(7).shuffle(self.free)
        shape = (num_blocks, spec.num_kv_heads, block_size, spec.head_dim)
        # NaN where nothing was written: a read outside a sequence's own keys cannot go unseen
        self.kv = [KVLayer(*(torch.full(shape, float("nan"), dtype=model.ctx.dtype, device=self.device) for _ in range(2))) for _ in range(spec.num_layers)]
        self.scratch = Scratch(max_rows, model.ctx.dtype, self.device)
        self.sequences: dict[int, _Stored] = {}

    @torch.inference_mode()
    def step(self, new: Sequence[tuple[int, Sequence[int]]], *, rope_length: int | None = None) -> dict[int, Tensor]:
        """Append tokens to sequences (id, tokens); float32 logits [n, V] of each one's new tokens. `rope_length` counts when a sequence starts."""
        inputs = self.begin(new, rope_length=rope_length)
        logits = self.model.logits(self.model.forward(inputs))
        work = self._ordered(new)
        sizes = [len(tokens) for _, tokens in work]
        return {name: rows.clone() for (name, _), rows in zip(work, logits.split(sizes), strict=True)}

    def begin(self, new: Sequence[tuple[int, Sequence[int]]], *, rope_length: int | None = None) -> ForwardInputs:
        """The inputs of a step that appends these tokens; logits of every row are wanted."""
        work = self._ordered(new)
        for name, tokens in work:
            stored = self.sequences.setdefault(name, _Stored(rope_length=rope_length or len(tokens)))
            stored.length += len(tokens)
            while len(stored.blocks) * self.block_size < stored.length:
                stored.blocks.append(self.free.pop())
        return self._inputs(work)

    @staticmethod
    def _ordered(new: Sequence[tuple[int, Sequence[int]]]) -> list[tuple[int, Sequence[int]]]:
        """Those with one new token first, as the contract has it."""
        return sorted(new, key=lambda item: len(item[1]) != 1)

    def drop(self, name: int) -> None:
        """Forget a sequence; its blocks are used again."""
        self.free += self.sequences.pop(name).blocks

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """`count` tokens after the prompt, likeliest each time."""
        name = -1 - len(self.sequences)
        out = [int(self.step([(name, prompt)])[name][-1].argmax())]
        while len(out) < count:
            out.append(int(self.step([(name, out[-1:])])[name][-1].argmax()))
        self.drop(name)
        return out

    def _inputs(self, work: Sequence[tuple[int, Sequence[int]]]) -> ForwardInputs:
        stored = [self.sequences[name] for name, _ in work]
        counts = [len(tokens) for _, tokens in work]
        positions = [p for s, n in zip(stored, counts, strict=True) for p in range(s.length - n, s.length)]
        slots = [
            s.blocks[p // self.block_size] * self.block_size + p % self.block_size
            for s, n in zip(stored, counts, strict=True)
            for p in range(s.length - n, s.length)
        ]
        widest = max(len(s.blocks) for s in stored)
        table = [s.blocks + [1 << 30] * (widest - len(s.blocks)) for s in stored]  # nobody may follow an undefined entry
        starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        meta = AttentionMeta(
            self._tensor(starts, torch.int32),
            self._tensor([s.length for s in stored], torch.int32),
            self._tensor(table, torch.int32),
            self._tensor(slots),
            counts,
            [s.length for s in stored],
            sum(n == 1 for n in counts),
        )
        lengths = self._tensor([s.rope_length for s, n in zip(stored, counts, strict=True) for _ in range(n)])
        return ForwardInputs(
            self._tensor([t for _, tokens in work for t in tokens]),
            self._tensor(positions),
            lengths if self.model.spec.rope.depends_on_length else None,
            meta,
            self.kv,
            torch.arange(sum(counts), device=self.device),
            self.scratch,
        )

    def _tensor(self, values: list[Any], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)
