"""Where a bridge is found: the addresses that both ends agree on.

On Hyper-V the host listens and the guest dials: a Linux guest through AF_VSOCK,
which the host sees as a Hyper-V socket whose service id is made from the port;
a Windows guest through a service id of its own. Under QEMU the bridge is a
virtio-serial port, a unix socket on the host's side.

Standard library only, for Python 3.9 too: the agent inside the guest runs this file.
"""

from __future__ import annotations

import socket
import uuid
from typing import Any, cast

VSOCK_PORT = 0x40000000
"""The port that a Linux guest dials."""

VSOCK_HOST_CID = 2
"""The host's address, seen from any guest."""

WINDOWS_SERVICE_ID = uuid.UUID("acef5661-84a1-4e44-856b-6245e69f4620")
"""The service that a Windows guest dials."""

CONFIDENTIAL_SERVICE_ID = uuid.UUID("ae8da506-a019-4553-a52b-902bc0fa0411")
"""The service that a confidential Windows guest dials, whose agent is a sidecar."""

_HV_PROTOCOL_RAW = 1
_BACKLOG = 16


def vsock_service_id(port: int) -> uuid.UUID:
    """The Hyper-V socket service under which the host sees a vsock port."""
    return uuid.UUID(f"{port:08x}-facb-11e6-bd58-64006a7986d3")


def listen_hyperv(runtime_id: uuid.UUID, service_id: uuid.UUID) -> socket.socket:
    """A listening socket of a Hyper-V host, for one VM alone.

    Args:
        runtime_id: the VM's.
        service_id: what its guest dials.

    Raises:
        NotImplementedError: this Python has no such sockets.
        OSError: it cannot be bound: the process is no administrator's, or another one listens.
    """
    family = _family("AF_HYPERV", "they take Windows and Python 3.12")
    listener = socket.socket(family, socket.SOCK_STREAM, _HV_PROTOCOL_RAW)
    return _bound(listener, (str(runtime_id), str(service_id)))


def listen_vsock(port: int = VSOCK_PORT) -> socket.socket:
    """A listening socket of a Linux host, for every VM with a vsock device.

    Raises:
        NotImplementedError: this Python has no such sockets.
        OSError: it cannot be bound: another process listens, or the kernel has no vsock.
    """
    family = _family("AF_VSOCK", "they take Linux")
    anybody = getattr(socket, "VMADDR_CID_ANY", 0xFFFFFFFF)
    return _bound(socket.socket(family, socket.SOCK_STREAM), (anybody, port))


def _family(name: str, takes: str) -> int:
    family = getattr(socket, name, None)
    if family is None:
        raise NotImplementedError(f"this Python has no {name} sockets: {takes}")
    return cast("int", family)


def _bound(listener: socket.socket, address: Any) -> socket.socket:
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
