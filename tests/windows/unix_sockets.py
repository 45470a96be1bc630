"""asyncio's functions for Unix sockets, by TCP, for tests: Windows' event loop has none.

A plugin of pytest's. What speaks over streams is tested there as on Linux by it; how a stream is
come by on Windows is not. The path is a file that says the port.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

_HOST = "127.0.0.1"


async def start_unix_server(
    callback: Any, path: str | os.PathLike[str], *, cleanup_socket: bool = False, **more: Any
) -> asyncio.Server:
    """As asyncio's, but that the path stays."""
    assert not cleanup_socket
    server = await asyncio.start_server(callback, _HOST, 0, **more)
    Path(path).write_text(str(server.sockets[0].getsockname()[1]))
    return server


async def open_unix_connection(
    path: str | os.PathLike[str], **more: Any
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """As asyncio's."""
    return await asyncio.open_connection(_HOST, int(Path(path).read_text()), **more)


for function in (start_unix_server, open_unix_connection):
    setattr(asyncio, function.__name__, function)
