"""What the device owes the host: tokens on their way, and the choice among logits that waits for masks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lmdeploy.engine.batch import STAGES
from lmdeploy.engine.graphs import device_turn
from lmdeploy.engine.plan import Ints

Tensor = torch.Tensor
Finish = Callable[[], None]


class Arrivals:
    """Chosen tokens on their way to the host: a few pinned buffers and events in turn, so that nothing waits before it must."""

    def __init__(self, most_rows: int, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._buffers = [torch.zeros(most_rows, dtype=torch.int64, pin_memory=True) for _ in range(STAGES)] if self._cuda else []
        self._parts: dict[int, list[tuple[Tensor, Ints]]] = {}  # their first so many places, made when first needed: slices of tensors take their time
        self._events = [torch.cuda.Event() for _ in self._buffers]  # type: ignore[no-untyped-call]
        self._stream = torch.cuda.current_stream(device) if self._cuda else None  # that steps are launched on: to ask for it takes its time
        self._next = 0

    def end(self) -> Finish | None:
        """Waits for all that has been launched; None where nothing runs beside the host. So no step is more than one behind the host, sampled or not."""
        if not self._cuda:
            return None
        reached = self._events[self._turn()]
        reached.record(self._stream)
        wait: Finish = reached.synchronize
        return wait

    def begin(self, tokens: Tensor, places: slice | Ints) -> Callable[[], Ints]:
        """Start to copy int64 [B]; the returned function waits and gives those at `places`."""
        if not self._cuda:
            return lambda: tokens.numpy()[places]
        turn, count = self._turn(), tokens.shape[0]
        if count not in self._parts:
            self._parts[count] = [(buffer[:count], buffer[:count].numpy()) for buffer in self._buffers]
        arrived, (buffer, found) = self._events[turn], self._parts[count][turn]
        buffer.copy_(tokens, non_blocking=True)
        arrived.record(self._stream)

        def wait() -> Ints:
            arrived.synchronize()
            return found[places]

        return wait

    def _turn(self) -> int:
        turn, self._next = self._next, (self._next + 1) % STAGES
        return turn


class Owed:
    """The choice among the logits of a step with grammars: launched when the next step is, or when its result is asked for, when the tokens before it are known."""

    def __init__(self, choose: Callable[[], Finish], device: torch.device) -> None:
        self._choose: Callable[[], Finish] | None = choose
        self._device = device
        self._finish: Finish | Exception | None = None

    @torch.inference_mode()
    def settle(self) -> None:
        """Launch it, once; what goes wrong is raised by `finish`."""
        choose, self._choose = self._choose, None
        if choose is not None:
            try:
                with device_turn(self._device):
                    self._finish = choose()
            except Exception as error:
                self._finish = error

    def finish(self) -> None:
        """Wait for it."""
        self.settle()
        if isinstance(self._finish, Exception):
            raise self._finish
        assert self._finish is not None
        self._finish()
