"""What the engine asks of a model, whatever its architecture."""

from __future__ import annotations

from typing import Protocol

import torch

from lmdeploy.inputs import ForwardInputs
from lmdeploy.spec import ModelSpec

Tensor = torch.Tensor


class Model(Protocol):
    """What a runner asks of a model; `models.decoder.Decoder` is one."""

    spec: ModelSpec
    weight_bytes: int

    def forward(self, inputs: ForwardInputs) -> Tensor:
        """Hidden rows [R, M] of `inputs.logit_rows`; writes the KV of all new tokens."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [R, V]; the caller may overwrite it."""
        ...

    def raw_logits(self, hidden: Tensor, out: Tensor) -> None:
        """The same into `out` [R, V] of the model's dtype, without a copy."""
        ...

    def shallow(self) -> tuple[Model, float]:
        """The same model with no more layers than it takes to meet every shape that a step has, and the share of the layers that these are."""
        ...
