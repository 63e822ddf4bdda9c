"""Rounding in view of the outputs: numbers of a grid that is already chosen are moved, one column after the other, to where the layer's outputs are nearest.

The error of a row is d^T H d, d being the difference of its weights and H the X^T X of the inputs. For one number and all others fixed that is a parabola,
so its best integer is known at once (coordinate descent); all rows go side by side, and no step can make a row worse. Nearest rounding, where this starts,
looks at each weight alone. Scales and zero points stay, so the layout of the file does too.
"""

from __future__ import annotations

import torch

from lmdeploy.formats.awq import LARGEST

Tensor = torch.Tensor

#: A share of H's mean diagonal that is added to it: calibration text is a sample, and directions that it hardly has are not free. Measured on the embedded
#: model: from 0 to 0.2 the divergence on the text's own kind stays, on foreign text it falls by 8 %.
RIDGE = 0.1
#: Embedded model: the error falls by 44 % in three passes over the columns and by 5 % more in the next three, which divergence does not show; after two
#: divergence is 2 to 7 % higher than after three.
SWEEPS = 3
#: Columns whose effect on all later ones is applied in one product.
BLOCK = 128


def damped(gram: Tensor) -> Tensor:
    """H of X^T X [K, K], scaled to a mean diagonal of 1, plus RIDGE on the diagonal. All zeros become the unit matrix."""
    mean = gram.diagonal().mean()
    out = gram / mean if float(mean) > 0 else torch.zeros_like(gram)
    out.diagonal().add_(RIDGE if float(mean) > 0 else 1.0)
    return out


def row_errors(difference: Tensor, gram: Tensor) -> Tensor:
    """d^T H d of every row: float32 [N] of [N, K] and [K, K]."""
    return ((difference @ gram) * difference).sum(-1)


def descend(weight: Tensor, gram: Tensor, q: Tensor, scales: Tensor, zeros: Tensor, sweeps: int = SWEEPS) -> Tensor:
    """Better numbers uint8 [N, K] for weight float32 [N, K] with H float32 [K, K], from q uint8 [N, K] with scales and zeros [N, K/g]."""
    step, zero = scales.t().contiguous(), zeros.t().contiguous()  # [K/g, N]: a column is one run of memory
    numbers = q.t().to(weight.dtype)
    group = numbers.shape[0] // step.shape[0]
    difference = ((numbers.view(*step.shape[:1], group, -1) - zero.unsqueeze(1)) * step.unsqueeze(1)).view(numbers.shape) - weight.t()
    inverse, curvature = step.reciprocal(), gram.diagonal().tolist()
    for _ in range(sweeps):
        slope = gram @ difference
        for start in range(0, numbers.shape[0], BLOCK):
            moved = _sweep(numbers, slope, gram, (start, min(start + BLOCK, numbers.shape[0])), (step, inverse), curvature)
            stop = start + moved.shape[0]
            difference[start:stop] += moved
            slope[stop:].addmm_(gram[stop:, start:stop], moved)
    return numbers.to(torch.uint8).t().contiguous()


def _sweep(numbers: Tensor, slope: Tensor, gram: Tensor, block: tuple[int, int], steps: tuple[Tensor, Tensor], curvature: list[float]) -> Tensor:
    """One pass over the columns of a block, in place; returns by how much each weight moved [B, N]. `slope` [K, N] is H d, up to date for the block."""
    start, stop = block
    (step, inverse), group = steps, numbers.shape[0] // steps[0].shape[0]
    fresh, moved = torch.empty_like(numbers[start:stop]), torch.empty_like(numbers[start:stop])
    slopes, effects = slope[start:stop], gram[start:stop, start:stop]
    rows = zip(numbers[start:stop].unbind(), slopes.unbind(), fresh.unbind(), moved.unbind(), strict=True)
    for j, (old, push, new, change) in enumerate(rows):  # as few kernels as can be: on a GPU their launches are all the time it takes
        place = (start + j) // group
        torch.addcmul(old, push, inverse[place], value=-1 / curvature[start + j], out=new).round_().clamp_(0, LARGEST)
        torch.sub(new, old, out=change).mul_(step[place])
        slopes[j + 1 :].addr_(effects[j, j + 1 :], change)
    numbers[start:stop] = fresh
    return moved
