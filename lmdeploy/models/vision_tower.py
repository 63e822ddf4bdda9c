"""Vision transformers: CLIP's, as LLaVA uses it, and InternViT. Tiles in, one feature row a patch out.

Plain torch: a picture is encoded once per request, which costs little beside the answer. Modules pull their weights by the published names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from lmdeploy.checkpoint.source import WeightSource
from lmdeploy.errors import CheckpointError
from lmdeploy.vision.spec import TowerSpec

Tensor = torch.Tensor


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": _quick_gelu, "gelu": F.gelu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu, "relu": F.relu,
}  # fmt: skip


class Weights:
    """Named tensors of one module, taken from a source as they are asked for."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.tensors: dict[str, Tensor] = {}

    def take(self, source: WeightSource, name: str, *shape: int) -> Tensor:
        """The tensor `name`, of exactly this shape in the file."""
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        source.take(name, out, shape=shape)
        self.tensors[name] = out
        return out


class Linear:
    """out = x W^T + b; the bias is what the file has."""

    def __init__(self, weights: Weights, source: WeightSource, name: str, inner: int, outer: int) -> None:
        self.weight = weights.take(source, f"{name}.weight", outer, inner)
        self.bias = weights.take(source, f"{name}.bias", outer) if source.has(f"{name}.bias") else None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Norm:
    """LayerNorm, or RMSNorm where the spec says so."""

    def __init__(self, weights: Weights, source: WeightSource, name: str, width: int, eps: float, *, rms: bool = False) -> None:
        self.weight, self.eps, self.width = weights.take(source, f"{name}.weight", width), eps, width
        self.bias = None if rms else weights.take(source, f"{name}.bias", width)
        self.rms = rms

    def __call__(self, x: Tensor) -> Tensor:
        if self.rms:
            return F.rms_norm(x.float(), (self.width,), None, self.eps).to(x.dtype) * self.weight
        return F.layer_norm(x, (self.width,), self.weight, self.bias, self.eps)


class Tower:
    """What both kinds share: patches, positions, layers up to the one whose features are read."""

    def __init__(self, spec: TowerSpec, feature_layer: int, dtype: torch.dtype, device: torch.device) -> None:
        count = spec.num_layers + 1 + feature_layer
        if not 0 <= count <= spec.num_layers:
            raise CheckpointError(f"the vision tower has {spec.num_layers} layers; feature layer {feature_layer} is not one of them")
        if spec.activation not in ACTIVATIONS:
            raise CheckpointError(f"the vision tower's hidden_act={spec.activation!r} is not known; known: {', '.join(ACTIVATIONS)}")
        self.spec, self.count = spec, count
        self.weights = Weights(dtype, device)
        self.activation = ACTIVATIONS[spec.activation]
        self.layers: list[_Layer] = []

    def load(self, source: WeightSource, prefix: str) -> None:
        """Pull all weights below `prefix`."""
        raise NotImplementedError

    def tensors(self) -> Iterator[Tensor]:
        """All weights."""
        yield from self.weights.tensors.values()

    def _patches(self, source: WeightSource, name: str) -> None:
        spec = self.spec
        self.patch_weight = self.weights.take(source, f"{name}.weight", spec.hidden_size, 3, spec.patch_size, spec.patch_size)
        self.patch_bias = self.weights.take(source, f"{name}.bias", spec.hidden_size) if source.has(f"{name}.bias") else None

    def _embed(self, pixels: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, 1 + patches, C] with the class token and positions."""
        patches = F.conv2d(pixels, self.patch_weight, self.patch_bias, stride=self.spec.patch_size).flatten(2).transpose(1, 2)
        first = self.class_token.expand(pixels.shape[0], 1, -1)
        return torch.cat((first, patches), 1) + self.positions

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [N, 3, S, S] -> features [N, patches, C], without the class token."""
        x = self.prepare(self._embed(pixels))
        for layer in self.layers:
            x = layer(x)
        return x[:, 1:]

    def prepare(self, x: Tensor) -> Tensor:
        """What comes before the first layer."""
        return x

    class_token: Tensor
    positions: Tensor
    patch_weight: Tensor
    patch_bias: Tensor | None


class _Layer:
    """x += scale1 * attention(norm1(x)); x += scale2 * mlp(norm2(x))."""

    def __init__(self, spec: TowerSpec, activation: Callable[[Tensor], Tensor]) -> None:
        self.heads, self.activation = spec.num_heads, activation
        self.scale1: Tensor | None = None
        self.scale2: Tensor | None = None
        self.query_norm: Norm | None = None
        self.key_norm: Norm | None = None

    norm1: Norm
    norm2: Norm
    qkv: Callable[[Tensor], tuple[Tensor, ...]]
    out: Linear
    fc1: Linear
    fc2: Linear

    def __call__(self, x: Tensor) -> Tensor:
        attended = self._attention(self.norm1(x))
        x = x + (attended if self.scale1 is None else attended * self.scale1)
        inner = self.fc2(self.activation(self.fc1(self.norm2(x))))
        return x + (inner if self.scale2 is None else inner * self.scale2)

    def _attention(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        q, k, v = (part.view(*part.shape[:2], self.heads, -1).transpose(1, 2) for part in (query, key, value))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ClipTower(Tower):
    """CLIP's: separate q, k and v, a norm before the first layer."""

    def load(self, source: WeightSource, prefix: str) -> None:
        """Pull all weights below `prefix` (`...vision_model.`)."""
        spec, weights, width = self.spec, self.weights, self.spec.hidden_size
        self.class_token = weights.take(source, f"{prefix}embeddings.class_embedding", width)
        self.positions = weights.take(source, f"{prefix}embeddings.position_embedding.weight", spec.side**2 + 1, width)
        self._patches(source, f"{prefix}embeddings.patch_embedding")
        self.first_norm = Norm(weights, source, f"{prefix}pre_layrnorm", width, spec.norm_eps)
        self.layers = [self._layer(source, f"{prefix}encoder.layers.{i}") for i in range(self.count)]

    def prepare(self, x: Tensor) -> Tensor:
        """The first norm."""
        return self.first_norm(x)

    def _layer(self, source: WeightSource, name: str) -> _Layer:
        spec, weights, width = self.spec, self.weights, self.spec.hidden_size
        layer = _Layer(spec, self.activation)
        layer.norm1 = Norm(weights, source, f"{name}.layer_norm1", width, spec.norm_eps)
        layer.norm2 = Norm(weights, source, f"{name}.layer_norm2", width, spec.norm_eps)
        parts = [Linear(weights, source, f"{name}.self_attn.{part}_proj", width, width) for part in "qkv"]
        layer.qkv = lambda x: tuple(part(x) for part in parts)
        layer.out = Linear(weights, source, f"{name}.self_attn.out_proj", width, width)
        layer.fc1 = Linear(weights, source, f"{name}.mlp.fc1", width, spec.intermediate_size)
        layer.fc2 = Linear(weights, source, f"{name}.mlp.fc2", spec.intermediate_size, width)
        return layer


class InternViT(Tower):
    """InternViT: q, k and v in one, a learned scale after each half of a layer; the largest normalises q and k over all heads."""

    def load(self, source: WeightSource, prefix: str) -> None:
        """Pull all weights below `prefix` (`vision_model.`)."""
        spec, weights, width = self.spec, self.weights, self.spec.hidden_size
        self.class_token = weights.take(source, f"{prefix}embeddings.class_embedding", 1, 1, width)
        self.positions = weights.take(source, f"{prefix}embeddings.position_embedding", 1, spec.side**2 + 1, width)
        self._patches(source, f"{prefix}embeddings.patch_embedding")
        self.layers = [self._layer(source, f"{prefix}encoder.layers.{i}") for i in range(self.count)]

    def _layer(self, source: WeightSource, name: str) -> _Layer:
        spec, weights, width = self.spec, self.weights, self.spec.hidden_size
        layer = _Layer(spec, self.activation)
        layer.norm1 = Norm(weights, source, f"{name}.norm1", width, spec.norm_eps, rms=spec.rms_norm)
        layer.norm2 = Norm(weights, source, f"{name}.norm2", width, spec.norm_eps, rms=spec.rms_norm)
        fused = Linear(weights, source, f"{name}.attn.qkv", width, 3 * width)
        layer.qkv = lambda x: fused(x).chunk(3, -1)
        if spec.qk_norm:
            layer.query_norm = Norm(weights, source, f"{name}.attn.q_norm", width, spec.norm_eps, rms=True)
            layer.key_norm = Norm(weights, source, f"{name}.attn.k_norm", width, spec.norm_eps, rms=True)
        layer.out = Linear(weights, source, f"{name}.attn.proj", width, width)
        layer.scale1, layer.scale2 = weights.take(source, f"{name}.ls1", width), weights.take(source, f"{name}.ls2", width)
        layer.fc1 = Linear(weights, source, f"{name}.mlp.fc1", width, spec.intermediate_size)
        layer.fc2 = Linear(weights, source, f"{name}.mlp.fc2", spec.intermediate_size, width)
        return layer


def build_tower(spec: TowerSpec, feature_layer: int, dtype: torch.dtype, device: torch.device) -> Tower:
    """The tower of a spec, its weights still to be loaded."""
    return (ClipTower if spec.kind == "clip" else InternViT)(spec, feature_layer, dtype, device)
