"""Programmatic dependent launch (Hopper and later): the programs of a kernel take their places while the kernel before still runs.

A kernel that is launched with `launch_pdl=overlaps(device)` may start as soon as all programs of the kernel before have called `after_previous` (or have
ended). The rule that makes it safe: every program calls `after_previous`, whatever it has to do, and touches nothing but weights before. Then a kernel
that is past the call knows that all before it have ended, since each of them waited for the one before it; so nothing is read too early, and nothing is
overwritten that is still being read. Kernels of other libraries start when all before have ended, as ever.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl


@triton.jit
def after_previous(PDL: tl.constexpr) -> None:
    """Let the next kernel's programs take their places, then wait until the kernel before has ended and what it wrote can be read."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels on that device may be launched so."""
    return device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)
