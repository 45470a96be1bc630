"""The modify documents: byte for byte those of hcsshim, and what is refused before any."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from hotlun.backends import requests
from hotlun.bridge import messages
from hotlun.bridge.frames import Frame, encode
from hotlun.bridge.messages import MessageType
from hotlun.errors import UnsupportedError
from hotlun.model import Attachment, Disk, DiskKind, GuestMount, MountConfig, Slot

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotlun.backends.base import OSType

ENVELOPE = (
    b'{"ContainerId":"00000000-0000-0000-0000-000000000000",'
    b'"ActivityId":"00000000-0000-0000-0000-000000000000","Request":%s}\n'
)


def attached(controller: int = 0, lun: int = 0, *, read_only: bool = False) -> Attachment:
    disk = Disk("/srv/a.vhdx", DiskKind.VIRTUAL_DISK, read_only)
    return Attachment(Slot(controller, lun), disk, "h1")


def mounted(
    path: str, controller: int, lun: int, *, read_only: bool = False, **config: Any
) -> GuestMount:
    return GuestMount(attached(controller, lun, read_only=read_only), path, MountConfig(**config))


def sent(request: requests.Request | None) -> bytes:
    assert request is not None
    return messages.encode_request(messages.modify_request(request))


def test_add_is_261_bytes() -> None:
    """Controller 0 and everything else that is zero is left out."""
    request = requests.mount_request(mounted("/run/mounts/scsi/m0", 0, 1, read_only=True), "linux")
    payload = sent(request)
    assert payload == ENVELOPE % (
        b'{"RequestType":"Add","ResourceType":"MappedVirtualDisk","Settings":'
        b'{"MountPath":"/run/mounts/scsi/m0","Lun":1,"ReadOnly":true}}'
    )
    data = encode(Frame(MessageType.MODIFY_SETTINGS, 1, payload))
    assert len(data) == 261
    assert data[:16].hex(" ") == "01 0a 10 10 05 01 00 00 01 00 00 00 00 00 00 00"


def test_encrypted_scratch() -> None:
    """As hcsshim asks for it."""
    mount = mounted("/run/gcs/c/x", 1, 2, encrypted=True, ensure_filesystem=True, filesystem="xfs")
    assert sent(requests.mount_request(mount, "linux")) == ENVELOPE % (
        b'{"RequestType":"Add","ResourceType":"MappedVirtualDisk","Settings":'
        b'{"MountPath":"/run/gcs/c/x","Lun":2,"Controller":1,"Encrypted":true,'
        b'"EnsureFilesystem":true,"Filesystem":"xfs"}}'
    )


def test_member_order_with_many_set() -> None:
    """MountPath, Lun, Controller, Partition, ReadOnly, Options, Filesystem."""
    mount = mounted(
        "/mnt/d", 3, 7, read_only=True, partition=2, options=["ro", "rshared"], filesystem="ext4"
    )
    assert sent(requests.mount_request(mount, "linux")) == ENVELOPE % (
        b'{"RequestType":"Add","ResourceType":"MappedVirtualDisk","Settings":{"MountPath":"/mnt/d",'
        b'"Lun":7,"Controller":3,"Partition":2,"ReadOnly":true,"Options":["ro","rshared"],'
        b'"Filesystem":"ext4"}}'
    )


def test_block_device() -> None:
    """BlockDev stands where hcsshim puts it, and slot 0:0 is not named at all."""
    mount = mounted("/dev/mine", 0, 0, block_device=True)
    assert sent(requests.mount_request(mount, "linux")) == ENVELOPE % (
        b'{"RequestType":"Add","ResourceType":"MappedVirtualDisk","Settings":'
        b'{"MountPath":"/dev/mine","BlockDev":true}}'
    )


def test_options_keep_the_callers_order() -> None:
    """Sorting would change what a later flag undoes."""
    mount = mounted("/m", 0, 0, options=["noatime", "data=ordered", "dev", "noatime"])
    request = requests.mount_request(mount, "linux")
    assert request["Settings"]["Options"] == ["noatime", "data=ordered", "dev", "noatime"]


def test_remove_carries_the_whole_config() -> None:
    """Encrypted above all: the agent closes the mapping by it."""
    mount = mounted(
        "/m",
        2,
        3,
        partition=1,
        encrypted=True,
        options=["noatime"],
        ensure_filesystem=True,
        filesystem="ext4",
    )
    add, remove = (
        requests.mount_request(mount, "linux"),
        requests.unmount_request(mount, "linux"),
    )
    assert remove == {**add, "RequestType": "Remove"}
    assert list(remove) == ["RequestType", "ResourceType", "Settings"]


def test_plain_remove() -> None:
    """For a plain mount it is the document that hcsshim sends."""
    request = requests.unmount_request(
        mounted("/run/mounts/scsi/m0", 0, 1, read_only=True), "linux"
    )
    assert sent(request) == ENVELOPE % (
        b'{"RequestType":"Remove","ResourceType":"MappedVirtualDisk","Settings":'
        b'{"MountPath":"/run/mounts/scsi/m0","Lun":1,"ReadOnly":true}}'
    )


def test_unplug_of_the_first_slot_has_empty_settings() -> None:
    """Empty, but there: 200 bytes in all."""
    payload = sent(requests.unplug_request(attached(0, 0), "linux"))
    assert payload == ENVELOPE % (
        b'{"RequestType":"Remove","ResourceType":"SCSIDevice","Settings":{}}'
    )
    assert len(encode(Frame(MessageType.MODIFY_SETTINGS, 1, payload))) == 200


def test_unplug_names_the_slot() -> None:
    """Controller, then LUN."""
    assert sent(requests.unplug_request(attached(3, 63), "linux")) == ENVELOPE % (
        b'{"RequestType":"Remove","ResourceType":"SCSIDevice","Settings":{"Controller":3,"Lun":63}}'
    )


def test_windows_documents() -> None:
    """A path and a LUN; read-only works through the attachment; unplug needs no word."""
    mount = mounted(r"c:\mounts\scsi\m0", 0, 2, read_only=True)
    for build, verb in (
        (requests.mount_request, b"Add"),
        (requests.unmount_request, b"Remove"),
    ):
        assert sent(build(mount, "windows")) == ENVELOPE % (
            b'{"RequestType":"%s","ResourceType":"MappedVirtualDisk","Settings":'
            b'{"ContainerPath":"c:\\\\mounts\\\\scsi\\\\m0","Lun":2}}' % verb
        )
    assert requests.unplug_request(attached(0, 2), "windows") is None


@pytest.mark.parametrize(
    ("os_type", "controller", "lun"),
    [("linux", 4, 0), ("linux", 0, 256), ("windows", 1, 0), ("windows", 0, 256)],
)
def test_slot_that_the_guest_does_not_have(os_type: OSType, controller: int, lun: int) -> None:
    """A fifth controller would kill the original agent: all three refuse, naming slot and disk."""
    path = "/m" if os_type == "linux" else r"c:\m"
    mount = mounted(path, controller, lun)
    calls: dict[str, Callable[[], object]] = {
        "mount": lambda: requests.mount_request(mount, os_type),
        "unmount": lambda: requests.unmount_request(mount, os_type),
        "unplug": lambda: requests.unplug_request(mount.attachment, os_type),
    }
    for operation, refused in calls.items():
        with pytest.raises(UnsupportedError, match=f"{controller}:{lun}") as caught:
            refused()
        assert caught.value.operation == operation
        assert caught.value.slot == Slot(controller, lun)
        assert caught.value.disk == mount.attachment.disk


def test_largest_slot() -> None:
    """The bridge can say 3:255, the compute service 3:63."""
    assert requests.mount_request(mounted("/m", 3, 255), "linux")["Settings"]["Lun"] == 255
    assert requests.mount_request(mounted("/m", 3, 63), "linux", max_lun=63)
    with pytest.raises(UnsupportedError, match="LUNs 0 to 63"):
        requests.mount_request(mounted("/m", 3, 64), "linux", max_lun=63)
    with pytest.raises(UnsupportedError, match="LUNs 0 to 63"):
        requests.unmount_request(mounted("/m", 3, 64), "linux", max_lun=63)
    with pytest.raises(UnsupportedError, match="LUNs 0 to 63"):
        requests.unplug_request(attached(3, 64), "linux", max_lun=63)


@pytest.mark.parametrize(
    "config",
    [
        {"partition": 1},
        {"options": ["noatime"]},
        {"filesystem": "ntfs"},
        {"ensure_filesystem": True, "filesystem": "refs"},
        {"encrypted": True, "ensure_filesystem": True, "filesystem": "refs"},
        {"block_device": True},
    ],
)
def test_windows_guest_is_asked_for_nothing_it_cannot_do(config: dict[str, Any]) -> None:
    """Each is refused by name; the guest would drop it."""
    mount = mounted(r"c:\m", 0, 0, **config)
    with pytest.raises(UnsupportedError, match=next(iter(config))) as caught:
        requests.check(mount.attachment.disk, mount.config, mount.path, "windows")
    assert caught.value.disk == mount.attachment.disk
    with pytest.raises(UnsupportedError):
        requests.mount_request(mount, "windows")


@pytest.mark.parametrize(
    ("os_type", "path"),
    [
        ("linux", ""),
        ("linux", "mnt"),
        ("linux", "c:\\m"),
        ("linux", "/mnt/\udc80"),
        ("linux", "/a/../b"),
        ("windows", ""),
        ("windows", "/mnt"),
        ("windows", "c:m"),
    ],
)
def test_path_that_the_guest_cannot_take(os_type: OSType, path: str) -> None:
    """An empty one above all: the original agent would mount nothing and say that it did."""
    with pytest.raises(UnsupportedError, match="another path"):
        requests.mount_request(mounted(path, 0, 0), os_type)
