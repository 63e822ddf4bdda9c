"""Programmatic dependent launch (Hopper and later): the programs of a kernel take their places while the kernel before still runs.

A kernel that is launched with `launch_pdl=overlaps(device)` may start as soon as all programs of the kernel before have called `after_previous` (or have
ended). The rule that makes it safe: every program calls `after_previous`, whatever it has to do, and touches nothing but weights before. Then a kernel
that is past the call knows that all before it have ended, since each of them waited for the one before it; so nothing is read too early, and nothing is
overwritten that is still being read. Kernels of other libraries start when all before have ended, as ever.

Two exceptions, for decode attention (`decode_plain.py`, `decode_shared.py`):
- A kernel may read before the call what was written before the step's embedding: lengths, block tables, angles, and the keys of earlier steps. The embedding, and
  what torch launches after it, start when all before have ended. A kernel behind them may start when all programs of the one before it have started, which could start
  when all of the one before that had, and so on back to the embedding: so what was there before it is there. What kernels after it write (activations, counters, the
  new key) may not be read before the call. Blocks that sequences share are full, and nobody writes to them; each layer has a cache of its own, to which in a step of
  one token each only its own attention writes. A tile that is read early may hold the place of the new key: what is read of that place is not used (16 bits), or read
  once more by the program when it has stored the key itself (8 and 4 bits). Where another kernel stores the new keys (steps with prompts), attention reads nothing early.
- A program that finds nothing to do may end without the call, where another of the kernel is sure to call: the kernel has ended when all its programs have.
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


@triton.jit
def wait_for_previous() -> None:
    """The wait alone, in a loop whose loads are pipelined: written out, since Triton 3.9 pipelines no loop with its own."""
    tl.inline_asm_elementwise("griddepcontrol.wait; // dummy $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels on that device may be launched so."""
    return device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)
