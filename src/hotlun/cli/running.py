"""Runs a command's coroutine so that whatever ends it, what it began is undone first.

What runs nothing imports this too, `--help` for one: asyncio and sockets come when they are used.
"""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Any, TypeVar

from hotlun.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Coroutine

_Result = TypeVar("_Result")

_ENDING = [one for one in signal.Signals if one.name in ("SIGTERM", "SIGHUP")]
"""By name: there is no SIGHUP on Windows, where this is imported, and nothing is run."""


def check_qemu_can_run() -> None:
    """Whether this is a system on which hotlun's own VMs run.

    Raises:
        UnsupportedError: it has no unix sockets, which is Windows.
    """
    import socket

    if not hasattr(socket, "AF_UNIX"):
        raise UnsupportedError(
            f"hotlun's VMs are QEMU's and run on Linux, not on {sys.platform}: "
            "docs/windows.md says how to reach a VM of Hyper-V"
        )


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
    import asyncio

    return asyncio.run(_until_terminated(main))


async def _until_terminated(main: Coroutine[Any, Any, _Result]) -> _Result:
    import asyncio

    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(main)
    received: list[signal.Signals] = []

    def end(number: signal.Signals) -> None:
        received.append(number)
        task.cancel()

    for number in _ENDING:
        loop.add_signal_handler(number, end, number)
    try:
        return await task
    except asyncio.CancelledError:
        if received:
            raise TerminatedError(received[0]) from None
        raise
    finally:
        for number in _ENDING:
            loop.remove_signal_handler(number)
