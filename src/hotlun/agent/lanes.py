"""Requests side by side, those of one disk one after another.

A lane lives while it has work; it has one thread then. Lanes belong to the agent, not
to a connection: what a host that is gone had begun, and what the next one asks for about
the same disk, must not meet.
"""

from __future__ import annotations

import collections
import functools
import logging
import threading
from typing import TYPE_CHECKING

from hotlun.agent.threads import Threads

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

_WAITING_MAX = 4096
"""Requests begun or waiting; a host that sends more is not read from meanwhile."""

_log = logging.getLogger("hotlun.agent")


class Lanes:
    """Runs jobs in threads, in order within a lane."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[Hashable, collections.deque[Callable[[], None]]] = {}
        self._unfinished: dict[Hashable, int] = {}
        self._count = 0
        """Jobs begun or waiting."""
        self._room = threading.Condition(self._lock)
        self._threads = Threads("disks")

    def submit(self, lane: Hashable, job: Callable[[], None]) -> None:
        """Have the job done when the lane's earlier ones are. It must not raise, and say `finish`.

        Raises:
            RuntimeError: the system has no more threads; the job will not be done.
        """
        with self._lock:
            while self._count >= _WAITING_MAX:
                self._room.wait()
            waiting = self._waiting.get(lane)
            if waiting is not None:
                waiting.append(job)
            else:
                # What the thread does first is to wait for the lock.
                self._threads.run(functools.partial(self._work, lane))
                self._waiting[lane] = collections.deque((job,))
            self._count += 1
            self._unfinished[lane] = self._unfinished.get(lane, 0) + 1

    def finish(self, lane: Hashable) -> None:
        """The lane's current job has done its work, and only tells of it still."""
        with self._lock:
            left = self._unfinished[lane] - 1
            if left:
                self._unfinished[lane] = left
            else:
                del self._unfinished[lane]

    def is_busy(self, lane: Hashable) -> bool:
        """Whether a job of the lane waits, or has not done its work yet."""
        with self._lock:
            return lane in self._unfinished

    def _work(self, lane: Hashable) -> None:
        with self._lock:
            job: Callable[[], None] | None = self._waiting[lane].popleft()
        while job is not None:
            try:
                job()
            except Exception:
                _log.exception("a job that must not raise has raised")
            del job  # with the request that it holds
            job = self._next(lane)

    def _next(self, lane: Hashable) -> Callable[[], None] | None:
        """The lane's next job, as one is done; without one the lane ends."""
        with self._lock:
            if self._count == _WAITING_MAX:
                self._room.notify_all()
            self._count -= 1
            if self._waiting[lane]:
                return self._waiting[lane].popleft()
            del self._waiting[lane]
            return None
