"""Rotary embedding: one factory for every kind; it yields cos and sin of the new tokens, once per step, shared by all layers.

The attention factor of yarn and longrope is folded into cos and sin. Frequencies are float32 and made by the same arithmetic as
the published models' own code, for at position 100,000 a last-bit difference in a frequency is visible in the logits.
No table is kept: a table must cover the longest session (0.5 GB at a million positions), and the direct way is four small operations, or on CUDA one kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lmdeploy.kernels.api import RopeRule
from lmdeploy.spec import RopeSpec

Tensor = torch.Tensor
RopeAngles = Callable[[Tensor, RopeRule, Tensor | None], tuple[Tensor, Tensor]]


class Rope:
    """Kinds whose frequencies are fixed: default, linear, llama3, yarn."""

    def __init__(self, inv_freq: Tensor, attention_factor: float = 1.0) -> None:
        self.inv_freq = inv_freq  # float32 [R/2]
        self.attention_factor = attention_factor
        self.kernel: RopeAngles | None = None

    @property
    def rule(self) -> RopeRule:
        """What a kernel is told of it."""
        return RopeRule(self.inv_freq, self.attention_factor)

    def cos_sin(self, positions: Tensor, rope_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [T, R/2], of positions [T]; `rope_lengths` [T] is needed by the kinds that depend on the length."""
        if self.kernel is not None:
            return self.kernel(positions, self.rule, rope_lengths)
        angles = positions.unsqueeze(1) * self._frequencies(rope_lengths)
        cos, sin = torch.cos(angles), torch.sin(angles)
        if self.attention_factor != 1.0:
            cos, sin = cos.mul_(self.attention_factor), sin.mul_(self.attention_factor)
        return cos, sin

    def _frequencies(self, rope_lengths: Tensor | None) -> Tensor:
        return self.inv_freq


class DynamicRope(Rope):
    """NTK: past the training length M the base grows with the length L that the sequence was started with (surface 7.6)."""

    def __init__(self, rope: RopeSpec, device: torch.device) -> None:
        super().__init__(_inverse(rope.theta, rope.rotary_dim, device))
        self.rope = rope
        self.exponents = _exponents(rope.rotary_dim, device)

    @property
    def rule(self) -> RopeRule:
        """What a kernel is told of it."""
        rope = self.rope
        return RopeRule(self.exponents, 1.0, rope.original_max_position, rope.theta, rope.factor, self._power)

    @property
    def _power(self) -> float:
        return self.rope.rotary_dim / (self.rope.rotary_dim - 2)

    def _frequencies(self, rope_lengths: Tensor | None) -> Tensor:
        assert rope_lengths is not None, "a dynamic rope needs the lengths that fix its base"
        rope, limit = self.rope, self.rope.original_max_position
        stretch = rope.factor * rope_lengths.clamp(min=limit) / limit - (rope.factor - 1)  # 1 up to M
        base = rope.theta * _power(stretch, self._power)
        return 1.0 / _power(base.unsqueeze(1), self.exponents)  # [T, R/2]


class LongRope(Rope):
    """Two sets of frequencies, chosen by whether the sequence is longer than the original training length."""

    def __init__(self, rope: RopeSpec, device: torch.device) -> None:
        short, long = (_inverse(rope.theta, rope.rotary_dim, device, factors) for factors in (rope.short_factor, rope.long_factor))
        super().__init__(short, _longrope_attention_factor(rope))
        self.limit = rope.original_max_position
        self.both = torch.stack((short, long))  # [2, R/2]

    @property
    def rule(self) -> RopeRule:
        """What a kernel is told of it."""
        return RopeRule(self.both, self.attention_factor, self.limit)

    def _frequencies(self, rope_lengths: Tensor | None) -> Tensor:
        assert rope_lengths is not None, "longrope needs the lengths that choose its factors"
        return self.both[(rope_lengths > self.limit).long()]  # [T, R/2]


def build_rope(rope: RopeSpec, device: torch.device, kernel: RopeAngles | None = None) -> Rope:
    """The rotary embedding that `rope` describes; `kernel` computes it, if there is one. A model of mere shapes (device "meta") gets it with numbers:
    arithmetic without them makes torch import its compiler, which takes a second."""
    built = _built(rope, torch.device("cpu") if device.type == "meta" else device)
    built.kernel = kernel
    return built


def _built(rope: RopeSpec, device: torch.device) -> Rope:
    if rope.kind == "dynamic":
        return DynamicRope(rope, device)
    if rope.kind == "longrope":
        return LongRope(rope, device)
    inv_freq = _inverse(rope.theta, rope.rotary_dim, device)
    if rope.kind == "linear":
        return Rope(inv_freq / rope.factor)
    if rope.kind == "llama3":
        return Rope(_llama3(rope, inv_freq))
    if rope.kind == "yarn":
        return Rope(_yarn(rope, device), _yarn_attention_factor(rope))
    assert rope.kind == "default", rope.kind
    return Rope(inv_freq)


def logn_scale(positions: Tensor, limit: int) -> Tensor:
    """float32 [T]: log(t) / log(limit) for the t-th token (from 1) past the training length, else 1."""
    return (torch.log((positions + 1).float()) / math.log(limit)).clamp_(min=1.0)


def _power(base: Tensor, exponent: Tensor | float) -> Tensor:
    """float32 base ** exponent, computed in float64: on CPU float32 powers differ in the last bit with the place in the tensor, so with the batch."""
    return (base.double() ** exponent).float()


def _exponents(dim: int, device: torch.device) -> Tensor:
    return torch.arange(0, dim, 2, device=device).float() / dim  # [R/2]


def _inverse(theta: float, dim: int, device: torch.device, factors: tuple[float, ...] = ()) -> Tensor:
    frequencies = theta ** _exponents(dim, device)
    if factors:
        frequencies = torch.tensor(factors, dtype=torch.float32, device=device) * frequencies
    return 1.0 / frequencies


def _llama3(rope: RopeSpec, inv_freq: Tensor) -> Tensor:
    """Slow waves are divided by `factor`, fast ones kept, those between blended (Llama 3.1)."""
    turns = rope.original_max_position / (2 * math.pi / inv_freq)  # within the training length
    blend = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - blend) * inv_freq / rope.factor + blend * inv_freq


def _yarn(rope: RopeSpec, device: torch.device) -> Tensor:
    """Interpolated (divided by `factor`) for waves slower than beta_slow turns, untouched for faster than beta_fast (YaRN, 2309.00071)."""
    dim = rope.rotary_dim
    frequencies = rope.theta ** _exponents(dim, device)
    low, high = (_yarn_dim(rope, turns) for turns in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return 1.0 / (rope.factor * frequencies) * (1 - keep) + 1.0 / frequencies * keep


def _yarn_dim(rope: RopeSpec, turns: float) -> float:
    """The dimension whose wave makes `turns` turns within the training length."""
    return rope.rotary_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def _yarn_attention_factor(rope: RopeSpec) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope_attention_factor(rope: RopeSpec) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position))
