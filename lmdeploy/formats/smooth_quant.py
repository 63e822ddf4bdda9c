"""SmoothQuant folders (`lmdeploy lite smooth_quant`): weights in int8 or fp8 with one scale a row, inputs quantised row by row while the model runs.

A linear layer is `weight` int8 or float8_e4m3fn [out, in], `scale` float32 [out, 1] and its `bias`; norms hold what the smoothing made of them. Source:
Xiao et al. 2022, "SmoothQuant".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lmdeploy.formats.packed8 import ScaledFormat

#: quant_dtype of config.json -> type of the numbers
DTYPES = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}


def smooth_quant_format(quantization: Mapping[str, Any], quantise_activations: bool) -> ScaledFormat | None:
    """The reader that a quantization_config asks for; None for a `quant_dtype` that is not known. Int8 where none is named."""
    dtype = DTYPES.get(str(quantization.get("quant_dtype") or "int8"))
    return None if dtype is None else ScaledFormat(("scale",), dtype, quantise_activations)
