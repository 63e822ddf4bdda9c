"""The numbers of a quantised cache row, in plain torch: what every other kernel must agree with.

Scale and offset are rounded outwards to bfloat16 before the numbers are made with them, so a row's extremes are never cut off and what is stored is exactly
what is used. A NaN in a row makes its offset NaN: the sequence is then reported, never silently wrong.
"""

from __future__ import annotations

import torch

from lmdeploy.kv_layer import Width

Tensor = torch.Tensor
FP8_MAX = 448.0  # largest finite float8_e4m3fn
LEVELS = {"8": 255, "4": 15}
#: Smallest normal bfloat16: the scale of a row whose numbers are all equal.
TINY = 2.0**-126
_LOW_HALF = 0xFFFF


def floor_bf16(x: Tensor) -> Tensor:
    """The largest bfloat16 that is not above x, as float32. NaN stays NaN; -0.0 and infinities stay as they are."""
    bits = x.float().view(torch.int32)
    lower = (bits & _LOW_HALF != 0) & (bits < 0)  # cutting the low bits moves negative numbers up
    floored = ((bits & ~_LOW_HALF) + lower.int() * 0x10000).view(torch.float32)
    return torch.where(torch.isnan(x), x, floored)


def ceil_bf16(x: Tensor) -> Tensor:
    """The smallest bfloat16 that is not below x, as float32."""
    return -floor_bf16(-x)


def divided(x: Tensor, number: float) -> Tensor:
    """x / number, correctly rounded on every device: on CUDA torch multiplies by the reciprocal of a plain number."""
    return x / torch.full_like(x, number)


def quantise_rows(x: Tensor, width: Width) -> tuple[Tensor, Tensor]:
    """Rows x [..., D] -> (numbers as `KVLayer` stores them, bfloat16 [..., 2] of scale and offset). `width` is not "16"."""
    x = x.float()
    if width == "fp8":
        scale = ceil_bf16(divided(x.abs().amax(-1, keepdim=True), FP8_MAX)).clamp(min=TINY)
        return (x / scale).to(torch.float8_e4m3fn), torch.cat([scale, torch.zeros_like(scale)], -1).to(torch.bfloat16)
    offset = floor_bf16(x.amin(-1, keepdim=True))
    scale = ceil_bf16(divided(x.amax(-1, keepdim=True) - offset, LEVELS[width])).clamp(min=TINY)
    numbers = ((x - offset) / scale).round().nan_to_num_(0).clamp_(0, LEVELS[width]).to(torch.uint8)
    if width == "4":
        low, high = numbers.chunk(2, dim=-1)
        numbers = low | high << 4
    return numbers, torch.cat([scale, offset], -1).to(torch.bfloat16)


def dequantise_rows(numbers: Tensor, scales: Tensor | None, width: Width) -> Tensor:
    """float32 rows [..., D] of what `quantise_rows` made; rows of 16 bit are only widened."""
    if width == "16":
        return numbers.float()
    assert scales is not None, "a quantised cache has scales"
    if width == "4":
        numbers = torch.cat([numbers & 15, numbers >> 4], dim=-1)
    pairs = scales.float()
    return numbers.float() * pairs[..., :1] + pairs[..., 1:]
