"""An independent reader of the AWQ GEMM and the GPTQ layout: nibble by nibble, from their descriptions, sharing no code with the package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

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


def gptq_dequantised(tensors: dict[str, Tensor], module: str) -> Tensor:
    """float32 [out, in]: (q - z) * s with the group that g_idx names; nibbles in their natural order, zero points stored minus 1."""
    words, zero_words = tensors[f"{module}.qweight"], tensors[f"{module}.qzeros"]
    scales, index = tensors[f"{module}.scales"], tensors[f"{module}.g_idx"]
    assert (words.dtype, zero_words.dtype, scales.dtype, index.dtype) == (torch.int32, torch.int32, torch.float16, torch.int32)
    raw, raw_zeros = words.numpy().view(np.uint32), zero_words.numpy().view(np.uint32)
    q = np.empty((raw.shape[0] * 8, raw.shape[1]), dtype=np.int64)  # [in, out]
    z = np.empty((raw_zeros.shape[0], raw_zeros.shape[1] * 8), dtype=np.int64)  # [groups, out]
    for i in range(8):
        q[i::8] = (raw >> np.uint32(4 * i)) & np.uint32(15)
        z[:, i::8] = (((raw_zeros >> np.uint32(4 * i)) & np.uint32(15)) + 1) & np.uint32(15)
    assert scales.shape == z.shape
    groups = index.numpy()
    assert groups.shape == (q.shape[0],)
    return torch.from_numpy(((q - z[groups]) * scales.float().numpy()[groups]).T.copy()).float()


def dense_copy(folder: Path, out: Path) -> Path:
    """The folder with its 4-bit weights written out in float32, as an unquantised model."""
    tensors, config = read_folder(folder), json.loads((folder / "config.json").read_text())
    method = config.pop("quantization_config")
    for module in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        awq = method["quant_method"] == "awq"
        tensors[f"{module}.weight"] = dequantised(tensors, module, method["group_size"]) if awq else gptq_dequantised(tensors, module)
        for suffix in ("qweight", "qzeros", "scales", "g_idx"):
            tensors.pop(f"{module}.{suffix}", None)
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
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
