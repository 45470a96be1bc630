"""Threads that are kept: to make one takes an emulated guest longer than much of what it is for."""

from __future__ import annotations

import logging
import queue
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_KEPT = 64
"""Threads without work, as many as a controller is asked about at once."""

_log = logging.getLogger("hotlun.agent")


class Threads:
    """Runs each job at once, in a thread for it alone.

    Args:
        name: the threads'.
        kept: how many wait for the next job, at most.
    """

    def __init__(self, name: str, kept: int = _KEPT) -> None:
        self._name = name
        self._kept = kept
        self._lock = threading.Lock()
        self._idle = 0
        self._handed_over: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def run(self, job: Callable[[], None]) -> None:
        """Have a job done, which must not raise.

        Raises:
            RuntimeError: the system has no more threads; the job will not be done.
        """
        with self._lock:
            if self._idle:
                self._idle -= 1
                self._handed_over.put(job)
                return
        threading.Thread(target=self._work, args=(job,), name=self._name, daemon=True).start()

    def _work(self, job: Callable[[], None]) -> None:
        while True:
            try:
                job()
            except Exception:
                _log.exception("a job that must not raise has raised")
            del job  # with what it holds
            with self._lock:
                if self._idle >= self._kept:
                    return
                self._idle += 1
            job = self._handed_over.get()
