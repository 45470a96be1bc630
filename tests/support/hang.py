"""A bound on hangs that no cancellation can swallow."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from types import FrameType

T = TypeVar("T")


class HangError(BaseException):
    """The code did not come to an end in time."""


def run_bounded(main: Coroutine[object, object, T], seconds: float = 20) -> T:
    """Run a coroutine on a loop of its own, and stop that loop if it takes too long.

    The alarm stops the loop itself, so a task that catches everything cannot
    outlive it; a second alarm breaks into code that never returns to the loop.
    """
    loop = asyncio.new_event_loop()
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
        if task.done():
            raise
        _hung(loop, seconds)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if not rings:
            leftover = asyncio.all_tasks(loop)
            loop.close()
            assert not leftover, leftover


def _hung(loop: asyncio.AbstractEventLoop, seconds: float) -> NoReturn:
    tasks = "\n".join(str(task) for task in asyncio.all_tasks(loop))
    raise HangError(f"not at an end after {seconds} s:\n{tasks}")
