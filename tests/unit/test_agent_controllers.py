"""The host's controller numbers, mapped to the guest's SCSI hosts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.guest import FakeGuest

from hotlun.agent.controllers import VMBUS_GUIDS, Controllers, NoControllerError
from hotlun.agent.errors import RequestError
from hotlun.bridge.codes import HResult

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
    controllers = Controllers(guest.kernel)
    assert [controllers.scsi_host(n) for n in range(4)] == [2, 11, 0, 1]


def test_hyper_v_controllers_are_known_by_their_guids(guest: FakeGuest) -> None:
    """A gap stays a gap: the others keep their numbers."""
    guest.add_vmbus_controller(VMBUS_GUIDS[0], 3)
    guest.add_vmbus_controller(VMBUS_GUIDS[2].upper(), 1)
    guest.add_vmbus_controller("99999999-0000-0000-0000-000000000000", 0)
    controllers = Controllers(guest.kernel)
    assert controllers.scsi_host(0) == 3
    assert controllers.scsi_host(2) == 1
    with pytest.raises(RequestError, match=r"no SCSI controller 1; it has 0, 2"):
        controllers.scsi_host(1)


def test_a_controller_that_is_not_there_is_named(guest: FakeGuest) -> None:
    """At once, and with those that there are."""
    with pytest.raises(RequestError, match=r"no SCSI controller 255; it has 0$") as caught:
        Controllers(guest.kernel).scsi_host(255)
    assert caught.value.code == HResult.NOT_FOUND


def test_controllers_that_come_and_go_are_counted_anew(guest: FakeGuest) -> None:
    """What was found before is believed only while all is as it was."""
    controllers = Controllers(guest.kernel)
    assert controllers.scsi_host(0) == 2
    guest.add_virtio_controller("0000:00:02.0", 1, 5)
    assert [controllers.scsi_host(n) for n in (0, 1)] == [5, 2]
    link = guest.sys / "bus/virtio/drivers/virtio_scsi/virtio1"
    link.unlink()
    assert controllers.scsi_host(0) == 2
    with pytest.raises(NoControllerError, match="no SCSI controller 1"):
        controllers.scsi_host(1)


def test_a_controller_that_its_driver_found_again_has_another_host(guest: FakeGuest) -> None:
    """Its name and its place are those of before."""
    controllers = Controllers(guest.kernel)
    guest.add_virtio_controller("0000:00:04.0", 1, 5)
    assert controllers.scsi_host(1) == 5
    link = guest.sys / "bus/virtio/drivers/virtio_scsi/virtio1"
    device = link.readlink()
    again = link.with_name("again")
    again.symlink_to(device)  # while the other is there, so that it has an inode of its own
    again.replace(link)
    (device / "host5").rename(device / "host6")
    assert controllers.scsi_host(1) == 6


def test_a_guid_has_another_host_once_its_host_has_gone(guest: FakeGuest) -> None:
    """The device stays when its driver lets it go."""
    controllers = Controllers(guest.kernel)
    guest.add_vmbus_controller(VMBUS_GUIDS[0], 3)
    assert controllers.scsi_host(0) == 3
    device = guest.sys / "bus/vmbus/devices" / VMBUS_GUIDS[0]
    (device / "host3").rename(device / "host4")
    assert controllers.scsi_host(0) == 4


def test_what_was_found_is_proved_by_one_look(
    guest: FakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look for a controller costs more than all else that finds a disk."""
    controllers = Controllers(guest.kernel)
    assert controllers.scsi_host(0) == 2
    monkeypatch.setattr(guest.kernel, "names", None)
    assert controllers.scsi_host(0) == 2
