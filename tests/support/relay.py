"""A unix socket in front of another one, to be cut at a chosen moment."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Relay:
    """Passes bytes on, until something is said or until it is told not to."""

    def __init__(self, target: str, path: str) -> None:
        self.path = path
        self.met = asyncio.Event()
        """Set when the trigger has been met."""
        self.target = target
        """Where the next connection goes."""
        self._trigger = b""
        self._cuts = False
        self._silent = False
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    @asynccontextmanager
    async def to(cls, target: str, folder: os.PathLike[str]) -> AsyncIterator[Relay]:
        """A relay in front of the socket `target`, listening at its own `path`."""
        relay = cls(target, os.path.join(folder, f"relay-{os.path.basename(target)}"))
        server = await asyncio.start_unix_server(relay._serve, relay.path)
        try:
            yield relay
        finally:
            server.close()
            relay.cut()
            await asyncio.gather(*relay._tasks)
            await server.wait_closed()
            with suppress(FileNotFoundError):  # Python 3.13's servers take it away
                os.unlink(relay.path)

    def cut_after(self, words: bytes) -> None:
        """Pass on the request that has these words, then close the connection at once."""
        self._trigger, self._cuts = words, True
        self.met.clear()

    def silent_after(self, words: bytes) -> None:
        """Pass on the request that has these words, and no answer after it."""
        self._trigger, self._cuts = words, False
        self.met.clear()

    def speak(self) -> None:
        """Pass answers on again, if it was silent; those before it are lost."""
        self._silent = False

    def cut(self) -> None:
        """Close both sides of every connection."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()
        self._silent = False

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(self.target)
        self._writers += [writer, back]
        for source, sink, asks in ((reader, back, True), (there, writer, False)):
            task = asyncio.create_task(self._pass_on(source, sink, asks))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, asks: bool
    ) -> None:
        with suppress(OSError):
            while data := await source.read(1 << 16):
                if asks or not self._silent:
                    sink.write(data)
                    await sink.drain()
                if asks and self._trigger and self._trigger in data:
                    self._trigger = b""
                    self.met.set()
                    if self._cuts:
                        self.cut()
                    self._silent = not self._cuts
        sink.close()
