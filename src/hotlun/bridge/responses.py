"""A guest's answer as the host reads it: how a request went, and what the guest can do.

Only the host has this file. What the guest answers is built in `messages`.
"""

from __future__ import annotations

from typing import NamedTuple

from hotlun.bridge.documents import Fields, MessageError, decode, printable
from hotlun.bridge.messages import EXTENSION, EXTENSION_VERSION


class Response(NamedTuple):
    """An answer to a request: `code` is unsigned, `text` the guest's words in one line."""

    code: int
    text: str
    fields: Fields

    @classmethod
    def read(cls, payload: bytes) -> Response:
        """Read an answer.

        Only `Result` must be right; words that are none are left out.

        Raises:
            MessageError: it does not say how the request went.
        """
        fields = decode(payload)
        code = fields.integer("Result", minimum=-(1 << 31), maximum=(1 << 32) - 1, default=None)
        return cls(code & 0xFFFFFFFF, _error_text(fields), fields)


def _error_text(fields: Fields) -> str:
    try:
        text = printable(fields.string("ErrorMessage"))
        if not text:
            records = fields.objects("ErrorRecords")[:8]
            text = printable("\n".join(record.string("Message") for record in records))
    except MessageError:
        return ""
    return text


class Capabilities(NamedTuple):
    """What a guest says of itself when it answers Negotiate.

    `os_type` is in lower case; `features` are those of our extension, none for
    a peer that does not know it or speaks another version of it.
    """

    os_type: str
    send_create: bool
    send_start: bool
    features: frozenset[str]
    fields: Fields

    @classmethod
    def read(cls, fields: Fields) -> Capabilities:
        """From the member `Capabilities`.

        Raises:
            MessageError: a member is of a wrong type.
        """
        extension = fields.fields("GuestDefinedCapabilities").fields(EXTENSION)
        known = extension.integer("Version", maximum=(1 << 32) - 1) == EXTENSION_VERSION
        return cls(
            os_type=printable(fields.string("RuntimeOsType"), 32).lower() or "windows",
            send_create=fields.boolean("SendHostCreateMessage"),
            send_start=fields.boolean("SendHostStartMessage"),
            features=frozenset(extension.strings("Features") if known else ()),
            fields=fields,
        )
