"""Blocking sockets behind asyncio's streams: one thread reads, one writes.

For Hyper-V sockets. asyncio's loop on Windows (Proactor) cannot accept or connect them: it
reserves 44 bytes for an address, and theirs have 52; and its sockets are made without the
protocol number (CPython 3.12, `Modules/overlapped.c` and `Lib/asyncio/windows_events.py`).

The socket is closed by the thread that ends last, so that no other one ever gets its number
while a thread is about to use it. Until then it is shut down, which wakes both on Linux. On
Windows it need not: there it ends what the other side sends, and to close it what waits here
(`closesocket`). So it is closed under a thread that has not come out after a while.

The host's end only.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

_READ_SIZE = 1 << 16
_MOST_UNREAD = 4
"""Pieces that have been read and that the protocol has not had yet."""
_HIGH_WATER = 1 << 16
_STUCK = 0.2
"""Seconds after a socket was shut down when a thread that has not ended waits inside it."""


def open_streams(connection: socket.socket, peer: str) -> Streams:
    """Streams over a connected socket, which is theirs from now on; to be called in the loop.

    Raises:
        OSError: there can be no more threads.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport = ThreadTransport(loop, connection, protocol, peer)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


def start_thread(function: Callable[[], None], what: str) -> None:
    """Have a thread of its own do it.

    Raises:
        OSError: there can be no more threads.
    """
    # A daemon: what a guest never ends does not keep the process.
    thread = threading.Thread(target=function, name=f"hotlun bridge {what}", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(f"cannot have a thread: {error}") from error


class ThreadTransport(asyncio.Transport):
    """A transport over a connected socket that blocks.

    Its threads keep it alive, as the loop does others: it has to be closed. The protocol is
    told of the end when both have ended and the socket is closed; or a moment after it should
    have been, though nothing wakes a thread (Wine 8, where the other end takes no bytes).

    Args:
        loop: where the protocol is called.
        connection: the socket.
        protocol: is told of what comes, and of the end.
        peer: what is at the other end, for people.

    Raises:
        OSError: there can be no more threads; the socket is closed.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: socket.socket,
        protocol: asyncio.Protocol,
        peer: str,
    ) -> None:
        super().__init__({"peername": peer, "socket": connection})
        connection.setblocking(True)
        self._loop = loop
        self._protocol: asyncio.BaseProtocol = protocol
        self._is_reading = True
        self._is_closing = False
        self._is_over = False  # the protocol knows of the end
        self._unread: deque[bytes] = deque()
        self._last_resort: asyncio.TimerHandle | None = None
        self._changed = threading.Condition()
        """Guards what follows; both threads and the loop hold it for a few instructions."""
        self._socket = connection
        self._ahead = 0  # pieces that were read, and that the protocol has not had
        self._unwritten: deque[bytes] = deque()
        self._size = 0  # of those, and of what is being written
        self._high, self._low = _HIGH_WATER, _HIGH_WATER // 4
        self._is_paused = False  # the protocol's writing
        self._is_finishing = False  # when all is written
        self._is_aborted = False
        self._problem: OSError | None = None
        self._running = 2
        loop.call_soon(protocol.connection_made, self)
        threads = ((self._read, f"reader of {peer}"), (self._write, f"writer to {peer}"))
        for started, (run, name) in enumerate(threads):
            try:
                start_thread(run, name)
            except OSError:
                for _ in threads[started:]:
                    self._leave(None)
                raise

    # --- The protocol's side, in the loop ---

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if not data or self._is_closing:
            return
        with self._changed:
            self._unwritten.append(bytes(data))
            self._size += len(data)
            self._changed.notify_all()
        self._pause_writing()

    def get_write_buffer_size(self) -> int:
        return self._size

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if high is None:
            high = _HIGH_WATER if low is None else 4 * low
        if low is None:
            low = high // 4
        if not 0 <= low <= high:
            raise ValueError(f"limits are 0 <= low <= high, not {low} and {high}")
        with self._changed:
            self._high, self._low = high, low
        self._pause_writing()
        self._resume_writing()

    def pause_reading(self) -> None:
        self._is_reading = False

    def resume_reading(self) -> None:
        if not self._is_reading:
            self._is_reading = True
            self._loop.call_soon(self._hand_over)

    def is_reading(self) -> bool:
        return self._is_reading and not self._is_closing

    def is_closing(self) -> bool:
        return self._is_closing

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        """Write what is to be written, then end it."""
        self._is_closing = True
        with self._changed:
            self._is_finishing = True
            self._changed.notify_all()

    def abort(self) -> None:
        """End it now."""
        self._is_closing = True
        with self._changed:
            self._abort()
        self._wait_for_threads()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    # --- The threads' side, in the loop ---

    def _came(self, data: bytes) -> None:
        self._unread.append(data)
        self._hand_over()

    def _hand_over(self) -> None:
        """What was read, `b""` at its end, to a protocol that wants it."""
        while self._unread and self._is_reading and not self._is_closing:
            data = self._unread.popleft()
            with self._changed:
                self._ahead -= 1
                self._changed.notify_all()
            if not isinstance(self._protocol, asyncio.Protocol):
                continue
            if data:
                self._protocol.data_received(data)
            elif not self._protocol.eof_received():
                self.close()

    def _pause_writing(self) -> None:
        with self._changed:
            is_due = self._size > self._high and not self._is_paused
            self._is_paused = self._is_paused or is_due
        if is_due:
            self._protocol.pause_writing()

    def _resume_writing(self) -> None:
        with self._changed:
            is_due = self._size <= self._low and self._is_paused
            self._is_paused = self._is_paused and not is_due
        if is_due:
            self._protocol.resume_writing()

    def _wait_for_threads(self) -> None:
        """They end by themselves where to shut a socket down wakes who is inside."""
        if self._is_aborted and self._running and self._last_resort is None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._last_resort = self._loop.call_later(_STUCK, self._end_without_threads)

    def _end_without_threads(self) -> None:
        with self._changed:
            self._socket.close()
        self._ended()

    def _ended(self) -> None:
        if self._is_over:
            return
        self._is_over = self._is_closing = True
        if self._last_resort is not None:
            self._last_resort.cancel()
        self._protocol.connection_lost(self._problem)

    # --- The threads ---

    def _read(self) -> None:
        problem: OSError | None = None
        data, is_heard = b"-", True
        try:
            while data and is_heard and self._has_room():
                data = self._socket.recv(_READ_SIZE)
                is_heard = self._post(self._came, data)
        except OSError as error:
            problem = error
        self._leave(problem, at_end=is_heard and not data)

    def _has_room(self) -> bool:
        """Once the protocol has had what was read before; never, when nothing is to be read."""
        with self._changed:
            self._changed.wait_for(lambda: self._ahead < _MOST_UNREAD or self._is_aborted)
            self._ahead += 1
            return not self._is_aborted

    def _write(self) -> None:
        problem: OSError | None = None
        while (data := self._next()) is not None:
            try:
                self._socket.sendall(data)
            except OSError as error:
                problem = error
                break
            with self._changed:
                self._size = max(0, self._size - len(data))
                is_due = self._is_paused and self._size <= self._low
            if is_due:
                self._post(self._resume_writing)
        self._leave(problem)

    def _next(self) -> bytes | None:
        """What is to be written; None when nothing ever is any more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._unwritten or self._is_finishing or self._is_aborted
            )
            return self._unwritten.popleft() if self._unwritten else None

    def _leave(self, problem: OSError | None, *, at_end: bool = False) -> None:
        """A thread ends, and with it the other; unless there was but nothing more to read."""
        with self._changed:
            if not self._is_aborted and not at_end:
                self._problem = problem
                self._abort()
            self._running -= 1
            is_last = not self._running
            if is_last:
                self._socket.close()
        self._post(self._ended if is_last else self._wait_for_threads)

    def _abort(self) -> None:
        self._is_aborted = True
        self._unwritten.clear()
        self._size = 0
        self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _post(self, function: Callable[..., None], *arguments: Any) -> bool:
        """Have the loop do something; False if it does nothing any more."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            return False
        return True
