#!/usr/bin/env python3
"""The other ends of `bridge.py`, each a process of its own at a unix socket.

    python bridge_peers.py agent PATH
    python bridge_peers.py answer PATH REQUEST ANSWER

`agent` is the agent's server, over disks with which nothing is done; `answer` has for each
REQUEST bytes that come ANSWER bytes, and looks at none of them. Both say when they listen.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import TYPE_CHECKING

from hotlun.agent.links import SocketLink
from hotlun.agent.queries import DiskQuery, Found
from hotlun.agent.server import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hotlun.agent.settings import DiskSettings, Slot


class NoDisks:
    """Disks with which all is done at once; asked what there is, it has a lot to say."""

    def mount(self, settings: DiskSettings, wanted: Callable[[], bool]) -> None:
        pass

    def unmount(self, settings: DiskSettings) -> None:
        pass

    def unplug(self, slot: Slot, timeout: float | None) -> None:
        pass

    def survey(self, asked: list[DiskQuery]) -> list[Found]:
        return [Found("x" * int(disk.serial), []) for disk in asked]


def links(path: str) -> Iterator[SocketLink]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        tell()
        while True:
            yield SocketLink(listener.accept()[0])


async def answer(path: str, request: int, size: int) -> None:
    data = bytes(size)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came = 0
        while part := await reader.read(1 << 16):
            came += len(part)
            whole, came = divmod(came, request)
            if whole:
                writer.write(data * whole)
                await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(serve, path) as server:
        tell()
        await server.serve_forever()


def tell() -> None:
    print("listening", flush=True)


if __name__ == "__main__":
    kind, place, *sizes = sys.argv[1:]
    if kind == "agent":
        Server(NoDisks()).serve_all(links(place))
    else:
        asyncio.run(answer(place, *map(int, sizes)))
