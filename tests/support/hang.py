"""A bound on hangs that no cancellation can swallow."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine
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
    rings = 0

    def ring(signum: int, frame: FrameType | None) -> None:
        nonlocal rings
        rings += 1
        if rings > 1:
            raise HangError(f"no return to the loop within {seconds} s")
        loop.stop()
        signal.setitimer(signal.ITIMER_REAL, 2)

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    task = loop.create_task(main)
    try:
        return loop.run_until_complete(task)
    except RuntimeError:
        if not rings:
            raise
        tasks = "\n".join(str(task) for task in asyncio.all_tasks(loop))
        raise HangError(f"not at an end after {seconds} s:\n{tasks}") from None
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
