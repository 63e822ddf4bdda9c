"""The decoder of the llama family, driven by the spec: what all models share, and nothing that only one of them needs.

The tree has the checkpoint's names and modules pull their weights; a model that differs states its names or replaces a method in
its own small file. `forward` allocates nothing but a few [T, R/2] tables, so that a step costs what its kernels cost.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Protocol

import torch

from lmdeploy.checkpoint.source import WeightSource
from lmdeploy.errors import CheckpointError
from lmdeploy.formats.weight_format import Part
from lmdeploy.inputs import ForwardInputs
from lmdeploy.kernels.api import Before
from lmdeploy.layers.attention import Attention, AttentionNames
from lmdeploy.layers.build import BuildContext, Module, StepBuffers, StepShape, reload
from lmdeploy.layers.embedding import Embedding
from lmdeploy.layers.linear import Head, Linear, TiedHead
from lmdeploy.layers.mlp import MLP, MLPNames
from lmdeploy.layers.norm import RMSNorm
from lmdeploy.layers.rope import build_rope, logn_scale

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class DecoderNames:
    """Names of the checkpoint's tensors; the defaults are llama's."""

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    input_norm: str = "input_layernorm"
    attention: str = "self_attn"
    post_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    in_attention: AttentionNames = AttentionNames()
    in_mlp: MLPNames = MLPNames()


@dataclass(frozen=True, slots=True)
class SmoothingGroup:
    """A tensor whose output channels may be divided by scales that the columns of `targets` are multiplied by (names below a layer)."""

    source: str
    targets: tuple[str, ...]
    source_is_norm: bool


class Block(Module, Protocol):
    """The second half of a layer: a dense MLP or experts."""

    def forward(self, inputs: ForwardInputs, step: StepBuffers) -> bool:
        """step.normed [T, M] -> step.proj [T, M], or added to step.residual, and then True."""
        ...


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and MLP with the norm before each."""

    input_norm: RMSNorm
    attention: Attention
    post_norm: RMSNorm
    mlp: Block


class Decoder:
    """A decoder-only language model on one rank. `prefix` stands before every tensor name (models inside larger models)."""

    names: ClassVar[DecoderNames] = DecoderNames()

    def __init__(self, ctx: BuildContext, prefix: str = "") -> None:
        spec, names = ctx.spec, self.names
        self.ctx, self.spec, self.prefix = ctx, spec, prefix
        self.embedding = Embedding(ctx, prefix + names.embedding)
        self.layers = [self.build_layer(index) for index in range(spec.num_layers)]
        self.norm = RMSNorm(ctx, prefix + names.norm, spec.hidden_size)
        self.head = self._build_head()
        self.rope = build_rope(spec.rope, ctx.device, ctx.kernels.rope_angles)
        self.shape = StepShape.of(ctx, dense_mlp=any(isinstance(layer.mlp, MLP) for layer in self.layers))
        self.normed_rows = 0  # up to how many rows norms are done by the products around them; known once loaded
        self.quartered_rows = range(0)  # for how many rows activations are in quarters; known once loaded
        self._zeros, self._places = torch.empty(0), list[Tensor]()  # room for their squares
        self.weight_bytes = 0  # known once loaded: a bias is what the file has

    def build_layer(self, index: int) -> Layer:
        """Layer `index`."""
        ctx, names = self.ctx, self.names
        prefix = f"{self.prefix}{names.layers}.{index}"
        return Layer(
            RMSNorm(ctx, f"{prefix}.{names.input_norm}", ctx.spec.hidden_size),
            Attention(ctx, f"{prefix}.{names.attention}", index, self.window(index), names.in_attention),
            RMSNorm(ctx, f"{prefix}.{names.post_norm}", ctx.spec.hidden_size),
            self.build_mlp(prefix, index),
        )

    def build_mlp(self, prefix: str, index: int) -> Block:
        """The second half of layer `index`; models with experts replace this."""
        return MLP(self.ctx, f"{prefix}.{self.names.mlp}", self.names.in_mlp)

    def window(self, index: int) -> int:
        """Sliding window of layer `index`; 0 = it sees everything."""
        layers = self.spec.window_layers
        return self.spec.sliding_window if not layers or layers[index] else 0

    def _build_head(self) -> Linear:
        spec = self.spec
        if spec.tie_embeddings:
            return TiedHead(self.ctx, self.embedding.weight, self.embedding.name)
        return Head(self.ctx, [Part(self.prefix + self.names.head, spec.vocab_size, spec.hidden_size)])

    def load(self, source: WeightSource, *, again: bool = False) -> None:
        """Pull all weights; a missing tensor raises with its name, and so does one that is left over. `again`: into the tensors that are there."""
        for part in self._parts():
            if again:
                reload(part, partial(part.load, source))
            else:
                part.load(source)
        self._check_tied(source)
        repeated = (f"{self.prefix}{self.names.head}.weight",) if self.spec.tie_embeddings else ()
        source.finish(ignore=(*repeated, *self.ctx.formats.unused))
        self.normed_rows = min((self._normed_rows(layer) for layer in self.layers), default=0)
        self.quartered_rows = self._quartered_rows()
        self._zeros = torch.zeros(2 * len(self.layers), self.normed_rows, dtype=torch.int64, device=self.ctx.device)
        self._places = list(self._zeros)
        self.weight_bytes = sum({t.data_ptr(): t.nbytes for t in self.tensors()}.values())

    def _normed_rows(self, layer: Layer) -> int:
        return min(layer.attention.normed_rows(), layer.mlp.normed_rows()) if isinstance(layer.mlp, MLP) else 0

    def _quartered_rows(self) -> range:
        """Where all products after norms and SiLU read quarters; on one rank only."""
        served = []
        for layer in self.layers:
            if not isinstance(layer.mlp, MLP) or self.ctx.parallel.size > 1:
                return range(0)
            served += [linear.rows_in_quarters() for linear in (layer.attention.qkv, layer.mlp.gate_up, layer.mlp.down)]
        return range(max(rows.start for rows in served), min(rows.stop for rows in served))

    def _check_tied(self, source: WeightSource) -> None:
        """A file may repeat a tied head, but another one than the table contradicts config.json: using either would be a guess."""
        name, table = f"{self.prefix}{self.names.head}.weight", self.embedding.weight
        stored = source.has(name) and source.names()  # random weights have any tensor asked for, and repeat nothing
        if not self.spec.tie_embeddings or not stored:
            return
        rows = slice(0, min(64, table.shape[0]))
        head = torch.empty_like(table[rows])
        source.take(name, head, rows)
        if not torch.equal(head, table[rows]):
            raise CheckpointError(
                f"config.json says tie_word_embeddings=true, but tensor {name!r} differs from the embedding; "
                "set tie_word_embeddings to false there, or delete the tensor"
            )

    def _parts(self) -> Iterator[Module]:
        yield self.embedding
        for layer in self.layers:
            yield from (layer.input_norm, layer.attention, layer.post_norm, layer.mlp)
        yield from (self.norm, self.head)

    def tensors(self) -> Iterator[Tensor]:
        """All weights; the table of a tied head in 16 bits comes twice."""
        for part in self._parts():
            yield from part.tensors()

    def forward(self, inputs: ForwardInputs) -> Tensor:
        """Final-normed hidden states [R, M] of the rows `inputs.logit_rows`, valid until the next step; KV of all new tokens is written."""
        inputs.cos, inputs.sin = self.rope.cos_sin(inputs.positions, inputs.rope_lengths)
        if self.spec.use_logn:
            inputs.q_scale = logn_scale(inputs.positions, self.spec.rope.original_max_position)
        rows, quarters = inputs.token_ids.shape[0], self.ctx.kernels.quarters
        step = StepBuffers.take(inputs.scratch, self.shape, rows, quarters.kernels if quarters and rows in self.quartered_rows else None)
        squares, before = self._begin(inputs, step), None
        for index, (layer, after) in enumerate(zip(self.layers[:-1], self.layers[1:], strict=True)):
            attn = layer.attention.forward(inputs, step, before)
            if squares is None:
                self._finish_layer(layer, after.input_norm, attn, inputs, step)
            else:
                before = self._finish_few_rows(layer, after.input_norm, attn, step, squares[2 * index], squares[2 * index + 1])
        last = self.layers[-1]
        attn = last.attention.forward(inputs, step, before)
        step = replace(step, kernels=None)  # the final norm is read by others
        if not inputs.every_row:
            step = step.select(inputs.scratch, self.shape, inputs.logit_rows, attn)
            attn = step.attn
        if not step.normed.shape[0]:
            return step.normed
        if squares is None:
            self._finish_layer(last, self.norm, attn, inputs, step)
        else:
            down = self._up_to_down(last, attn, step, squares[-2])
            down.forward(step.act, step.proj)
            self.norm.add(step.proj, step.residual, step.normed)
        return step.normed

    def _begin(self, inputs: ForwardInputs, step: StepBuffers) -> list[Tensor] | None:
        """Embedding and first norm; and zeros for the rows' squares at every norm but the first and the last two, None where norms are operators of their own."""
        norm, together = self.layers[0].input_norm, self.ctx.kernels.embed_norm
        zeros = self._zeros if 0 < inputs.token_ids.shape[0] <= self.normed_rows else None
        if together is not None and inputs.replaced_rows is None and step.kernels is None:
            together(inputs.token_ids, self.embedding.weight, norm.weight, norm.eps, step.residual, step.normed, zeros)
            return self._places if zeros is not None else None
        self.embedding.forward(inputs.token_ids, step.residual)
        if inputs.replaced_rows is not None:
            assert inputs.replacements is not None
            step.residual.index_copy_(0, inputs.replaced_rows, inputs.replacements)
        norm.forward(step.residual, step.normed, step.kernels)
        if zeros is not None:
            zeros.zero_()
        return self._places if zeros is not None else None

    def _finish_layer(self, layer: Layer, next_norm: RMSNorm, attn: Tensor, inputs: ForwardInputs, step: StepBuffers) -> None:
        """All after the attention: output projection, MLP, and the norm that follows (the next layer's, or the final one)."""
        layer.post_norm.after(step, layer.attention.project(attn, step))
        next_norm.after(step, layer.mlp.forward(inputs, step))

    def _finish_few_rows(self, layer: Layer, next_norm: RMSNorm, attn: Tensor, step: StepBuffers, middle: Tensor, end: Tensor) -> Before:
        """The same with both norms in the products around them; `middle` and `end` are room for their rows' squares."""
        return next_norm.inside(self._up_to_down(layer, attn, step, middle), step.act, step, end)

    def _up_to_down(self, layer: Layer, attn: Tensor, step: StepBuffers, middle: Tensor) -> Linear:
        """Of that the output projection, the norm behind it and the first product of the MLP; its second one, which is left."""
        assert isinstance(layer.mlp, MLP)
        before = layer.post_norm.inside(layer.attention.out, attn, step, middle)
        layer.mlp.gate_up.normed(step.normed, step.act, silu=True, before=before)
        return layer.mlp.down

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [R, V] of hidden states [R, M]."""
        out = torch.empty(hidden.shape[0], self.spec.vocab_size, dtype=self.ctx.dtype, device=hidden.device)
        self.raw_logits(hidden, out)
        return out.float()

    def raw_logits(self, hidden: Tensor, out: Tensor) -> None:
        """The same as the head's product gives them, into `out` [R, V] of the model's dtype."""
        self.head.forward(hidden, out)

    def shallow(self) -> tuple[Decoder, float]:
        """On the same weights: of the layers that are alike, the first; and the last one, whose rows may be fewer. Their share of all layers."""
        first: dict[object, Layer] = {}
        for layer in self.layers[:-1]:
            parts = (layer.input_norm, layer.attention, layer.post_norm, layer.mlp)
            first.setdefault(tuple((type(part), *((t.shape, t.dtype) for t in part.tensors())) for part in parts), layer)
        model = copy.copy(self)
        model.layers = [*first.values(), self.layers[-1]]
        return model, len(model.layers) / len(self.layers)

    def waits_for_device(self) -> bool:
        """Whether a step of the loaded model looks at numbers on the host, whatever its kernels: such a step cannot be captured."""
        return False

    def smoothing_groups(self) -> tuple[SmoothingGroup, ...]:
        """For quantisers: where scales may move from activations into weights, in every layer."""
        names, spec = self.names, self.spec
        attention = [f"{names.attention}.{name}" for name in names.in_attention.qkv]
        gate_up = [f"{names.mlp}.{name}" for name in names.in_mlp.gate_up]
        groups = [SmoothingGroup(names.input_norm, tuple(attention), True), SmoothingGroup(names.post_norm, tuple(gate_up), True)]
        if spec.num_heads == spec.num_kv_heads and len(attention) == 3:
            groups.append(SmoothingGroup(attention[2], (f"{names.attention}.{names.in_attention.out}",), False))
        groups.append(SmoothingGroup(gate_up[-1], (f"{names.mlp}.{names.in_mlp.down}",), False))
        return tuple(groups)

    def unquantised(self) -> tuple[str, ...]:
        """For quantisers: linear layers that stay as they are (names below a layer)."""
        return ()
