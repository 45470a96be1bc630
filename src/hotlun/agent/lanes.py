"""Requests side by side, those of one disk one after another.

A lane lives while it has work; it has one thread then. Lanes belong to the agent,
not to a connection: what a host that is gone had begun, and what the next one asks
for about the same disk, must not meet.
"""

from __future__ import annotations

import collections
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

_WAITING_MAX = 4096
"""Requests begun or waiting; a host that sends more is not read from meanwhile."""


class Lanes:
    """Runs jobs in threads, in order within a lane."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[Hashable, collections.deque[Callable[[], None]]] = {}
        self._room = threading.BoundedSemaphore(_WAITING_MAX)

    def submit(self, lane: Hashable, job: Callable[[], None]) -> None:
        """Have the job done when the lane's earlier ones are. It must not raise.

        Raises:
            RuntimeError: the system has no more threads; the job will not be done.
        """
        self._room.acquire()
        with self._lock:
            if lane in self._waiting:
                self._waiting[lane].append(job)
                return
            self._waiting[lane] = collections.deque([job])
            try:
                threading.Thread(
                    target=self._work, args=(lane,), name=f"disk {lane}", daemon=True
                ).start()
            except RuntimeError:
                del self._waiting[lane]
                self._room.release()
                raise

    def _work(self, lane: Hashable) -> None:
        while True:
            with self._lock:
                if not self._waiting[lane]:
                    del self._waiting[lane]
                    return
                job = self._waiting[lane].popleft()
            try:
                job()
            finally:
                self._room.release()
