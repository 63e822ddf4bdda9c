"""The operators that have a Triton kernel, and what each asks of the device and the model. `select.py` adds what is left from the reference.

A new kernel is one line in `OPERATORS`, and one in `reasons_against` when it cannot serve every model.
"""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from lmdeploy.kernels.triton_kernels.activation import silu_mul
from lmdeploy.kernels.triton_kernels.angles import rope_angles
from lmdeploy.kernels.triton_kernels.attention import attention, rope_attention
from lmdeploy.kernels.triton_kernels.embedding import embed_norm
from lmdeploy.kernels.triton_kernels.experts import experts
from lmdeploy.kernels.triton_kernels.kv_write import rope_write_kv
from lmdeploy.kernels.triton_kernels.linear import linear_w8a8
from lmdeploy.kernels.triton_kernels.linear16 import linear, linear_add, linear_silu
from lmdeploy.kernels.triton_kernels.linear_w4 import linear_w4
from lmdeploy.kernels.triton_kernels.linear_w8 import linear_w8
from lmdeploy.kernels.triton_kernels.normed import NORMED
from lmdeploy.kernels.triton_kernels.norms import add_rms_norm, head_norm, rms_norm
from lmdeploy.kernels.triton_kernels.quartered import in_quarters
from lmdeploy.kernels.triton_kernels.routing import choose_experts

OPERATORS: dict[str, Callable[..., None]] = {
    "linear": linear, "linear_silu": linear_silu, "linear_w4": linear_w4, "linear_w8": linear_w8, "linear_w8a8": linear_w8a8, "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm, "head_norm": head_norm, "rope_write_kv": rope_write_kv, "attention": attention, "silu_mul": silu_mul,
    "experts": experts,
}  # fmt: skip
ROPE_ATTENTION = rope_attention  # where both of its operators are chosen
EMBED_NORM = embed_norm  # where rms_norm is
ROPE_ANGLES = rope_angles  # where rope_write_kv is
CHOOSE_EXPERTS = choose_experts  # where experts are
LINEAR_ADD = linear_add  # where `linear` is chosen
NORMED_PRODUCTS = NORMED  # where all that they replace are chosen
IN_QUARTERS = in_quarters  # likewise
NAME = f"triton {triton.__version__}"
MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FIRST_CAPABILITY = (8, 0)  # Ampere: bfloat16 and TF32 on tensor cores


def reasons_against(operator: str, dtype: torch.dtype, head_dim: int | None) -> list[str]:
    """Why the kernel of `operator` cannot serve on this machine's CUDA device; empty when it can. `head_dim` None: not asked about a model."""
    reasons = []
    if dtype not in DTYPES:
        reasons.append(f"no {str(dtype).removeprefix('torch.')} kernel")
    if operator in ("rope_write_kv", "attention") and head_dim is not None and (head_dim > MAX_HEAD_DIM or head_dim % 2):
        reasons.append(f"head_dim={head_dim} is {'odd' if head_dim % 2 else f'above {MAX_HEAD_DIM}'}")
    reasons += _missing_for_the_launcher()
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < FIRST_CAPABILITY:
        reasons.append(f"the device's compute capability {torch.cuda.get_device_capability()} is below {FIRST_CAPABILITY}")
    return reasons


def _missing_for_the_launcher() -> list[str]:
    """Triton builds a small C extension that launches a kernel, at the first launch."""
    reasons = []
    if triton.knobs.build.cc is None and not any(shutil.which(name) for name in ("gcc", "clang")):
        reasons.append("Triton needs a C compiler: install gcc or clang, or name one by CC")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        reasons.append("Triton needs Python.h: install Python's development headers")
    return reasons
