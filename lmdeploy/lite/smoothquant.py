"""SmoothQuant (Xiao et al., 2022): 8-bit weights and activations. Outliers of an activation channel are moved into the weights before both are rounded.

s_j = max|x_j|^a / max|w_j|^(1 - a): the input is divided by s (in the norm or linear layer before it), the columns are multiplied. a = 0.5, or chosen by the
error of the outputs with both sides rounded, "as it is" included. File: `weight` int8 or float8_e4m3fn [N, K], `scale` float32 [N, 1], one for each
output; activations get one scale for each token while the model runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmdeploy.kernels.reference import quantise_activations
from lmdeploy.lite.awq import LayerResult, LayerWeights, LinearWeight, ScaleSource, group_stats
from lmdeploy.lite.calibrate import InputStats
from lmdeploy.models.decoder import SmoothingGroup

Tensor = torch.Tensor

HALF = 0.5
#: Shares that the search tries beside "as it is".
ALPHAS = tuple(i / 20 for i in range(1, 20))
SMALLEST = 1e-5


@dataclass(frozen=True, slots=True)
class SmoothQuantMethod:
    """`stored` is int8 or float8_e4m3fn."""

    stored: torch.dtype
    search: bool

    def title(self, *, calibrated: bool) -> str:
        """For the report."""
        how = "plain rounding" if not calibrated else "scales searched" if self.search else "fixed scales"
        return f"SmoothQuant, {str(self.stored).removeprefix('torch.')} weights and activations, {how}"

    @property
    def group(self) -> int:
        """Whole rows share a scale."""
        return 0

    @property
    def gram_group(self) -> int | None:
        """Errors are measured on rows."""
        return None

    @property
    def packs(self) -> bool:
        """A number is a byte: any shape will do."""
        return False

    def work_bytes(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        """The layer in float32, and four more of its largest matrix."""
        sizes = [n * k for n, k in shapes.values()]
        return 4 * (sum(sizes) + 4 * max(sizes))

    def entry(self, kept: Sequence[str]) -> Mapping[str, Any]:
        """The keys of docs: method and type."""
        entry = {"quant_method": "smooth_quant", "quant_dtype": str(self.stored).removeprefix("torch.")}
        return {**entry, "modules_to_not_convert": list(kept)} if kept else entry

    def quantise(self, layer: LayerWeights, stats: dict[str, InputStats], groups: Sequence[SmoothingGroup]) -> LayerResult:
        """Smooth the groups, then round every linear layer."""
        before = {name: linear.weight for name, linear in layer.linears.items() if linear.quantised}
        result = LayerResult({})
        for group in groups:
            self._smooth(layer, stats, group, result.warnings)
        for name, linear in layer.linears.items():
            if linear.quantised:
                self._finish(name, linear, before.pop(name), stats.get(name), result)
            else:
                result.tensors[f"{name}.weight"] = linear.weight.to(linear.dtype)
            if linear.bias is not None:
                result.tensors[f"{name}.bias"] = linear.bias
        result.tensors.update(layer.others)
        return result

    def _smooth(self, layer: LayerWeights, stats: dict[str, InputStats], group: SmoothingGroup, warnings: list[str]) -> None:
        """Choose the scales of one group and move them; a group whose statistics are unusable stays as it is."""
        targets = [name for name in group.targets if name in layer.linears]
        seen = group_stats(stats, targets)
        if seen is None or not targets:
            return
        for name in targets:  # experts are given what their router was given
            stats.setdefault(name, seen)
        if not seen.finite:
            warnings.append(f"{', '.join(targets)}: inputs hold NaN or infinity; left unscaled")
            return
        source = ScaleSource(layer, group)
        weights = [layer.linears[name].weight for name in targets if layer.linears[name].quantised]
        if not weights or not source.fits(seen.absmax.shape[0]):
            return
        scales = self._searched(seen, weights, source) if self.search else source.realised(smoothing_scales(seen.absmax, weights, HALF))
        if not bool(torch.isfinite(scales).all()):
            warnings.append(f"{', '.join(targets)}: the scales are not finite; left unscaled")
            return
        source.divide(scales)
        for name in targets:
            layer.linears[name].scale_columns(scales)

    def _searched(self, seen: InputStats, weights: Sequence[Tensor], source: ScaleSource) -> Tensor:
        """The scales with the smallest error of the outputs."""
        rows, best = seen.rows, torch.ones_like(seen.absmax)
        truth = [rows @ weight.t() for weight in weights]
        least = self._errors(rows, weights, truth, best)
        for alpha in ALPHAS:
            scales = source.realised(smoothing_scales(seen.absmax, weights, alpha))
            error = self._errors(rows, weights, truth, scales)
            if error < least:
                best, least = scales, error
        return best

    def _errors(self, rows: Tensor, weights: Sequence[Tensor], truth: Sequence[Tensor], scales: Tensor) -> float:
        """Squared error of all outputs with inputs divided and columns multiplied by `scales`."""
        inputs = self.rounded(rows / scales)
        return sum(float((inputs @ self.rounded(weight * scales).t() - wanted).square().sum()) for weight, wanted in zip(weights, truth, strict=True))

    def rounded(self, values: Tensor) -> Tensor:
        """Rows of weights or activations as they are once quantised, float32."""
        numbers, scale = quantise_activations(values, self.stored)
        return numbers * scale

    def _finish(self, name: str, linear: LinearWeight, before: Tensor, seen: InputStats | None, result: LayerResult) -> None:
        """Round and measure one linear layer; `before` is its weight in the file."""
        numbers, scale = quantise_activations(linear.weight, self.stored)
        result.tensors[f"{name}.weight"] = numbers.to(self.stored)
        result.tensors[f"{name}.scale"] = scale
        if seen is None or not seen.count or not seen.finite:
            return
        rows, columns = seen.rows, linear.columns
        truth = rows @ before.t()
        plain = self.rounded(rows) @ self.rounded(before).t() - truth
        outputs = self.rounded(rows if columns is None else rows / columns) @ (numbers * scale).t()
        if linear.rows is not None:
            outputs = outputs * linear.rows
        result.errors[name] = (float(plain.square().sum()), float((outputs - truth).square().sum()), float(truth.square().sum()))


def smoothing_scales(absmax: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """max|x_j|^alpha / max|w_j|^(1 - alpha) [K] over the rows of all weights [N, K], around 1."""
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).clamp(min=SMALLEST)
    scales = (absmax.clamp(min=SMALLEST).pow(alpha) / largest.pow(1 - alpha)).clamp(min=SMALLEST)
    return scales / (scales.max() * scales.min()).sqrt()
