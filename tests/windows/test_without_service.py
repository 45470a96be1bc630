"""A Windows without the Host Compute Service, as most are, and without Unix sockets, as all are."""

from __future__ import annotations

import pytest

from hotlun.bridge.client import BridgeConnection
from hotlun.errors import UnsupportedError
from hotlun.hcs import enumerate_systems, open_system
from hotlun.hcs.computecore import ComputeCore


def test_the_library_is_missed_with_advice() -> None:
    """The loader's own words, and what to turn on."""
    with pytest.raises(UnsupportedError, match=r"computecore\.dll.*turn on Hyper-V"):
        ComputeCore.load()


async def test_so_it_is_by_whoever_asks() -> None:
    """Not only by who loads it."""
    with pytest.raises(UnsupportedError, match="turn on Hyper-V"):
        async with open_system("vm"):
            raise AssertionError("it was opened")
    with pytest.raises(UnsupportedError, match="turn on Hyper-V"):
        await enumerate_systems()


def test_a_unix_socket_is_not_to_be_had() -> None:
    """Before anything is tried, and with what there is in its place."""
    with pytest.raises(UnsupportedError, match=r"no unix sockets on win32.*Hyper-V socket"):
        BridgeConnection.connect_unix("agent.sock")
