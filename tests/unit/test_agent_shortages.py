"""Every system call of every kind of request fails once, and nothing is left open or claimed.

In the fuzz's guest, which is nothing but memory. A descriptor that is forgotten there is
more than a leak: an exclusive one holds the disk until the agent ends.
"""

from __future__ import annotations

import base64
import errno
import itertools
from typing import TYPE_CHECKING, Any

import pytest
from fuzz import mutation
from fuzz.grammar import KEYS, ROOT_HASH, Message
from fuzz.inputs import Input
from fuzz.target import Target

from hotlun.bridge import messages
from hotlun.bridge.messages import MessageType

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY = base64.b64encode(KEYS[0]).decode()
DISK = ("Add", "MappedVirtualDisk")
SURVEY = ("", "")
MAKING = {"EnsureFilesystem": True, "Filesystem": "ext4"}

REQUESTS: dict[str, list[tuple[tuple[str, str], dict[str, Any]]]] = {
    "a mount": [(DISK, {})],
    "a mount below a new folder": [(DISK, {"MountPath": "/run/a/b/m0"})],
    "a mount twice": [(DISK, {"Options": ["nodev", "rshared"]})] * 2,
    "a mount with an option for mount(2)": [(DISK, {"Options": ["acl"]})],
    "a partition": [(DISK, {"Lun": 3, "Partition": 1})],
    "a partition that is not there": [(DISK, {"Partition": 3})],
    "a link": [(DISK, {"BlockDev": True})] * 2,
    "a new filesystem": [(DISK, {"Lun": 1, **MAKING})],
    "an encrypted disk": [(DISK, {"Lun": 1, "Encrypted": True, **MAKING})],
    "a volume that is there": [(DISK, {"Lun": 4, "Encrypted": True, "Key": KEY})],
    "a new volume": [(DISK, {"Lun": 1, "Encrypted": True, "Key": KEY, **MAKING})],
    "a verified disk": [(DISK, {"Lun": 5, "ReadOnly": True, "Verity": {"RootHash": ROOT_HASH}})],
    "a stale disk": [
        (DISK, {"Lun": 2, "Controller": 1, "Serial": "disk-2-new", "Filesystem": "xfs"})
    ],
    "an unmount": [(DISK, {}), (("Remove", "MappedVirtualDisk"), {})],
    "an unmount of a volume": [
        (DISK, {"Lun": 4, "Encrypted": True, "Key": KEY}),
        (("Remove", "MappedVirtualDisk"), {"Lun": 4}),
    ],
    "an unmount of a link": [
        (DISK, {"BlockDev": True}),
        (("Remove", "MappedVirtualDisk"), {"BlockDev": True}),
    ],
    "an unplug": [(("Remove", "SCSIDevice"), {})],
    "an unplug of what is in use": [(("Remove", "SCSIDevice"), {"Controller": 1})],
    "a survey of a mount": [(SURVEY, {"Serial": "disk-0"})],
    "a survey of a partition": [(SURVEY, {"Lun": 3, "Partition": 1})],
    "a survey of a link": [(SURVEY, {"BlockDev": True})],
    "a survey of a volume": [(SURVEY, {"Lun": 4, "Encrypted": True})],
    "a survey of a verified disk": [(SURVEY, {"Lun": 5, "Verity": {"RootHash": ROOT_HASH}})],
}

REFUSED = ("a partition that is not there", "an unplug of what is in use")
SHORTAGES = (errno.EMFILE, errno.ENOMEM, errno.EIO)


@pytest.fixture
def target() -> Iterator[Target]:
    target = Target()
    with target.listening():
        yield target


def given(requests: list[tuple[tuple[str, str], dict[str, Any]]], faults: dict[int, int]) -> Input:
    """A greeting, then these, one link's."""
    talk = [Message(MessageType.NEGOTIATE_PROTOCOL, 1, messages.negotiate_request())]
    for number, ((kind, resource), settings) in enumerate(requests, 2):
        if (kind, resource) == SURVEY:
            disk = {name: settings[name] for name in ("Lun", "Serial") if name in settings}
            disk["Mounts"] = [{"MountPath": "/run/mounts/m0", **settings}]
            document = messages.properties_request({messages.EXTENSION: {"Disks": [disk]}})
            talk.append(Message(MessageType.GET_PROPERTIES, number, document))
            continue
        if resource == "MappedVirtualDisk":
            settings = {"MountPath": "/run/mounts/m0", **settings}
        request = {"RequestType": kind, "ResourceType": resource, "Settings": settings}
        document = messages.modify_request(request)
        talk.append(Message(MessageType.MODIFY_SETTINGS, number, document))
    return Input(
        number=0,
        writes=tuple(mutation.encoded(message) for message in talk),
        drops=False,
        by_socket=False,
        faults=faults,
        luck=7,
    )


@pytest.mark.parametrize("name", REQUESTS)
def test_whatever_system_call_fails_nothing_is_forgotten(target: Target, name: str) -> None:
    """Each in turn, from the first to the last that there is; each answer is well-formed."""
    assert target.feed(given(REQUESTS[name], {})) == []
    assert bool(target.figures.refusals) == (name in REFUSED), target.figures.refusals
    for number in itertools.count():
        for error in SHORTAGES:
            wrong = target.feed(given(REQUESTS[name], {number: error}))
            assert not wrong, f"call {number} fails with {errno.errorcode[error]}: {wrong}"
        if not target.guest.injected:
            break
    assert number > 10
