"""Which tensors of a checkpoint are what, layer by layer, from names and shapes alone; whatever cannot be quantised is refused here, before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from lmdeploy.checkpoint.source import WeightSource
from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.models.decoder import Decoder

#: Endings of tensors that only quantised checkpoints have.
QUANTISED = (".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".scale")


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One decoder layer. Names of `linears`, `others` and `kept` are those below `prefix`; `tensors` are whole names."""

    index: int
    prefix: str
    linears: tuple[str, ...]  # modules with a matrix
    kept: tuple[str, ...]  # those of them that stay as they are (routers)
    others: tuple[str, ...]  # tensors that belong to no linear layer
    tensors: tuple[str, ...]
    linear_bytes: int  # of the matrices that are quantised
    shapes: Mapping[str, tuple[int, int]]  # of all matrices [N, K]

    @property
    def num_weights(self) -> int:
        """Numbers in all matrices."""
        return sum(map(prod, self.shapes.values()))


def plan_layers(model: Decoder, source: WeightSource, group: int, *, packs: bool = True) -> tuple[LayerPlan, ...]:
    """The plan of every layer; ConfigError when the group size does not fit, CheckpointError when the folder is no 16-bit model.

    `group`: inputs that share a scale, 0 = all of a row. `packs`: eight numbers share a word.
    """
    names = sorted(source.names())
    if packed := next((n for n in names if n.endswith(QUANTISED) or source.dtype(n).itemsize == 1), None):
        raise CheckpointError(f"the model is already quantised: it has the tensor {packed!r}; give the 16-bit model")
    stem = f"{model.prefix}{model.names.layers}."
    by_layer: dict[int, list[str]] = {}
    for name in names:
        number = name.removeprefix(stem).split(".", 1)[0]
        if name.startswith(stem) and number.isdigit():
            by_layer.setdefault(int(number), []).append(name)
    count = model.spec.num_layers
    if missing := [i for i in range(count) if i not in by_layer]:
        raise CheckpointError(f"the weights have no tensors of layer {missing[0]} ('{stem}{missing[0]}.*'), but config.json says that there are {count} layers")
    plans = tuple(_plan(index, f"{stem}{index}.", by_layer[index], model.unquantised(), source) for index in range(count))
    if packs:
        for plan in plans:
            for name in plan.linears:
                if name not in plan.kept:
                    _check(plan.prefix + name, plan.shapes[name], group)
    return plans


def _plan(index: int, prefix: str, names: list[str], kept: tuple[str, ...], source: WeightSource) -> LayerPlan:
    linears = tuple(n.removeprefix(prefix).removesuffix(".weight") for n in names if n.endswith(".weight") and len(source.shape(n)) == 2)
    quantised = [name for name in linears if name not in kept]
    taken = {f"{prefix}{name}.{suffix}" for name in linears for suffix in ("weight", "bias")}
    others = tuple(n.removeprefix(prefix) for n in names if n not in taken)
    shapes: dict[str, tuple[int, int]] = {}
    for name in linears:
        rows, cols = source.shape(f"{prefix}{name}.weight")
        shapes[name] = (rows, cols)
    stored = sum(prod(shapes[name]) * source.dtype(f"{prefix}{name}.weight").itemsize for name in quantised)
    return LayerPlan(index, prefix, linears, tuple(name for name in linears if name in kept), others, tuple(names), stored, shapes)


def _check(name: str, shape: tuple[int, int], group: int) -> None:
    outputs, inputs = shape
    if inputs % group:
        fits = [g for g in (16, 32, 64, 128, 256) if inputs % g == 0]
        hint = f"use --w-group-size {' or '.join(map(str, fits))}" if fits else "no usual group size does"
        raise ConfigError(f"w_group_size={group} does not divide the {inputs} inputs of {name!r}; {hint}")
    if outputs % 8 or inputs % 8:
        raise ConfigError(f"{name!r} has {inputs} inputs and {outputs} outputs; 4-bit files hold multiples of 8 of both")
