"""Runs a command's coroutine so that whatever ends it, what it began is undone first."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

_Result = TypeVar("_Result")


class TerminatedError(Exception):
    """A signal other than Ctrl-C's has ended the command, which has cleaned up."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"ended by {number.name}")
        self.number = number


def run(main: Coroutine[Any, Any, _Result]) -> _Result:
    """`asyncio.run`, with SIGTERM and SIGHUP cancelling as Ctrl-C does.

    Raises:
        KeyboardInterrupt: Ctrl-C, once everything is undone.
        TerminatedError: one of the others, likewise.
    """
    return asyncio.run(_until_terminated(main))


async def _until_terminated(main: Coroutine[Any, Any, _Result]) -> _Result:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(main)
    received: list[signal.Signals] = []

    def end(number: signal.Signals) -> None:
        received.append(number)
        task.cancel()

    numbers = (signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, end, number)
    try:
        return await task
    except asyncio.CancelledError:
        if received:
            raise TerminatedError(received[0]) from None
        raise
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
