"""The lines that a start prints, the same for `chat` and `serve api_server`: what runs, how, and where the memory went."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmdeploy.config import EngineConfig

if TYPE_CHECKING:
    from lmdeploy.frontend import Frontend

EMBEDDED = "no model given: using the embedded tiny-internlm2-chat, a 20M-parameter demonstration model"


def describe(frontend: Frontend, config: EngineConfig) -> str:
    """Settings and memory bill of a started engine."""
    from lmdeploy.engine.memory import format_bill
    from lmdeploy.engine.quality import describe as describe_quality

    info = frontend.info
    rows = {
        "model": f"{frontend.model_path} ({frontend.spec.architecture})",
        "template": frontend.template.name,
        "engine": f"{config.backend}, {info.dtype} on {info.memory.device}, started in {info.start_seconds:.1f} s",
        "limits": f"session_len {info.session_len}, max_batch_size {info.max_batch_size}, prefix caching {'on' if config.enable_prefix_caching else 'off'}",
        "kernels": by_kernel(info.kernels),
    }
    if info.kv_quality is not None:
        rows["quality"] = describe_quality(info.kv_quality)
    return "\n".join(f"{name:<10}{text}" for name, text in rows.items()) + "\n" + format_bill(info.memory)


def by_kernel(names: dict[str, str]) -> str:
    """'torch: linear, experts; native: attention' from op -> implementation."""
    ops: dict[str, list[str]] = {}
    for op, kernel in names.items():
        ops.setdefault(kernel, []).append(op)
    return "; ".join(f"{kernel}: {', '.join(group)}" for kernel, group in ops.items())
