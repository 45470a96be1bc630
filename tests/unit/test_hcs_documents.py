"""What is sent to the Host Compute Service, byte for byte, and what is read from it."""

from __future__ import annotations

import copy
import json
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotlun import Attachment, Disk, DiskKind, GuestMount, ImageFormat, MountConfig, Slot
from hotlun.backends import requests
from hotlun.errors import UnsupportedError
from hotlun.hcs import documents
from hotlun.hcs.documents import CONTROLLERS, document_slots, hcs_document

VHD = Disk(r"C:\disks\layer.vhd", DiskKind.VIRTUAL_DISK, read_only=True)
ROOT = Disk(r"C:\uvm\rootfs.vhd", DiskKind.VIRTUAL_DISK, read_only=True)
VHDX = Disk(r"D:\scratch\sandbox.vhdx", DiskKind.VIRTUAL_DISK)

SLOTS = st.builds(Slot, st.integers(0, 3), st.integers(0, 63))


def compact(document: dict[str, Any]) -> str:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False)


def attachment(disk: Disk, controller: int, lun: int) -> Attachment:
    return Attachment(Slot(controller, lun), disk, "h1")


def test_the_controllers_are_computed_guids() -> None:
    """RFC 4122 version 5, of the number as a name."""
    namespace = uuid.UUID("d422512d-2bf2-4752-809d-7b82b5fcb1b4")
    assert [str(uuid.uuid5(namespace, str(n))) for n in range(4)] == list(CONTROLLERS)


@pytest.mark.parametrize(
    ("disk", "controller", "lun", "text"),
    [
        pytest.param(
            VHD,
            0,
            3,
            r'{"ResourcePath":"VirtualMachine/Devices/Scsi/df6d0690-79e5-55b6-a5ec-c1e2f77f580a/'
            r'Attachments/3","RequestType":"Add","Settings":{"Type":"VirtualDisk",'
            r'"Path":"C:\\disks\\layer.vhd","ReadOnly":true}}',
            id="VHD, read-only",
        ),
        pytest.param(
            VHDX,
            1,
            0,
            r'{"ResourcePath":"VirtualMachine/Devices/Scsi/0110f83b-de10-5172-a266-78bca56bf50a/'
            r'Attachments/0","RequestType":"Add","Settings":{"Type":"VirtualDisk",'
            r'"Path":"D:\\scratch\\sandbox.vhdx"}}',
            id="VHDX, writable",
        ),
        pytest.param(
            Disk(r"\\.\PHYSICALDRIVE2", DiskKind.PHYSICAL_DISK),
            0,
            4,
            r'{"ResourcePath":"VirtualMachine/Devices/Scsi/df6d0690-79e5-55b6-a5ec-c1e2f77f580a/'
            r'Attachments/4","RequestType":"Add","Settings":{"Type":"PassThru",'
            r'"Path":"\\\\.\\PHYSICALDRIVE2"}}',
            id="physical",
        ),
        pytest.param(
            Disk("{pool}{disk}", DiskKind.EXTENSIBLE_VIRTUAL_DISK, provider="space"),
            0,
            5,
            r'{"ResourcePath":"VirtualMachine/Devices/Scsi/df6d0690-79e5-55b6-a5ec-c1e2f77f580a/'
            r'Attachments/5","RequestType":"Add","Settings":{"Type":"ExtensibleVirtualDisk",'
            r'"Path":"{pool}{disk}","ExtensibleVirtualDiskType":"space"}}',
            id="extensible",
        ),
        pytest.param(
            Disk("a/b", DiskKind.EXTENSIBLE_VIRTUAL_DISK, read_only=True, provider="p"),
            3,
            63,
            r'{"ResourcePath":"VirtualMachine/Devices/Scsi/305891a9-b251-5dfe-91a2-c25d9212275b/'
            r'Attachments/63","RequestType":"Add","Settings":{"Type":"ExtensibleVirtualDisk",'
            r'"Path":"a/b","ReadOnly":true,"ExtensibleVirtualDiskType":"p"}}',
            id="extensible, read-only, the last slot",
        ),
    ],
)
def test_an_attach(disk: Disk, controller: int, lun: int, text: str) -> None:
    """Each kind of disk as hcsshim sends it."""
    assert compact(documents.add_document(attachment(disk, controller, lun))) == text


def test_a_detach() -> None:
    """The slot, and nothing about the disk."""
    assert compact(documents.remove_document(attachment(VHD, 0, 3))) == (
        '{"ResourcePath":"VirtualMachine/Devices/Scsi/df6d0690-79e5-55b6-a5ec-c1e2f77f580a/'
        'Attachments/3","RequestType":"Remove"}'
    )


def test_a_request_for_the_guest() -> None:
    """It is all that is in the document."""
    mount = GuestMount(attachment(VHD, 0, 3), "/run/mounts/scsi/m0", MountConfig())
    request = requests.mount_request(mount, "linux")
    assert compact(documents.guest_document(request)) == (
        '{"GuestRequest":{"RequestType":"Add","ResourceType":"MappedVirtualDisk","Settings":'
        '{"MountPath":"/run/mounts/scsi/m0","Lun":3,"ReadOnly":true}}}'
    )


def test_a_path_is_sent_as_it_is() -> None:
    """Whatever is in it, Unicode and quotes too."""
    path = 'C:\\Größe "é"\\\u00e9\U0001f4be.vhdx'
    document = documents.add_document(attachment(Disk(path, DiskKind.VIRTUAL_DISK), 0, 0))
    assert json.loads(compact(document))["Settings"]["Path"] == path


@pytest.mark.parametrize(("controller", "lun"), [(4, 0), (0, 64)])
def test_a_slot_that_hyper_v_has_not(controller: int, lun: int) -> None:
    """4 controllers with 64 LUNs."""
    for make in (documents.add_document, documents.remove_document):
        with pytest.raises(UnsupportedError, match=r"4 controllers with 64 LUNs") as caught:
            make(attachment(VHD, controller, lun))
        assert (caught.value.slot, caught.value.disk) == (Slot(controller, lun), VHD)


@pytest.mark.parametrize("image_format", [ImageFormat.RAW, ImageFormat.QCOW2])
def test_an_image_that_hyper_v_does_not_read(image_format: ImageFormat) -> None:
    """It says which it does, and how to get one."""
    disk = Disk(r"C:\disks\d.img", DiskKind.VIRTUAL_DISK, format=image_format)
    with pytest.raises(UnsupportedError, match=r"only VHD and VHDX.*qemu-img convert"):
        documents.add_document(attachment(disk, 0, 0))


def test_controllers_of_other_names() -> None:
    """A VM that somebody else made may call them otherwise."""
    document = documents.add_document(attachment(VHD, 1, 3), ("one", "two"))
    assert document["ResourcePath"] == "VirtualMachine/Devices/Scsi/two/Attachments/3"


class TestTheVMsDocument:
    def test_declares_the_controllers(self) -> None:
        """Empty ones, to attach disks to."""
        assert compact(hcs_document()) == (
            '{"VirtualMachine":{"Devices":{"Scsi":{'
            '"df6d0690-79e5-55b6-a5ec-c1e2f77f580a":{},'
            '"0110f83b-de10-5172-a266-78bca56bf50a":{},'
            '"b5d2d8d4-3a75-51bf-945b-3444dc6b8579":{},'
            '"305891a9-b251-5dfe-91a2-c25d9212275b":{}}}}}'
        )

    def test_has_the_disks_to_boot_from(self) -> None:
        """In the document that the user has, which stays as it was."""
        base = {
            "Owner": "demo",
            "SchemaVersion": {"Major": 2, "Minor": 5},
            "VirtualMachine": {"StopOnReset": True},
            "ShouldTerminateOnLastHandleClosed": True,
        }
        before = copy.deepcopy(base)
        assert compact(hcs_document({Slot(0, 0): ROOT}, into=base)) == (
            '{"Owner":"demo","SchemaVersion":{"Major":2,"Minor":5},'
            '"VirtualMachine":{"StopOnReset":true,"Devices":{"Scsi":{'
            '"df6d0690-79e5-55b6-a5ec-c1e2f77f580a":{"Attachments":{"0":'
            r'{"Type":"VirtualDisk","Path":"C:\\uvm\\rootfs.vhd","ReadOnly":true}}},'
            '"0110f83b-de10-5172-a266-78bca56bf50a":{},'
            '"b5d2d8d4-3a75-51bf-945b-3444dc6b8579":{},'
            '"305891a9-b251-5dfe-91a2-c25d9212275b":{}}}},'
            '"ShouldTerminateOnLastHandleClosed":true}'
        )
        assert base == before

    def test_keeps_what_is_there(self) -> None:
        """Disks, other devices, and a GUID in another spelling."""
        guid = CONTROLLERS[0].upper()
        base = {
            "VirtualMachine": {
                "Devices": {
                    "ComPorts": {},
                    "Scsi": {guid: {"Attachments": {"1": {"Type": "Iso", "Path": "x"}}}},
                }
            }
        }
        before = copy.deepcopy(base)
        document = hcs_document({Slot(0, 2): VHDX}, controllers=1, into=base)
        assert document["VirtualMachine"]["Devices"]["ComPorts"] == {}
        scsi = document["VirtualMachine"]["Devices"]["Scsi"]
        assert list(scsi) == [guid]
        assert list(scsi[guid]["Attachments"]) == ["1", "2"]
        assert base == before

    def test_refuses_two_disks_in_a_slot(self) -> None:
        """What is there is somebody's."""
        base = hcs_document({Slot(0, 0): ROOT})
        with pytest.raises(ValueError, match="slot 0:0 is taken"):
            hcs_document({Slot(0, 0): VHDX}, into=base)

    @pytest.mark.parametrize("slot", [Slot(1, 0), Slot(0, 64)])
    def test_refuses_a_slot_beyond_it(self, slot: Slot) -> None:
        """It says how many there are."""
        with pytest.raises(ValueError, match="1 controllers with 64 LUNs"):
            hcs_document({slot: ROOT}, controllers=1)

    @pytest.mark.parametrize("controllers", [0, 5])
    def test_refuses_more_controllers_than_hyper_v_has(self, controllers: int) -> None:
        """Or none."""
        with pytest.raises(ValueError, match="1 to 4 controllers"):
            hcs_document(controllers=controllers)

    @given(st.sets(SLOTS, max_size=12))
    def test_read_back_tells_the_taken_slots(self, slots: set[Slot]) -> None:
        """Just those that were filled."""
        document = hcs_document(dict.fromkeys(slots, ROOT))
        assert document_slots(json.loads(json.dumps(document))) == slots

    def test_of_other_controllers_is_not_ours_to_read(self) -> None:
        """Unless they are named."""
        scsi = {"data": {"Attachments": {"7": {}}}, "boot": {"Attachments": None}, "no": None}
        document = {"VirtualMachine": {"Devices": {"Scsi": scsi}}}
        assert document_slots(document) == frozenset()
        assert document_slots(document, ("boot", "data", "no")) == {Slot(1, 7)}

    @pytest.mark.parametrize("document", [{}, {"VirtualMachine": {}}, {"VirtualMachine": None}])
    def test_without_disks_takes_no_slot(self, document: dict[str, Any]) -> None:
        """A container's document, for instance."""
        assert document_slots(document) == frozenset()

    @pytest.mark.parametrize(
        ("scsi", "problem"),
        [
            (["x"], "Devices of .* is an object"),
            ({"Scsi": 3}, "Scsi of .* is an object"),
            ({"Scsi": {CONTROLLERS[0]: "x"}}, "is an object"),
            ({"Scsi": {CONTROLLERS[0]: {"Attachments": ["x"]}}}, "Attachments of .* an object"),
            ({"Scsi": {CONTROLLERS[0]: {"Attachments": {"64": {}}}}}, "LUN from 0 to 63: '64'"),
            ({"Scsi": {CONTROLLERS[0]: {"Attachments": {"01": {}}}}}, "LUN from 0 to 63: '01'"),
            ({"Scsi": {CONTROLLERS[0]: {"Attachments": {"-1": {}}}}}, "LUN from 0 to 63"),
        ],
    )
    def test_that_is_none(self, scsi: object, problem: str) -> None:
        """It says what is wrong where."""
        with pytest.raises(ValueError, match=problem):
            document_slots({"VirtualMachine": {"Devices": scsi}})


class TestWhatIsAttached:
    def test_is_read_from_the_properties(self) -> None:
        """Numbers of controllers and LUNs are members; what is not asked about is passed over."""
        told = json.loads(
            r'{"Id":"x","State":"Running","MappedVirtualDiskControllers":{"0":{'
            r'"MappedVirtualDisks":{"2":{"HostPath":"C:\\a.vhdx","ContainerPath":"/m","Lun":2},'
            r'"3":{"HostPath":"C:\\b.vhdx","Lun":3,"AttachOnly":true}}},"1":{}}}'
        )
        assert documents.attached_paths(told) == {
            Slot(0, 2): r"C:\a.vhdx",
            Slot(0, 3): r"C:\b.vhdx",
        }

    @pytest.mark.parametrize("told", [{}, {"MappedVirtualDiskControllers": None}])
    def test_is_not_known_where_it_is_not_told(self, told: dict[str, Any]) -> None:
        """Which is not the same as nothing."""
        assert documents.attached_paths(told) is None

    @pytest.mark.parametrize(
        "controllers",
        [
            {"x": {}},
            {"0": []},
            {"0": {"MappedVirtualDisks": []}},
            {"0": {"MappedVirtualDisks": {"y": {"HostPath": "z"}}}},
            {"0": {"MappedVirtualDisks": {"1": {"HostPath": 1}}}},
            {"0": {"MappedVirtualDisks": {"1": None}}},
        ],
    )
    def test_passes_over_what_has_another_shape(self, controllers: object) -> None:
        """The service's documents grow."""
        assert documents.attached_paths({"MappedVirtualDiskControllers": controllers}) == {}


def test_slots_are_found_however_the_names_are_spelt() -> None:
    """As `hcs_document` finds them; one that is overlooked counts as free, and can be emptied."""
    mine: dict[str, Any] = {
        "virtualMachine": {"devices": {"SCSI": {CONTROLLERS[0]: {"attachments": {"0": {}}}}}}
    }
    document = hcs_document({Slot(1, 0): VHDX}, into=mine)
    assert document_slots(document) == {Slot(0, 0), Slot(1, 0)}
