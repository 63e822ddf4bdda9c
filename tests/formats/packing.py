"""Quantised checkpoints for tests, packed and read number by number from the published description, with none of the package's code.

`Module` is one 4-bit linear of AWQ or GPTQ, functions that return `Stored` write one of the other methods; `quantised_folder` and `stored_folder` turn a
dense model folder into one that another tool could have written, and into the dense folder that means the same numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.helpers import write_folder

Tensor = torch.Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(nibble: Tensor) -> Tensor:
    """int32 [R, C] of int64 nibbles [R, C, 8], the first one lowest."""
    total = sum(nibble[..., i] << (4 * i) for i in range(8))
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


@dataclass(frozen=True)
class Module:
    """q [N, K] in 0..15; scale (float16 numbers) and zero [N, G]; group [K] says which of the G an input belongs to."""

    q: Tensor
    scale: Tensor
    zero: Tensor
    group: Tensor

    @classmethod
    def random(cls, outputs: int, inputs: int, group_size: int, seed: int, act_order: bool = False) -> Module:
        g = torch.Generator().manual_seed(seed)
        count = inputs // group_size
        group = torch.arange(inputs) // group_size
        scale = (torch.rand(outputs, count, generator=g) * 0.1 + 0.01).half().float()
        q, zero = (torch.randint(0, 16, (outputs, n), generator=g) for n in (inputs, count))
        return cls(q, scale, zero, group[torch.randperm(inputs, generator=g)] if act_order else group)

    @classmethod
    def of(cls, weight: Tensor, group_size: int, group: Tensor | None = None) -> Module:
        """A weight [N, K] rounded to the nearest; the range of a group includes zero."""
        outputs, inputs = weight.shape
        count = inputs // group_size
        group = torch.arange(inputs) // group_size if group is None else group
        q, scale, zero = torch.empty(outputs, inputs, dtype=torch.int64), torch.empty(outputs, count), torch.empty(outputs, count, dtype=torch.int64)
        for i in range(count):
            part = weight[:, group == i].float()
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scale[:, i] = ((high - low).clamp(min=1e-5) / 15).half().float()
            zero[:, i] = (-low / scale[:, i]).round().clamp(0, 15).long()
            q[:, group == i] = ((part / scale[:, i : i + 1]).round().long() + zero[:, i : i + 1]).clamp(0, 15)
        return cls(q, scale, zero, group)

    @property
    def weight(self) -> Tensor:
        """float32 [N, K]: what the numbers mean."""
        return (self.q - self.zero[:, self.group]).float() * self.scale[:, self.group]

    def awq(self) -> dict[str, Tensor]:
        order = list(AWQ_ORDER)
        by_eight = [t.t().reshape(t.shape[1], -1, 8)[:, :, order] for t in (self.q, self.zero)]
        return {"qweight": words(by_eight[0]), "qzeros": words(by_eight[1]), "scales": self.scale.t().half().contiguous()}

    def gptq(self, offset: int = 1) -> dict[str, Tensor]:
        numbers = self.q.reshape(self.q.shape[0], -1, 8).transpose(0, 1)
        zeros = ((self.zero - offset) % 16).t().reshape(self.zero.shape[1], -1, 8)
        scales = self.scale.t().half().contiguous()
        return {"qweight": words(numbers), "qzeros": words(zeros), "scales": scales, "g_idx": self.group.to(torch.int32)}


def configuration(method: str, group_size: int, **changes: Any) -> dict[str, Any]:
    """A quantization_config as AutoAWQ or AutoGPTQ writes it."""
    extra = {"version": "gemm", "zero_point": True} if method == "awq" else {"desc_act": False, "sym": False}
    return {"quant_method": method, "bits": 4, "group_size": group_size, **extra, **changes}


def quantised_folder(
    dense: Path, out: Path, method: str, group_size: int, *, act_order: bool = False, skip: tuple[str, ...] = (), also: tuple[str, ...] = ()
) -> tuple[Path, Path]:
    """(4-bit folder, dense folder of the same numbers) of a dense folder: every linear in the decoder layers is rounded, but routers and `skip`; and `also`."""
    config = json.loads((dense / "config.json").read_text())
    tensors = dense_tensors(dense)
    packed, plain = dict(tensors), dict(tensors)
    orders: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if not (".layers." in name or module in also) or tensor.dim() != 2 or module.endswith(".gate") or any(part in name for part in skip):
            continue
        inputs = tensor.shape[1]
        if act_order and inputs not in orders:  # modules with the same input have the same order
            orders[inputs] = Module.random(8, inputs, group_size, inputs, True).group
        made = Module.of(tensor, group_size, orders.get(inputs))
        del packed[name]
        packed |= {f"{module}.{suffix}": t for suffix, t in (made.awq() if method == "awq" else made.gptq()).items()}
        plain[name] = made.weight
    extra = {"modules_to_not_convert": list(skip)} if skip else {}
    write_folder(out / "packed", {**config, "quantization_config": configuration(method, group_size, **extra)}, packed)
    write_folder(out / "plain", {**config, "torch_dtype": "float32"}, plain)
    return out / "packed", out / "plain"


#: What a tool writes for one linear layer, and the float32 weight that it means.
Stored = tuple[dict[str, Tensor], Tensor]


def dense_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a dense folder."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def stored_folder(dense: Path, out: Path, entry: dict[str, Any], store: Callable[[Tensor], Stored], also: tuple[str, ...] = ()) -> tuple[Path, Path]:
    """(quantised folder, dense folder of the same numbers): every linear in the decoder layers but routers, and `also`, is written by `store`."""
    config, tensors = json.loads((dense / "config.json").read_text()), dense_tensors(dense)
    packed, plain = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if (".layers." in name or module in also) and tensor.dim() == 2 and not module.endswith(".gate"):
            stored, plain[name] = store(tensor)
            del packed[name]
            packed |= {f"{module}.{suffix}": t for suffix, t in stored.items()}
    write_folder(out / "packed", {**config, "quantization_config": entry}, packed)
    write_folder(out / "plain", {**config, "torch_dtype": "float32"}, plain)
    return out / "packed", out / "plain"


def by_rows(weight: Tensor, dtype: torch.dtype, blocks: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(8-bit numbers [N, K], one float32 scale for each block of (rows, inputs), the last ones smaller)."""
    counts = [math.ceil(size / block) for size, block in zip(weight.shape, blocks, strict=True)]
    whole = torch.zeros([count * block for count, block in zip(counts, blocks, strict=True)])
    whole[: weight.shape[0], : weight.shape[1]] = weight
    largest = whole.view(counts[0], blocks[0], counts[1], blocks[1]).abs().amax((1, 3))
    scales = largest / (127 if dtype is torch.int8 else 448)
    scaled = weight.float() / meaning(torch.ones(weight.shape), scales, blocks)
    return (scaled.round() if dtype is torch.int8 else scaled).to(dtype), scales


def meaning(numbers: Tensor, scales: Tensor, blocks: tuple[int, int]) -> Tensor:
    """float32 [N, K]."""
    wide = scales.repeat_interleave(blocks[0], 0)[: numbers.shape[0]].repeat_interleave(blocks[1], 1)[:, : numbers.shape[1]]
    return numbers.float() * wide


def smooth_quant(weight: Tensor, dtype: torch.dtype) -> Stored:
    """`weight` [N, K] and `scale` [N, 1]."""
    blocks = (1, weight.shape[1])
    numbers, scales = by_rows(weight, dtype, blocks)
    return {"weight": numbers, "scale": scales}, meaning(numbers, scales, blocks)


def fp8(weight: Tensor, blocks: tuple[int, int] | None, *, suffix: str = "weight_scale_inv") -> Stored:
    """`weight` float8_e4m3fn and a scale for each block; for the whole tensor without blocks."""
    size = blocks or (weight.shape[0], weight.shape[1])
    numbers, scales = by_rows(weight, torch.float8_e4m3fn, size)
    return {"weight": numbers, suffix: scales if blocks else scales.view(())}, meaning(numbers, scales, size)


def packed_words(numbers: Tensor, bits: int) -> Tensor:
    """int32 [R, C * bits / 32] of signed numbers [R, C]: 32 / bits of them in a word from its lowest bits on, each plus 2^(bits - 1)."""
    count = 32 // bits
    shifted = (numbers.long() + (1 << (bits - 1))).reshape(numbers.shape[0], -1, count)
    total = sum(shifted[:, :, i] << (bits * i) for i in range(count))
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def compressed4(weight: Tensor, group_size: int, *, symmetric: bool = True, group: Tensor | None = None) -> Stored:
    """pack-quantized with 4 bits. `group` [K]: the group of each input, where they are not neighbours."""
    made = Module.of(weight, group_size, group)
    zero = torch.full_like(made.zero, 8) if symmetric else made.zero
    found = Module(made.q, made.scale, zero, made.group)
    stored = {
        "weight_packed": packed_words(made.q - 8, 4),
        "weight_scale": made.scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        stored["weight_zero_point"] = packed_words((zero - 8).t(), 4).t()
    if group is not None:
        stored["weight_g_idx"] = group.to(torch.int32)
    return stored, found.weight


def compressed8(weight: Tensor, dtype: torch.dtype, blocks: tuple[int, int], *, packed: bool = False) -> Stored:
    """int-quantized or float-quantized, or 8 bits in words; one scale for each block."""
    numbers, scales = by_rows(weight, dtype, blocks)
    named = {"weight_packed": packed_words(numbers, 8), "weight_shape": torch.tensor(weight.shape)} if packed else {"weight": numbers}
    return {**named, "weight_scale": scales}, meaning(numbers, scales, blocks)


def compressed_entry(stored: str, weights: dict[str, Any], *, activations: bool = False, **changes: Any) -> dict[str, Any]:
    """A quantization_config as llm-compressor writes it, of one group for all linear layers."""
    inputs = {"num_bits": 8, "type": weights["type"], "symmetric": True, "strategy": "token", "dynamic": True} if activations else None
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        **changes,
    }
