"""Blocking sockets behind asyncio's streams: one thread reads, one writes.

For Hyper-V sockets. asyncio's loop on Windows (Proactor) cannot accept or connect them: it
reserves 44 bytes for an address, and theirs have 52; and its sockets are made without the
protocol number (CPython 3.12, `Modules/overlapped.c` and `Lib/asyncio/windows_events.py`).

The socket is closed by the thread that ends last, so that no other one ever gets its number
while a thread may still use it. Until then it is shut down, which wakes both.

The host's end only.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import warnings
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

_READ_SIZE = 1 << 16
_MOST_UNREAD = 4
"""Pieces that have been read and that the loop has not had yet."""
_HIGH_WATER, _LOW_WATER = 1 << 16, 1 << 14
"""Bytes not written at which a writer is to wait, and at which it may go on."""


def open_streams(connection: socket.socket, peer: str) -> Streams:
    """Streams over a connected socket, which is theirs from now on; to be called in the loop."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport = ThreadTransport(loop, connection, protocol, peer)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def accept(listener: socket.socket) -> socket.socket:
    """The first connection that comes in; the listening socket is closed after it, or without.

    Raises:
        OSError: nothing can come in any more.
    """
    loop = asyncio.get_running_loop()
    accepted: asyncio.Future[socket.socket] = loop.create_future()

    def deliver(connection: socket.socket | None, error: OSError | None) -> None:
        if connection is None:
            accepted.set_exception(error or OSError("nothing came in"))
        else:
            accepted.set_result(connection)

    def wait() -> None:
        connection: socket.socket | None = None
        problem: OSError | None = None
        try:
            connection, _ = listener.accept()
        except OSError as error:
            problem = error
        listener.close()
        try:
            loop.call_soon_threadsafe(deliver, connection, problem)
        except RuntimeError:  # the loop is closed
            if connection is not None:
                connection.close()

    listener.setblocking(True)
    _start(wait, "accept")
    try:
        return await asyncio.shield(accepted)
    except asyncio.CancelledError:
        accepted.add_done_callback(_close_what_came)
        _wake(listener)
        raise


def _close_what_came(accepted: asyncio.Future[socket.socket]) -> None:
    if accepted.exception() is None:
        accepted.result().close()


def _wake(listener: socket.socket) -> None:
    """Have the thread that accepts there give up."""
    try:
        listener.shutdown(socket.SHUT_RDWR)  # Linux: accept() ends with EINVAL
    except OSError:
        listener.close()  # Windows: with WSAEINTR or WSAENOTSOCK


def _start(function: Callable[[], None], what: str) -> None:
    # A daemon: what a guest never ends does not keep the process.
    threading.Thread(target=function, name=f"hotlun bridge {what}", daemon=True).start()


class ThreadTransport(asyncio.Transport):
    """A transport over a connected socket that blocks.

    Args:
        loop: where the protocol is called.
        connection: the socket.
        protocol: is told of what comes, and of the end.
        peer: what is at the other end, for people.
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
        self._socket = connection
        self._protocol: asyncio.BaseProtocol = protocol
        self._peer = peer
        self._may_read = threading.Event()
        self._may_read.set()
        self._room = threading.Semaphore(_MOST_UNREAD)
        self._changed = threading.Condition()
        """Guards what follows; both threads and the loop hold it for a few instructions."""
        self._unwritten: deque[bytes] = deque()
        self._size = 0
        self._is_closing = self._is_aborted = False
        self._threads = 2
        self._is_paused = False  # the protocol's writing
        self._is_over = False  # the protocol knows of the end
        loop.call_soon(protocol.connection_made, self)
        _start(self._read, f"reader of {peer}")
        _start(self._write, f"writer to {peer}")

    # --- The loop's side ---

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if not data or self._is_closing:
            return
        with self._changed:
            self._unwritten.append(bytes(data))
            self._size += len(data)
            self._changed.notify()
        if self._size > _HIGH_WATER and not self._is_paused:
            self._is_paused = True
            self._protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        return self._size

    def pause_reading(self) -> None:
        self._may_read.clear()

    def resume_reading(self) -> None:
        self._may_read.set()

    def is_reading(self) -> bool:
        return self._may_read.is_set() and not self._is_closing

    def is_closing(self) -> bool:
        return self._is_closing

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        """Write what is to be written, then end it."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()

    def abort(self) -> None:
        """End it now."""
        with self._changed:
            self._is_closing = self._is_aborted = True
            self._unwritten.clear()
            self._size = 0
            self._changed.notify()
        self._shut_down()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def _came(self, data: bytes) -> None:
        self._room.release()
        if not self._is_over and isinstance(self._protocol, asyncio.Protocol):
            self._protocol.data_received(data)

    def _was_written(self) -> None:
        if self._is_paused and self._size <= _LOW_WATER and not self._is_over:
            self._is_paused = False
            self._protocol.resume_writing()

    def _ended(self, error: OSError | None) -> None:
        """One of the threads has: the protocol is told of the first, which ends the other."""
        if self._is_over:
            return
        self._is_over = True
        was_aborted = self._is_aborted
        self.abort()
        self._protocol.connection_lost(None if was_aborted else error)

    def __del__(self) -> None:
        if not self._is_closing:
            warnings.warn(f"unclosed transport to {self._peer}", ResourceWarning, stacklevel=1)
            self.abort()

    # --- The threads ---

    def _read(self) -> None:
        problem: OSError | None = None
        while True:
            self._may_read.wait()
            self._room.acquire()
            try:
                data = self._socket.recv(_READ_SIZE)
            except OSError as error:
                problem = error
                break
            if not data or not self._post(self._came, data):
                break
        self._leave(problem)

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
            self._post(self._was_written)
        self._leave(problem)

    def _next(self) -> bytes | None:
        """What is to be written; None when nothing ever is any more."""
        with self._changed:
            while not self._unwritten and not self._is_closing:
                self._changed.wait()
            return self._unwritten.popleft() if self._unwritten else None

    def _leave(self, problem: OSError | None) -> None:
        with self._changed:
            self._threads -= 1
            is_last = not self._threads
        self._shut_down()
        if is_last:
            self._socket.close()
        self._post(self._ended, problem)

    def _shut_down(self) -> None:
        """Wake whichever thread is inside the socket, or waits for leave to read."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._may_read.set()
        self._room.release()

    def _post(self, function: Callable[..., None], *arguments: Any) -> bool:
        """Have the loop do something; False if it does nothing any more."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            return False
        return True
