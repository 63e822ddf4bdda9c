"""The lines that a start prints, the same for `chat` and `serve api_server`: what runs, how, and where the memory went."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lmdeploy.config import EngineConfig, TurbomindEngineConfig
from lmdeploy.errors import ConfigError, LmdeployError

if TYPE_CHECKING:
    from lmdeploy.frontend import Frontend

EMBEDDED = "no model given: using the embedded tiny-internlm2-chat, a 20M-parameter demonstration model"


def describe(frontend: Frontend, config: EngineConfig) -> str:
    """Settings and memory bill of a started engine."""
    from lmdeploy.engine.bill import format_bill

    info = frontend.info
    rows = {
        "model": f"{frontend.model_path} ({frontend.spec.architecture})",
        "template": frontend.template.name,
        "engine": f"{config.backend}, {info.dtype} on {info.memory.device}, started in {info.start_seconds:.1f} s",
        "limits": f"session_len {info.session_len}, max_batch_size {info.max_batch_size}, prefix caching {'on' if config.enable_prefix_caching else 'off'}",
        "kernels": by_kernel(info.kernels),
    }
    if info.kv_quality is not None:
        from lmdeploy.engine.quality import describe as describe_quality

        rows["quality"] = describe_quality(info.kv_quality)
    return "\n".join(f"{name:<10}{text}" for name, text in rows.items()) + "\n" + format_bill(info.memory)


def by_kernel(names: dict[str, str]) -> str:
    """'torch: linear, experts; native: attention' from op -> implementation."""
    ops: dict[str, list[str]] = {}
    for op, kernel in names.items():
        ops.setdefault(kernel, []).append(op)
    return "; ".join(f"{kernel}: {', '.join(group)}" for kernel, group in ops.items())


@contextlib.contextmanager
def advised(model_path: str | None, config: EngineConfig) -> Iterator[None]:
    """An engine that does not start for lack of memory: the error also has the command of a setting that fits, where there is one."""
    from lmdeploy.engine.sizing import SEE_PLAN

    try:
        yield
    except ConfigError as error:
        command = _smaller(model_path, config) if str(error).endswith(SEE_PLAN) else None
        if command is None:
            raise
        raise ConfigError(f"{error}; this would start here: {command}") from error


def _smaller(model_path: str | None, config: EngineConfig) -> str | None:
    """The plan's advice for this machine, with sizes and quantisation left open."""
    import torch

    from lmdeploy.plan.options import PlanConfig
    from lmdeploy.plan.plan import make_plan

    wanted: dict[str, Any] = {}
    if config.device_type != "cpu" and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        wanted = {"gpu_memory": f"{total}B", "gpu_memory_used": f"{total - free}B"}
    kept = ("dtype", "head_bits", "download_dir", "revision")
    given = {name: getattr(config, name) for name in kept if name in config.given}
    try:
        advice = make_plan(model_path, TurbomindEngineConfig(**given), PlanConfig(bandwidth=1.0, **wanted)).advice
    except LmdeployError:
        return None
    return " && ".join(advice.commands) if advice is not None else None
