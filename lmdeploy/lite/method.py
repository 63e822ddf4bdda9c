"""What a quantising method must offer to the skeleton in `api.py`, and AWQ's answer; each other method's is in its own file.

A method sees one decoder layer at a time: weights, what went into them, and where scales may move. Files, models and devices are not its business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lmdeploy.lite.awq import ROUND_AT_ONCE, LayerResult, LayerWeights, Rounding, quantise_layer
from lmdeploy.lite.calibrate import InputStats
from lmdeploy.models.decoder import SmoothingGroup


class Method(Protocol):
    """One way to make weights small."""

    def title(self, *, calibrated: bool) -> str:
        """For the report."""
        ...

    @property
    def group(self) -> int:
        """Inputs of a row that share a scale; 0 = all of them."""
        ...

    @property
    def gram_group(self) -> int | None:
        """Block size of the X^T X that is collected; 0 = one block of all inputs, None = no X^T X."""
        ...

    @property
    def packs(self) -> bool:
        """Whether eight numbers share a word, so that inputs and outputs must be multiples of 8."""
        ...

    def work_bytes(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        """Bytes that rounding a layer with these matrices [N, K] takes beside the layer itself."""
        ...

    def quantise(self, layer: LayerWeights, stats: dict[str, InputStats], groups: Sequence[SmoothingGroup]) -> LayerResult:
        """The tensors of one layer as they go into the file."""
        ...

    def entry(self, kept: Sequence[str]) -> Mapping[str, Any]:
        """config.json's `quantization_config`; `kept`: names of modules that are not quantised."""
        ...


@dataclass(frozen=True, slots=True)
class AwqMethod:
    """4 bits with a zero point, scales by formula or by search (`awq.py`)."""

    group: int
    search: bool

    def title(self, *, calibrated: bool) -> str:
        """For the report."""
        how = "plain rounding" if not calibrated else "scales, clipping and rounding searched" if self.search else "fixed scales"
        return f"AWQ, 4 bits, groups of {self.group}, {how}"

    @property
    def gram_group(self) -> int | None:
        """The whole X^T X."""
        return 0 if self.search else None

    @property
    def packs(self) -> bool:
        """Eight numbers to a word."""
        return True

    def work_bytes(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        """The layer in float32, and of what is rounded together: scaled, candidate, numbers, differences; with search X^T X of every input."""
        sizes = [n * k for n, k in shapes.values()]
        if not self.search:
            return 4 * (sum(sizes) + 7 * max(sizes))
        widths = Counter(k for _, k in shapes.values())
        usual, _ = widths.most_common(1)[0]  # inputs of q, k and v together, of o, of gate and up together (of all experts); others have an input each
        grams = 3 * usual**2 + sum(count * k**2 for k, count in widths.items() if k != usual)
        return 4 * (sum(sizes) + grams + 9 * max(max(sizes), min(sum(sizes), ROUND_AT_ONCE)))

    def quantise(self, layer: LayerWeights, stats: dict[str, InputStats], groups: Sequence[SmoothingGroup]) -> LayerResult:
        """Smooth, clip, round."""
        return quantise_layer(layer, stats, groups, Rounding(self.group, self.search))

    def entry(self, kept: Sequence[str]) -> Mapping[str, Any]:
        """AutoAWQ's keys."""
        entry = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": self.group, "zero_point": True}
        return {**entry, "modules_to_not_convert": list(kept)} if kept else entry
