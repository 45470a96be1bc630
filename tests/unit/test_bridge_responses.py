"""Responses: what the host reads of an answer, whatever it is."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotlun.bridge import messages
from hotlun.bridge.codes import HResult
from hotlun.bridge.documents import Fields, MessageError, decode, encode_response
from hotlun.bridge.messages import ModifyRequest
from hotlun.bridge.responses import Capabilities, Response


def test_answer_can_name_any_file() -> None:
    """A file name that is no UTF-8 is escaped in an answer, and readable at the other end."""
    payload = encode_response(messages.response(HResult.FAIL, "no \udcff.img"))
    assert Response.read(payload).text == r"no \udcff.img"


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
    return Capabilities.read(decode(payload))


def _read_modify(payload: bytes) -> ModifyRequest:
    return ModifyRequest.read(decode(payload))


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
    reply = messages.negotiate_response(["options", "filesystems"], activity_id=messages.NULL_ID)
    assert encode_response(reply) == (
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
