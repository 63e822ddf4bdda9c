"""Until when the host may wait for masks without the device waiting for the host: a guess from the steps before."""

from __future__ import annotations

from math import inf
from time import perf_counter

#: how much a step counts for the guess of the next ones
WEIGHT = 0.25
#: seconds; what takes longer was no step of answers
LONGEST = 0.1
#: seconds by which masks are given up earlier after they were given up too late; what of that is taken back after each step that did not wait for the host
EARLIER, TAKEN_BACK = 4e-5, 1 / 64
#: seconds that there must have been to wait for masks, if it is to be their fault that the device waited
AT_LEAST = 5e-5


class DevicePace:
    """Seconds that the device takes from the tokens of a step to those of the next one, and the host from masks to what is launched with them."""

    def __init__(self) -> None:
        self._since = 0.0  # when the device began with the step whose masks are waited for, as far as anybody knows; 0: nobody does
        self._exact = False  # and it is known by more than a guess
        self._begun = 0.0  # when the next step was launched
        self._room = 0.0  # seconds that masks could be waited for, as it was thought
        self._there = 0.0  # when the wait for masks ended
        self._device = self._host = 0.0
        self._lead = 0.0  # by which the logits are there before tokens would be, and whatever else there is
        self._own = False  # the device was still at work when the choice was launched: the time to its tokens is its own

    def forget(self) -> None:
        """The step whose masks are asked for is behind one without."""
        self._since, self._exact, self._own = 0.0, False, False

    def goes_on(self) -> None:
        """The step behind the one whose tokens come next is launched."""
        self._begun = perf_counter()

    def begins(self, waited: bool) -> None:
        """The tokens of a step are there, for which the host `waited` or not, and the device goes on with the next one, or has done so before."""
        now = perf_counter()
        if waited:
            if self._own and self._exact and now - self._since < LONGEST:
                self._device += (now - self._since - self._device) * (WEIGHT if self._device else 1)
            self._since, self._exact = now, True
        elif not self._own:  # it had waited for the host, and then begun with what was launched at once
            self._since, self._exact = self._begun, True
        else:  # it went on without waiting for anybody, when it had chosen, and when there was something to go on with; where that is not known, neither is this
            self._since, self._exact = min(max(self._since + self._device, self._begun), now) if self._since else 0.0, False
        self._own = False

    def end(self) -> float:
        """Until when masks are waited for, now; infinity where there is no guess."""
        end = self._since + self._device - self._host - self._lead if self._since and self._device else inf
        self._room = end - perf_counter()
        return end

    def idle(self) -> None:
        """The device has ended already, but for the choice."""
        if self._exact:
            seconds = perf_counter() - self._since
            self._device = min(self._device, seconds) if self._device else seconds
        self._exact = False

    def ends_wait(self) -> None:
        """The masks are there, or late."""
        self._there = perf_counter()

    def launched(self, busy: bool, late: bool) -> None:
        """What the masks were for has been launched; whether the device was still `busy`, and some were given up, as `late`."""
        seconds, self._own = perf_counter() - self._there, busy
        self._host += (min(seconds, LONGEST) - self._host) * (WEIGHT if self._host else 1)
        if busy:
            self._lead -= self._lead * TAKEN_BACK
        elif late and self._room > AT_LEAST:
            self._lead = min(self._lead + EARLIER, self._device / 2)
