"""The library that checks each call: what is wrong is seen, and what is right is not."""

from __future__ import annotations

import ctypes
import json
import os
import threading
from ctypes import POINTER, byref, c_uint16, c_uint32, c_void_p
from typing import TYPE_CHECKING, Any

import pytest
from support.computecore import VM, Call, FakeComputeCore, When, build

from hotlun import Attachment, Disk, DiskKind, Slot
from hotlun.hcs import documents

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows' own LocalFree tells nobody")

ALL = 0x10000000
ADD = documents.add_document(Attachment(Slot(1, 3), Disk("C:\\a", DiskKind.VIRTUAL_DISK), "h1"))
REMOVE = documents.remove_document(
    Attachment(Slot(1, 3), Disk("C:\\a", DiskKind.VIRTUAL_DISK), "h1")
)


def wide(text: str) -> Any:
    data = (text + "\0").encode("utf-16-le")
    return (c_uint16 * (len(data) // 2)).from_buffer_copy(data)


def compact(document: object) -> str:
    return json.dumps(document, separators=(",", ":"))


class Raw:
    """The functions with no care taken."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(build().core)
        self.fake = FakeComputeCore(self.library)
        self.fake.reset()
        self.fake.add_system(VM)

    def open(self, access: int = ALL) -> int:
        handle = c_void_p()
        self.library.HcsOpenComputeSystem(wide(VM), c_uint32(access), byref(handle))
        assert handle.value
        return handle.value

    def operation(self) -> int:
        made: int = self.library.HcsCreateOperation(None, None)
        return made

    def modify(self, system: int, operation: int, document: object) -> int:
        text = document if isinstance(document, str) else compact(document)
        code: int = self.library.HcsModifyComputeSystem(system, operation, wide(text), None)
        return code & 0xFFFFFFFF

    def wait(self, operation: int, milliseconds: int = 20_000) -> tuple[int, c_void_p]:
        result = c_void_p()
        code = self.library.HcsWaitForOperationResult(operation, milliseconds, byref(result))
        return code & 0xFFFFFFFF, result

    def said(self) -> str:
        return "\n".join(self.fake.take_violations())


@pytest.fixture
def raw() -> Iterator[Raw]:
    raw = Raw()
    yield raw
    raw.fake.reset()


def test_what_is_right_is_not_complained_of(raw: Raw) -> None:
    """One call from its beginning to its end."""
    system, operation = raw.open(), raw.operation()
    assert raw.modify(system, operation, ADD) == 0
    assert raw.wait(operation)[0] == 0
    raw.library.HcsCloseOperation(operation)
    raw.library.HcsCloseComputeSystem(system)
    raw.fake.check()


class TestHandles:
    def test_closed_twice(self, raw: Raw) -> None:
        """Of systems and of operations."""
        system, operation = raw.open(), raw.operation()
        for _ in range(2):
            raw.library.HcsCloseOperation(operation)
            raw.library.HcsCloseComputeSystem(system)
        assert raw.said().splitlines() == [
            f"HcsCloseOperation: no open operation: {operation:#x}",
            f"HcsCloseComputeSystem: no open system: {system:#x}",
        ]

    def test_never_made(self, raw: Raw) -> None:
        """Whatever the pointer is."""
        raw.modify(16, 32, ADD)
        raw.wait(48)
        assert raw.said().count("no open") == 3

    def test_closed_under_a_call(self, raw: Raw) -> None:
        """An operation goes on."""
        system, operation = raw.open(), raw.operation()
        raw.fake.script(Call.MODIFY, When.UNTIL_TOLD)
        raw.modify(system, operation, ADD)
        raw.library.HcsCloseComputeSystem(system)
        assert "HcsCloseComputeSystem: under 1 operations" in raw.said()

    def test_closed_under_a_wait(self, raw: Raw) -> None:
        """Of another thread."""
        system, operation = raw.open(), raw.operation()
        raw.fake.script(Call.MODIFY, When.UNTIL_TOLD)
        raw.modify(system, operation, ADD)
        thread = threading.Thread(target=raw.wait, args=(operation,))
        thread.start()
        said = ""
        while not said:  # until the other thread is inside
            raw.library.HcsCloseOperation(operation)
            said = raw.said()
        assert said.startswith(("HcsCloseOperation: under a wait", "HcsCloseOperation: no open"))
        raw.fake.finish()
        thread.join()

    def test_left_open(self, raw: Raw) -> None:
        """Are counted."""
        raw.open()
        raw.operation()
        with pytest.raises(AssertionError, match="'systems': 1, 'operations': 1"):
            raw.fake.check()

    def test_used_for_two_calls(self, raw: Raw) -> None:
        """An operation is for one."""
        system, operation = raw.open(), raw.operation()
        raw.modify(system, operation, ADD)
        assert raw.modify(system, operation, REMOVE) == 0x80370116
        assert "for the second time" in raw.said()

    def test_waited_for_before_it_began(self, raw: Raw) -> None:
        """As Windows says."""
        assert raw.wait(raw.operation())[0] == 0x80370115
        assert "of what was not begun" in raw.said()

    def test_opened_with_other_rights(self, raw: Raw) -> None:
        """All are to be asked for."""
        raw.open(access=1)
        assert "access 0x1" in raw.said()


class TestStrings:
    def result(self, raw: Raw) -> c_void_p:
        system, operation = raw.open(), raw.operation()
        raw.modify(system, operation, REMOVE)
        code, result = raw.wait(operation)
        assert code == 0x80070490
        return result

    def test_freed_twice(self, raw: Raw) -> None:
        """Once is right."""
        result = self.result(raw)
        raw.library.LocalFree(result)
        assert raw.said() == ""
        raw.library.LocalFree(result)
        assert "a second time" in raw.said()

    def test_freed_by_the_wrong_function(self, raw: Raw) -> None:
        """hcsshim's, for one."""
        raw.library.CoTaskMemFree(self.result(raw))
        assert "the wrong function" in raw.said()

    def test_never_freed(self, raw: Raw) -> None:
        """Are counted."""
        self.result(raw)
        assert raw.fake.alive["strings"] == 1

    def test_of_somebody_else(self, raw: Raw) -> None:
        """Are not to be freed."""
        raw.library.LocalFree(c_void_p(ctypes.addressof(wide("x"))))
        assert "what was not handed out" in raw.said()

    def test_without_an_end(self, raw: Raw) -> None:
        """Nor at an odd address, nor none."""
        endless = (c_uint16 * ((1 << 20) + 8))(*[65] * ((1 << 20) + 8))
        odd = ctypes.cast(ctypes.addressof(endless) + 1, POINTER(c_uint16))
        for text in (endless, odd, None):
            raw.library.HcsModifyComputeSystem(raw.open(), raw.operation(), text, None)
        said = raw.said().splitlines()
        assert "no NUL at its end" in said[0]
        assert "no pointer to UTF-16" in said[1]
        assert "no pointer to UTF-16" in said[2]

    def test_an_identity_or_a_callback(self, raw: Raw) -> None:
        """hotlun has neither."""
        raw.library.HcsModifyComputeSystem(
            raw.open(), raw.library.HcsCreateOperation(1, None), wide(compact(ADD)), c_void_p(4)
        )
        assert "an identity" in (said := raw.said())
        assert "a callback" in said


def without(document: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != name}


def with_settings(**settings: Any) -> dict[str, Any]:
    return ADD | {"Settings": settings}


GUEST = {
    "RequestType": "Add",
    "ResourceType": "MappedVirtualDisk",
    "Settings": {"MountPath": "/m", "Lun": 3, "Controller": 1},
}


@pytest.mark.parametrize(
    "document",
    [
        "",
        "{",
        compact(ADD) + "x",
        '{"RequestType":"Add","RequestType":"Add"}',
        "[" * 100,
        {},
        [],
        without(ADD, "Settings"),
        without(ADD, "ResourcePath"),
        dict(reversed(ADD.items())),
        ADD | {"More": 1},
        ADD | {"RequestType": "Update"},
        ADD | {"ResourcePath": ADD["ResourcePath"].replace("/3", "/03")},
        ADD | {"ResourcePath": ADD["ResourcePath"].replace("/3", "/64")},
        ADD | {"ResourcePath": ADD["ResourcePath"].replace("/3", "/+3")},
        ADD | {"ResourcePath": ADD["ResourcePath"].upper()},
        REMOVE | {"Settings": {}},
        with_settings(Type="VirtualDisk", Path="x", ReadOnly=False),
        with_settings(Path="x", Type="VirtualDisk"),
        with_settings(Type="VirtualDisk", Path=""),
        with_settings(Type="VirtualDisk", Path=3),
        with_settings(Type="Iso", Path="x"),
        with_settings(Type="VirtualDisk", Path="x", ExtensibleVirtualDiskType="y"),
        with_settings(Type="ExtensibleVirtualDisk", Path="x"),
        {"GuestRequest": GUEST, "RequestType": "Add"},
        {"GuestRequest": without(GUEST, "Settings")},
        {"GuestRequest": dict(reversed(GUEST.items()))},
        {"GuestRequest": GUEST | {"Settings": {"MountPath": "/m", "Lun": 0}}},
        {"GuestRequest": GUEST | {"Settings": {"MountPath": "/m", "Lun": "1"}}},
        {"GuestRequest": GUEST | {"Settings": {"MountPath": "/m", "Controller": 4}}},
        {"GuestRequest": GUEST | {"Settings": {"ContainerPath": "c:\\m", "Lun": 1}}},
        {"GuestRequest": GUEST | {"RequestType": "Update"}},
        {"GuestRequest": GUEST | {"ResourceType": "SCSIDevice"}},
    ],
    ids=lambda document: (document if isinstance(document, str) else compact(document))[:60],
)
def test_a_document_of_another_shape_is_refused(raw: Raw, document: object) -> None:
    """And noted: none of ours may be."""
    operation = raw.operation()
    raw.modify(raw.open(), operation, document)
    assert raw.wait(operation)[0] == 0x8037010D
    assert "a document with" in raw.said()
