"""Where a connection to a guest's agent comes from: dialled, dialled by the guest, or given.

The host's end only.
"""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from hotlun.bridge import transport
from hotlun.bridge.listening import Listening
from hotlun.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hotlun.bridge.threaded import Streams

_ANY = 0xFFFFFFFF
"""Of vsock's numbers, which have 32 bits: VMADDR_CID_ANY, VMADDR_PORT_ANY."""


@dataclass(frozen=True)
class Opening:
    """A way to get streams.

    Args:
        opener: gives them, each time anew if `reopens`.
        peer: what they lead to, for people.
        reopens: whether `opener` can be asked again.
        advice: what to look at when no agent has answered.
        begin: is called once when there is a connection for it, before it is entered.
        stop: undoes that, for a connection that will not be entered.
        is_dialled: by the guest, which may do so again.
        runtime_id: the VM's, for a Windows guest to be told; `""` if it is not known.
    """

    opener: Callable[[], Awaitable[Streams]]
    peer: str
    reopens: bool
    advice: str
    begin: Callable[[], None] = lambda: None
    stop: Callable[[], None] = lambda: None
    is_dialled: bool = False
    runtime_id: str = ""


def unix(path: str | os.PathLike[str]) -> Opening:
    """Dial a unix socket.

    Raises:
        UnsupportedError: there are none here: on Windows.
    """
    path = os.fspath(path)
    connect = getattr(asyncio, "open_unix_connection", None)
    if connect is None:
        raise UnsupportedError(
            f"asyncio cannot open {path}: it has no unix sockets on {sys.platform}; "
            "a VM of Hyper-V is reached through the compute service or a Hyper-V socket",
            operation="connect",
        )

    async def opener() -> Streams:
        streams: Streams = await connect(path)
        return streams

    advice = "is the agent running in the guest, and is no other client connected to that socket?"
    return Opening(opener, path, reopens=True, advice=advice)


def given(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Opening:
    """Streams that are open already."""

    async def opener() -> Streams:
        return reader, writer

    peer = str(writer.get_extra_info("peername") or "the given streams")
    return Opening(opener, peer, reopens=False, advice="is an agent at their other end?")


def hyperv(runtime_id: str | uuid.UUID, os_type: str, *, confidential: bool) -> Opening:
    """Be dialled by a guest of Hyper-V; see `BridgeConnection.listen_hyperv`.

    Raises:
        ValueError: no runtime id, or another os_type.
    """
    vm = runtime_id if isinstance(runtime_id, uuid.UUID) else uuid.UUID(runtime_id)
    services = {
        ("linux", False): transport.vsock_service_id(transport.VSOCK_PORT),
        ("linux", True): transport.vsock_service_id(transport.VSOCK_PORT),
        ("windows", False): transport.WINDOWS_SERVICE_ID,
        ("windows", True): transport.CONFIDENTIAL_SERVICE_ID,
    }
    if (os_type, confidential) not in services:
        raise ValueError(f"a guest's os_type is 'linux' or 'windows', not {os_type!r}")
    service = services[os_type, confidential]
    peer = f"the guest of VM {vm}"
    listening = Listening(partial(transport.listen_hyperv, vm, service), peer, in_threads=True)
    advice = (
        f"does the VM run, and its guest an agent (hcsshim's with -v4); is that the RuntimeId of "
        f"the VM; does the HvSocketConfig of its document allow service {service}?"
    )
    return being_dialled(listening, peer, advice, runtime_id=str(vm))


def vsock(cid: int | None, port: int) -> Opening:
    """Be dialled by a guest with a vsock device; see `BridgeConnection.listen_vsock`.

    Raises:
        ValueError: no guest has this cid, or none can dial this port.
    """
    for name, number in (("cid", cid), ("port", port)):
        if number is not None and not 0 <= number < _ANY:
            raise ValueError(f"{name} is a number from 0 to {_ANY - 1}, not {number!r}")
    peer = f"the guest at vsock {'*' if cid is None else cid}:{port}"
    listening = Listening(partial(transport.listen_vsock, port), peer, expects=cid)
    advice = (
        "does the VM run, with a vsock device (vhost-vsock-pci) of that CID, and in it an agent "
        "that dials (`hotlun-agent` without --port)?"
    )
    return being_dialled(listening, peer, advice)


def being_dialled(listening: Listening, peer: str, advice: str, *, runtime_id: str = "") -> Opening:
    """Be dialled at any listening socket."""
    return Opening(
        listening,
        peer,
        reopens=True,
        advice=advice,
        begin=listening.begin,
        stop=listening.stop,
        is_dialled=True,
        runtime_id=runtime_id,
    )
