"""Time in the guest: it passes while somebody waits, and costs none of ours.

Each thread has its own, so that what waits does not run others out of time, and what
one request does comes out the same whatever runs beside it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from fuzz.guest.errors import StrayError

if TYPE_CHECKING:
    from collections.abc import Callable

_TICK = 1e-5


class Clock(threading.local):
    """Stands in for `time`."""

    def __init__(self, waited: Callable[[], None]) -> None:
        self.now = 1000.0
        self._haste = 1.0
        self._waited = waited

    def begin(self) -> None:
        """Begin anew: the first waits of an input take as long as they should."""
        self._haste = 1.0

    def monotonic(self) -> float:
        self.now += _TICK
        return self.now

    def sleep(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError("sleep length must be non-negative")
        self.now += seconds * self._haste
        self._haste *= 3  # so that who looks twice a second for an hour does not look for long
        self._waited()


class Threads:
    """Stands in for `threading`, where threads are started to do one thing meanwhile.

    It is done at once. Locks and conditions are real, but to wait for a lock for a while is the
    clock's.
    """

    Condition = staticmethod(threading.Condition)

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __getattr__(self, name: str) -> object:
        raise StrayError(f"threading.{name}")

    def Lock(self) -> _Lock:  # noqa: N802 - as in threading
        return _Lock(self._clock)

    def Thread(self, *, target: Callable[..., object], name: str, daemon: bool) -> _Thread:  # noqa: N802
        return _Thread(target, name)


class _Lock:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self.locked = self._lock.locked
        self.release = self._lock.release

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if timeout < 0:
            return self._lock.acquire(blocking)
        if not self._lock.acquire(blocking=False):
            self._clock.sleep(timeout)
            return False
        return True

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


class _Thread:
    def __init__(self, target: Callable[..., Any], name: str) -> None:
        self._target = target
        self._listens = name == "uevents"

    def start(self) -> None:
        if not self._listens:  # that goes on for ever; the guest says nothing
            self._target()

    def is_alive(self) -> bool:
        return False

    def join(self, timeout: float | None = None) -> None:
        pass
