"""The grammar that the test server of the compute service holds documents against."""

from __future__ import annotations

import pytest
from support import hcs_grammar
from support.hcs_grammar import GUIDS, GuestRequest, InvalidDocumentError, ResourceRequest

from hotlun import DiskKind, Slot
from hotlun.bridge import messages

SLOT = f"VirtualMachine/Devices/Scsi/{GUIDS[0]}/Attachments/3"
ADD = f'{{"ResourcePath":"{SLOT}","RequestType":"Add","Settings":'
OURS = (messages.FEATURE_PRESERVE_DATA, messages.FEATURE_KEYS)


def mapped(settings: str, verb: str = "Add", resource: str = "MappedVirtualDisk") -> str:
    request = f'"RequestType":"{verb}","ResourceType":"{resource}","Settings":{settings}'
    return f'{{"GuestRequest":{{{request}}}}}'


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        (
            ADD + '{"Type":"VirtualDisk","Path":"C:\\\\disks\\\\layer.vhd","ReadOnly":true}}',
            ResourceRequest(
                Slot(0, 3), True, DiskKind.VIRTUAL_DISK, "C:\\disks\\layer.vhd", read_only=True
            ),
        ),
        (
            ADD + '{"Type":"PassThru","Path":"\\\\\\\\.\\\\PHYSICALDRIVE2"}}',
            ResourceRequest(Slot(0, 3), True, DiskKind.PHYSICAL_DISK, r"\\.\PHYSICALDRIVE2"),
        ),
        (
            ADD + '{"Type":"ExtensibleVirtualDisk","Path":"{pool}{disk}",'
            '"ExtensibleVirtualDiskType":"space"}}',
            ResourceRequest(
                Slot(0, 3),
                True,
                DiskKind.EXTENSIBLE_VIRTUAL_DISK,
                "{pool}{disk}",
                provider="space",
            ),
        ),
        (
            f'{{"ResourcePath":"{SLOT}","RequestType":"Remove"}}',
            ResourceRequest(Slot(0, 3), False),
        ),
    ],
)
def test_what_hcsshim_sends_about_a_slot(text: str, request_: ResourceRequest) -> None:
    """Is read."""
    assert hcs_grammar.read(text) == request_


@pytest.mark.parametrize(
    ("text", "verb", "slot"),
    [
        (
            mapped('{"MountPath":"/run/mounts/scsi/m0","Lun":3,"ReadOnly":true}'),
            "mount",
            Slot(0, 3),
        ),
        (
            mapped(
                '{"MountPath":"/mnt/d","Lun":7,"Controller":3,"Partition":2,"ReadOnly":true,'
                '"Options":["ro","rshared"],"Filesystem":"ext4"}',
                "Remove",
            ),
            "unmount",
            Slot(3, 7),
        ),
        (mapped("{}", "Remove", "SCSIDevice"), "unplug", Slot(0, 0)),
        (mapped('{"Controller":1,"Lun":2}', "Remove", "SCSIDevice"), "unplug", Slot(1, 2)),
    ],
)
def test_what_hcsshim_sends_to_the_guest(text: str, verb: str, slot: Slot) -> None:
    """Is read, and the guest's part of it is what it was."""
    request = hcs_grammar.read(text)
    assert isinstance(request, GuestRequest)
    assert (request.verb, request.slot) == (verb, slot)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no JSON"),
        ("[]", "no object"),
        ("{}", "lacks ResourcePath, RequestType"),
        (f'{{"ResourcePath":"{SLOT}","RequestType":"Update"}}', "RequestType"),
        (f'{{"RequestType":"Remove","ResourcePath":"{SLOT}"}}', "another order"),
        (f'{{"ResourcePath":"{SLOT}","RequestType":"Remove","Settings":{{}}}}', "unknown Settings"),
        (f'{{"ResourcePath":"{SLOT}","RequestType":"Remove","Force":true}}', "unknown Force"),
        (f'{{"ResourcePath":"{SLOT}","RequestType":"Add"}}', "lacks Settings"),
        (f'{{"ResourcePath":"{SLOT.upper()}","RequestType":"Remove"}}', "no slot"),
        (f'{{"ResourcePath":"{SLOT[:-1]}64","RequestType":"Remove"}}', "no slot"),
        (f'{{"ResourcePath":"{SLOT[:-1]}03","RequestType":"Remove"}}', "no slot"),
        (ADD + '{"Path":"a","Type":"VirtualDisk"}}', "another order"),
        (ADD + '{"Type":"Iso","Path":"a"}}', "Type"),
        (ADD + '{"Type":"VirtualDisk","Path":""}}', "Path"),
        (ADD + '{"Type":"VirtualDisk","Path":"a","ReadOnly":false}}', "ReadOnly"),
        (ADD + '{"Type":"VirtualDisk","Path":"a","CachingMode":"Cached"}}', "unknown CachingMode"),
        (
            ADD + '{"Type":"VirtualDisk","Path":"a","ExtensibleVirtualDiskType":"b"}}',
            "unknown ExtensibleVirtualDiskType",
        ),
        (ADD + '{"Type":"ExtensibleVirtualDisk","Path":"a"}}', "no ExtensibleVirtualDiskType"),
        (ADD + '{"Type":"VirtualDisk","Type":"PassThru","Path":"a"}}', "twice"),
        (mapped("{}"), "lacks MountPath"),
        (mapped('{"MountPath":"/a","Lun":0}'), "Lun"),
        (mapped('{"MountPath":"/a","Lun":"3"}'), "Lun"),
        (mapped('{"MountPath":"/a","Lun":true}'), "Lun"),
        (mapped('{"MountPath":"/a","Lun":64}'), "Lun"),
        (mapped('{"MountPath":"/a","Controller":4}'), "Controller"),
        (mapped('{"MountPath":"/a","Controller":1,"Lun":1}'), "another order"),
        (mapped('{"MountPath":"/a","Options":[]}'), "Options"),
        (mapped('{"MountPath":"/a","Encrypted":false}'), "Encrypted"),
        (mapped('{"MountPath":"/a","Serial":"h1"}'), "unknown Serial"),
        (mapped('{"MountPath":"/a","LazyUnmount":true}'), "unknown LazyUnmount"),
        (mapped('{"MountPath":"/a","Key":"YQ=="}', "Remove"), "unknown Key"),
        (mapped('{"MountPath":"/a"}', "Update"), "RequestType"),
        (mapped('{"Lun":1}', "Add", "SCSIDevice"), "only be removed"),
        (mapped('{"Lun":1,"Controller":1}', "Remove", "SCSIDevice"), "another order"),
        (mapped("{}", "Remove", "MappedDirectory"), "ResourceType"),
        (f'{mapped("{}", "Remove", "SCSIDevice")[:-1]},"RequestType":"Remove"}}', "RequestType"),
    ],
)
def test_anything_else_is_refused(text: str, problem: str) -> None:
    """And what is wrong with it is said."""
    with pytest.raises(InvalidDocumentError, match=problem):
        hcs_grammar.read(text, OURS)


def test_our_extension_is_for_an_agent_that_has_it() -> None:
    """Behind the rest, in its order."""
    text = mapped('{"MountPath":"/a","Filesystem":"ext4","PreserveData":true,"Key":"YQ=="}')
    assert hcs_grammar.read(text, OURS).verb == "mount"
    with pytest.raises(InvalidDocumentError, match="unknown PreserveData, Key"):
        hcs_grammar.read(text)
