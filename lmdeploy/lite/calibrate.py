"""Runs a model one decoder layer at a time and notes what goes into every linear layer.

The hidden states of all windows stay on the host (or `home`); one layer is loaded, run for all of them, and forgotten. It is the 16-bit layer that runs: statistics are
those of the original model, rounding errors of earlier layers do not reach them, and one pass is enough. Inputs are seen by wrapping the kernels that
every layer calls, so any model of the registry works, experts included. The memory need is one layer, one batch and the hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from lmdeploy.checkpoint.source import WeightSource
from lmdeploy.formats.dense import DenseWeight
from lmdeploy.inputs import AttentionMeta, ForwardInputs, Scratch
from lmdeploy.kernels.api import Kernels
from lmdeploy.kernels.reference import gated, silu_mul
from lmdeploy.kv_layer import KVLayer
from lmdeploy.layers.build import BuildContext, StepBuffers, StepShape
from lmdeploy.layers.experts import Experts
from lmdeploy.layers.linear import Linear
from lmdeploy.layers.mlp import MLP
from lmdeploy.layers.rope import logn_scale
from lmdeploy.models.decoder import Decoder, Layer
from lmdeploy.models.registry import model_class
from lmdeploy.parallel import Parallel
from lmdeploy.spec import ModelSpec

Tensor = torch.Tensor

#: Input rows that are kept of a linear layer, evenly taken from all windows; errors of outputs are measured on them.
MAX_ROWS = 512
#: Tokens of a block of the one-sequence KV cache.
BLOCK = 64


@dataclass(slots=True)
class InputStats:
    """What went into one linear layer with K inputs, in float32: per input the largest and the summed magnitude; per group of g inputs X^T X; some rows.

    For X^T X and the rows that are kept, every token's inputs are scaled to a mean square of 1: else the few tokens with huge inputs that most models have
    would be all that an error measures (embedded model: the search then loses to plain rounding on some text).
    """

    absmax: Tensor  # [K]
    abssum: Tensor  # [K]
    gram: Tensor | None  # [K/g, g, g]
    count: int = 0
    kept: list[Tensor] = field(default_factory=list)

    @classmethod
    def empty(cls, inputs: int, group: int, device: torch.device, *, with_gram: bool) -> InputStats:
        """Nothing seen yet. group 0: X^T X of all inputs together, [1, K, K]."""
        group = group or inputs
        gram = torch.zeros(inputs // group, group, group, device=device) if with_gram and inputs % group == 0 else None
        return cls(torch.zeros(inputs, device=device), torch.zeros(inputs, device=device), gram)

    def add(self, x: Tensor, keep: int) -> None:
        """Count rows x [T, K] in; about `keep` of them are kept."""
        values = x.float()
        size = values.abs()
        torch.maximum(self.absmax, size.amax(0), out=self.absmax)
        self.abssum += size.sum(0)
        self.count += x.shape[0]
        values = values / values.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
        if self.gram is not None:
            groups = values.view(x.shape[0], self.gram.shape[0], -1).transpose(0, 1)  # [K/g, T, g]
            self.gram.baddbmm_(groups.transpose(1, 2), groups)
        self.kept.append(values[:: max(1, x.shape[0] // max(1, keep))][:keep].clone())

    @property
    def absmean(self) -> Tensor:
        """Mean magnitude per input."""
        return self.abssum / max(1, self.count)

    @property
    def rows(self) -> Tensor:
        """The kept rows, float32 [S, K]."""
        return torch.cat(self.kept)

    @property
    def finite(self) -> bool:
        """False when a NaN or an infinity was seen. maximum() passes NaN on, so nothing hides."""
        return bool(torch.isfinite(self.abssum).all() and torch.isfinite(self.absmax).all())


class Recorder:
    """Stands between the layers and their kernels; `stats` is by module name."""

    def __init__(self, kernels: Kernels, group: int, *, with_gram: bool) -> None:
        self.inner, self.group, self.with_gram = kernels, group, with_gram
        self.keep = MAX_ROWS
        self.paused = False  # True: layers run, nothing is noted (a run that is taken up again)
        self.stats: dict[str, InputStats] = {}
        self._names: dict[int, tuple[str, ...]] = {}  # address of a weight -> its modules
        self.kernels = replace(kernels, linear=self.linear, linear_add=None, linear_silu=gated(self.linear, kernels.silu_mul), experts=self.experts)

    def watch(self, prefix: str, layer: Layer) -> None:
        """Forget the last layer and note the weights of this one; names are those below `prefix`."""
        self.stats, self._names = {}, {}
        for linear in _linears(layer):
            assert isinstance(linear.weight, DenseWeight)
            self._names[linear.weight.weight.data_ptr()] = tuple(dict.fromkeys(part.name.removeprefix(prefix) for part in linear.parts))
        if isinstance(block := layer.mlp, Experts):
            names = block.names
            downs = (f"{block.prefix}.{names.experts}.{e}.{names.down}".removeprefix(prefix) for e in range(block.num_experts))
            self._names[block.down.data_ptr()] = tuple(downs)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """As the kernel, and noted."""
        names = self._names[weight.data_ptr()]
        self._note(names[0], x)
        for name in names[1:] if not self.paused else ():
            self.stats[name] = self.stats[names[0]]
        self.inner.linear(x, weight, bias, out)

    def experts(self, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
        """As the kernel, expert by expert, so that the inputs of each one's last product are seen; those of the first are the router's."""
        total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
        for expert in torch.unique(ids).tolist():
            token, choice = torch.where(ids == expert)
            both = x[token] @ gate_up[expert].t()
            hidden = both.new_empty(both.shape[0], both.shape[1] // 2)
            silu_mul(both, hidden)
            self._note(self._names[down.data_ptr()][expert], hidden)
            total.index_add_(0, token, (hidden @ down[expert].t()).float().mul_(weights[token, choice].float().unsqueeze(1)))
        out.copy_(total)

    def _note(self, name: str, x: Tensor) -> None:
        if self.paused:
            return
        if name not in self.stats:
            self.stats[name] = InputStats.empty(x.shape[1], self.group, x.device, with_gram=self.with_gram)
        self.stats[name].add(x, self.keep)


def _linears(layer: Layer) -> Iterator[Linear]:
    yield from (layer.attention.qkv, layer.attention.out)
    if isinstance(layer.mlp, MLP):
        yield from (layer.mlp.gate_up, layer.mlp.down)
    else:
        assert isinstance(layer.mlp, Experts), type(layer.mlp)
        yield layer.mlp.router


class LayerStream:
    """The model's layers, one after another, over all windows [n, L]."""

    def __init__(self, spec: ModelSpec, source: WeightSource, recorder: Recorder, device: torch.device, dtype: torch.dtype) -> None:
        self.spec, self.source, self.recorder, self.device, self.dtype = spec, source, recorder, device, dtype
        self.home = torch.device("cpu")  # where the hidden states are kept; the device itself where they fit
        ctx = BuildContext(replace(spec, num_layers=0), Parallel(), recorder.kernels, dtype, device)  # layers are built one by one
        self.model: Decoder = model_class(spec)(ctx)
        self.hidden = torch.empty(0)

    @torch.inference_mode()
    def embed(self, windows: Tensor, batch_size: int) -> None:
        """Fill the hidden states [n, L, M] of all windows."""
        count, length = windows.shape
        self.batch_size = min(batch_size, count)
        self.recorder.keep = -(-MAX_ROWS // -(-count // self.batch_size))
        self.model.embedding.load(self.source)
        self.hidden = torch.empty(count, length, self.spec.hidden_size, dtype=self.dtype, device=self.home)
        for rows in self._batches():
            flat = torch.empty(windows[rows].numel(), self.spec.hidden_size, dtype=self.dtype, device=self.device)
            self.model.embedding.forward(windows[rows].reshape(-1).to(self.device), flat)
            self.hidden[rows] = flat.view(-1, length, self.spec.hidden_size).to(self.home)
        self.model.embedding.weight = torch.empty(0)
        self.scratch = Scratch(self.batch_size * length, self.dtype, self.device)
        blocks = self.batch_size * -(-length // BLOCK)
        shape = (blocks, self.spec.num_kv_heads, BLOCK, self.spec.head_dim)
        self.cache = KVLayer(torch.zeros(shape, dtype=self.dtype, device=self.device), torch.zeros(shape, dtype=self.dtype, device=self.device))

    @property
    def num_batches(self) -> int:
        """Steps of one layer."""
        return -(-self.hidden.shape[0] // self.batch_size)

    def _batches(self) -> Iterator[slice]:
        for start in range(0, self.hidden.shape[0], self.batch_size):
            yield slice(start, min(start + self.batch_size, self.hidden.shape[0]))

    @torch.inference_mode()
    def run(self, index: int) -> Iterator[int]:
        """Replace the hidden states by those after layer `index`; yields after each batch. The recorder's stats are the layer's when it ends."""
        layer = self.model.build_layer(index)
        for part in (layer.input_norm, layer.attention, layer.post_norm, layer.mlp):
            part.load(self.source)
        self.recorder.watch(f"{self.model.prefix}{self.model.names.layers}.{index}.", layer)
        shape = StepShape.of(self.model.ctx, dense_mlp=isinstance(layer.mlp, MLP))
        for number, rows in enumerate(self._batches()):
            states = self.hidden[rows]
            inputs = self._inputs(states.shape[0], states.shape[1])
            step = StepBuffers.take(self.scratch, shape, states.shape[0] * states.shape[1])
            step.residual.copy_(states.reshape(-1, self.spec.hidden_size))
            _forward(layer, inputs, step)
            self.hidden[rows] = step.residual.view(states.shape).to(self.home)
            yield number

    def _inputs(self, count: int, length: int) -> ForwardInputs:
        """`count` fresh sequences of `length` tokens, each in blocks of its own."""
        per, device = -(-length // BLOCK), self.device
        positions = torch.arange(length, device=device)
        slots = (torch.arange(count, device=device).unsqueeze(1) * per * BLOCK + positions).flatten()
        starts = torch.arange(count + 1, dtype=torch.int32, device=device) * length
        lens = torch.full((count,), length, dtype=torch.int32, device=device)
        table = torch.arange(count * per, dtype=torch.int32, device=device).view(count, per)
        meta = AttentionMeta(starts, lens, table, slots, [length] * count, [length] * count, 0)
        places = positions.repeat(count)
        lengths = torch.full_like(places, length) if self.spec.rope.depends_on_length else None
        inputs = ForwardInputs(places, places, lengths, meta, [self.cache] * self.spec.num_layers, places, self.scratch)
        inputs.cos, inputs.sin = self.model.rope.cos_sin(places, lengths)
        if self.spec.use_logn:
            inputs.q_scale = logn_scale(places, self.spec.rope.original_max_position)
        return inputs


def _forward(layer: Layer, inputs: ForwardInputs, step: StepBuffers) -> None:
    """step.residual -> step.residual after the layer."""
    layer.input_norm.forward(step.residual, step.normed)
    layer.attention.project(layer.attention.forward(inputs, step), step)
    layer.post_norm.add(step.proj, step.residual, step.normed)
    layer.mlp.forward(inputs, step)
    step.residual.add_(step.proj)
