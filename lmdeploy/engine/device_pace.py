"""Until when the host may wait for masks without the device waiting for the host: a guess from the steps before."""

from __future__ import annotations

from math import inf
from time import perf_counter

#: how much a step counts for the guess of the next ones
WEIGHT = 0.25
#: seconds; what takes longer was no step of answers
LONGEST = 0.1
#: mean deviations that the host may take longer than it did on average, without the device waiting
SPREADS = 2


class _Seconds:
    """A mean of what was measured last, and how far from it that is on average."""

    def __init__(self) -> None:
        self.mean = self.spread = 0.0

    def add(self, seconds: float) -> None:
        if self.mean:
            self.spread += (abs(seconds - self.mean) - self.spread) * WEIGHT
            self.mean += (seconds - self.mean) * WEIGHT
        else:
            self.mean = seconds


class DevicePace:
    """Seconds that the device takes from the tokens of a step to the logits of the next one, and the host from masks to what is launched with them."""

    def __init__(self) -> None:
        self._since = 0.0  # when the device began with the step whose masks are waited for, as far as anybody knows; 0: nobody does
        self._there = 0.0  # when the wait for masks ended
        self._launched = 0.0  # when what was launched with them was
        self._device = _Seconds()  # from tokens to tokens, where it never waited for the host
        self._choice = _Seconds()  # from the launch of the choice to its tokens, where it had waited for that
        self._host = _Seconds(), _Seconds()  # where all masks were there; where some were late, whose logits are kept
        self._exact = False  # the host had waited for the tokens then, so that they were not there long since
        self._own = False  # the device was still at work when the choice was launched: the time to its tokens is its own

    def forget(self) -> None:
        """The step whose masks are asked for is behind one without."""
        self._since, self._exact, self._launched = 0.0, False, 0.0

    def begins(self, waited: bool) -> None:
        """The tokens of a step are there, for which the host `waited` or not, and the device goes on with the next one."""
        now = perf_counter()
        if waited and self._own and self._exact and now - self._since < LONGEST:
            self._device.add(now - self._since)
        elif waited and not self._own and self._launched and now - self._launched < LONGEST:
            self._choice.add(now - self._launched)
        self._since, self._exact, self._own, self._launched = now, waited, False, 0.0

    def end(self) -> float:
        """Until when masks are waited for; infinity where there is no guess. What is not there by then is late."""
        host = max(self._host, key=lambda host: host.mean)
        if not (self._since and self._device.mean):
            return inf
        return self._since + self._device.mean - self._choice.mean - host.mean - SPREADS * host.spread

    def idle(self) -> None:
        """The device has ended already, but for the choice."""
        if self._exact:
            self._device.mean = min(self._device.mean, perf_counter() - self._since + self._choice.mean)
        self._exact = False

    def ends_wait(self) -> None:
        """The masks are there, or late."""
        self._there = perf_counter()

    def launched(self, busy: bool, late: bool) -> None:
        """What the masks were for has been launched; whether the device was still `busy`, and some were `late`."""
        self._launched, self._own = perf_counter(), busy
        self._host[late].add(min(self._launched - self._there, LONGEST))
