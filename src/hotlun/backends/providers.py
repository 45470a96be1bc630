"""Extensible virtual disks under QEMU: a table of providers, each a way to reach a server.

`evd://nbd/...` is an export of a Network Block Device server, in one of two forms:

| path | server | export |
|---|---|---|
| `unix:/run/nbd.sock` | a unix socket: absolute path, no colon in it | the default one |
| `unix:/run/nbd.sock:export` | | what follows the second colon |
| `host:port` | TCP; an IPv6 address stands in `[]` | the default one |
| `host:port/export` | | what follows the first slash |

An export's name is taken byte for byte; nothing is unescaped.

While QEMU (7.2) opens such a disk the whole VM stands still, for ever if the server
hangs. So it is given a time limit, which has a price: up to that limit QEMU also
tries a server again that is dead. A unix socket that is missing is found out
before. Once open, a server that hangs is to the guest a slow disk.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from hotlun.errors import BackendError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hotlun.model import Disk

_OPEN_TIMEOUT = 3
"""Seconds for reaching a server and agreeing with it."""
_LONGEST_SOCKET_PATH = 107
_LONGEST_EXPORT = 4096
_UNIX = re.compile(r"unix:(?P<socket>/[^:]+)(?::(?P<export>.*))?", re.DOTALL)
_TCP = re.compile(
    r"(?:\[(?P<address>[0-9A-Fa-f:.%]+)\]|(?P<host>[A-Za-z0-9._-]+)):(?P<port>[0-9]{1,5})"
    r"(?:/(?P<export>.*))?",
    re.DOTALL,
)


def provider_node(disk: Disk, *, is_open: bool = False) -> dict[str, object]:
    """The block driver's options that reach the disk.

    Args:
        disk: the disk.
        is_open: QEMU has it open already, so that it need not be within reach of this process.

    Raises:
        UnsupportedError: there is no such provider.
        BackendError: the provider cannot make sense of the path.
    """
    try:
        provider = PROVIDERS[disk.provider]
    except KeyError:
        raise UnsupportedError(
            f"no provider {disk.provider!r} under QEMU; there is {', '.join(PROVIDERS)}"
        ) from None
    return provider(disk.path, is_open)


def nbd_server(path: str) -> tuple[dict[str, str], str]:
    """The server, as QEMU's `SocketAddress`, and the export that a path means.

    Raises:
        BackendError: the path has neither of the two forms.
    """
    if unix := _UNIX.fullmatch(path):
        server = {"type": "unix", "path": unix["socket"]}
        export = unix["export"] or ""
        is_good = len(unix["socket"].encode()) <= _LONGEST_SOCKET_PATH
    elif not path.startswith("unix:") and (tcp := _TCP.fullmatch(path)):
        server = {"type": "inet", "host": tcp["address"] or tcp["host"], "port": tcp["port"]}
        export = tcp["export"] or ""
        is_good = 0 < int(tcp["port"]) < 1 << 16
    else:
        is_good = False
    if not is_good or len(export.encode()) > _LONGEST_EXPORT:
        raise BackendError(
            f"nobody can be reached at evd://nbd/{path}; "
            "give evd://nbd/unix:/SOCKET[:EXPORT] or evd://nbd/HOST:PORT[/EXPORT]"
        )
    return server, export


def _nbd(path: str, is_open: bool) -> dict[str, object]:
    server, export = nbd_server(path)
    if server["type"] == "unix" and not is_open and not os.path.exists(server["path"]):
        raise BackendError(
            f"there is no socket {server['path']}; start the server, or correct the path"
        )
    return {"driver": "nbd", "server": server, "export": export, "open-timeout": _OPEN_TIMEOUT}


PROVIDERS: Mapping[str, Callable[[str, bool], dict[str, object]]] = {"nbd": _nbd}
"""Provider -> what makes a block driver's options of a path."""
