"""Memory: what is free, what the process takes, and the bill that says where it went.

The total is measured from outside (resident set of the process, or the device's used bytes), never summed up from what we
think we allocated; `other` is the difference, so the lines of the bill always add up.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from lmdeploy.engine.host_memory import host_free
from lmdeploy.messages import MemoryBill

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # numbers of malloc.h
MMAP_THRESHOLD, TRIM_THRESHOLD = 128 << 10, 1 << 20


def free_bytes(device: torch.device) -> int:
    """What can still be allocated: of the device, or of the machine and the control groups of this process."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    return host_free()


def taken_bytes(device: torch.device) -> int:
    """Resident set of this process (CPU), or bytes in use on the device, by anybody."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(total - free)
    return int(psutil.Process().memory_info().rss)


def hold_steady() -> None:
    """Make the C library return large blocks to the system as soon as they are freed.

    By default glibc raises its limit with every large block that is freed, up to 32 MiB, and the heap keeps what fell between:
    measured, a 620 MiB process grew by 120 MiB over its first long requests, and by 5 MiB with a fixed limit.
    """
    if give := _glibc("mallopt"):
        give(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        give(M_TRIM_THRESHOLD, TRIM_THRESHOLD)


def trim() -> None:
    """Give the C library's free pages back, so that what loading left behind is not counted for ever."""
    if give_back := _glibc("malloc_trim"):
        give_back(0)


def _glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where there is no glibc."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return getattr(libc, name) if hasattr(libc, "gnu_get_libc_version") else None


@dataclass(frozen=True, slots=True)
class PoolShape:
    """What the bill says of the KV pool; `bytes_16bit` are those of a token that is not quantised."""

    num_blocks: int
    block_size: int
    token_bytes: int
    bytes_16bit: int
    policy: str = "none"


def make_bill(device: torch.device, parts: tuple[int, int, int], pool: PoolShape, session_len: int, note: str, graphs: int = 0) -> MemoryBill:
    """`parts` are the bytes of weights, KV pool and workspace; `graphs` those that CUDA graphs will take."""
    total = taken_bytes(device)
    weights, kv_pool, workspace = parts
    return MemoryBill(
        device=str(device),
        weights=weights,
        kv_pool=kv_pool,
        workspace=workspace,
        other=total - weights - kv_pool - workspace,
        total=total,
        free=free_bytes(device),
        num_blocks=pool.num_blocks,
        block_size=pool.block_size,
        bytes_per_token=pool.token_bytes,
        session_len=session_len,
        bytes_per_token_16bit=pool.bytes_16bit,
        kv_policy=pool.policy,
        note=note,
        graphs=graphs,
    )
