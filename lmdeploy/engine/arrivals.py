"""What the device owes the host: tokens on their way, and the choice among logits that waits for masks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from lmdeploy.engine.batch import STAGES
from lmdeploy.engine.graphs import device_turn
from lmdeploy.engine.plan import Ints, StepPlan, StepResult

Tensor = torch.Tensor
Finish = Callable[[], None]


class Arrivals:
    """Chosen tokens on their way to the host: a few lines of pinned memory and events in turn, so that nothing waits before it must. Graphs write their tokens
    into `lines` themselves. What arrived is good until as many lines have been taken again: until the next step but one is launched."""

    def __init__(self, most_rows: int, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.lines = torch.zeros((STAGES, most_rows), dtype=torch.int64, pin_memory=self._cuda)
        self._found = self.lines.numpy()
        self._parts: dict[int, list[Ints]] = {}  # the first so many places of each line, made when first needed: slices take their time
        self._events = [torch.cuda.Event() for _ in range(STAGES if self._cuda else 0)]  # type: ignore[no-untyped-call]
        # on the stream that steps are launched on; what torch's own method calls, once it has looked for the stream and for its class
        self._records = [partial(super(torch.cuda.Event, event).record, torch.cuda.current_stream(device)) for event in self._events]
        self.last = 0  # line that was taken

    def take_line(self) -> int:
        """The next line."""
        self.last = (self.last + 1) % STAGES
        return self.last

    def end(self) -> Finish | None:
        """Waits for all that has been launched; None where nothing runs beside the host. So no step is more than one behind the host, sampled or not."""
        if not self._cuda:
            return None
        wait: Finish = self._events[self.follow()].synchronize
        return wait

    def begin(self, tokens: Tensor) -> Callable[[], Ints]:
        """Start to copy int64 [B]; the returned function waits and gives them."""
        if not self._cuda:
            return lambda: tokens.numpy()
        line, count = self.take_line(), tokens.shape[0]
        self.lines[line, :count].copy_(tokens, non_blocking=True)
        self.mark(line)
        return partial(self.wait, line, count)

    def mark(self, line: int) -> None:
        """What writes to this line has been launched."""
        if self._cuda:
            self._records[line]()

    def is_due(self, line: int) -> bool:
        """Whether the device is still busy with what this line was marked behind."""
        return self._cuda and not self._events[line].query()  # type: ignore[no-untyped-call]

    def follow(self) -> int:
        """What writes to the next line, whose number is returned, has been launched."""
        self.last = line = (self.last + 1) % STAGES
        if self._cuda:
            self._records[line]()
        return line

    def wait(self, line: int, count: int) -> Ints:
        """So many tokens of a line that was marked, once they are there."""
        if self._cuda:
            self._events[line].synchronize()
        parts = self._parts.get(count)
        if parts is None:
            parts = self._parts[count] = [found[:count] for found in self._found]
        return parts[line]


class Owed:
    """The choice among the logits of a step with grammars: launched when the next step is, or when its result is asked for, when the tokens before it are known."""

    def __init__(self, choose: Callable[[StepPlan | None], Finish], device: torch.device) -> None:
        """`choose` is given the plan that comes next, if there is one."""
        self._choose: Callable[[StepPlan | None], Finish] | None = choose
        self._device = device
        self._finish: Finish | Exception | None = None

    def settle(self, plan: StepPlan | None = None) -> None:
        """Launch it, once, in inference mode; what goes wrong is raised by `finish`. `plan`: what is about to be launched behind it."""
        choose, self._choose = self._choose, None
        if choose is not None:
            try:
                with device_turn(self._device):
                    self._finish = choose(plan)
            except Exception as error:
                self._finish = error

    def finish(self) -> None:
        """Wait for it."""
        if self._choose is not None:
            with torch.inference_mode():
                self.settle()
        if isinstance(self._finish, Exception):
            raise self._finish
        assert self._finish is not None
        self._finish()


def nothing_more() -> None:
    """All has been brought."""


def after(finish: Finish | None, result: StepResult) -> StepResult:
    """The result, once that is done."""
    if finish is not None:
        finish()
    return result
