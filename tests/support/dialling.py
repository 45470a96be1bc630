"""Where guests dial in tests, and what must not be left when they have."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading

from support.peer import DEADLINE


class Place:
    """An address of this machine's, the same each time somebody listens there."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as found:
            self.address: tuple[str, int] = found.getsockname()
        self.listened = 0
        self.error: OSError | None = None
        self.was_refused = asyncio.Event()
        """Set when somebody was to listen, and met the error."""

    def listen(self) -> socket.socket:
        if self.error is not None:
            self.was_refused.set()
            raise self.error
        self.listened += 1
        return socket.create_server(self.address)

    async def dial(
        self, source: tuple[str, int] | None = None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self.address, local_addr=source)


def bridge_threads() -> list[threading.Thread]:
    """Those that live."""
    return [each for each in threading.enumerate() if each.name.startswith("hotlun bridge")]


def check_nothing_is_left() -> None:
    """No thread of the bridge's, nor a socket, of which its destruction would warn."""
    for thread in bridge_threads():
        thread.join(DEADLINE)
        assert not thread.is_alive(), thread
    gc.collect()


async def in_turns(turns: int) -> None:
    """Let the event loop go round so often."""
    for _ in range(turns):
        await asyncio.sleep(0)
