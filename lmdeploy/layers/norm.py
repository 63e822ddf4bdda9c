"""RMSNorm, alone or fused with the addition to the residual before it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lmdeploy.checkpoint.source import WeightSource
from lmdeploy.kernels.api import After, Before, Kernels
from lmdeploy.layers.build import BuildContext, StepBuffers
from lmdeploy.layers.linear import Linear

Tensor = torch.Tensor


class RMSNorm:
    """out = x / sqrt(mean(x^2) + eps) * weight over the last axis of `size`."""

    def __init__(self, ctx: BuildContext, name: str, size: int) -> None:
        self.name, self.eps, self.kernels = name, ctx.spec.norm_eps, ctx.kernels
        self.weight = ctx.empty(size)

    def load(self, source: WeightSource) -> None:
        """Pull the weight."""
        source.take(f"{self.name}.weight", self.weight)

    def tensors(self) -> Iterator[Tensor]:
        """The weight."""
        yield self.weight

    def forward(self, x: Tensor, out: Tensor, kernels: Kernels | None = None) -> None:
        """x, out [T, M]."""
        (kernels or self.kernels).rms_norm(x, self.weight, self.eps, out)

    def add(self, x: Tensor, residual: Tensor, out: Tensor, kernels: Kernels | None = None) -> None:
        """residual += x, then out = norm(residual). x, residual, out [T, M]."""
        (kernels or self.kernels).add_rms_norm(x, residual, self.weight, self.eps, out)

    def after(self, step: StepBuffers, added: bool) -> None:
        """step.normed of the residual after a block: what that gave is in step.proj, or has been added."""
        if added:
            self.forward(step.residual, step.normed, step.kernels)
        else:
            self.add(step.proj, step.residual, step.normed, step.kernels)

    def inside(self, linear: Linear, x: Tensor, step: StepBuffers, squares: Tensor) -> Before:
        """step.residual += linear(x); step.normed is its norm but for what is returned, which the next product makes up for."""
        linear.normed(x, step.normed, after=After(step.residual, self.weight, squares))
        return Before(squares, self.eps)

    def heads(self, x: Tensor) -> None:
        """Each head of x [T, H, D] in place."""
        self.kernels.head_norm(x, self.weight, self.eps)
