"""The first connection that comes in at a listening socket, which is closed with it.

In asyncio's loop where that can wait for such sockets, else in a thread. A caller that is
cancelled leaves nothing behind: not the connection that came just then, not the thread.

The host's end only.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from hotlun.bridge.threaded import start_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    Wanted = Callable[[Any], bool]
    """Whether a connection from that address is; others are hung up on."""

_HUNG_UP = ConnectionAbortedError, ConnectionResetError
"""Who was there has hung up before it was accepted: ECONNABORTED of Linux, WSAECONNRESET."""

_INSIDE = 0.1
"""Seconds after which a thread that was about to call accept() is in it."""


async def in_loop(listener: socket.socket, is_wanted: Wanted) -> socket.socket:
    """Accept in the event loop; not for Windows.

    The loop's own `sock_accept` drops what it has accepted when it is cancelled just then
    (CPython 3.11, `Lib/asyncio/selector_events.py`). So it is but told that something waits.

    Raises:
        OSError: nothing can come in any more.
    """
    with listener:
        listener.setblocking(False)
        while True:
            await _until_readable(listener)
            try:
                connection, address = listener.accept()
            except (BlockingIOError, *_HUNG_UP):
                continue
            if is_wanted(address):
                return connection
            connection.close()


async def _until_readable(listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    readable = loop.create_future()
    loop.add_reader(listener, _settle, readable)
    try:
        await readable
    finally:
        loop.remove_reader(listener)


async def in_thread(listener: socket.socket, is_wanted: Wanted) -> socket.socket:
    """Accept in a thread.

    Raises:
        OSError: nothing can come in any more, or there can be no more threads.
    """
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    accepting = _Accepting(
        listener, is_wanted, functools.partial(loop.call_soon_threadsafe, _settle, ended)
    )
    try:
        await ended
    except BaseException:
        accepting.give_up()
        raise
    return accepting.result()


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _Accepting:
    """A thread inside accept(), and what it comes back with.

    It closes the listening socket, under a lock: so the number that `give_up` shuts down is
    never one that another thread was given meanwhile.

    Args:
        tell: is called by the thread when it is done; RuntimeError if nobody hears that.
    """

    def __init__(
        self, listener: socket.socket, is_wanted: Wanted, tell: Callable[[], object]
    ) -> None:
        self._listener = listener
        self._is_wanted = is_wanted
        self._tell = tell
        self._lock = threading.Lock()
        """Guards what follows."""
        self._is_given_up = False
        self._is_ended = False
        self._connection: socket.socket | None = None
        self._problem: OSError | None = None
        self._began = time.monotonic()
        listener.setblocking(True)
        try:
            start_thread(self._run, "accept")
        except OSError:
            listener.close()
            raise

    def result(self) -> socket.socket:
        """What came; from then on the caller's."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is None:
            raise self._problem or OSError("nothing came in")
        return connection

    def give_up(self) -> None:
        """Nobody waits any more: have the thread end, and close what it has got."""
        with self._lock:
            self._is_given_up = True
            self._close_what_came()
            if self._is_ended:
                return
            try:
                self._listener.shutdown(socket.SHUT_RDWR)  # Linux: accept() ends with EINVAL
                return
            except OSError:  # Windows: WSAENOTCONN, and accept() goes on until it is closed
                left = self._began + _INSIDE - time.monotonic()
        if left <= 0:
            self._close_listener()
        else:
            # A thread on its way to accept() might get there with a number that is another's.
            closer = threading.Timer(left, self._close_listener)
            closer.daemon, closer.name = True, "hotlun bridge accept closer"
            try:
                closer.start()
            except RuntimeError:  # there is none to be had; the loop can do it, if it still runs
                asyncio.get_running_loop().call_later(left, self._close_listener)

    def _close_listener(self) -> None:
        with self._lock:
            self._listener.close()

    def _close_what_came(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _run(self) -> None:
        connection: socket.socket | None = None
        problem: OSError | None = None
        try:
            connection = self._accept()
        except OSError as error:
            problem = error
        with self._lock:
            self._listener.close()
            self._is_ended = True
            self._connection, self._problem = connection, problem
            if self._is_given_up:
                self._close_what_came()
        try:
            self._tell()
        except RuntimeError:  # the loop is closed
            with self._lock:
                self._close_what_came()

    def _accept(self) -> socket.socket:
        while True:
            with contextlib.suppress(*_HUNG_UP):
                connection, address = self._listener.accept()
                if self._is_wanted(address):
                    return connection
                connection.close()
