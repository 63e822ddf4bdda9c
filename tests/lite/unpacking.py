"""An independent reader of the AWQ GEMM layout: nibble by nibble, from the layout's description, sharing no code with the package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

Tensor = torch.Tensor

#: output 0..7 of a word -> the nibble that holds it
NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors, found through the index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    out: dict[str, Tensor] = {}
    for file in sorted(set(index.values())):
        with safe_open(folder / file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # no mapping
                assert index[name] == file
                out[name] = tensors.get_tensor(name)
    assert set(out) == set(index)
    return out


def nibbles(words: Tensor) -> np.ndarray:
    """int [R, 8 C] of int32 words [R, C]."""
    assert words.dtype == torch.int32
    raw = words.numpy().view(np.uint32)
    out = np.empty((raw.shape[0], raw.shape[1] * 8), dtype=np.int64)
    for output in range(8):
        out[:, output::8] = (raw >> np.uint32(4 * NIBBLE_OF_OUTPUT[output])) & np.uint32(15)
    return out


def dequantised(tensors: dict[str, Tensor], module: str, group: int) -> Tensor:
    """float32 [out, in]: (q - z) * s."""
    q, z = nibbles(tensors[f"{module}.qweight"]), nibbles(tensors[f"{module}.qzeros"])
    scales = tensors[f"{module}.scales"]
    assert scales.dtype == torch.float16
    s = scales.float().numpy()
    assert q.shape[0] == s.shape[0] * group
    assert q.shape[1] == s.shape[1] == z.shape[1]
    return torch.from_numpy(((q - z.repeat(group, 0)) * s.repeat(group, 0)).T.copy()).float()
