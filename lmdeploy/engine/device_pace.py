"""Until when the host may wait for masks without the device waiting for the host: a guess from the steps before."""

from __future__ import annotations

from math import inf
from time import perf_counter

#: how much a step counts for the guess of the next ones
WEIGHT = 0.25
#: seconds; what takes longer was no step of answers
LONGEST = 0.1


class DevicePace:
    """Seconds that the device takes from the tokens of a step to the logits of the next one, and the host from masks to what is launched with them."""

    def __init__(self) -> None:
        self._since = 0.0  # when the device began with the step whose masks are waited for, as far as anybody knows; 0: nobody does
        self._there = 0.0  # when the wait for masks ended
        self._device = self._host = 0.0
        self._exact = False  # the host had waited for the tokens then, so that they were not there long since
        self._own = False  # the device was still at work when the choice was launched: the time to its tokens is its own

    def forget(self) -> None:
        """The step whose masks are asked for is behind one without."""
        self._since, self._exact = 0.0, False

    def begins(self, waited: bool) -> None:
        """The tokens of a step are there, for which the host `waited` or not, and the device goes on with the next one."""
        now = perf_counter()
        if waited and self._exact and self._own and now - self._since < LONGEST:
            self._device += (now - self._since - self._device) * (WEIGHT if self._device else 1)
        self._since, self._exact, self._own = now, waited, False

    def end(self) -> float:
        """Until when masks are waited for; infinity where there is no guess."""
        return self._since + self._device - self._host if self._since and self._device else inf

    def idle(self) -> None:
        """The device has ended already."""
        if self._exact:
            self._device = min(self._device, perf_counter() - self._since)
        self._exact = False

    def ends_wait(self) -> None:
        """The masks are there, or late."""
        self._there = perf_counter()

    def launched(self, busy: bool) -> None:
        """What the masks were for has been launched; whether the device was still `busy`."""
        seconds, self._own = perf_counter() - self._there, busy
        self._host += (min(seconds, LONGEST) - self._host) * (WEIGHT if self._host else 1)
