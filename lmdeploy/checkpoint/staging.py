"""Weights on their way to a CUDA device: through two pinned buffers, so that the bus has its full rate and never waits for the disk's pages.

A copy from mapped, pageable memory is done by one thread of the driver and faults in every page on the way. Here all threads of torch fill one buffer while the
other is sent.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor
#: small tensors are copied as they are: the driver takes them in at once
SMALL_BYTES = 1 << 20


class Staging:
    """Two pinned buffers of `size` bytes and the events that say when each may be filled again."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._buffers: list[Tensor] = []
        self._sent: list[torch.cuda.Event] = []
        self._turn = 0

    def copy(self, out: Tensor, view: Tensor) -> None:
        """out = view, casting; `view` is in memory and has been read when this returns, `out` is complete for all that is launched later."""
        if not out.is_cuda or not SMALL_BYTES <= view.nbytes <= self._size:
            out.copy_(view)
            return
        if not self._buffers:
            self._buffers = [torch.empty(self._size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            self._sent = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        turn, self._turn = self._turn, 1 - self._turn
        self._sent[turn].synchronize()  # at once, where it was never recorded
        staged = self._buffers[turn][: view.nbytes].view(view.dtype).view(view.shape)
        staged.copy_(view)
        out.copy_(staged, non_blocking=True)
        self._sent[turn].record()

    def close(self) -> None:
        """Give the buffers back, when they are on the device."""
        for event in self._sent:
            event.synchronize()
        self._buffers, self._sent = [], []
