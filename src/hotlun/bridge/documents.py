"""The documents in the frames of the bridge: JSON, written, and read with suspicion.

Both ends read the other's as hostile input: bounded depth, bounded numbers, every
field checked for its type, and one error, `MessageError`, for all that is wrong.

Standard library only, for Python 3.9 too: the agent inside the guest runs this file.
"""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_DEPTH = 32
MAX_TEXT = 4096
"""Characters of an error text that are sent or shown: hcsshim's host takes 64 KiB frames."""

Document = dict[str, Any]


class MessageError(ValueError):
    """The document is not JSON, or not what the protocol says it is."""


def encode_request(document: Mapping[str, Any]) -> bytes:
    """Compact UTF-8 JSON, members in their order, ended by one newline as hcsshim's host does.

    Raises:
        MessageError: a string that UTF-8 cannot hold, or a value that JSON cannot.
    """
    try:
        return (to_json(document) + "\n").encode()
    except (TypeError, ValueError) as error:
        problem = str(error)
    # Not chained: the codec's error keeps the whole document, and there may be a key in it.
    raise MessageError(f"no document can hold that: {problem}")


def encode_response(document: Mapping[str, Any]) -> bytes:
    """As `encode_request`, without the newline; what UTF-8 cannot hold is escaped."""
    if tuple(document) == ("Result", "ActivityId"):
        return _short_response(document["Result"], document["ActivityId"])
    return to_json(document).encode("utf-8", "backslashreplace")


@functools.lru_cache(maxsize=16)
def _short_response(result: int, activity_id: str) -> bytes:
    """Most answers say no more than that it is done, and hosts have few ids for what they do."""
    document = {"Result": result, "ActivityId": activity_id}
    return to_json(document).encode("utf-8", "backslashreplace")


def to_json(document: Mapping[str, Any]) -> str:
    """As `encode_request`, but as text: what another document holds in a string (`embedded`)."""
    return _ENCODER.encode(document)


def decode(payload: bytes) -> Fields:
    """Read a document. Of members given twice the last counts.

    Raises:
        MessageError: not UTF-8, not JSON, not an object, nested deeper than
            `MAX_DEPTH`, or with a number of more than 20 digits.
    """
    try:
        text = payload.decode().strip(_BLANKS)
        document, end = _DECODER.raw_decode(text)  # decode() looks for blanks with two regexes
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except MessageError:
        raise
    except RecursionError:
        raise MessageError(f"nested deeper than {MAX_DEPTH}") from None
    except ValueError as error:
        raise MessageError(f"not a JSON document: {error}") from None
    if not isinstance(document, dict):
        raise MessageError(f"not a JSON object but {_kind_of(document)}")
    # Mostly there are not enough brackets for that.
    if payload.count(b"{") + payload.count(b"[") > MAX_DEPTH and _is_deep(document):
        raise MessageError(f"nested deeper than {MAX_DEPTH}")
    return Fields(document)


def _is_deep(document: Document) -> bool:
    level: list[Any] = [document]
    for _ in range(MAX_DEPTH):
        if not level:
            break
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
    return bool(level)


def _parse_integer(digits: str) -> int:
    if len(digits) > 21:
        raise MessageError(f"a number of {len(digits)} digits")
    return int(digits)


def _refuse_constant(word: str) -> None:
    raise MessageError(f"{word} is not JSON")


def embedded(document: Fields, name: str) -> Fields:
    """The document in a string; an empty one if the string is empty or not there.

    Raises:
        MessageError: it is no string, or holds what `decode` refuses.
    """
    text = document.string(name)
    try:
        return decode(text.encode()) if text else Fields({})
    except ValueError as error:
        raise MessageError(f"{name}: {error}") from None


def printable(text: str, limit: int = MAX_TEXT) -> str:
    """One line that is safe in a log or a terminal, at most `limit` characters.

    Lines become parts separated by `; `, control and other unprintable characters
    their escapes.
    """
    if not text:  # as with most answers
        return ""
    lines = (line.strip() for line in text[: 2 * limit].splitlines())
    line = "; ".join(line for line in lines if line)
    if not line.isprintable():
        line = "".join(
            char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
            for char in line
        )
    return line if len(line) <= limit else line[: limit - 1] + "…"


_SPELLED = frozenset(
    (
        *("ContainerId", "ActivityId", "Request", "RequestType", "ResourceType", "Settings"),
        *("Controller", "Lun", "Partition", "MountPath", "ReadOnly", "Options", "Filesystem"),
        *("Encrypted", "BlockDev", "EnsureFilesystem", "PreserveData", "LazyUnmount"),
        *("Serial", "Size", "Key", "Verity", "RootHash", "HashOffset", "TimeoutInMs"),
        *("Result", "ErrorMessage", "ErrorRecords"),
    )
)
"""Members that are asked for just so: where there are no others, none has to be looked for
without regard to case."""


class Fields:
    """An object of a document: members found without regard to case, checked for type.

    A member that is missing or null has the default, as in the original agent.
    Each getter raises `MessageError`, naming the member, for a value of another type.
    """

    # The getters that a request is read by look themselves: mostly there is nothing to find,
    # and a call more would cost an emulated guest as much as all that they do.

    __slots__ = ("_odd", "_where", "document")

    def __init__(self, document: Mapping[str, Any], where: str = "") -> None:
        self.document = document
        self._where = where
        self._odd: dict[str, Any] | None = None
        """Members that may be spelled otherwise than they are asked for, in lower case."""
        if not _SPELLED.issuperset(document):
            self._odd = {
                name.lower(): value for name, value in document.items() if name not in _SPELLED
            }

    def __contains__(self, name: str) -> bool:
        return self._get(name) is not None

    def string(self, name: str, default: str = "") -> str:
        value = self.document.get(name)
        if value is None and self._odd is not None:
            value = self._odd.get(name.lower())
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value

    def boolean(self, name: str) -> bool:
        value = self.document.get(name)
        if value is None and self._odd is not None:
            value = self._odd.get(name.lower())
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self._wrong(name, value, "a boolean")
        return value

    def integer(self, name: str, *, minimum: int = 0, maximum: int, default: int | None = 0) -> int:
        """Default None: the member must be there."""
        value = self.document.get(name)
        if value is None and self._odd is not None:
            value = self._odd.get(name.lower())
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(name, value, _between(minimum, maximum))
        if not minimum <= value <= maximum:
            expected = _between(minimum, maximum)
            raise MessageError(f"{self._where}{name} is {value}, not {expected}")
        return value

    def strings(self, name: str) -> list[str]:
        value = self._get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name, value, "an array of strings")
        return value

    def booleans(self, name: str) -> list[bool]:
        value = self._get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, bool) for item in value):
            raise self._wrong(name, value, "an array of booleans")
        return value

    def fields(self, name: str) -> Fields:
        """The object in a member; an empty one by default (see `in`)."""
        value = self._get(name)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return Fields(value, f"{self._where}{name}.")

    def objects(self, name: str) -> list[Fields]:
        value = self._get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._wrong(name, value, "an array of objects")
        return [Fields(item, f"{self._where}{name}.") for item in value]

    def _get(self, name: str) -> Any:
        value = self.document.get(name)
        if value is None and self._odd is not None:
            value = self._odd.get(name.lower())
        return value

    def _wrong(self, name: str, value: object, expected: str) -> MessageError:
        return MessageError(f"{self._where}{name} is {_kind_of(value)}, not {expected}")


def _between(minimum: int, maximum: int) -> str:
    return f"a whole number, {minimum} to {maximum}"


def _kind_of(value: object) -> str:
    return {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}.get(
        type(value), "null" if value is None else "a number"
    )


# Made once: json.dumps() and json.loads() with arguments of ours make one each time.
_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)
_DECODER = json.JSONDecoder(parse_int=_parse_integer, parse_constant=_refuse_constant)
_BLANKS = " \t\n\r"
