"""Chooses the implementation of every operator. Candidates stand in order of preference and answer with reasons against
themselves; the first without a reason is taken. The same answers feed the choice, the log and `lmdeploy check_env`, so what is
reported is what runs. Layers never choose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from lmdeploy.kernels.api import Kernels, NormedProducts, Quarters
from lmdeploy.kernels.build import NativeBuild, load_native
from lmdeploy.kernels.cpu import MAX_HEAD_DIM, native_kernels
from lmdeploy.kernels.reference import REFERENCE, dequantising, dequantising_w8, gated
from lmdeploy.kernels.row_buckets import Linear, padded
from lmdeploy.log import get_logger
from lmdeploy.spec import ModelSpec

logger = get_logger(__name__)
Tensor = torch.Tensor

PADDED: Linear = padded(REFERENCE.linear)
PADDED_W4 = dequantising(PADDED)
PADDED_W8 = dequantising_w8(PADDED)

OPERATORS = tuple(REFERENCE.names)
#: (operator, the chosen candidate, every other candidate with the reasons against it)
Report = list[tuple[str, str, list[tuple[str, list[str]]]]]


@dataclass(frozen=True, slots=True)
class Need:
    """What is asked of the kernels."""

    backend: str
    device_type: str
    dtype: torch.dtype
    head_dim: int | None = None


def _against_native(operator: str, need: Need, build: NativeBuild | None) -> list[str]:
    """Reasons why the native CPU kernel of `operator` cannot serve; empty when it can."""
    reasons = []
    if need.backend != "turbomind":
        reasons.append(f"backend={need.backend!r} means plain torch")
    if need.device_type != "cpu":
        reasons.append(f"runs on cpu, not on {need.device_type}")
    if build is None:
        return reasons
    if build.library is None:
        return [*reasons, build.reason]
    if need.dtype not in (torch.float32, torch.bfloat16):
        reasons.append(f"no {str(need.dtype).removeprefix('torch.')} kernel; use bfloat16 or float32 on CPU")
    if operator in ("linear", "linear_silu", "experts") and need.dtype is torch.bfloat16 and build.variant != "amx":
        reasons.append(f"bfloat16 products need AMX ({'; '.join(build.notes) or build.variant}); torch is faster without")
    if operator == "attention" and need.head_dim is not None and need.head_dim > MAX_HEAD_DIM:
        reasons.append(f"head_dim={need.head_dim} is above {MAX_HEAD_DIM}")
    return reasons


@dataclass(frozen=True, slots=True)
class TritonSet:
    """What `triton_kernels.triton_set` offers; `missing` says why there is nothing."""

    name: str = "triton"
    operators: dict[str, Callable[..., None]] = field(default_factory=dict)
    rope_attention: Callable[..., Tensor] | None = None
    embed_norm: Callable[..., None] | None = None
    rope_angles: Callable[..., tuple[Tensor, Tensor]] | None = None
    choose_experts: Callable[..., None] | None = None
    linear_add: Callable[..., bool] | None = None
    normed: NormedProducts | None = None
    in_quarters: Callable[[Kernels], Quarters] | None = None
    reasons_against: Callable[[str, torch.dtype, int | None], list[str]] | None = None
    missing: str = ""


def _against_triton(operator: str, need: Need, triton: TritonSet) -> list[str]:
    """Reasons why the Triton kernel of `operator` cannot serve; empty when it can."""
    reasons = []
    if need.backend != "turbomind":
        reasons.append(f"backend={need.backend!r} means plain torch")
    if need.device_type != "cuda":
        reasons.append(f"runs on cuda, not on {need.device_type}")
    if reasons:
        return reasons
    if triton.reasons_against is None:
        return [triton.missing]
    return triton.reasons_against(operator, need.dtype, need.head_dim)


def _build_for(need: Need, cache_dir: Path | None) -> NativeBuild | None:
    """Compile or load the native library only where it could be chosen."""
    return load_native(cache_dir) if need.backend == "turbomind" and need.device_type == "cpu" else None


def _triton_for(need: Need) -> TritonSet:
    """Import Triton, which takes a second, only where it could be chosen."""
    if need.backend != "turbomind" or need.device_type != "cuda":
        return TritonSet()
    try:
        from lmdeploy.kernels.triton_kernels import triton_set
    except ImportError as error:
        return TritonSet(missing=f"Triton cannot be imported ({error})")
    return TritonSet(
        triton_set.NAME,
        triton_set.OPERATORS,
        triton_set.ROPE_ATTENTION,
        triton_set.EMBED_NORM,
        triton_set.ROPE_ANGLES,
        triton_set.CHOOSE_EXPERTS,
        triton_set.LINEAR_ADD,
        triton_set.NORMED_PRODUCTS,
        triton_set.IN_QUARTERS,
        triton_set.reasons_against,
    )


def _report(need: Need, build: NativeBuild | None, triton: TritonSet) -> Report:
    native = f"native {build.variant}" if build is not None and build.library is not None else "native"
    rows: Report = []
    for operator in OPERATORS:
        candidates: list[tuple[str, list[str]]] = [
            (native, _against_native(operator, need, build)),
            (triton.name, _against_triton(operator, need, triton)),
            ("torch", []),
        ]
        chosen = next(name for name, reasons in candidates if not reasons)
        rows.append((operator, chosen, [(name, reasons or ["slower"]) for name, reasons in candidates if name != chosen]))
    return rows


def pads_rows(kernels: Kernels) -> bool:
    """Whether products pad their rows to buckets, which then want to be met at start-up."""
    return kernels.linear is PADDED


def can_be_captured(kernels: Kernels, device_type: str, spec: ModelSpec) -> bool:
    """Whether a decode step may become a CUDA graph: no operator of it looks at numbers on the host. The reference's attention and experts do."""
    return device_type == "cuda" and kernels.names["attention"] != "torch" and not (spec.num_experts and kernels.names["experts"] == "torch")


def _torch_set(need: Need) -> Kernels:
    """The reference; 16-bit products on CPU pad their rows."""
    padding = need.device_type == "cpu" and need.dtype is not torch.float32
    return replace(REFERENCE, linear=PADDED, linear_w4=PADDED_W4, linear_w8=PADDED_W8) if padding else REFERENCE


def _log_fallbacks(rows: Report, fast: str) -> None:
    """One line a reason for the operators that torch serves where the `fast` candidate was expected to."""
    fallbacks: dict[str, list[str]] = {}
    for operator, chosen, others in rows:
        reasons = next((reasons for name, reasons in others if name.startswith(fast)), [])
        if chosen == "torch":
            fallbacks.setdefault("; ".join(reasons), []).append(operator)
    for reason, operators in fallbacks.items():
        logger.warning("%s: torch instead of the %s kernel: %s", ", ".join(operators), fast, reason)


def select(
    backend: str, device_type: str, dtype: torch.dtype, *, head_dim: int | None = None, threads: int | None = None, cache_dir: Path | None = None
) -> Kernels:
    """The kernel set for an engine. A fallback from the fast set is logged with its reasons, one line a reason."""
    need = Need(backend, device_type, dtype, head_dim)
    build, triton = _build_for(need, cache_dir), _triton_for(need)
    rows = _report(need, build, triton)
    names = {operator: chosen for operator, chosen, _ in rows}
    functions = {operator: getattr(_torch_set(need), operator) for operator in OPERATORS}
    if build is not None and build.library is None:
        logger.warning("CPU kernels fall back to torch: %s", build.reason)
    elif build is not None:
        fast = native_kernels(build, threads)
        functions |= {operator: getattr(fast, operator) for operator, chosen in names.items() if chosen != "torch"}
        _log_fallbacks(rows, "native")
    elif backend == "turbomind" and device_type == "cuda":
        functions |= {operator: triton.operators[operator] for operator, chosen in names.items() if chosen != "torch"}
        _log_fallbacks(rows, "triton")
    if names["linear_silu"] == "torch":
        functions["linear_silu"] = gated(functions["linear"], functions["silu_mul"])
    together = triton.rope_attention if names["attention"] == names["rope_write_kv"] == triton.name else None
    angles = triton.rope_angles if names["rope_write_kv"] == triton.name else None
    routing = triton.choose_experts if names["experts"] == triton.name else None
    added = triton.linear_add if names["linear"] == triton.name else None
    normed = triton.normed if all(names[operator] == triton.name for operator in ("linear", "linear_silu", "linear_w4", "add_rms_norm")) else None
    begin = triton.embed_norm if names["rms_norm"] == triton.name else None
    kernels = Kernels(
        **functions, names=names, rope_attention=together, embed_norm=begin, rope_angles=angles, choose_experts=routing, linear_add=added, normed=normed
    )
    if triton.in_quarters is None or any(names[operator] != triton.name for operator in ("linear_w4", "rms_norm", "add_rms_norm", "silu_mul")):
        return kernels
    return replace(kernels, quarters=triton.in_quarters(kernels))


@dataclass(frozen=True, slots=True)
class TokenKernel:
    """The kernel that chooses tokens, and how many int64 numbers of work space it wants for a slot; `triton_kernels/sampling.py` says what it does."""

    choose: Callable[..., None]  # as `sampling.choose_tokens`
    scratch_width: int


def token_kernel(device_type: str) -> TokenKernel | None:
    """The sampler's kernel; None where torch serves. No operator of a layer, and so the same for every backend."""
    triton = _triton_for(Need("turbomind", device_type, torch.float32))
    if triton.reasons_against is None or triton.reasons_against("choose_tokens", torch.float32, None):
        return None
    from lmdeploy.kernels.triton_kernels import sampling

    return TokenKernel(sampling.choose_tokens, sampling.scratch_width())


def places_kernel(device_type: str) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]] | None:
    """`triton_kernels.places.find_places`; None where torch serves. The same for every backend."""
    triton = _triton_for(Need("turbomind", device_type, torch.float32))
    if triton.reasons_against is None or triton.reasons_against("find_places", torch.float32, None):
        return None
    from lmdeploy.kernels.triton_kernels import places

    return places.find_places


def report(backend: str, device_type: str, dtype: torch.dtype, *, head_dim: int | None = None, cache_dir: Path | None = None) -> Report:
    """For each operator the chosen candidate and the reasons against the others, as `select` would decide now."""
    need = Need(backend, device_type, dtype, head_dim)
    return _report(need, _build_for(need, cache_dir), _triton_for(need))
