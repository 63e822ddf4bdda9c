"""Mixture of experts: a router picks `experts_per_token` experts for each token, the experts' outputs are summed by its weights.

The router's softmax is float32 over all experts, before the choice, as Mixtral and Qwen3-MoE were trained. Each rank holds a slice
of every expert's width, so ranks stay balanced whatever the router chooses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lmdeploy.checkpoint.source import WeightSource
from lmdeploy.errors import CheckpointError
from lmdeploy.formats.dense import DenseFormat, DenseWeight
from lmdeploy.formats.weight_format import Part, WeightFormat
from lmdeploy.inputs import ForwardInputs
from lmdeploy.layers.build import BuildContext, StepBuffers
from lmdeploy.layers.linear import Linear

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Checkpoint names below the layer's MoE block; an expert is `<experts>.<number>.<gate>`."""

    router: str = "gate"
    experts: str = "experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


class Experts:
    """Router and experts of one layer."""

    def __init__(self, ctx: BuildContext, prefix: str, names: ExpertNames) -> None:
        spec = ctx.spec
        self.prefix, self.names, self.kernels, self.parallel = prefix, names, ctx.kernels, ctx.parallel
        self.num_experts, self.top_k, self.normalise = spec.num_experts, spec.experts_per_token, spec.norm_topk_prob
        self.full_width, self.hidden_size = spec.moe_intermediate_size, spec.hidden_size
        self.share = ctx.parallel.slice(self.full_width, "moe_intermediate_size")
        self.width = self.share.stop - self.share.start
        self.ctx = ctx
        self.router = Linear(ctx, [Part(f"{prefix}.{names.router}", spec.num_experts, spec.hidden_size)])
        self.gate_up = self.down = torch.empty(0)  # [E, 2F, M] and [E, M, F] once loaded
        self.packed: list[tuple[WeightFormat, WeightFormat]] = []  # instead of them where the experts are quantised

    def load(self, source: WeightSource) -> None:
        """Pull the router and every expert's slice."""
        self.router.load(source)
        kinds = {type(self.ctx.formats.of(source, [*self._inner(e), self._outer(e)])) for e in range(self.num_experts)}
        if kinds == {DenseFormat}:
            self._load_dense(source)
        elif DenseFormat in kinds:
            raise CheckpointError(f"{self.prefix}.{self.names.experts}: some experts are quantised and others are not; they must be stored alike")
        else:
            self.packed = [(self._load_packed(source, self._inner(e)), self._load_packed(source, [self._outer(e)])) for e in range(self.num_experts)]

    def _inner(self, expert: int) -> list[Part]:
        """Gate and up of an expert."""
        name = f"{self.prefix}.{self.names.experts}.{expert}"
        return [Part(f"{name}.{part}", self.full_width, self.hidden_size, [self.share]) for part in (self.names.gate, self.names.up)]

    def _outer(self, expert: int) -> Part:
        """Down of an expert."""
        return Part(f"{self.prefix}.{self.names.experts}.{expert}.{self.names.down}", self.hidden_size, self.full_width, None, self.share)

    def _load_packed(self, source: WeightSource, parts: list[Part]) -> WeightFormat:
        return self.ctx.formats.of(source, parts).load(source, parts, False, self.ctx.dtype, self.ctx.device)

    def _load_dense(self, source: WeightSource) -> None:
        """All experts in two tensors, as the kernel wants them."""
        self.gate_up = self.ctx.empty(self.num_experts, 2 * self.width, self.hidden_size)
        self.down = self.ctx.empty(self.num_experts, self.hidden_size, self.width)
        for expert in range(self.num_experts):
            DenseWeight(self.gate_up[expert]).load(source, self._inner(expert))
            DenseWeight(self.down[expert]).load(source, [self._outer(expert)])

    def tensors(self) -> Iterator[Tensor]:
        """All weights."""
        yield from self.router.tensors()
        for gate_up, down in self.packed:
            yield from gate_up.memory()
            yield from down.memory()
        if not self.packed:
            yield self.gate_up
            yield self.down

    def forward(self, inputs: ForwardInputs, step: StepBuffers) -> bool:
        """step.normed [T, M] -> step.proj [T, M]; False, as it is never added to step.residual here."""
        scores = inputs.scratch.take("router", step.normed.shape[0], self.num_experts)
        self.router.forward(step.normed, scores)
        chosen, weights = self._choose(scores)
        if self.packed:
            self._run_packed(step.normed, chosen, weights, step.proj)
        else:
            self.kernels.experts(step.normed, self.gate_up, self.down, chosen, weights, step.proj)
        if self.parallel.size > 1:
            self.parallel.all_reduce(step.proj)
        return False

    def _choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Experts int64 [T, k] and their weights float32 [T, k] by the router's scores [T, E]."""
        if self.kernels.choose_experts is not None:
            chosen, weights = (torch.empty(scores.shape[0], self.top_k, dtype=dtype, device=scores.device) for dtype in (torch.int64, torch.float32))
            self.kernels.choose_experts(scores, self.normalise, chosen, weights)
            return chosen, weights
        weights, chosen = torch.topk(torch.softmax(scores, dim=-1, dtype=torch.float32), self.top_k, dim=-1)
        return chosen, weights / weights.sum(dim=-1, keepdim=True) if self.normalise else weights

    def _run_packed(self, x: Tensor, chosen: Tensor, weights: Tensor, out: Tensor) -> None:
        """`kernels.experts` with weights of any format: each expert's tokens together."""
        total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
        for expert in torch.unique(chosen).tolist():
            token, choice = torch.where(chosen == expert)
            gate_up, down = self.packed[expert]
            both = x.new_empty(token.shape[0], 2 * self.width)
            hidden, result = x.new_empty(token.shape[0], self.width), x.new_empty(token.shape[0], self.hidden_size)
            gate_up.matmul(x[token], both, self.kernels)
            self.kernels.silu_mul(both, hidden)
            down.matmul(hidden, result, self.kernels)
            total.index_add_(0, token, result.float().mul_(weights[token, choice].unsqueeze(1)))
        out.copy_(total)
