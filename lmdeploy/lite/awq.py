"""AWQ (Lin et al., 2023) for the weights of one decoder layer: smooth, clip, round. Pure functions of tensors; nothing here knows files or models.

Scales s move magnitude from activations into weights: the inputs of a linear layer are divided by s (in the norm or linear layer before it) and its columns
multiplied. Without search s follows a fixed formula (alpha 0.5) and numbers are rounded to the nearest. With search alpha, each group's clipping and at last
the numbers themselves (`descent.py`) are chosen by one measure, the error of the outputs over all calibration tokens, d^T X^T X d. Every choice
contains "as plain rounding" and is measured with the numbers that will be stored, so no layer gets worse by searching.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from lmdeploy.formats.awq import pack, quantise
from lmdeploy.lite.calibrate import InputStats
from lmdeploy.lite.descent import damped, descend, row_errors
from lmdeploy.models.decoder import SmoothingGroup

Tensor = torch.Tensor

ALPHAS = tuple(i / 20 for i in range(20))
#: what of a group's largest magnitude is kept; the first is no clipping
SHRINKS = tuple(1 - i / 20 for i in range(10))
MIN_SCALE = 1e-4
#: weights that are rounded side by side (1 GB in float32; about six copies live at a time)
ROUND_AT_ONCE = 1 << 28


@dataclass(slots=True)
class LinearWeight:
    """A linear layer on its way: `weight` float32 [N, K] is original * columns / rows."""

    weight: Tensor
    dtype: torch.dtype  # in the file
    bias: Tensor | None = None
    quantised: bool = True
    columns: Tensor | None = None  # [K]
    rows: Tensor | None = None  # [N]

    def scale_columns(self, scales: Tensor) -> None:
        """Columns times `scales` [K]."""
        self.weight = self.weight * scales
        self.columns = scales if self.columns is None else self.columns * scales

    def divide_last_rows(self, scales: Tensor) -> None:
        """The last rows, and their bias, by `scales` [n]."""
        full = torch.ones(self.weight.shape[0], device=scales.device)
        full[-scales.shape[0] :] = scales
        self.weight = self.weight / full.unsqueeze(1)
        self.rows = full if self.rows is None else self.rows * full
        if self.bias is not None:
            self.bias = (self.bias.float() / full).to(self.bias.dtype)

    def original(self, weight: Tensor) -> Tensor:
        """A weight in today's scaling, back in that of the file."""
        if self.columns is not None:
            weight = weight / self.columns
        return weight * self.rows.unsqueeze(1) if self.rows is not None else weight


@dataclass(slots=True)
class LayerWeights:
    """Weights of one layer by name: linear layers by module, all others (norms) by tensor."""

    linears: dict[str, LinearWeight]
    others: dict[str, Tensor]


@dataclass(slots=True)
class LayerResult:
    """What goes into the file, and squared output errors on the kept rows by module: (plain rounding, this result, the outputs' own square)."""

    tensors: dict[str, Tensor]
    errors: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Rounding:
    """How to round: group size, and whether to search."""

    group: int
    search: bool

    def rounded(self, weight: Tensor) -> Tensor:
        """The weight after quantising and dequantising."""
        return dequantised(*quantise(weight, self.group))


def dequantised(q: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """float32 [N, K] of q [N, K], scales and zeros [N, K/g]."""
    grouped = q.float().view(*scales.shape, -1)
    return ((grouped - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)).view(q.shape)


def quantise_layer(layer: LayerWeights, stats: dict[str, InputStats], groups: Sequence[SmoothingGroup], how: Rounding) -> LayerResult:
    """Smooth the groups, then clip and round every linear layer."""
    before = {name: linear.weight for name, linear in layer.linears.items() if linear.quantised}
    result = LayerResult({}, warnings=smooth_layer(layer, stats, groups, how))
    for names in _together(layer, stats):
        _finish(names, layer, before, _usable(stats, names[0]), how, result)
    for name, linear in layer.linears.items():
        if not linear.quantised:
            result.tensors[f"{name}.weight"] = linear.weight.to(linear.dtype)
        if linear.bias is not None:
            result.tensors[f"{name}.bias"] = linear.bias
    result.tensors.update(layer.others)
    return result


def smooth_layer(layer: LayerWeights, stats: dict[str, InputStats], groups: Sequence[SmoothingGroup], how: Rounding) -> list[str]:
    """Move scales within the layer; it still computes the same. Returns warnings about groups that were left alone."""
    warnings: list[str] = []
    for group in groups:
        _smooth(layer, stats, group, how, warnings)
    return warnings


def _usable(stats: dict[str, InputStats], name: str) -> InputStats | None:
    found = stats.get(name)
    return found if found is not None and found.count and found.finite else None


def group_stats(stats: dict[str, InputStats], targets: Sequence[str]) -> InputStats | None:
    """What the targets of a group were given: they share one input, so the record with most tokens (a router's, beside its experts')."""
    found = [stats[name] for name in targets if name in stats]
    return max(found, key=lambda s: s.count) if found else None


def _smooth(layer: LayerWeights, stats: dict[str, InputStats], group: SmoothingGroup, how: Rounding, warnings: list[str]) -> None:
    """Choose the scales of one group and move them; a group whose statistics are unusable stays as it is."""
    targets = [name for name in group.targets if name in layer.linears]
    seen = group_stats(stats, targets)
    if seen is None or not targets:
        return
    for name in targets:  # experts of a router are given what it was given
        stats.setdefault(name, seen)
    if not seen.finite:
        warnings.append(f"{', '.join(targets)}: inputs hold NaN or infinity; left unscaled and unclipped")
        return
    source = ScaleSource(layer, group)
    if not source.fits(seen.absmax.shape[0]):
        return
    weights = [layer.linears[name].weight for name in targets if layer.linears[name].quantised]
    scales = _searched(seen, weights, source, how) if how.search else source.realised(fixed_scales(seen.absmax, weights, how.group))
    if not bool(torch.isfinite(scales).all()):
        warnings.append(f"{', '.join(targets)}: the scales are not finite; left unscaled")
        return
    source.divide(scales)
    for name in targets:
        layer.linears[name].scale_columns(scales)


class ScaleSource:
    """The norm or linear layer whose outputs are divided."""

    def __init__(self, layer: LayerWeights, group: SmoothingGroup) -> None:
        self.layer, self.name, self.is_norm = layer, group.source, group.source_is_norm
        self.norm = layer.others.get(f"{group.source}.weight") if group.source_is_norm else None

    def fits(self, inputs: int) -> bool:
        """Whether it has an output for every input (a fused one: at the end of its rows)."""
        if self.is_norm:
            return self.norm is not None and self.norm.shape[0] == inputs
        return self.name in self.layer.linears and self.layer.linears[self.name].weight.shape[0] >= inputs

    def realised(self, scales: Tensor) -> Tensor:
        """The scales that dividing really gives: a norm is stored in 16 bits, and the columns take over what its rounding changes."""
        if self.norm is None:
            return scales
        norm = self.norm.float()
        stored = (norm / scales).to(self.norm.dtype).float()
        return torch.where(stored == 0, torch.ones_like(scales), norm / stored)

    def divide(self, scales: Tensor) -> None:
        """Divide the outputs."""
        if self.norm is not None:
            self.layer.others[f"{self.name}.weight"] = (self.norm.float() / scales).to(self.norm.dtype)
        else:
            self.layer.linears[self.name].divide_last_rows(scales)


def _normalised(scales: Tensor) -> Tensor:
    """Scales around 1: divided by the geometric mean of their extremes."""
    scales = scales.clamp(min=MIN_SCALE)
    return scales / (scales.max() * scales.min()).sqrt()


def fixed_scales(absmax: Tensor, weights: Sequence[Tensor], group: int) -> Tensor:
    """s_j = (a_j / w_j)^0.5 [K], w_j being the mean over rows of |W_rj| relative to the largest of its group."""
    relative = torch.zeros_like(absmax)
    for weight in weights:
        size = weight.abs().view(weight.shape[0], -1, group)
        relative += (size / size.amax(-1, keepdim=True).clamp(min=1e-9)).flatten(1).sum(0)
    relative /= sum(weight.shape[0] for weight in weights)
    return _normalised((absmax / relative.clamp(min=1e-9)).sqrt())


def _searched(seen: InputStats, weights: Sequence[Tensor], source: ScaleSource, how: Rounding) -> Tensor:
    """mean|x|^alpha with the alpha whose rounded weights come nearest to the outputs."""
    best, least = torch.ones_like(seen.absmax), float("inf")
    gram = seen_gram(seen)
    if gram is None:
        return best
    for alpha in ALPHAS:
        scales = source.realised(_normalised(seen.absmean.clamp(min=MIN_SCALE).pow(alpha))) if alpha else torch.ones_like(best)
        error = 0.0
        for weight in weights:
            error += float(row_errors(how.rounded(weight * scales) / scales - weight, gram).sum())
        if error < least:
            best, least = scales, error
    return best


def seen_gram(seen: InputStats | None) -> Tensor | None:
    """What errors are measured with, H [K, K]; None when nothing usable was seen."""
    if seen is None or seen.gram is None or not seen.count or not seen.finite or not bool(torch.isfinite(seen.gram).all()):
        return None
    return damped(seen.gram[0])


def _error(rows: Tensor, difference: Tensor) -> float:
    """Squared error of the outputs: rows [S, K], difference of weights [N, K]."""
    return float((rows @ difference.t()).square().sum())


def clipped(weight: Tensor, gram: Tensor, group: int) -> Tensor:
    """The weight with each group of each row cut off at the share of its magnitude that gives the least output error of the group alone. gram [K, K]."""
    grouped = weight.view(weight.shape[0], -1, group)
    blocks = torch.stack([gram[i : i + group, i : i + group] for i in range(0, gram.shape[0], group)])  # [G, g, g]
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    best, least = weight, torch.full(grouped.shape[:2], float("inf"), device=weight.device)
    for shrink in SHRINKS:
        candidate = grouped.clamp(low * shrink, high * shrink).view(weight.shape)
        difference = (dequantised(*quantise(candidate, group)) - weight).view(grouped.shape).transpose(0, 1)  # [G, N, g]
        error = (torch.bmm(difference, blocks) * difference).sum(-1).t().contiguous()  # [N, G]
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better.unsqueeze(-1), candidate.view(grouped.shape), best.view(grouped.shape)).view(weight.shape)
    return best


def refined(weight: Tensor, gram: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(q, scales, zeros) of a weight [N, K] by H [K, K]: a row is clipped where that helps the whole row, then its numbers descend."""
    cut = clipped(weight, gram, group)
    errors = [row_errors(dequantised(*quantise(w, group)) - weight, gram) for w in (weight, cut)]
    q, scales, zeros = quantise(torch.where((errors[1] < errors[0]).unsqueeze(1), cut, weight), group)
    return descend(weight, gram, q, scales, zeros), scales, zeros


def _round(names: Sequence[str], layer: LayerWeights, seen: InputStats | None, how: Rounding) -> tuple[Tensor, Tensor, Tensor]:
    """(q, scales, zeros) of the rows of all these modules, which share inputs and column scales, one module below the other."""
    linears = [layer.linears[name] for name in names]
    weight = torch.cat([linear.weight for linear in linears])
    gram = seen_gram(seen) if how.search else None
    if gram is None:
        return quantise(weight, how.group)
    if (columns := linears[0].columns) is not None:
        gram = gram / columns.unsqueeze(1) / columns
    return refined(weight, gram, how.group)


def _together(layer: LayerWeights, stats: dict[str, InputStats]) -> Iterator[list[str]]:
    """Quantised modules that share inputs and column scales, so that one pass over the columns serves all; at most ROUND_AT_ONCE numbers, or one module."""
    sets: dict[tuple[int, int], list[str]] = {}
    for name, linear in layer.linears.items():
        if linear.quantised:
            sets.setdefault((id(stats.get(name, linear)), id(linear.columns)), []).append(name)
    for names in sets.values():
        batch: list[str] = []
        for name in names:
            if batch and sum(layer.linears[n].weight.numel() for n in (*batch, name)) > ROUND_AT_ONCE:
                yield batch
                batch = []
            batch.append(name)
        yield batch


def _finish(names: Sequence[str], layer: LayerWeights, before: dict[str, Tensor], seen: InputStats | None, how: Rounding, result: LayerResult) -> None:
    """Round, pack and measure modules that go together; `before` has their weights in the file."""
    numbers, start = _round(names, layer, seen, how), 0
    for name in names:
        linear, old = layer.linears[name], before.pop(name)
        own = tuple(part[start : start + old.shape[0]] for part in numbers)
        start += old.shape[0]
        result.tensors.update({f"{name}.{suffix}": tensor for suffix, tensor in pack(*own).items()})
        if seen is not None:
            difference = linear.original(dequantised(*own)) - old
            result.errors[name] = (_error(seen.rows, how.rounded(old) - old), _error(seen.rows, difference), _error(seen.rows, old))
