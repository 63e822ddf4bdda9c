"""What a CUDA device takes long for, done beside the imports of the engine's process: its context, the libraries' and Triton's first words."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import threading
from pathlib import Path


def begin(device_type: str) -> None:
    """Make the first device's context in a thread, before torch is imported, which then finds and uses it. Nothing where there is no device, or no CUDA build of torch."""
    if device_type != "cpu" and _torch_has_cuda():
        threading.Thread(target=_make_context, name="context", daemon=True).start()


def _torch_has_cuda() -> bool:
    spec = importlib.util.find_spec("torch")
    return spec is not None and spec.origin is not None and (Path(spec.origin).parent / "lib" / "libtorch_cuda.so").exists()


def _make_context() -> None:
    """By the driver's own functions: they need neither torch nor Python's lock. What goes wrong shows later, when torch looks."""
    with contextlib.suppress(OSError):
        driver, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def go_on(device_type: str) -> None:
    """In a thread, once torch is there: torch's own part, and the hash of Triton's files that names compiled kernels."""
    threading.Thread(target=_wake, args=[device_type], name="device", daemon=True).start()


def _wake(device_type: str) -> None:
    import torch

    with contextlib.suppress(Exception):
        if device_type != "cpu" and torch.cuda.is_available():
            torch.zeros(1, device="cuda")
            importlib.import_module("triton.runtime.cache").triton_key()
