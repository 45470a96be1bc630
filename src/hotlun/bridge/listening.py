"""Waiting for a guest to dial: one connection, and then nobody listens until it is lost.

On Hyper-V, and where a VM has a vsock device, the guest's agent is who connects; it tries
again every 100 ms for as long as it runs, after a lost connection too (hcsshim's and hotlun's).

The host's end only.
"""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Any

from hotlun.bridge import accepting, threaded
from hotlun.errors import BackendError, UnsupportedError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from hotlun.bridge.threaded import Streams

    Listen = Callable[[], socket.socket]

_DENIED = (errno.EACCES, errno.EPERM)


class Listening:
    """An opener of streams, as `Keeper` takes it: each call waits for one guest.

    It may listen from an earlier moment on (`begin`), so that a VM can be started between that
    and the first call; and does again from each call after the first.

    Args:
        listen: makes a listening socket.
        peer: whom for, for people.
        expects: what the address of the right guest begins with; others are hung up on.
        in_threads: for sockets that asyncio's loop cannot wait for.
    """

    def __init__(
        self, listen: Listen, peer: str, *, expects: object = None, in_threads: bool = False
    ) -> None:
        self._listen = listen
        self._peer = peer
        self._expects = expects
        self._in_threads = in_threads
        self._listener: socket.socket | None = None

    def begin(self) -> None:
        """Listen from now on.

        Raises:
            UnsupportedError: there are no such sockets here.
            BackendError: it cannot listen.
        """
        try:
            self._listener = self._listen()
        except NotImplementedError as error:
            raise UnsupportedError(
                f"cannot listen for {self._peer}: {error}", operation="connect"
            ) from error
        except OSError as error:
            raise BackendError(
                f"cannot listen for {self._peer}: {error}; {_advice(error)}",
                operation="connect",
                detail=str(error),
            ) from error

    def stop(self) -> None:
        """Listen no more, if nobody waits for the guest yet."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()

    async def __call__(self) -> Streams:
        """Wait for the guest; for as long as the caller does.

        Raises:
            OSError: it cannot listen, or nobody can come any more.
        """
        listener, self._listener = self._listener, None
        try:
            listener = listener or self._listen()
            if self._in_threads:
                connection = await accepting.in_thread(listener, self._is_wanted)
                return threaded.open_streams(connection, self._peer)
            connection = await accepting.in_loop(listener, self._is_wanted)
            return await asyncio.open_connection(sock=connection)
        except OSError as error:
            # Without its number: that nobody listens here is no word about the VM.
            raise OSError(f"listening for {self._peer}: {error}") from error

    def _is_wanted(self, address: Any) -> bool:
        return self._expects is None or _first(address) == self._expects


def _first(address: Any) -> object:
    return address[0] if isinstance(address, tuple) else address


def _advice(error: OSError) -> str:
    if error.errno in _DENIED:
        return "run as an administrator"
    if error.errno == errno.EADDRINUSE:
        return "another process listens for it: end that, or use its connection"
    return "is there such a VM, and does the system have such sockets?"
