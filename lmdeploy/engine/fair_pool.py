"""`FairPool`: one thread that works on the jobs of many owners, one of each in turn, so that nobody waits for all that somebody else wants."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from lmdeploy.errors import EngineError, OverloadedError

_Queue = deque[tuple[Future[Any], Callable[[], Any]]]


class FairPool:
    """At most `most` jobs wait, and `most_of_one` of each owner that has a name (None: any number). May be used from any thread."""

    def __init__(self, name: str, *, most: int | None = None, most_of_one: int | None = None) -> None:
        self._name, self._most, self._most_of_one = name, most, most_of_one
        self._lock = threading.Lock()
        self._queues: dict[str, _Queue] = {}  # by owner, none is empty; who is first is served next
        self._count = 0
        self._closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    def submit(self, owner: str, job: Callable[[], Any], future: Future[Any] | None = None) -> Future[Any]:
        """Queue a job; its future. `future`: of a job that waits for other owners already; it is done when the first of them has its turn.

        Raises OverloadedError when too many wait, EngineError after `close`.
        """
        with self._lock:
            if self._closed:
                raise EngineError("the engine is closed")
            queue = self._queues.get(owner, _Queue())
            limit = self._limit_reached(owner, queue)
            if future is not None and (limit or future.running() or future.done() or any(f is future for f, _ in queue)):
                return future
            if limit:
                raise OverloadedError(limit, code="overloaded")
            future = future or Future()
            queue.append((future, job))
            self._queues[owner] = queue
            self._count += 1
            self._thread.submit(self._work)  # one for each that waits; under the lock, so that `close` does not come between
        return future

    def _limit_reached(self, owner: str, queue: _Queue) -> str | None:
        if owner and self._most_of_one is not None and len(queue) >= self._most_of_one:
            return f"{len(queue)} of your requests wait for {self._name}, that is as many as may; try again later"
        if self._most is not None and self._count >= self._most:
            return f"{self._count} requests wait for {self._name}, that is as many as may; try again later"
        return None

    def _work(self) -> None:
        with self._lock:
            if self._closed:
                return
            owner = next(iter(self._queues))
            queue = self._queues.pop(owner)
            future, job = queue.popleft()
            if queue:
                self._queues[owner] = queue  # behind all others
            self._count -= 1
            if future.done() or not future.set_running_or_notify_cancel():
                return  # another owner had its turn before
        try:
            future.set_result(job())
        except BaseException as e:
            future.set_exception(e)

    def close(self) -> None:
        """What waits ends with an EngineError; what runs is not waited for."""
        with self._lock:
            self._closed = True
            left = {id(future): future for queue in self._queues.values() for future, _ in queue}
            self._queues.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)
        for future in left.values():
            if not future.done() and future.set_running_or_notify_cancel():
                future.set_exception(EngineError("the engine is closed"))
