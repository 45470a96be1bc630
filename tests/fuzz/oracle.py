"""What an input must be answered with, told from its bytes alone, and whether it was.

By the rules of hcsshim's host, which drops the link for less, and by our own client's
reader. Frames are cut here anew, so that the server is not measured by its own code.
"""

from __future__ import annotations

import collections
import json
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from fuzz.grammar import SECRET, SECRET_TEXT
from hotlun.bridge import messages
from hotlun.bridge.documents import Fields, MessageError, decode, embedded
from hotlun.bridge.messages import MessageType
from hotlun.bridge.responses import Response

if TYPE_CHECKING:
    from collections.abc import Iterable

_HEADER = struct.Struct("<IIQ")
_LARGEST_REQUEST = 4 << 20
_LARGEST_ANSWER = 0x10000
"""Header included; hcsshim's host ends the bridge for more."""
_MEMBERS = frozenset(
    (
        "Result",
        "ActivityId",
        "ErrorMessage",
        "ErrorRecords",
        "Version",
        "Capabilities",
        "Properties",
    )
)
_LANED = (MessageType.MODIFY_SETTINGS, MessageType.GET_PROPERTIES)
"""Requests that are not answered where they are read."""
_INT32 = range(-(1 << 31), 1 << 31)


class Cut(NamedTuple):
    """One frame as it was sent."""

    kind: int
    id: int
    payload: bytes


class Debt(NamedTuple):
    """What has to come, and what may."""

    frames: tuple[Cut, ...]
    breaks: bool
    """Behind them is what cannot be a frame: the link is to be dropped."""
    is_whole: bool
    """Nothing is behind them."""
    must: collections.Counter[tuple[int, int]]
    """Types and ids of answers."""
    may: collections.Counter[tuple[int, int]]


def cut(data: bytes) -> tuple[list[Cut], bool]:
    """The whole frames, and whether what follows them cannot be one."""
    frames: list[Cut] = []
    at = 0
    while len(data) - at >= _HEADER.size:
        kind, size, number = _HEADER.unpack_from(data, at)
        if not _HEADER.size <= size <= _LARGEST_REQUEST:
            return frames, True
        if len(data) - at < size:
            break
        frames.append(Cut(kind, number, data[at + _HEADER.size : at + size]))
        at += size
    return frames, False


def owed(data: bytes, *, drops: bool) -> Debt:
    """What a host that has written this is to be answered.

    Args:
        drops: it has hung up at once, so that nothing has to come.
    """
    frames, breaks = cut(data)
    must: collections.Counter[tuple[int, int]] = collections.Counter()
    may: collections.Counter[tuple[int, int]] = collections.Counter()
    for frame in frames:
        if frame.kind >> 28 in (2, 3):
            continue
        answer = (0x20000000 | frame.kind & 0x0FFFFFFF, frame.id)
        may[answer] += 1
        # Such an answer can be overtaken by the end of the link.
        if not drops and not (breaks and frame.kind in _LANED):
            must[answer] += 1
    is_whole = sum(_HEADER.size + len(frame.payload) for frame in frames) == len(data)
    return Debt(tuple(frames), breaks, is_whole, must, may)


def check(debt: Debt, data: bytes) -> tuple[list[str], list[tuple[Cut, dict[str, Any]]]]:
    """What is wrong with what was answered, and the answers that could be read."""
    answers, breaks = cut(data)
    wrong = []
    if breaks or sum(_HEADER.size + len(answer.payload) for answer in answers) != len(data):
        wrong.append(f"the answers are no frames: {data[:200]!r}")
    got = collections.Counter((answer.kind, answer.id) for answer in answers)
    wrong += [f"no answer to {kind:#x}, {number}" for kind, number in debt.must - got]
    wrong += [
        f"an answer that nobody asked for: {kind:#x}, {number}" for kind, number in got - debt.may
    ]
    requests = {(0x20000000 | f.kind & 0x0FFFFFFF, f.id): f for f in debt.frames}
    repeated = {key for key, times in debt.may.items() if times > 1}
    read = []
    for answer in answers:
        try:
            document = _read(answer)
            key = (answer.kind, answer.id)
            if key not in repeated and key in requests:
                _check_activity(requests[key], document)
                _check_properties(requests[key], document)
            read.append((answer, document))
        except (MessageError, AssertionError) as error:
            wrong.append(
                f"an answer to {answer.kind:#x}, {answer.id}: {error}: {answer.payload[:300]!r}"
            )
    return wrong, read


def _read(answer: Cut) -> dict[str, Any]:
    size = _HEADER.size + len(answer.payload)
    assert size <= _LARGEST_ANSWER, f"{size} bytes"
    response = Response.read(answer.payload)
    document = dict(response.fields.document)
    result = document["Result"]
    assert type(result) is int, "Result is no number"
    assert result in _INT32, f"Result is {result}"
    assert document.keys() <= _MEMBERS, f"members {document.keys() - _MEMBERS}"
    assert bool(result) == bool(response.text), "a result without words, or words without one"
    for record in document.get("ErrorRecords", ()):
        assert record["Result"] == result, "another result in the records"
    return document


def _check_activity(request: Cut, document: dict[str, Any]) -> None:
    answered = document.get("ActivityId", "")
    simple = f'"ActivityId":"{answered}"'.encode("utf-8", "surrogatepass")
    if request.payload.lower().count(b"activityid") == 1 and simple in request.payload:
        return  # as it mostly is, and reading a document takes long
    try:
        activity = messages.activity_of(decode(request.payload))
    except MessageError:
        return
    assert answered == activity, "another ActivityId"


def _check_properties(request: Cut, document: dict[str, Any]) -> None:
    """An entry for each disk that was asked for, and a word for each of its mounts."""
    is_told = request.kind == MessageType.GET_PROPERTIES and not document["Result"]
    assert is_told == ("Properties" in document), "properties, or none, where they do not belong"
    if not is_told:
        return
    properties = embedded(Fields(document), "Properties")
    query = embedded(decode(request.payload), "Query")
    if messages.EXTENSION not in query:
        assert properties.document == {}, "properties that were not asked for"
        return
    assert properties.document.keys() == {messages.EXTENSION}
    found = properties.fields(messages.EXTENSION)
    assert found.document.keys() == {"Disks"}
    asked = query.fields(messages.EXTENSION).objects("Disks")
    disks = found.objects("Disks")
    assert len(disks) == len(asked) <= messages.MAX_SURVEYED_DISKS, "other disks"
    for disk, wanted in zip(disks, asked, strict=True):
        assert disk.document.keys() <= {"Device", "Busy", "Mounts"}
        assert disk.document.get("Busy", True) is True
        device, mounts = disk.string("Device"), disk.booleans("Mounts")
        assert device in ("", *messages.DEVICES), "no such device"
        if mounts:
            assert device == messages.OWN, "mounts without their disk"
            assert len(mounts) == len(wanted.objects("Mounts")), "other mounts"
            assert any(mounts), "a member that could have been left out"


def leaks(texts: Iterable[str | bytes], frames: Iterable[Cut]) -> list[str]:
    """Of the texts those that tell a key, where nothing but the member Key had it."""
    told = [text for text in texts if _tells(text)]
    if told and any(_tells_elsewhere(frame.payload) for frame in frames):
        return []  # who gives the key as a path hears of it
    return [f"a key is told: {text[:300]!r}" for text in told]


def _tells(text: str | bytes) -> bool:
    if isinstance(text, bytes):
        return SECRET in text or SECRET_TEXT.encode() in text
    return SECRET.decode() in text or SECRET_TEXT in text


def _tells_elsewhere(payload: bytes) -> bool:
    try:
        document = json.loads(payload)
    except (ValueError, RecursionError):
        return False

    def found(value: Any) -> bool:
        if isinstance(value, str):
            return SECRET_TEXT in value
        if isinstance(value, list):
            return any(map(found, value))
        if isinstance(value, dict):
            return any(
                SECRET_TEXT in name or (name.lower() != "key" and found(inner))
                for name, inner in value.items()
            )
        return False

    return found(document)
