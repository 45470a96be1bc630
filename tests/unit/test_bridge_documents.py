"""Documents: JSON as it goes out, and reading what nobody should send."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotlun.bridge import messages
from hotlun.bridge.documents import (
    MAX_DEPTH,
    Fields,
    MessageError,
    decode,
    embedded,
    encode_request,
    encode_response,
    printable,
)
from hotlun.bridge.responses import Response


@pytest.mark.parametrize("text", [None, "", "{}"])
def test_an_embedded_document_that_is_missing_is_empty(text: str | None) -> None:
    """As every member that is missing has the zero value of its type."""
    assert embedded(Fields({"Query": text}), "Query").document == {}


@pytest.mark.parametrize(
    "text",
    [7, {}, [], True, "x", "[]", "7", "{", "\ud800", '{"a":NaN}', '{"a":' * 99 + "1" + "}" * 99],
)
def test_an_embedded_document_is_read_as_any_other(text: object) -> None:
    """Its depth and its numbers are bounded, and what is wrong is said of the member."""
    with pytest.raises(MessageError, match=r"^Query"):
        embedded(Fields({"Query": text}), "Query")


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
    assert encode_request(document) == expected.encode() + b"\n"
    assert encode_response(document) == expected.encode()


@pytest.mark.parametrize("value", ["\udc80", float("nan"), {1, 2}, b"bytes"])
def test_what_json_cannot_hold_is_not_sent(value: object) -> None:
    """Half a surrogate pair, no number, no JSON type: an error, not something else sent."""
    with pytest.raises(MessageError, match="no document can hold that"):
        encode_request({"x": value})


@pytest.mark.parametrize("activity", [messages.NULL_ID, 'a"b', "\ud800", "ö"])
def test_an_answer_without_words_is_as_any_other(activity: str) -> None:
    """It is put together only once for each id, and no other is given its bytes."""
    for result in (0, -1, 0):
        document = {"Result": result, "ActivityId": activity}
        words = encode_response({**document, "More": 1})
        assert encode_response(document) == words.replace(b',"More":1', b"")


def test_text_becomes_one_printable_line() -> None:
    """Many lines, terminal escapes, bells and direction marks: nothing reaches a terminal raw."""
    text = "Usage:\n\n\tmkfs.xfs\r\n/* \x1b[31mred\x07 \u202e*/\x85end"
    assert printable(text) == (r"Usage:; mkfs.xfs; /* \x1b[31mred\x07 \u202e*/; end")


@given(st.text(), st.integers(1, 50))
def test_printable_is_bounded_and_printable(text: str, limit: int) -> None:
    """Whatever comes in."""
    line = printable(text, limit)
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
        decode(payload)
    with pytest.raises(MessageError):
        Response.read(payload)


def test_depth_is_counted_not_met() -> None:
    """As deep as allowed is allowed, one deeper is not."""
    inside = MAX_DEPTH - 1
    payload = b'{"a":' + b"[" * inside + b"]" * inside + b"}"
    assert decode(payload).document
    with pytest.raises(MessageError, match="nested deeper"):
        decode(payload.replace(b"[]", b"[[]]"))


def test_fields_are_found_without_regard_to_case() -> None:
    """As in the original agent; an exact name is preferred, of two equal ones the last."""
    fields = decode(b'{"mountpath":"/b","LUN":7,"MountPath":"/a","MountPath":"/c"}')
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
    fields = decode(b'{"a":null}')
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
    fields = decode(json.dumps({"Settings": {"M": value}}).encode()).fields("Settings")
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
