"""How far one model's next-token distributions are from another's: perplexity, KL divergence and top-1 agreement, token by token.

A `Reference` keeps the last hidden states of every scored position (T x M numbers) and the output head of its model, not T x V probabilities: 8,192 tokens of
a 92k vocabulary take 34 MB instead of 3 GB, nothing is written to disk, and the model itself may be freed. Logits exist for a few rows at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lmdeploy.checkpoint.source import open_source
from lmdeploy.config import EngineConfig
from lmdeploy.engine.scores import rows_per_chunk
from lmdeploy.engine.start import adapt_spec, choose_device, resolve_config
from lmdeploy.formats.choose import choose_formats
from lmdeploy.kernels.select import select
from lmdeploy.models.registry import build_model
from lmdeploy.parallel import Parallel
from lmdeploy.spec import load_spec

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """Of one model on the scored tokens; `..._se` is a standard error over tokens. Those below it are None without a reference.

    kl: mean over tokens of KL(p_ref || p) = sum_v p_ref[v] (log p_ref[v] - log p[v]), in nats. top1: share of tokens where both find the same token likeliest.
    ratio: perplexity / perplexity of the reference; its error is that of the paired differences, far smaller than those of the two perplexities.
    """

    tokens: int
    perplexity: float
    perplexity_se: float
    reference_perplexity: float | None = None
    ratio: float | None = None
    ratio_se: float | None = None
    kl: float | None = None
    kl_se: float | None = None
    kl_p99: float | None = None
    top1: float | None = None
    top1_se: float | None = None


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Float64 [T] per scored token: its negative log-likelihood; against a reference the reference's, the divergence, and 1 where the top tokens agree."""

    loss: Tensor
    reference_loss: Tensor | None = None
    kl: Tensor | None = None
    agrees: Tensor | None = None

    @classmethod
    def join(cls, parts: Sequence[TokenScores]) -> TokenScores:
        """All tokens of the parts, which either all have a reference or none."""
        return cls(torch.cat([p.loss for p in parts]), *(_joined([getattr(p, name) for p in parts]) for name in ("reference_loss", "kl", "agrees")))

    def summary(self) -> Scores:
        """Means and their errors."""
        loss, loss_se = mean_and_error(self.loss)
        perplexity = _exp(loss)
        scores = Scores(self.loss.numel(), perplexity, perplexity * loss_se)
        if self.reference_loss is None or self.kl is None or self.agrees is None:
            return scores
        change, change_se = mean_and_error(self.loss - self.reference_loss)
        ratio = _exp(change)
        kl, kl_se = mean_and_error(self.kl)
        top1, top1_se = mean_and_error(self.agrees)
        return dataclasses.replace(
            scores,
            reference_perplexity=_exp(float(self.reference_loss.mean())),
            ratio=ratio,
            ratio_se=ratio * change_se,
            kl=kl,
            kl_se=kl_se,
            kl_p99=float(self.kl.quantile(0.99)),
            top1=top1,
            top1_se=top1_se,
        )


def _exp(loss: float) -> float:
    """Infinite for what is no number, too: such a model is not better than any."""
    return math.exp(loss) if loss < 700 else math.inf


def _joined(column: list[Tensor | None]) -> Tensor | None:
    values = [value for value in column if value is not None]
    assert len(values) in (0, len(column))
    return torch.cat(values) if values else None


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of float64 [T] and its standard error, tokens taken as independent."""
    spread = float(values.std()) if values.numel() > 1 else math.nan
    return float(values.mean()), spread / math.sqrt(values.numel())


class Head:
    """The output head of a model folder alone: last hidden states to logits, as the whole model would."""

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        self.device = choose_device(config)
        spec = adapt_spec(load_spec(folder, config.hf_overrides), config)
        resolved = resolve_config(config, spec, self.device)
        self.dtype: torch.dtype = getattr(torch, resolved.dtype)
        kernels = select(resolved.backend, self.device.type, self.dtype, head_dim=spec.head_dim, threads=resolved.cpu_threads)
        formats = choose_formats(spec.quantization, config.model_format, str(folder))
        self.vocab_size = spec.vocab_size
        self._model = build_model(dataclasses.replace(spec, num_layers=0), self.dtype, self.device, kernels, Parallel(), formats)
        source = open_source(folder)
        if spec.tie_embeddings:
            self._model.embedding.load(source)
        else:
            self._model.embedding.weight = torch.empty(0)  # nothing reads it
        self._model.head.load(source)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, on `device`."""
        return sum(tensor.nbytes for tensor in self._model.head.tensors())

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [n, V] of hidden states [n, M] on any device."""
        return self._model.logits(hidden.to(self.device, self.dtype))


@dataclass(frozen=True, slots=True)
class Reference:
    """What others are compared with: the head, and of every window the hidden states [L, M] on the host."""

    head: Head
    hidden: list[Tensor]

    def taken(self) -> int:
        """Bytes on the head's device: the head, and the hidden states where that is the host."""
        return self.head.nbytes + (sum(states.nbytes for states in self.hidden) if self.head.device.type == "cpu" else 0)


@torch.inference_mode()
def score_rows(logits: Tensor, targets: Tensor, head: Head | None = None, hidden: Tensor | None = None) -> TokenScores:
    """Scores of rows whose next tokens are known: float32 logits [n, V], int64 targets [n], the reference's hidden states [n, M].

    Works on a few rows at a time, on the reference's device; `logits` stay as they are.
    """
    parts, chunk = [], rows_per_chunk(logits.shape[1])
    for start in range(0, targets.numel(), chunk):
        rows = slice(start, start + chunk)
        own, chosen = logits[rows], targets[rows].unsqueeze(1)
        if head is None or hidden is None:
            parts.append(TokenScores(_loss(torch.log_softmax(own, -1), chosen)))
            continue
        parts.append(_compare(own.to(head.device), head.logits(hidden[rows]), chosen.to(head.device)))
    return TokenScores.join(parts)


def _compare(own: Tensor, other: Tensor, chosen: Tensor) -> TokenScores:
    agrees = own.max(-1).indices == other.max(-1).indices  # argmax takes twice as long
    own, other = torch.log_softmax(own, -1), torch.log_softmax(other, -1)
    p = other.exp()
    kl = (p * (other - own)).masked_fill_(p == 0, 0).sum(-1).clamp_min_(0)  # 0 log 0 = 0; the sum is below 0 only by rounding
    return TokenScores(_loss(own, chosen), _loss(other, chosen), kl.double().cpu(), agrees.double().cpu())


def _loss(logprobs: Tensor, chosen: Tensor) -> Tensor:
    return -logprobs.gather(1, chosen).squeeze(1).double().cpu()
