"""Bytes in, frames out: how the bridge cuts a byte stream into messages.

A frame is a 16-byte little-endian header (type, size, id) and a payload; the size
counts the header. Nothing in it marks where a frame begins, so a size that cannot
be true is the end of the stream: the decoder says so, and stays broken.

Standard library only, for Python 3.9 too: the agent inside the guest runs this file.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

HEADER = struct.Struct("<IIQ")
"""Type (unsigned 32 bits), size with this header (32), id (64); little-endian."""

DEFAULT_LIMIT = 4 << 20
"""The largest frame accepted, header included, in bytes.

hcsshim's host stops at 64 KiB, which an error text with a stack trace can pass.
"""


class Frame(NamedTuple):
    """One message: its type and id as numbers, its payload as it came."""

    type: int
    id: int
    payload: bytes


class FrameError(ValueError):
    """The stream cannot be trusted any more.

    `frames` holds the whole frames that the same call to `feed` found before
    the bad one, so that how the bytes were split makes no difference.
    """

    def __init__(self, message: str, frames: tuple[Frame, ...] = ()) -> None:
        super().__init__(message)
        self.frames = frames


def encode(frame: Frame) -> bytes:
    """The bytes of a frame.

    Raises:
        FrameError: a number does not fit its field.
    """
    try:
        return HEADER.pack(frame.type, HEADER.size + len(frame.payload), frame.id) + frame.payload
    except struct.error as error:
        raise FrameError(
            f"no frame has type {frame.type:#x}, id {frame.id} and {len(frame.payload)} bytes: "
            f"{error}"
        ) from None


class FrameDecoder:
    """Collects bytes, however they are split, and gives back whole frames.

    Args:
        limit: the largest frame accepted, in bytes, header included.
        sync_on: the type and id of the frame to begin with; what comes before it
            is dropped and counted in `skipped`. For streams that may begin with the
            rest of somebody else's frame. Every type has control characters, which
            never occur raw in JSON: no payload can be taken for the header looked for.
    """

    def __init__(
        self, limit: int = DEFAULT_LIMIT, *, sync_on: tuple[int, int] | None = None
    ) -> None:
        self.skipped = 0
        self._limit = limit
        self._buffer = bytearray()
        self._error: str | None = None
        self._start = None if sync_on is None else _header_pattern(*sync_on)

    @property
    def pending(self) -> int:
        """How many bytes of an unfinished frame are held."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[Frame]:
        """Take in some bytes; return the frames that are whole now.

        Raises:
            FrameError: a size below the header's or above the limit, now or earlier.
        """
        if self._error is not None:
            raise FrameError(self._error)
        if not self._buffer and self._start is None and len(data) >= HEADER.size:
            kind, size, number = HEADER.unpack_from(data)
            if size == len(data) <= self._limit:  # mostly there is one, and it came whole
                return [Frame(kind, number, bytes(data[HEADER.size :]))]
        self._buffer += data
        if self._start is not None and not self._synchronised(self._start):
            return []
        frames: list[Frame] = []
        position, end = 0, len(self._buffer)
        with memoryview(self._buffer) as view:
            while end - position >= HEADER.size:
                kind, size, number = HEADER.unpack_from(view, position)
                if not HEADER.size <= size <= self._limit:
                    self._error = (
                        f"a frame of type {kind:#010x} claims {size} bytes; "
                        f"{HEADER.size} to {self._limit} are possible"
                    )
                    break
                if end - position < size:
                    break
                payload = bytes(view[position + HEADER.size : position + size])
                frames.append(Frame(kind, number, payload))
                position += size
        if self._error is not None:
            self._buffer.clear()
            raise FrameError(self._error, tuple(frames))
        del self._buffer[:position]  # moves a pointer, not the rest
        return frames

    def _synchronised(self, start: re.Pattern[bytes]) -> bool:
        """Drop what cannot belong to the frame looked for; whether it was found."""
        found = start.search(self._buffer)
        useless = found.start() if found else max(0, len(self._buffer) - HEADER.size + 1)
        self.skipped += useless
        del self._buffer[:useless]
        if found:
            self._start = None
        return found is not None


def _header_pattern(kind: int, number: int) -> re.Pattern[bytes]:
    """A header of any size: HEADER's type and id, four bytes apart."""
    begin, end = re.escape(struct.pack("<I", kind)), re.escape(struct.pack("<Q", number))
    return re.compile(begin + b".{4}" + end, re.DOTALL)
