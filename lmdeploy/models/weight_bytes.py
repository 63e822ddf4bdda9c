"""Bytes of a model's weights by part, as `layers` allocate them on one rank, for every way to store them.

Each linear layer is a `Matrix`; a `Storage` says what its numbers and scales take. Tests hold this against loaded models, byte for byte. Must not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.formats.groups import GROUP, fitting_group
from lmdeploy.spec import ModelSpec
from lmdeploy.vision.spec import VisionSpec

PARTS = ("embedding", "attention", "MLP", "norms", "head", "vision")
METHODS = ("awq", "gptq", "smooth_quant", "fp8", "compressed-tensors")


@dataclass(frozen=True, slots=True)
class Storage:
    """How a matrix is kept: `bits` 16 means the model's own type; `group` inputs share a scale, 0 = all of a row. `name` is what tables call it."""

    name: str
    bits: int = 16
    group: int = 0
    exact_group: bool = True  # the file's group, cut where ranks cut; else the largest that divides (weights rounded at load)
    ordered: bool = False  # GPTQ's act-order: the inputs' order is kept

    def nbytes(self, rows: int, cols: int, number_bytes: int) -> int:
        """Bytes of a weight [rows, cols], scales and zeros included."""
        if self.bits == 16:
            return rows * cols * number_bytes
        group = math.gcd(self.group, cols) if self.group and self.exact_group else fitting_group(cols, self.group)
        if self.bits == 4:  # float16 scale and uint8 zero of a group
            return rows * (cols // 2 + 3 * (cols // group)) + 8 * cols * self.ordered
        return rows * (cols + 4 * (cols // group))  # float32 scales


DENSE = Storage("16 bit")
W4 = Storage("W4", 4, GROUP)
FP8 = Storage("fp8", 8, GROUP, exact_group=False)
W8 = Storage("W8", 8)
#: `--head-bits`
HEADS = {16: DENSE, 8: Storage("int8", 8), 4: Storage("int4", 4, GROUP, exact_group=False)}


@dataclass(frozen=True, slots=True)
class Matrix:
    """`count` equal linear layers of one part on one rank. `quantised` False: never stored in fewer bits. `experts`: how many of `count` are alternatives."""

    part: str
    rows: int
    cols: int
    bias: int = 0
    count: int = 1
    quantised: bool = True
    experts: int = 0

    @property
    def numbers(self) -> int:
        """Of all of them."""
        return self.count * (self.rows * self.cols + self.bias)


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes on one rank by part (`PARTS`), and what one decode step reads of them, expert layers apart."""

    parts: Mapping[str, int]
    read: int
    expert_bytes: int  # of all experts together
    num_experts: int
    experts_per_token: int

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    def read_bytes(self, batch: int) -> int:
        """Bytes that a decode step of `batch` tokens reads; of the experts those that somebody's token goes to, if routers choose evenly."""
        if not self.num_experts:
            return self.read
        hit = 1 - (1 - self.experts_per_token / self.num_experts) ** batch
        return self.read + int(self.expert_bytes * hit)


def check_split(spec: ModelSpec, tp: int) -> ModelSpec:
    """The spec of one of `tp` ranks' KV cache: its KV heads, replicated where there are fewer than ranks. ConfigError when the model cannot be split so."""
    width = spec.moe_intermediate_size or spec.intermediate_size
    heads = spec.num_kv_heads
    if spec.num_heads % tp or width % tp or (heads % tp and tp % heads):
        fits = [n for n in range(1, 65) if not (spec.num_heads % n or width % n or (heads % n and n % heads))]
        raise ConfigError(
            f"tp={tp} does not divide {spec.num_heads} heads, {heads} KV heads and the MLP's width {width}; possible: {', '.join(map(str, fits))}"
        )
    return replace(spec, num_kv_heads=max(1, heads // tp))


def matrices(spec: ModelSpec, tp: int = 1) -> Iterator[Matrix]:
    """All linear layers of the decoder on one rank, the head apart."""
    hidden, layers = spec.hidden_size, spec.num_layers
    heads, kv_heads = spec.num_heads // tp, max(1, spec.num_kv_heads // tp)
    qkv = (heads + 2 * kv_heads) * spec.head_dim
    yield Matrix("attention", qkv, hidden, qkv * spec.qkv_bias, layers)
    yield Matrix("attention", hidden, heads * spec.head_dim, hidden * spec.o_bias, layers)
    dense = len(spec.dense_layers) if spec.num_experts else layers
    width = spec.intermediate_size // tp
    if dense:
        yield Matrix("MLP", 2 * width, hidden, 2 * width * spec.mlp_bias, dense)
        yield Matrix("MLP", hidden, width, hidden * spec.mlp_bias, dense)
    if sparse := layers - dense:
        width, experts = spec.moe_intermediate_size // tp, spec.num_experts
        yield Matrix("MLP", experts, hidden, 0, sparse, quantised=False)
        yield Matrix("MLP", 2 * width, hidden, 0, sparse * experts, experts=experts)
        yield Matrix("MLP", hidden, width, 0, sparse * experts, experts=experts)


def norm_numbers(spec: ModelSpec) -> int:
    """Numbers in all norms."""
    return spec.num_layers * (2 * spec.hidden_size + 2 * spec.head_dim * spec.qk_norm) + spec.hidden_size


def vision_numbers(vision: VisionSpec, width: int) -> int:
    """Numbers of a vision tower up to the layer that is read, and of the projector to the decoder's `width`, as `models/vision.py` loads them."""
    tower, h, inner = vision.tower, vision.tower.hidden_size, vision.tower.intermediate_size
    clip, norm = tower.kind == "clip", h if tower.rms_norm else 2 * h
    layer = 4 * h * h + h + 2 * h * inner + inner + h + 2 * norm  # qkv, out and its bias, fc1 and fc2 with theirs, two norms
    layer += 3 * h * tower.qkv_bias + 2 * h * tower.qk_norm + (0 if clip else 2 * h)  # InternViT scales both halves
    patches = 3 * tower.patch_size**2 * h + (2 * h if clip else h)  # CLIP: no bias, and a norm behind it
    wide = h * int(1 / vision.downsample) ** 2
    projector = (2 * wide if vision.family == "internvl" else 0) + (wide + 1) * width + (width + 1) * width + (width if vision.aspect == "anyres" else 0)
    return patches + h + (tower.side**2 + 1) * h + (tower.num_layers + 1 + vision.feature_layer) * layer + projector


def parameters(spec: ModelSpec, vision: VisionSpec | None = None) -> int:
    """Numbers that are loaded of the whole model."""
    tables = spec.vocab_size * spec.hidden_size * (1 if spec.tie_embeddings else 2)
    return tables + norm_numbers(spec) + sum(m.numbers for m in matrices(spec)) + (vision_numbers(vision, spec.hidden_size) if vision else 0)


def weights_of(spec: ModelSpec, storage: Storage, head: Storage, number_bytes: int, tp: int = 1, vision: VisionSpec | None = None) -> Weights:
    """What one rank holds. Embedding, norms, head and vision part are whole on every rank, as `layers` build them."""
    parts = dict.fromkeys(PARTS, 0)
    parts["embedding"] = spec.vocab_size * spec.hidden_size * number_bytes
    parts["norms"] = norm_numbers(spec) * number_bytes
    # a tied head in 16 bits is the embedding table itself
    parts["head"] = 0 if spec.tie_embeddings and head.bits == 16 else head.nbytes(spec.vocab_size, spec.hidden_size, number_bytes)
    parts["vision"] = vision_numbers(vision, spec.hidden_size) * number_bytes if vision else 0
    read, expert_bytes = parts["norms"] + (parts["head"] or parts["embedding"]), 0
    for matrix in matrices(spec, tp):
        kept = storage if matrix.quantised else DENSE
        size = matrix.count * (kept.nbytes(matrix.rows, matrix.cols, number_bytes) + matrix.bias * number_bytes)
        parts[matrix.part] += size
        if matrix.experts:
            expert_bytes += size
        else:
            read += size
    return Weights(parts, read, expert_bytes, spec.num_experts, spec.experts_per_token)


def stored(spec: ModelSpec) -> Storage:
    """How the files hold the linear layers, by config.json. CheckpointError for a method that cannot be read."""
    quantization = spec.quantization
    if not quantization:
        return DENSE
    method = str(quantization.get("quant_method", "")).lower()
    if method in ("awq", "gptq"):
        group = _number(quantization, ("group_size", "q_group_size"))
        return Storage(method.upper(), _number(quantization, ("bits", "w_bit")), max(0, group), ordered=bool(quantization.get("desc_act")))
    if method == "smooth_quant":
        return Storage(f"W8A8 {quantization.get('quant_dtype') or 'int8'}", 8)
    if method == "fp8":
        block = quantization.get("weight_block_size")
        return Storage("fp8", 8, _block(block) if block else 0)
    if method == "compressed-tensors":
        return _compressed(quantization)
    raise CheckpointError(f"config.json: quantization_config has quant_method={str(quantization.get('quant_method'))[:60]!r}; known: {', '.join(METHODS)}")


def _compressed(quantization: Mapping[str, Any]) -> Storage:
    groups = quantization.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = first.get("weights") if isinstance(first, Mapping) else None
    if not isinstance(weights, Mapping):
        raise CheckpointError("config.json: quantization_config of compressed-tensors has no config_groups with weights")
    bits = _number(weights, ("num_bits",))
    size = weights.get("group_size")
    if weights.get("strategy") == "block":
        block = weights.get("block_structure")
        size = _block(block.split("x") if isinstance(block, str) else block)
    return Storage(f"W{bits}", bits, size if isinstance(size, int) and size > 0 and weights.get("strategy") != "channel" else 0)


def _number(table: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    value = next((table[key] for key in keys if table.get(key) is not None), None)
    if type(value) is not int or (keys[0] in ("bits", "num_bits") and value not in (4, 8)):
        raise CheckpointError(f"config.json: quantization_config has {keys[0]}={str(value)[:40]}, which this version of lmdeploy does not load")
    return value


def _block(block: Any) -> int:
    """Inputs of a block [rows, inputs]."""
    if isinstance(block, (list, tuple)) and len(block) == 2 and str(block[1]).isdigit() and int(block[1]) > 0:
        return int(block[1])
    raise CheckpointError(f"config.json: quantization_config has the block size {str(block)[:40]}; two whole numbers such as [128, 128] are needed")
