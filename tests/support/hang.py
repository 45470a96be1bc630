"""A bound on hangs that no cancellation can swallow."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator
    from types import FrameType

T = TypeVar("T")


class HangError(BaseException):
    """The code did not come to an end in time."""


def bounded(
    loop: asyncio.AbstractEventLoop, main: Coroutine[object, object, T], seconds: float = 20
) -> T:
    """Run a coroutine to its end, and stop the loop itself if that takes too long.

    A task that catches everything cannot outlive the alarm; a second one breaks
    into code that never returns to the loop.
    """
    with _alarm(loop, seconds) as rings:
        task = loop.create_task(main)
        try:
            return loop.run_until_complete(task)
        except RuntimeError:
            if not rings:
                raise
            tasks = "\n".join(str(task) for task in asyncio.all_tasks(loop))
            raise HangError(f"not at an end after {seconds} s:\n{tasks}") from None


if os.name == "nt":

    @contextmanager
    def _alarm(loop: asyncio.AbstractEventLoop, seconds: float) -> Iterator[list[float]]:
        """Stop the loop; what never returns to it is left to pytest's time-out."""
        rings: list[float] = []

        def ring() -> None:
            rings.append(time.monotonic())
            loop.call_soon_threadsafe(loop.stop)

        timer = threading.Timer(seconds, ring)
        timer.start()
        try:
            yield rings
        finally:
            timer.cancel()
            timer.join()

else:

    @contextmanager
    def _alarm(loop: asyncio.AbstractEventLoop, seconds: float) -> Iterator[list[float]]:
        """Stop the loop, and then what never returns to it."""
        rings: list[float] = []

        def ring(signum: int, frame: FrameType | None) -> None:
            rings.append(time.monotonic())
            if len(rings) > 1:
                raise HangError(f"no return to the loop within {seconds} s")
            loop.stop()
            signal.setitimer(signal.ITIMER_REAL, 2)

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield rings
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def run_bounded(main: Coroutine[object, object, T], seconds: float = 20) -> T:
    """The same on a loop of its own, on which nothing may be left."""
    loop = asyncio.new_event_loop()
    try:
        result = bounded(loop, main, seconds)
        leftover = asyncio.all_tasks(loop)
        assert not leftover, leftover
    finally:
        loop.close()
    return result
