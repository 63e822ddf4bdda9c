"""GPTQ (Frantar et al., 2022): columns are rounded one after the other, and what a column loses is made up for in those that are still to come.

With H = X^T X + damping and U the upper Cholesky factor of its inverse, rounding column j costs e = (w_j - q_j) / U_jj, and every later column k loses
e * U_jk. Modules with the same input are one matrix here. A row keeps plain rounding where that has the smaller error tr(D H D^T) on the calibration text,
so no row gets worse; a module whose statistics are unusable is named and rounded plainly. Layout: formats/gptq.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmdeploy.formats.awq import LARGEST, MIN_RANGE
from lmdeploy.formats.packed4 import words_of
from lmdeploy.lite.awq import LayerResult, LayerWeights, group_stats
from lmdeploy.lite.calibrate import InputStats
from lmdeploy.models.decoder import SmoothingGroup

Tensor = torch.Tensor

#: Columns whose effect on all later ones is applied in one product.
BLOCK = 128
#: Shares of a group's range that are tried; the one with the least weighted error of the group stays.
SHRINKS = tuple(1 - i / 20 for i in range(7))
#: An input's energy counts at least as this share of its group's mean: no weight is given up for free.
FLOOR = 0.05
MIDDLE = 8
#: Damping is raised tenfold this often before a matrix counts as unusable.
ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Grid:
    """What numbers a group can be: w = (q - zero) * scale, q in 0..15. Scales are numbers that float16 can hold."""

    scales: Tensor
    zeros: Tensor

    def numbers(self, weight: Tensor) -> Tensor:
        """float32 q of weights."""
        return (torch.round(weight / self.scales) + self.zeros).clamp_(0, LARGEST)

    def values(self, numbers: Tensor) -> Tensor:
        """What q stand for."""
        return (numbers - self.zeros) * self.scales


@dataclass(frozen=True, slots=True)
class Rounded:
    """q uint8 [N, K], scales and zeros float32 [N, K/g] in the order of `order` int64 [K] (None: that of the inputs)."""

    numbers: Tensor
    scales: Tensor
    zeros: Tensor
    order: Tensor | None = None

    def weight(self) -> Tensor:
        """float32 [N, K], columns in the order of the inputs."""
        grouped = self.numbers.float().view(*self.scales.shape, -1)
        flat = ((grouped - self.zeros.unsqueeze(-1)) * self.scales.unsqueeze(-1)).flatten(1)
        return flat if self.order is None else flat[:, torch.argsort(self.order)]

    def rows(self, part: slice) -> Rounded:
        """Some of the rows."""
        return Rounded(self.numbers[part], self.scales[part], self.zeros[part], self.order)

    def pack(self) -> dict[str, Tensor]:
        """The tensors of a module in GPTQ's layout; zero points are stored minus 1, modulo 16."""
        group = self.numbers.shape[1] // self.scales.shape[1]
        index = torch.arange(self.numbers.shape[1], dtype=torch.int32, device=self.numbers.device) // group
        numbers = self.numbers
        if self.order is not None:
            back = torch.argsort(self.order)
            numbers, index = numbers[:, back], index[back]
        zeros = ((self.zeros.to(torch.int32) - 1) & LARGEST).to(torch.uint8)
        return {
            "qweight": words_of(numbers).t().contiguous(),
            "qzeros": words_of(zeros.t().contiguous()),
            "scales": self.scales.t().half().contiguous(),
            "g_idx": index,
        }


@dataclass(frozen=True, slots=True)
class GptqMethod:
    """4 bits; `sym`: the zero point is always 8; `desc_act`: inputs with the largest magnitude are rounded first and share groups."""

    group: int
    sym: bool = True
    desc_act: bool = False
    damp: float = 0.01

    def title(self, *, calibrated: bool) -> str:
        """For the report."""
        order = ", act-order" if self.desc_act else ""
        return f"GPTQ, 4 bits, groups of {self.group}, {'symmetric' if self.sym else 'with zero points'}{order if calibrated else ', plain rounding'}"

    @property
    def gram_group(self) -> int | None:
        """The whole X^T X."""
        return 0

    @property
    def packs(self) -> bool:
        """Eight numbers to a word."""
        return True

    def work_bytes(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        """X^T X of every input of the layer, four more of the largest one, and the weights thrice in float32."""
        widths = [inputs for _, inputs in shapes.values()]
        return 4 * (sum(k * k for k in set(widths)) + 4 * max(widths) ** 2 + 3 * sum(n * k for n, k in shapes.values()))

    def entry(self, kept: Sequence[str]) -> Mapping[str, Any]:
        """AutoGPTQ's and GPTQModel's keys; `dynamic` is how the latter leaves modules out."""
        entry = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": self.group,
            "sym": self.sym,
            "desc_act": self.desc_act,
            "damp_percent": self.damp,
            "checkpoint_format": "gptq",
            "lm_head": False,
        }
        if not kept:
            return entry
        return {**entry, "modules_to_not_convert": list(kept), "dynamic": {f"-:.*{name.replace('.', chr(92) + '.')}.*": {} for name in kept}}

    def quantise(self, layer: LayerWeights, stats: dict[str, InputStats], groups: Sequence[SmoothingGroup]) -> LayerResult:
        """Round every linear layer; nothing is scaled, so everything else stays as it is."""
        result = LayerResult(dict(layer.others))
        for names, seen in _by_input(layer, stats, groups):
            self._round_together(names, layer, seen, result)
        for name, linear in layer.linears.items():
            if not linear.quantised:
                result.tensors[f"{name}.weight"] = linear.weight.to(linear.dtype)
            if linear.bias is not None:
                result.tensors[f"{name}.bias"] = linear.bias
        return result

    def _round_together(self, names: Sequence[str], layer: LayerWeights, seen: InputStats | None, result: LayerResult) -> None:
        """Modules with one input: round their rows as one matrix, pack each."""
        weight = torch.cat([layer.linears[name].weight for name in names])
        gram = usable_gram(seen)
        better = None if gram is None else self.compensated(weight, gram)
        if seen is not None and better is None:
            why = "inputs hold NaN or infinity" if gram is None else "X^T X cannot be inverted"
            result.warnings.append(f"{', '.join(names)}: {why}; rounded plainly")
        rounded, errors = self.plain(weight, better.order if better is not None else None), None
        if gram is not None:
            rounded, errors = _best(weight, gram, rounded, better)
        start = 0
        for name in names:
            part = slice(start, start + layer.linears[name].weight.shape[0])
            start = part.stop
            result.tensors.update({f"{name}.{suffix}": tensor for suffix, tensor in rounded.rows(part).pack().items()})
            if errors is not None:
                plain, least, square = (float(e[part].sum()) for e in errors)
                result.errors[name] = (plain, least, square)

    def plain(self, weight: Tensor, order: Tensor | None = None) -> Rounded:
        """Each number to the nearest of its group's grid, for weight float32 [N, K]; groups are made in the given order of the inputs."""
        weight = weight if order is None else weight[:, order]
        grouped = weight.view(weight.shape[0], -1, self.group)
        grid = self._grid(grouped, 1.0)
        return Rounded(grid.numbers(grouped).to(torch.uint8).flatten(1), grid.scales.squeeze(-1), grid.zeros.squeeze(-1), order)

    def compensated(self, weight: Tensor, gram: Tensor) -> Rounded | None:
        """GPTQ of weight float32 [N, K] with X^T X [K, K]; None when that cannot be inverted."""
        importance = gram.diagonal()
        order = torch.argsort(importance, descending=True, stable=True) if self.desc_act else None
        if order is not None:
            weight, gram, importance = weight[:, order], gram[order][:, order], importance[order]
        factor = inverse_factor(gram, self.damp)
        if factor is None:
            return None
        columns = weight.t().contiguous()  # [K, N]: a column is one run of memory
        numbers, scales, zeros = torch.empty_like(columns, dtype=torch.uint8), [], []
        for start, stop in self._blocks(columns.shape[0]):
            losses = torch.empty_like(columns[start:stop])
            for j in range(start, stop):
                if j % self.group == 0:
                    grid = self._fitted(columns[j : j + self.group], importance[j : j + self.group])
                    scales.append(grid.scales)
                    zeros.append(grid.zeros)
                q = grid.numbers(columns[j])
                loss = (columns[j] - grid.values(q)) / factor[j, j]
                numbers[j], losses[j - start] = q, loss
                columns[j + 1 : stop].addr_(factor[j, j + 1 : stop], loss, alpha=-1)
            columns[stop:].addmm_(factor[start:stop, stop:].t(), losses, alpha=-1)
        out = Rounded(numbers.t().contiguous(), torch.stack(scales, 1), torch.stack(zeros, 1), order)
        return out if bool(torch.isfinite(columns).all()) else None

    def _blocks(self, count: int) -> Iterator[tuple[int, int]]:
        """About BLOCK columns; no group begins inside a block that does not hold all of it, so what a grid is fitted to is up to date."""
        size = max(1, BLOCK // self.group) * self.group if self.group <= BLOCK else math.gcd(self.group, BLOCK)
        for start in range(0, count, size):
            yield start, min(start + size, count)

    def _grid(self, values: Tensor, shrink: float) -> Grid:
        """The grid of each group along the last axis [..., 1]; part of the range may be given up for finer steps."""
        low, high = values.amin(-1, keepdim=True).clamp(max=0) * shrink, values.amax(-1, keepdim=True).clamp(min=0) * shrink
        if self.sym:
            high = torch.maximum(-low, high)
            low = -high
        scales = ((high - low).clamp(min=MIN_RANGE) / LARGEST).half().float()
        zeros = torch.full_like(scales, MIDDLE) if self.sym else (-torch.round(low / scales)).clamp(0, LARGEST)
        return Grid(scales, zeros)

    def _fitted(self, columns: Tensor, importance: Tensor) -> Grid:
        """The grid [N] of a group of columns [g, N] with the least squared error, each column weighted by its input's energy [g]."""
        values, best = columns.t(), None
        weights = importance.clamp(min=float(importance.mean()) * FLOOR + 1e-12)
        for shrink in SHRINKS:
            grid = self._grid(values, shrink)
            error = (grid.values(grid.numbers(values)) - values).square_() @ weights
            if best is None:
                best, least = grid, error
                continue
            better = error < least
            least = torch.where(better, error, least)
            pick = better.unsqueeze(1)
            best = Grid(torch.where(pick, grid.scales, best.scales), torch.where(pick, grid.zeros, best.zeros))
        assert best is not None
        return Grid(best.scales.squeeze(-1), best.zeros.squeeze(-1))


def _by_input(layer: LayerWeights, stats: dict[str, InputStats], groups: Sequence[SmoothingGroup]) -> list[tuple[list[str], InputStats | None]]:
    """Quantised modules that share an input, with what is known of it. Experts are given what their router was given."""
    found = dict(stats)
    for group in groups:
        if (seen := group_stats(stats, group.targets)) is not None:
            for name in group.targets:
                found.setdefault(name, seen)
    sets: dict[object, tuple[list[str], InputStats | None]] = {}
    for name, linear in layer.linears.items():
        if linear.quantised:
            seen = found.get(name)
            key = id(seen) if seen is not None else name
            sets.setdefault(key, ([], seen))[0].append(name)
    return list(sets.values())


def _best(weight: Tensor, gram: Tensor, plain: Rounded, better: Rounded | None) -> tuple[Rounded, tuple[Tensor, Tensor, Tensor]]:
    """Row by row the one with the smaller error; beside it [N] the error of plain rounding, its own, and the outputs' own square."""
    base, square = row_errors(plain.weight() - weight, gram), row_errors(weight, gram)
    if better is None:
        return plain, (base, base, square)
    error = row_errors(better.weight() - weight, gram)
    keep = (error < base).unsqueeze(1)
    pairs = ((better.numbers, plain.numbers), (better.scales, plain.scales), (better.zeros, plain.zeros))
    numbers, scales, zeros = (torch.where(keep, new, old) for new, old in pairs)
    return Rounded(numbers, scales, zeros, better.order), (base, torch.minimum(error, base), square)


def usable_gram(seen: InputStats | None) -> Tensor | None:
    """X^T X [K, K] of an input, if there is one and it is finite."""
    if seen is None or seen.gram is None or not seen.count or not seen.finite or not bool(torch.isfinite(seen.gram).all()):
        return None
    return seen.gram[0]


def row_errors(difference: Tensor, gram: Tensor) -> Tensor:
    """Squared error of each output [N] over all calibration tokens: d^T H d of differences [N, K]."""
    return ((difference @ gram) * difference).sum(-1)


def inverse_factor(gram: Tensor, damp: float) -> Tensor | None:
    """Upper Cholesky factor of (X^T X + damping)^-1 [K, K]. An input that was always zero stands for itself."""
    matrix = gram.clone()
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1
    step = damp * float(diagonal.mean())
    for _ in range(ATTEMPTS):
        diagonal += step
        lower, failed = torch.linalg.cholesky_ex(matrix)
        upper: Tensor
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return upper
        step *= 10
    return None
