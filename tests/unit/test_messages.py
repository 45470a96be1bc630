"""Messages: the documents byte for byte, and reading what nobody should send."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotlun.bridge import messages, transport
from hotlun.bridge.frames import Frame, encode
from hotlun.bridge.messages import (
    Capabilities,
    Fields,
    HResult,
    MessageError,
    MessageType,
    ModifyRequest,
    Response,
)

NULL = "00000000-0000-0000-0000-000000000000"


def encoded(document: dict[str, Any], kind: int, number: int) -> bytes:
    return encode(Frame(kind, number, messages.encode_request(document)))


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
    assert messages.encode_request(messages.create_request()) == (
        b'{"ContainerId":"00000000-0000-0000-0000-000000000000",'
        b'"ActivityId":"00000000-0000-0000-0000-000000000000",'
        b'"ContainerConfig":"{\\"SystemType\\":\\"Container\\",\\"TimeZoneInformation\\":null}"}\n'
    )


def test_start_names_the_vm() -> None:
    """Start has nothing but the address."""
    assert messages.encode_request(messages.start_request()) == (
        b'{"ContainerId":"00000000-0000-0000-0000-000000000000",'
        b'"ActivityId":"00000000-0000-0000-0000-000000000000"}\n'
    )


def test_a_windows_guest_is_told_two_addresses() -> None:
    """Its own, and the host's, which is the same for all."""
    document = messages.addresses_request("3f2504e0-4f89-11d3-9a0c-0305e82c3301")
    assert messages.encode_request(document) == (
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
    inner = messages.embedded(Fields(document), "Query").fields("Hotlun")
    assert [disk.string("Serial") for disk in inner.objects("Disks")] == ['h"1']
    assert messages.properties_response({}, activity_id="a") == {
        "Result": 0,
        "ActivityId": "a",
        "Properties": "{}",
    }


@pytest.mark.parametrize("text", [None, "", "{}"])
def test_an_embedded_document_that_is_missing_is_empty(text: str | None) -> None:
    """As every member that is missing has the zero value of its type."""
    assert messages.embedded(Fields({"Query": text}), "Query").document == {}


@pytest.mark.parametrize(
    "text",
    [7, {}, [], True, "x", "[]", "7", "{", "\ud800", '{"a":NaN}', '{"a":' * 99 + "1" + "}" * 99],
)
def test_an_embedded_document_is_read_as_any_other(text: object) -> None:
    """Its depth and its numbers are bounded, and what is wrong is said of the member."""
    with pytest.raises(MessageError, match=r"^Query"):
        messages.embedded(Fields({"Query": text}), "Query")


def test_booleans_and_nothing_else() -> None:
    """A number is no boolean, and a boolean is no array of them."""
    assert Fields({"Mounts": [True, False]}).booleans("mounts") == [True, False]
    assert Fields({}).booleans("Mounts") == []
    values: tuple[object, ...] = (True, [1], [None], ["true"], {})
    for value in values:
        with pytest.raises(MessageError, match=r"Mounts is .*, not an array of booleans"):
            Fields({"Mounts": value}).booleans("Mounts")


def test_nothing_is_escaped_that_need_not_be() -> None:
    """`&`, `<` and letters of any script go out as they are; members keep their order."""
    document = {"z": "<a&b>", "a": "ü💾", "m": [1, True, None]}
    expected = '{"z":"<a&b>","a":"ü💾","m":[1,true,null]}'
    assert messages.encode_request(document) == expected.encode() + b"\n"
    assert messages.encode_response(document) == expected.encode()


@pytest.mark.parametrize("value", ["\udc80", float("nan"), {1, 2}, b"bytes"])
def test_what_json_cannot_hold_is_not_sent(value: object) -> None:
    """Half a surrogate pair, no number, no JSON type: an error, not something else sent."""
    with pytest.raises(MessageError, match="no document can hold that"):
        messages.encode_request({"x": value})


@pytest.mark.parametrize("activity", [messages.NULL_ID, 'a"b', "\ud800", "ö"])
def test_an_answer_without_words_is_as_any_other(activity: str) -> None:
    """It is put together only once for each id, and no other is given its bytes."""
    for result in (0, -1, 0):
        document = {"Result": result, "ActivityId": activity}
        words = messages.encode_response({**document, "More": 1})
        assert messages.encode_response(document) == words.replace(b',"More":1', b"")


def test_answer_can_name_any_file() -> None:
    """A file name that is no UTF-8 is escaped in an answer, and readable at the other end."""
    payload = messages.encode_response(messages.response(HResult.FAIL, "no \udcff.img"))
    assert Response.read(payload).text == r"no \udcff.img"


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


@pytest.mark.parametrize(
    ("decimal", "code"),
    [
        (-2147467263, HResult.NOT_IMPLEMENTED),
        (-2147467259, HResult.FAIL),
        (-2147023728, HResult.NOT_FOUND),
        (-2147024809, HResult.INVALID_ARGUMENT),
        (-1070137079, HResult.TIMEOUT),
        (-1070137077, HResult.UNKNOWN_MESSAGE),
        (-1070137076, HResult.UNSUPPORTED_PROTOCOL_VERSION),
        (-1070137075, HResult.INVALID_JSON),
        (-1070137074, HResult.SYSTEM_NOT_FOUND),
        (-1070137073, HResult.SYSTEM_ALREADY_EXISTS),
        (-1070137072, HResult.SYSTEM_ALREADY_STOPPED),
        (-2143878907, HResult.INVALID_STATE),
        (-2144272345, HResult.WRONG_KEY),
    ],
)
def test_codes_are_signed_on_the_wire_and_unsigned_here(decimal: int, code: HResult) -> None:
    """Both ways of writing a result are the same code, and a failure."""
    assert messages.signed(code) == decimal
    for written in (decimal, int(code)):
        assert Response.read(b'{"Result":%d}' % written).code == code
    assert messages.is_failure(code)
    assert messages.code_name(code) == f"{int(code):#010x} ({code.name})"


def test_code_without_a_name() -> None:
    """An unknown code is still a code."""
    assert messages.code_name(0x80040001) == "0x80040001"
    assert not messages.is_failure(0)
    assert not messages.is_failure(1)


def test_failure_as_the_original_agent_sends_it() -> None:
    """Its words are found; records and unknown members do no harm."""
    response = Response.read(
        b'{"Result":-2147467259,"ActivityId":"00000000-0000-0000-0000-000000000000",'
        b'"ErrorMessage":"mounting: invalid argument","ErrorRecords":[{"Result":-2147467259,'
        b'"Message":"mounting: invalid argument","ModuleName":"gcs","FileName":"",'
        b'"Line":4294967295}],"Later":{"x":[1]}}'
    )
    assert (response.code, response.text) == (HResult.FAIL, "mounting: invalid argument")


@pytest.mark.parametrize(
    "members",
    [
        '"ErrorMessage":5',
        '"ErrorMessage":null',
        '"ErrorRecords":"none"',
        '"ErrorRecords":[3]',
        '"ErrorRecords":[{"Message":[]}]',
        '"ErrorMessage":"\\u0000\\n \\r"',
        '"ActivityId":7',
    ],
)
def test_odd_words_do_not_hide_the_code(members: str) -> None:
    """Only Result must be right."""
    response = Response.read(b'{"Result":-2147467259,%s}' % members.encode())
    assert response.code == HResult.FAIL
    assert response.text in ("", r"\x00")


def test_records_speak_when_the_message_does_not() -> None:
    """An empty ErrorMessage is replaced by the records' words."""
    records = b'[{"Message":"one"},{"Message":"two"}]'
    assert Response.read(b'{"Result":-1,"ErrorRecords":%s}' % records).text == "one; two"


def test_text_becomes_one_printable_line() -> None:
    """Many lines, terminal escapes, bells and direction marks: nothing reaches a terminal raw."""
    text = "Usage:\n\n\tmkfs.xfs\r\n/* \x1b[31mred\x07 \u202e*/\x85end"
    assert messages.printable(text) == (r"Usage:; mkfs.xfs; /* \x1b[31mred\x07 \u202e*/; end")


@given(st.text(), st.integers(1, 50))
def test_printable_is_bounded_and_printable(text: str, limit: int) -> None:
    """Whatever comes in."""
    line = messages.printable(text, limit)
    assert len(line) <= limit
    assert line.isprintable()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"1",
        b'"x"',
        b"\xff\xfe",
        b'{"a":\xff}',
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b'{"a":1}x',
        b"[" * 1_000_000,
        b'{"a":' * 100_000,
        b'{"a":' + b"[" * 40 + b"]" * 40 + b"}",
        b'{"a":' + b"9" * 5000 + b"}",
        b"\xef\xbb\xbf{}",
    ],
)
def test_what_is_no_document_is_one_kind_of_error(payload: bytes) -> None:
    """Not UTF-8, not JSON, no object, too deep, too long a number."""
    with pytest.raises(MessageError):
        messages.decode(payload)
    with pytest.raises(MessageError):
        Response.read(payload)


def test_depth_is_counted_not_met() -> None:
    """As deep as allowed is allowed, one deeper is not."""
    inside = messages.MAX_DEPTH - 1
    payload = b'{"a":' + b"[" * inside + b"]" * inside + b"}"
    assert messages.decode(payload).document
    with pytest.raises(MessageError, match="nested deeper"):
        messages.decode(payload.replace(b"[]", b"[[]]"))


@given(st.binary(max_size=300))
def test_bytes_are_a_response_or_a_message_error(payload: bytes) -> None:
    """No other exception comes out."""
    with contextlib.suppress(MessageError):
        Response.read(payload)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)
NAMES = st.sampled_from(
    [
        "Result",
        "result",
        "ErrorMessage",
        "ErrorRecords",
        "RuntimeOsType",
        "SendHostCreateMessage",
        "GuestDefinedCapabilities",
        "Hotlun",
        "Version",
        "Features",
        "Request",
        "Settings",
    ]
)


@given(st.dictionaries(NAMES, JSON | st.dictionaries(NAMES, JSON), max_size=6))
def test_any_document_is_read_or_refused(document: dict[str, Any]) -> None:
    """Known names with values of any type make no reader do anything but raise MessageError."""
    payload = json.dumps(document).encode()
    for read in (Response.read, _read_capabilities, _read_modify):
        with contextlib.suppress(MessageError):
            read(payload)


def _read_capabilities(payload: bytes) -> Capabilities:
    return Capabilities.read(messages.decode(payload))


def _read_modify(payload: bytes) -> ModifyRequest:
    return ModifyRequest.read(messages.decode(payload))


@pytest.mark.parametrize(
    "payload",
    [
        b"{}",
        b'{"Result":null}',
        b'{"Result":"0"}',
        b'{"Result":true}',
        b'{"Result":0.0}',
        b'{"Result":[]}',
        b'{"Result":4294967296}',
        b'{"Result":-2147483649}',
    ],
)
def test_answer_without_a_result_says_nothing(payload: bytes) -> None:
    """A missing Result is not taken for success."""
    with pytest.raises(MessageError, match="Result is"):
        Response.read(payload)


def test_fields_are_found_without_regard_to_case() -> None:
    """As in the original agent; an exact name is preferred, of two equal ones the last."""
    fields = messages.decode(b'{"mountpath":"/b","LUN":7,"MountPath":"/a","MountPath":"/c"}')
    assert fields.string("MountPath") == "/c"
    assert fields.integer("Lun", maximum=255) == 7


@pytest.mark.parametrize("name", ["Lun", "LUN", "lun"])
@pytest.mark.parametrize("more", [{}, {"Other": 1}, {"MOUNTPATH": ""}])
def test_case_is_of_no_regard_whatever_is_beside(name: str, more: dict[str, Any]) -> None:
    """Also where all the others are spelled as they are asked for, and where none is."""
    fields = Fields({**more, name: 7, "Controller": 2})
    assert (fields.integer("Lun", maximum=9), fields.integer("Controller", maximum=9)) == (7, 2)
    assert "Lun" in fields


def test_missing_and_null_are_the_default() -> None:
    """Members left out because they are zero, false or empty."""
    fields = messages.decode(b'{"a":null}')
    for name in ("a", "b"):
        assert name not in fields
        assert fields.string(name) == ""
        assert fields.boolean(name) is False
        assert fields.integer(name, maximum=3) == 0
        assert fields.strings(name) == []
        assert fields.objects(name) == []
        assert fields.fields(name).document == {}


@pytest.mark.parametrize("value", ["x", 1, 1.5, True, [], ["x"], [1], {}, [{}]])
def test_wrong_type_names_the_member(value: object) -> None:
    """Each getter takes its own type only, and the error says where."""
    fields = messages.decode(json.dumps({"Settings": {"M": value}}).encode()).fields("Settings")
    accepted = {
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
        "integer": value == 1 and not isinstance(value, bool),
        "strings": value in ([], ["x"]),
        "objects": value in ([], [{}]),
        "fields": isinstance(value, dict),
    }
    for getter, fits in accepted.items():
        arguments = {"maximum": 9} if getter == "integer" else {}
        if fits:
            getattr(fields, getter)("M", **arguments)
        else:
            with pytest.raises(MessageError, match=r"^Settings\.M is "):
                getattr(fields, getter)("M", **arguments)


@pytest.mark.parametrize("value", [-1, 256, 10**19])
def test_number_out_of_range(value: int) -> None:
    """A LUN of 300 is no LUN."""
    with pytest.raises(MessageError, match="0 to 255"):
        Fields({"Lun": value}).integer("Lun", maximum=255)


def test_modify_request_as_the_guest_reads_it() -> None:
    """Without a RequestType it is an Add, as in the original agent."""
    document = messages.modify_request({"ResourceType": "SCSIDevice", "Settings": {"Lun": 1}})
    request = _read_modify(messages.encode_request(document))
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
    assert messages.encode_response(messages.response(activity_id=NULL)) == (
        b'{"Result":0,"ActivityId":"00000000-0000-0000-0000-000000000000"}'
    )
    assert messages.encode_response(messages.response(HResult.FAIL, "no disk", ExitCode=3)) == (
        b'{"Result":-2147467259,"ErrorMessage":"no disk","ErrorRecords":[{"Result":-2147467259,'
        b'"Message":"no disk","ModuleName":"hotlun","FileName":"","Line":4294967295}],'
        b'"ExitCode":3}'
    )


def test_failure_fits_the_smallest_frame_a_host_takes() -> None:
    """hcsshim's host drops the bridge at 64 KiB; no error text of ours gets there."""
    for letter in ("\x00", "💾", "\udcff"):
        document = messages.response(HResult.FAIL, letter * 100_000, activity_id=NULL)
        assert len(messages.encode_response(document)) + 16 < 1 << 16


def test_capabilities_of_the_original_agent() -> None:
    """A Linux guest asks for no Create and no Start, and has none of our features."""
    reply = Response.read(
        b'{"Result":0,"ActivityId":"00000000-0000-0000-0000-000000000000","Version":4,'
        b'"Capabilities":{"SupportedSchemaVersions":[{"Major":2,"Minor":1}],"RuntimeOsType":'
        b'"Linux","GuestDefinedCapabilities":{"NamespaceAddRequestSupported":true,'
        b'"SignalProcessSupported":true,"DumpStacksSupported":true,'
        b'"DeleteContainerStateSupported":true}}}'
    )
    capabilities = Capabilities.read(reply.fields.fields("Capabilities"))
    assert capabilities.os_type == "linux"
    assert not capabilities.send_create
    assert not capabilities.send_start
    assert capabilities.features == frozenset()
    guest_defined = capabilities.fields.fields("GuestDefinedCapabilities")
    assert guest_defined.boolean("DumpStacksSupported")


def test_capabilities_of_our_agent() -> None:
    """The features that it lists are those that the host reads."""
    reply = messages.negotiate_response(["options", "filesystems"], activity_id=NULL)
    assert messages.encode_response(reply) == (
        b'{"Result":0,"ActivityId":"00000000-0000-0000-0000-000000000000","Version":4,'
        b'"Capabilities":{"SupportedSchemaVersions":[{"Major":2,"Minor":1}],"RuntimeOsType":'
        b'"Linux","GuestDefinedCapabilities":{"Hotlun":{"Version":1,"Features":'
        b'["options","filesystems"]}}}}'
    )
    capabilities = Capabilities.read(Fields(reply).fields("Capabilities"))
    assert capabilities.features == {messages.FEATURE_OPTIONS, messages.FEATURE_FILESYSTEMS}


def test_system_without_a_name_is_windows() -> None:
    """An empty RuntimeOsType is what Windows guests send."""
    capabilities = Capabilities.read(Fields({"SendHostCreateMessage": True}))
    assert capabilities.os_type == "windows"
    assert capabilities.send_create


def test_extension_of_another_version_has_no_features_that_we_know() -> None:
    """A name may mean something else there."""
    extension = {"Hotlun": {"Version": 2, "Features": ["options"]}}
    fields = Fields({"GuestDefinedCapabilities": extension})
    assert Capabilities.read(fields).features == frozenset()


def test_vsock_port_as_the_host_sees_it() -> None:
    """Hyper-V makes a service id of the port that a Linux guest dials."""
    service = transport.vsock_service_id(transport.VSOCK_PORT)
    assert str(service) == "40000000-facb-11e6-bd58-64006a7986d3"
