"""The modify documents: byte for byte those of hcsshim, and what is refused before any."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from hotlun.backends import requests
from hotlun.bridge import messages
from hotlun.bridge.documents import encode_request
from hotlun.bridge.frames import Frame, encode
from hotlun.bridge.messages import MessageType
from hotlun.errors import UnsupportedError
from hotlun.model import (
    Attachment,
    Disk,
    DiskIdentity,
    DiskKind,
    GuestMount,
    MountConfig,
    Secret,
    Slot,
    Verity,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotlun.backends.base import OSType

ENVELOPE = (
    b'{"ContainerId":"00000000-0000-0000-0000-000000000000",'
    b'"ActivityId":"00000000-0000-0000-0000-000000000000","Request":%s}\n'
)

OURS = (
    messages.FEATURE_OPTIONS,
    messages.FEATURE_FILESYSTEMS,
    messages.FEATURE_PRESERVE_DATA,
    messages.FEATURE_IDENTITY,
    messages.FEATURE_KEYS,
    messages.FEATURE_VERITY,
    messages.FEATURE_LAZY_UNMOUNT,
)
ROOT_HASH = "ab" * 32


def attached(controller: int = 0, lun: int = 0, *, read_only: bool = False) -> Attachment:
    disk = Disk("/srv/a.vhdx", DiskKind.VIRTUAL_DISK, read_only)
    return Attachment(Slot(controller, lun), disk, "h1")


def mounted(
    path: str, controller: int, lun: int, *, read_only: bool = False, **config: Any
) -> GuestMount:
    return GuestMount(attached(controller, lun, read_only=read_only), path, MountConfig(**config))


def sent(request: requests.Request | None) -> bytes:
    assert request is not None
    return encode_request(messages.modify_request(request))


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
    assert sent(requests.mount_request(mount, "linux", OURS)) == ENVELOPE % (
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
    request = requests.mount_request(mount, "linux", OURS)
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
        requests.mount_request(mount, "linux", OURS),
        requests.unmount_request(mount, "linux", OURS),
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


def persistent() -> GuestMount:
    """A mount of which the original agent would understand little."""
    mount = mounted(
        "/srv/data",
        1,
        2,
        partition=3,
        encrypted=True,
        options=["noatime"],
        ensure_filesystem=True,
        filesystem="xfs",
        preserve_data=True,
        key=Secret("open sesame"),
        lazy_unmount=True,
    )
    identity = DiskIdentity("h1", (1 << 40) + 512)
    return GuestMount(mount.attachment, mount.path, mount.config, identity)


def test_what_hcsshim_does_not_know_comes_last() -> None:
    """PreserveData, Serial, Size, Key, LazyUnmount, in this order behind the rest."""
    assert sent(requests.mount_request(persistent(), "linux", OURS)) == ENVELOPE % (
        b'{"RequestType":"Add","ResourceType":"MappedVirtualDisk","Settings":'
        b'{"MountPath":"/srv/data","Lun":2,"Controller":1,"Partition":3,"Encrypted":true,'
        b'"Options":["noatime"],"EnsureFilesystem":true,"Filesystem":"xfs",'
        b'"PreserveData":true,"Serial":"h1","Size":1099511628288,"Key":"b3BlbiBzZXNhbWU=",'
        b'"LazyUnmount":true}}'
    )


def test_remove_never_carries_the_key() -> None:
    """Nor the identity: closing takes neither."""
    assert sent(requests.unmount_request(persistent(), "linux", OURS)) == ENVELOPE % (
        b'{"RequestType":"Remove","ResourceType":"MappedVirtualDisk","Settings":'
        b'{"MountPath":"/srv/data","Lun":2,"Controller":1,"Partition":3,"Encrypted":true,'
        b'"Options":["noatime"],"EnsureFilesystem":true,"Filesystem":"xfs",'
        b'"PreserveData":true,"LazyUnmount":true}}'
    )


@pytest.mark.parametrize(
    ("verity", "member"),
    [
        (ROOT_HASH, b'{"RootHash":"%s"}' % ROOT_HASH.encode()),
        (
            Verity(ROOT_HASH.upper(), 4096),
            b'{"RootHash":"%s","HashOffset":4096}' % ROOT_HASH.encode(),
        ),
    ],
)
def test_verity_is_an_object(verity: Verity | str, member: bytes) -> None:
    """On Add and on Remove; a hash tree right behind the filesystem has no offset."""
    mount = mounted("/m", 0, 0, read_only=True, verity=verity, block_device=True)
    for build, verb in ((requests.mount_request, b"Add"), (requests.unmount_request, b"Remove")):
        assert sent(build(mount, "linux", OURS)) == ENVELOPE % (
            b'{"RequestType":"%s","ResourceType":"MappedVirtualDisk","Settings":'
            b'{"MountPath":"/m","ReadOnly":true,"BlockDev":true,"Verity":%s}}' % (verb, member)
        )


def test_identity_is_for_whom_it_says_something() -> None:
    """Not for an agent without the feature, nor for Windows; what is not known is left out."""
    plain = mounted("/m", 0, 0)
    path = r"c:\m"

    def settings(identity: DiskIdentity | None, *features: str) -> dict[str, Any]:
        mount = GuestMount(plain.attachment, plain.path, plain.config, identity)
        return dict(requests.mount_request(mount, "linux", features)["Settings"])

    whole, serial = DiskIdentity("h1", 1 << 20), DiskIdentity("h1")
    feature = messages.FEATURE_IDENTITY
    assert settings(whole) == settings(None, feature) == {"MountPath": "/m"}
    assert settings(serial, feature) == {"MountPath": "/m", "Serial": "h1"}
    assert settings(whole, feature) == {"MountPath": "/m", "Serial": "h1", "Size": 1 << 20}
    windows = GuestMount(plain.attachment, path, plain.config, whole)
    assert requests.mount_request(windows, "windows", OURS)["Settings"] == {"ContainerPath": path}


def test_a_request_does_not_show_its_key() -> None:
    """Only on the wire is it text."""
    request = requests.mount_request(persistent(), "linux", OURS)
    assert request["Settings"]["Key"] == "b3BlbiBzZXNhbWU="
    assert "b3Bl" not in f"{request} {request!r}"


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
    """A fifth controller would kill the original agent: each refuses, naming slot and disk."""
    path = "/m" if os_type == "linux" else r"c:\m"
    mount = mounted(path, controller, lun)
    calls: dict[str, Callable[[], object]] = {
        "mount": lambda: requests.mount_request(mount, os_type),
        "unmount": lambda: requests.unmount_request(mount, os_type),
    }
    if os_type == "linux":
        calls["unplug"] = lambda: requests.unplug_request(mount.attachment, os_type)
    else:  # which is told of no unplug
        assert requests.unplug_request(mount.attachment, os_type) is None
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


def test_the_scratch_of_a_windows_container() -> None:
    """Added as one, and removed as any other disk."""
    mount = mounted(r"c:\mounts\scsi\m1", 0, 4, container_scratch=True)
    document = (
        b'{"RequestType":"%s","ResourceType":"%s","Settings":'
        b'{"ContainerPath":"c:\\\\mounts\\\\scsi\\\\m1","Lun":4}}'
    )
    assert sent(requests.mount_request(mount, "windows")) == ENVELOPE % (
        document % (b"Add", b"MappedVirtualDiskForContainerScratch")
    )
    assert sent(requests.unmount_request(mount, "windows")) == ENVELOPE % (
        document % (b"Remove", b"MappedVirtualDisk")
    )


@pytest.mark.parametrize(
    ("os_type", "read_only", "problem"),
    [
        ("linux", False, r"a Linux guest does not know container_scratch; use encrypted=True"),
        ("windows", True, r"formats it, and it is read-only; attach it writable"),
    ],
)
def test_a_scratch_that_cannot_be(os_type: OSType, read_only: bool, problem: str) -> None:
    """Before anything is touched, and with what to do."""
    path = "/m" if os_type == "linux" else r"c:\m"
    mount = mounted(path, 0, 0, read_only=read_only, container_scratch=True)
    with pytest.raises(UnsupportedError, match=problem) as caught:
        requests.check(mount.attachment.disk, mount.config, mount.path, os_type, OURS)
    assert caught.value.disk == mount.attachment.disk


@pytest.mark.parametrize(
    "config",
    [
        {"partition": 1},
        {"options": ["noatime"]},
        {"filesystem": "ntfs"},
        {"ensure_filesystem": True, "filesystem": "refs"},
        {"encrypted": True, "ensure_filesystem": True, "filesystem": "refs"},
        {"block_device": True},
        {"preserve_data": True, "ensure_filesystem": True, "filesystem": "refs"},
        {"key": Secret("k"), "encrypted": True},
        {"verity": ROOT_HASH},
        {"lazy_unmount": True},
    ],
)
def test_windows_guest_is_asked_for_nothing_it_cannot_do(config: dict[str, Any]) -> None:
    """Each is refused by name; the guest would drop it."""
    mount = mounted(r"c:\m", 0, 0, **config)
    with pytest.raises(UnsupportedError, match=next(iter(config))) as caught:
        requests.check(mount.attachment.disk, mount.config, mount.path, "windows", OURS)
    assert caught.value.disk == mount.attachment.disk
    with pytest.raises(UnsupportedError):
        requests.mount_request(mount, "windows", OURS)


@pytest.mark.parametrize(
    ("config", "feature"),
    [
        ({"options": ["noatime"]}, messages.FEATURE_OPTIONS),
        ({"options": ["rshared", "data=ordered"]}, messages.FEATURE_OPTIONS),
        ({"ensure_filesystem": True, "filesystem": "xfs"}, messages.FEATURE_FILESYSTEMS),
        (
            {"ensure_filesystem": True, "filesystem": "ext4", "preserve_data": True},
            messages.FEATURE_PRESERVE_DATA,
        ),
        ({"encrypted": True, "key": Secret("k")}, messages.FEATURE_KEYS),
        ({"verity": ROOT_HASH}, messages.FEATURE_VERITY),
        ({"lazy_unmount": True}, messages.FEATURE_LAZY_UNMOUNT),
    ],
)
def test_what_takes_a_feature(config: dict[str, Any], feature: str) -> None:
    """Without it nothing is made of the config, so that nobody sends half of it."""
    mount = mounted("/m", 0, 0, read_only=True, **config)
    disk = mount.attachment.disk
    others = tuple(name for name in OURS if name != feature)
    for features in ((), others):
        with pytest.raises(UnsupportedError, match="hotlun's agent") as caught:
            requests.check(disk, mount.config, mount.path, "linux", features)
        assert (caught.value.operation, caught.value.disk) == ("mount", disk)
        with pytest.raises(UnsupportedError):
            requests.mount_request(mount, "linux", features)
    requests.check(disk, mount.config, mount.path, "linux", (feature,))


def test_verity_is_for_disks_that_nobody_writes() -> None:
    """Refused whatever the agent can, with the way out."""
    mount = mounted("/m", 0, 0, verity=ROOT_HASH)
    with pytest.raises(UnsupportedError, match="read_only=True"):
        requests.mount_request(mount, "linux", OURS)


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
