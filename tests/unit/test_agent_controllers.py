"""The host's controller numbers, mapped to the guest's SCSI hosts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.guest import FakeGuest

from hotlun.agent.controllers import VMBUS_GUIDS, scsi_host
from hotlun.agent.errors import RequestError
from hotlun.bridge.messages import HResult

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FakeGuest]:
    guest = FakeGuest(tmp_path)
    yield guest
    guest.close()


def test_virtio_controllers_are_counted_by_their_pci_address(guest: FakeGuest) -> None:
    """Neither the order in which drivers found them counts nor how names sort."""
    guest.add_virtio_controller("0000:00:0a.0", 10, 0)
    guest.add_virtio_controller("0000:00:04.0", 2, 11)
    guest.add_virtio_controller("0000:00:1c.0/0000:01:00.0", 1, 1)
    assert [scsi_host(guest.kernel, n) for n in range(4)] == [2, 11, 0, 1]


def test_hyper_v_controllers_are_known_by_their_guids(guest: FakeGuest) -> None:
    """A gap stays a gap: the others keep their numbers."""
    guest.add_vmbus_controller(VMBUS_GUIDS[0], 3)
    guest.add_vmbus_controller(VMBUS_GUIDS[2].upper(), 1)
    guest.add_vmbus_controller("99999999-0000-0000-0000-000000000000", 0)
    assert scsi_host(guest.kernel, 0) == 3
    assert scsi_host(guest.kernel, 2) == 1
    with pytest.raises(RequestError, match=r"no SCSI controller 1; it has 0, 2"):
        scsi_host(guest.kernel, 1)


def test_a_controller_that_is_not_there_is_named(guest: FakeGuest) -> None:
    """At once, and with those that there are."""
    with pytest.raises(RequestError, match=r"no SCSI controller 255; it has 0$") as caught:
        scsi_host(guest.kernel, 255)
    assert caught.value.code == HResult.NOT_FOUND
