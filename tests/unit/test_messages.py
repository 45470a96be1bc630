"""Messages: what either end says, byte for byte, and the types of it."""

from __future__ import annotations

from typing import Any

import pytest

from hotlun.bridge import messages
from hotlun.bridge.codes import HResult
from hotlun.bridge.documents import (
    Fields,
    MessageError,
    decode,
    embedded,
    encode_request,
    encode_response,
)
from hotlun.bridge.frames import Frame, encode
from hotlun.bridge.messages import MessageType, ModifyRequest

NULL = "00000000-0000-0000-0000-000000000000"


def encoded(document: dict[str, Any], kind: int, number: int) -> bytes:
    return encode(Frame(kind, number, encode_request(document)))


def test_negotiate_is_125_bytes() -> None:
    """The first message of a connection, as hcsshim's host sends it."""
    data = encoded(messages.negotiate_request(), MessageType.NEGOTIATE_PROTOCOL, 0)
    assert data[:16].hex(" ") == "01 0b 10 10 7d 00 00 00 00 00 00 00 00 00 00 00"
    assert data[16:] == (
        b'{"ContainerId":"","ActivityId":"00000000-0000-0000-0000-000000000000",'
        b'"MinimumVersion":4,"MaximumVersion":4}\n'
    )


def test_create_holds_a_document_in_a_string() -> None:
    """ContainerConfig is JSON inside JSON."""
    assert encode_request(messages.create_request()) == (
        b'{"ContainerId":"00000000-0000-0000-0000-000000000000",'
        b'"ActivityId":"00000000-0000-0000-0000-000000000000",'
        b'"ContainerConfig":"{\\"SystemType\\":\\"Container\\",\\"TimeZoneInformation\\":null}"}\n'
    )


def test_start_names_the_vm() -> None:
    """Start has nothing but the address."""
    assert encode_request(messages.start_request()) == (
        b'{"ContainerId":"00000000-0000-0000-0000-000000000000",'
        b'"ActivityId":"00000000-0000-0000-0000-000000000000"}\n'
    )


def test_a_windows_guest_is_told_two_addresses() -> None:
    """Its own, and the host's, which is the same for all."""
    document = messages.addresses_request("3f2504e0-4f89-11d3-9a0c-0305e82c3301")
    assert encode_request(document) == (
        b'{"ContainerId":"00000000-0000-0000-0000-000000000000",'
        b'"ActivityId":"00000000-0000-0000-0000-000000000000",'
        b'"Request":{"RequestType":"Update","ResourceType":"HvSocket","Settings":'
        b'{"LocalAddress":"3f2504e0-4f89-11d3-9a0c-0305e82c3301",'
        b'"ParentAddress":"894cc2d6-9d79-424f-93fe-42969ae6d8d1"}}}\n'
    )


def test_a_query_is_a_document_in_a_string() -> None:
    """So are the properties that answer it; both are read again as what they were."""
    document = messages.properties_request({"Hotlun": {"Disks": [{"Serial": 'h"1'}]}})
    assert document == {
        "ContainerId": messages.NULL_ID,
        "ActivityId": messages.NULL_ID,
        "Query": '{"Hotlun":{"Disks":[{"Serial":"h\\"1"}]}}',
    }
    inner = embedded(Fields(document), "Query").fields("Hotlun")
    assert [disk.string("Serial") for disk in inner.objects("Disks")] == ['h"1']
    assert messages.properties_response({}, activity_id="a") == {
        "Result": 0,
        "ActivityId": "a",
        "Properties": "{}",
    }


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        (MessageType.CREATE, 0x20100101),
        (MessageType.START, 0x20100201),
        (MessageType.SHUTDOWN_GRACEFUL, 0x20100301),
        (MessageType.SHUTDOWN_FORCED, 0x20100401),
        (MessageType.EXECUTE_PROCESS, 0x20100501),
        (MessageType.WAIT_FOR_PROCESS, 0x20100601),
        (MessageType.SIGNAL_PROCESS, 0x20100701),
        (MessageType.RESIZE_CONSOLE, 0x20100801),
        (MessageType.GET_PROPERTIES, 0x20100901),
        (MessageType.MODIFY_SETTINGS, 0x20100A01),
        (MessageType.NEGOTIATE_PROTOCOL, 0x20100B01),
        (MessageType.DUMP_STACKS, 0x20100C01),
        (MessageType.DELETE_CONTAINER_STATE, 0x20100D01),
        (MessageType.UPDATE_CONTAINER, 0x20100E01),
        (MessageType.LIFECYCLE_NOTIFICATION, 0x20100F01),
        (MessageType.MODIFY_SERVICE_SETTINGS, 0x20200101),
        (0x10FFFFFF, 0x20FFFFFF),
    ],
)
def test_response_type_of_a_request(kind: int, answer: int) -> None:
    """The kind changes, nothing else; also for types that nobody knows."""
    assert messages.response_type(kind) == answer
    assert messages.request_type(answer) == kind
    assert messages.is_request(kind)
    assert messages.is_response(answer)
    assert not messages.is_notification(answer)


def test_notification_is_told_by_its_type() -> None:
    """Its id is 0 and says nothing."""
    assert messages.is_notification(MessageType.CONTAINER_NOTIFICATION)
    assert MessageType(0x30100101) is MessageType.CONTAINER_NOTIFICATION


def test_types_have_names_for_people() -> None:
    """Known or not, a type can be put into a sentence."""
    assert messages.type_name(0x10100A01) == "ModifySettings request (0x10100a01)"
    assert messages.type_name(0x20100A01) == "ModifySettings response (0x20100a01)"
    assert messages.type_name(0x30100101) == "ContainerNotification (0x30100101)"
    assert messages.type_name(0) == "unknown (0x00000000)"


def test_modify_request_as_the_guest_reads_it() -> None:
    """Without a RequestType it is an Add, as in the original agent."""
    document = messages.modify_request({"ResourceType": "SCSIDevice", "Settings": {"Lun": 1}})
    request = ModifyRequest.read(decode(encode_request(document)))
    assert (request.request_type, request.resource_type) == ("Add", "SCSIDevice")
    assert request.settings.integer("Lun", maximum=255) == 1


@pytest.mark.parametrize(
    "document", [{}, {"Request": None}, {"Request": {}}, {"Request": {"Settings": None}}]
)
def test_modify_request_without_settings(document: dict[str, Any]) -> None:
    """Settings may be empty but must be there."""
    with pytest.raises(MessageError, match="is missing"):
        ModifyRequest.read(Fields(document))


def test_response_of_our_agent() -> None:
    """Success is short; a failure has a record; the activity comes back; numbers are signed."""
    assert encode_response(messages.response(activity_id=NULL)) == (
        b'{"Result":0,"ActivityId":"00000000-0000-0000-0000-000000000000"}'
    )
    assert encode_response(messages.response(HResult.FAIL, "no disk", ExitCode=3)) == (
        b'{"Result":-2147467259,"ErrorMessage":"no disk","ErrorRecords":[{"Result":-2147467259,'
        b'"Message":"no disk","ModuleName":"hotlun","FileName":"","Line":4294967295}],'
        b'"ExitCode":3}'
    )


def test_failure_fits_the_smallest_frame_a_host_takes() -> None:
    """hcsshim's host drops the bridge at 64 KiB; no error text of ours gets there."""
    for letter in ("\x00", "💾", "\udcff"):
        document = messages.response(HResult.FAIL, letter * 100_000, activity_id=NULL)
        assert len(encode_response(document)) + 16 < 1 << 16
