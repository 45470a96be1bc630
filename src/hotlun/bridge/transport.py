"""Where a bridge is found: the addresses that both ends agree on.

On Hyper-V the host listens and the guest dials: a Linux guest through AF_VSOCK,
which the host sees as a Hyper-V socket whose service id is made from the port;
a Windows guest through a service id of its own. Under QEMU the bridge is a
virtio-serial port, a unix socket on the host's side.

Standard library only, for Python 3.9 too: the agent inside the guest runs this file.
"""

from __future__ import annotations

import uuid

VSOCK_PORT = 0x40000000
"""The port that a Linux guest dials."""

VSOCK_HOST_CID = 2
"""The host's address, seen from any guest."""

WINDOWS_SERVICE_ID = uuid.UUID("acef5661-84a1-4e44-856b-6245e69f4620")
"""The service that a Windows guest dials."""


def vsock_service_id(port: int) -> uuid.UUID:
    """The Hyper-V socket service under which the host sees a vsock port."""
    return uuid.UUID(f"{port:08x}-facb-11e6-bd58-64006a7986d3")
