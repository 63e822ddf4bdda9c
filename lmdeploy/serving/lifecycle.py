"""`Lifecycle`: how many requests the server is answering, and whether it is on its way out."""

from __future__ import annotations

import time


class Lifecycle:
    """From the first signal on the server drains: nothing new is begun, what runs may end until `deadline`."""

    def __init__(self) -> None:
        self.active = 0  # requests that are being answered; probes and /metrics are not counted
        self.deadline: float | None = None  # of time.monotonic()

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self.deadline is not None

    def drain(self, seconds: float) -> None:
        """Begin to end; may be called from a signal handler."""
        self.deadline = time.monotonic() + seconds

    @property
    def over(self) -> bool:
        """Whether the server may go: it drains, and everything has ended or had its time."""
        return self.deadline is not None and (not self.active or time.monotonic() >= self.deadline)
