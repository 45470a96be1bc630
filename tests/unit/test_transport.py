"""Sockets that listen for guests: their addresses, and what they say where there are none."""

from __future__ import annotations

import errno
import gc
import socket
import uuid

import pytest

from hotlun import BackendError, UnsupportedError
from hotlun.bridge import transport
from hotlun.bridge.client import BridgeConnection

VM = uuid.UUID("3f2504e0-4f89-11d3-9a0c-0305e82c3301")
PORT = 0x4000_4711

has_vsock = pytest.mark.skipif(
    not hasattr(socket, "AF_VSOCK"), reason="this Python has no vsock sockets"
)


def test_service_ids() -> None:
    """Those that hcsshim's host listens at."""
    assert str(transport.vsock_service_id(transport.VSOCK_PORT)) == (
        "40000000-facb-11e6-bd58-64006a7986d3"
    )
    assert str(transport.vsock_service_id(109)) == "0000006d-facb-11e6-bd58-64006a7986d3"
    assert str(transport.WINDOWS_SERVICE_ID) == "acef5661-84a1-4e44-856b-6245e69f4620"
    assert str(transport.CONFIDENTIAL_SERVICE_ID) == "ae8da506-a019-4553-a52b-902bc0fa0411"


@pytest.fixture
def vsock() -> socket.socket:
    """Listens at PORT."""
    try:
        return transport.listen_vsock(PORT)
    except OSError as error:
        pytest.skip(f"this kernel has no vsock: {error}")


@has_vsock
def test_vsock_listens_for_any_guest(vsock: socket.socket) -> None:
    """At the port that is asked for, for connections."""
    with vsock:
        assert vsock.getsockname() == (socket.VMADDR_CID_ANY, PORT)
        assert vsock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
        assert vsock.type == socket.SOCK_STREAM


@has_vsock
def test_a_port_that_is_taken(vsock: socket.socket) -> None:
    """It says so, and keeps no socket."""
    with vsock:
        with pytest.raises(OSError, match="in use") as caught:
            transport.listen_vsock(PORT)
        assert caught.value.errno == errno.EADDRINUSE
        with pytest.raises(BackendError, match="another process listens for it"):
            BridgeConnection.listen_vsock(3, port=PORT)
        gc.collect()  # of a socket that is left this would warn


@has_vsock
async def test_nobody_dials_over_vsock() -> None:
    """It says what to look at, and the port is free again."""
    try:
        connection = BridgeConnection.listen_vsock(3, port=PORT, timeout=0.1)
    except BackendError as error:
        pytest.skip(f"this kernel has no vsock: {error}")
    with pytest.raises(BackendError, match=r"no connection, .* at the guest at vsock 3:.* CID"):
        await connection.__aenter__()
    transport.listen_vsock(PORT).close()


@pytest.mark.skipif(hasattr(socket, "AF_HYPERV"), reason="this Python has Hyper-V's sockets")
def test_no_hyper_v_sockets() -> None:
    """It says what they take, in the standard library's words."""
    with pytest.raises(NotImplementedError, match="AF_HYPERV sockets: they take Windows"):
        transport.listen_hyperv(VM, transport.WINDOWS_SERVICE_ID)


@pytest.mark.skipif(not hasattr(socket, "AF_HYPERV"), reason="this Python has no such sockets")
def test_hyper_v_sockets_that_cannot_be_had() -> None:
    """No such VM, or no administrator, or no Hyper-V: the system's word, and no socket is kept."""
    with pytest.raises(BackendError, match=f"cannot listen for the guest of VM {VM}"):
        BridgeConnection.listen_hyperv(VM, "windows")
    gc.collect()


@pytest.mark.skipif(hasattr(socket, "AF_VSOCK"), reason="this Python has vsock sockets")
def test_no_vsock() -> None:
    """It says what they take, in hotlun's words."""
    with pytest.raises(UnsupportedError, match="AF_VSOCK sockets: they take Linux"):
        BridgeConnection.listen_vsock()
