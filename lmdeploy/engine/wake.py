"""What a CUDA device takes long for, begun before torch is imported: its context, and the hash of Triton's files that names compiled kernels.

Both are mostly not Python, so they cost the imports in the main thread little. What goes wrong here shows later, where it is needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path


def begin(device_type: str) -> None:
    """Begin in threads; nothing for the CPU or without a CUDA build of torch."""
    if device_type != "cpu" and _torch_has_cuda():
        _in_thread(_make_context, "context")
        _in_thread(_hash_triton, "triton")


def go_on(device_type: str) -> None:
    """Once torch is imported: what torch itself does at the first use of a device, in a thread."""
    if device_type != "cpu" and _torch_has_cuda():
        _in_thread(_use_device, "device")


def _in_thread(target: Callable[[], None], name: str) -> None:
    threading.Thread(target=target, name=name, daemon=True).start()


def _torch_has_cuda() -> bool:
    spec = importlib.util.find_spec("torch")
    return spec is not None and spec.origin is not None and (Path(spec.origin).parent / "lib" / "libtorch_cuda.so").exists()


def _make_context() -> None:
    """The first device's primary context, which torch finds and uses: by the driver's own functions, which need neither torch nor Python's lock."""
    with contextlib.suppress(OSError):
        driver, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def _hash_triton() -> None:
    with contextlib.suppress(Exception):
        importlib.import_module("triton.runtime.cache").triton_key()


def _use_device() -> None:
    import torch

    with contextlib.suppress(Exception):
        if torch.cuda.is_available():
            torch.zeros(1, device="cuda")
