"""`Admission`: who is worked on next. A bounded number of requests runs, a bounded number waits, and keys take turns.

Keys are served round robin, so one that sends a thousand requests delays another key's next one by one place, not by a thousand; and
in a full queue a key gives up places to keys that have fewer.
Everything happens on the event loop's thread. `Retry-After` comes from the measured rate at which requests end.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict, deque

from lmdeploy.serving.connections import Connection
from lmdeploy.serving.openai.errors import ClientGone, HttpError

#: bounds of Retry-After in seconds, and what is said before anything was measured
MIN_RETRY, MAX_RETRY, UNKNOWN_RETRY = 1, 60, 5
#: the rate is that of the last this many requests, if they ended within the last so many seconds
RATE_REQUESTS, RATE_SECONDS = 64, 120.0


class Admission:
    """The places of one server. `limit` requests run, `max_queue` wait, at most `max_seconds`; one key has at most `per_key` of both."""

    def __init__(self, limit: int, max_queue: int, max_seconds: float, per_key: int | None) -> None:
        self._limit, self._max_queue, self._max_seconds, self._per_key = limit, max_queue, max_seconds, per_key
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # the key whose turn it is comes first
        self._in_flight: Counter[str] = Counter()
        self._ends: deque[float] = deque(maxlen=RATE_REQUESTS)
        self.running = self.waiting = 0

    @property
    def full(self) -> bool:
        """Whether the next request would be refused."""
        return self.waiting >= self._max_queue and self.running >= self._limit

    async def enter(self, key: str, deadline: float, connection: Connection | None = None) -> None:
        """Return when the request may run; `leave` must follow. Raises HttpError 429 (the key's own limit) or 503 (the server's), and
        ClientGone when `connection` ends while the request waits."""
        if self._per_key is not None and self._in_flight[key] >= self._per_key:
            raise HttpError(
                429, f"this key already has {self._per_key} requests here, as many as max_concurrent_per_key allows; wait for one of them", code="key_limit"
            )
        if self.running < self._limit and not self.waiting:
            self.running += 1
            self._in_flight[key] += 1
            return
        if self.waiting >= self._max_queue and not self._make_room(key):
            raise self._overloaded()
        self._in_flight[key] += 1
        try:
            await self._wait(key, deadline, connection)
        except BaseException:
            self._forget(key)
            raise

    def _overloaded(self) -> HttpError:
        return HttpError(503, f"{self.waiting} requests are waiting, as many as max_queue allows; try again later", code="overloaded")

    def _make_room(self, key: str) -> bool:
        """In a full queue, send away the last request of the key that has most there, if that is more than `key` would have."""
        longest = max(self._queues, key=lambda k: len(self._queues[k]), default=key)
        own = self._queues.get(key, ())
        if not self._queues or len(self._queues[longest]) <= len(own) + 1:
            return False
        turn = self._queues[longest][-1]
        self._drop(longest, turn)
        _end(turn, self._overloaded())
        return True

    async def _wait(self, key: str, deadline: float, connection: Connection | None) -> None:
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        seconds = max(min(self._max_seconds, deadline - time.monotonic()), 0.0)
        late = HttpError(503, f"the request waited {seconds:.0f} s and was not started; try again later", code="queue_timeout")
        timer = loop.call_later(seconds, _end, turn, late)
        if connection is not None:
            connection.on_lost = lambda: _end(turn, ClientGone())
        self._queues.setdefault(key, deque()).append(turn)
        self.waiting += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:  # its turn came at the same moment: pass it on
                self.running -= 1
                self._next()
            raise
        finally:
            timer.cancel()
            if connection is not None:
                connection.on_lost = None
            self._drop(key, turn)

    def _drop(self, key: str, turn: asyncio.Future[None]) -> None:
        """Take a request out of its queue, unless its turn has taken it out."""
        queue = self._queues.get(key)
        if queue is not None and turn in queue:
            queue.remove(turn)
            self.waiting -= 1
            if not queue:
                del self._queues[key]

    def leave(self, key: str) -> None:
        """The request is over; the next one may run."""
        self.running -= 1
        self._forget(key)
        self._ends.append(time.monotonic())
        self._next()

    def _forget(self, key: str) -> None:
        self._in_flight[key] -= 1
        if not self._in_flight[key]:
            del self._in_flight[key]

    def _next(self) -> None:
        """Give free places to those who wait, one key after the other."""
        while self.running < self._limit and self._queues:
            key, queue = self._queues.popitem(last=False)
            turn = queue.popleft()
            self.waiting -= 1
            if queue:
                self._queues[key] = queue  # behind the other keys
            if not turn.done():
                self.running += 1
                turn.set_result(None)

    def close(self) -> None:
        """Send everybody away who waits."""
        for queue in list(self._queues.values()):
            for turn in list(queue):
                _end(turn, HttpError(503, "the server is shutting down", code="shutting_down"))

    def retry_after(self) -> int:
        """Seconds until a place will probably be free: what is before a new request, at the measured rate."""
        ends = self._ends
        now = time.monotonic()
        if len(ends) < 2 or now - ends[-1] > RATE_SECONDS:
            return UNKNOWN_RETRY
        rate = (len(ends) - 1) / max(now - ends[0], 1e-3)
        return min(max(math.ceil((self.waiting + 1) / rate), MIN_RETRY), MAX_RETRY)


class Place:
    """What one request takes of an `Admission`: `take` it before work begins, at most once; the gate gives it back."""

    def __init__(self, admission: Admission, key: str, deadline: float, connection: Connection | None) -> None:
        self._admission, self._key, self._deadline, self._connection = admission, key, deadline, connection
        self._taken = False

    async def take(self) -> None:
        """Wait for it; raises what `Admission.enter` raises."""
        if not self._taken:
            await self._admission.enter(self._key, self._deadline, self._connection)
            self._taken = True

    def give_back(self) -> None:
        """The request is over."""
        if self._taken:
            self._admission.leave(self._key)


def _end(turn: asyncio.Future[None], why: Exception) -> None:
    """Nobody waits for this turn any more."""
    if not turn.done():
        turn.set_exception(why)
