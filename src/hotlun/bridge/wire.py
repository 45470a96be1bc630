"""One connection of the bridge, from its opening to its loss: requests out, answers in.

Answers are matched by id, in whatever order they come. An id that nobody waits for, a
notification, a reply that is not JSON cost at most the one request. Only a frame whose
size cannot be true ends a connection, because nothing after it can be read.

The host's end only: the agent has `agent.links`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from typing import TYPE_CHECKING

from hotlun.bridge import messages
from hotlun.bridge.documents import MessageError, printable
from hotlun.bridge.frames import Frame, FrameDecoder, FrameError
from hotlun.bridge.messages import MessageType, type_name
from hotlun.bridge.responses import Response

if TYPE_CHECKING:
    from collections.abc import Callable

    Answered = asyncio.Future[Frame | str]
    """An answer, or why none will come."""

_FLUSH_TIMEOUT = 1.0
"""Seconds that closing waits for a frame to go out whole: half of one would confuse the agent."""

_READ_SIZE = 1 << 16

_MOST_TOLD, _TOLD_ANEW = 64, 60.0
"""Log lines about what a guest sends unasked, in so many seconds: it may never stop."""

_log = logging.getLogger("hotlun.bridge")


class Ids:
    """Numbers for requests, none of them twice.

    An agent may answer what another connection has asked, or another process: so each
    one counts from a random 62-bit number, and goes on counting when it connects again.
    """

    def __init__(self) -> None:
        self._first = self._next = secrets.randbits(62)

    def take(self) -> int:
        number, self._next = self._next, self._next + 1
        return number

    def __contains__(self, number: int) -> bool:
        """Whether it has been taken."""
        return self._first <= number < self._next


class Wire:
    """Open streams, and who waits for what of them.

    Args:
        streams: to read from and to write to.
        peer: what is there, for the log.
        limit: the largest frame accepted, in bytes.
        ids: where the numbers of requests come from.
        greeting: the number of the Negotiate that is sent first. What comes before the
            answer to it was meant for somebody else, and is dropped.
        on_loss: called once, in the loop, with this wire, which says why it is `lost`.
    """

    def __init__(
        self,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        peer: str,
        *,
        limit: int,
        ids: Ids,
        greeting: int,
        on_loss: Callable[[Wire], None],
    ) -> None:
        reader, self._writer = streams
        self._peer = peer
        self._limit = limit
        self._ids = ids
        self._on_loss = on_loss
        self._pending: dict[int, Answered] = {}
        self._told, self._told_since = 0, 0.0
        self.lost = ""
        """Why nothing can be sent any more; `""` while it can."""
        kind = messages.response_type(MessageType.NEGOTIATE_PROTOCOL)
        decoder = FrameDecoder(limit, sync_on=(kind, greeting))
        self._receiver = asyncio.create_task(self._receive(reader, decoder), name=f"bridge {peer}")

    @property
    def is_idle(self) -> bool:
        """Whether the other end has taken all that was written."""
        return not self.lost and not self._writer.transport.get_write_buffer_size()

    @property
    def has_room(self) -> bool:
        """Whether `drain` would certainly not wait, nor raise."""
        transport = self._writer.transport
        low, _ = transport.get_write_buffer_limits()
        is_open = not self.lost and not transport.is_closing()
        return is_open and transport.get_write_buffer_size() <= low

    async def drain(self) -> None:
        """Wait until an other end that reads slowly has taken what was written before.

        Raises:
            OSError: the connection is lost.
        """
        await self._writer.drain()

    def send(self, number: int, data: bytes) -> Answered:
        """Write a request; its answer comes later, unless `number` is forgotten."""
        answered: Answered = asyncio.get_running_loop().create_future()
        if self.lost:
            answered.set_result(self.lost)
        else:
            self._pending[number] = answered
            self._writer.write(data)
        return answered

    def forget(self, number: int) -> None:
        """Nobody waits for this answer any more."""
        self._pending.pop(number, None)

    def abandon(self, reason: str) -> None:
        """Whoever waits for an answer waits no longer."""
        pending, self._pending = self._pending, {}
        for answered in pending.values():
            if not answered.done():
                answered.set_result(reason)

    def drop(self, reason: str) -> None:
        """Have the connection lost, at once."""
        self._fail(reason)
        self._writer.transport.abort()

    async def close(self, reason: str) -> None:
        """Close it, having written what was begun if that is possible soon."""
        self._fail(reason)
        try:
            self._writer.close()
            # Not wait_for(), which can swallow a cancellation (Python 3.11).
            with contextlib.suppress(OSError):
                async with asyncio.timeout(_FLUSH_TIMEOUT):
                    await self._writer.wait_closed()
        finally:
            self._writer.transport.abort()
            self._receiver.cancel()
        await asyncio.wait((self._receiver,))

    def _fail(self, reason: str) -> None:
        if self.lost:
            return
        self.lost = reason
        _log.debug("%s: connection closed: %s", self._peer, reason)
        self.abandon(f"the connection was lost ({reason})")
        self._on_loss(self)

    async def _receive(self, reader: asyncio.StreamReader, decoder: FrameDecoder) -> None:
        """Read frames until that makes no sense any more, then say why to all who wait."""
        reason = "reading ended unexpectedly"
        try:
            reason = await self._read_frames(reader, decoder)
        except asyncio.CancelledError:  # it is being closed, or the event loop ends
            self.lost = self.lost or "it was left open when the event loop ended"
            raise
        finally:
            self._fail(reason)
            if not self._writer.is_closing():
                self._writer.transport.abort()

    async def _read_frames(self, reader: asyncio.StreamReader, decoder: FrameDecoder) -> str:
        greeted = False
        while True:
            try:
                data = await reader.read(_READ_SIZE)
            except OSError as error:
                return f"reading failed: {error}"
            if not data:
                return "the other end closed it"
            try:
                frames = decoder.feed(data)
                error_text = ""
            except FrameError as error:
                frames = list(error.frames)
                error_text = f"what the guest sends cannot be trusted any more: {error}"
            if decoder.skipped > 4 * self._limit:
                return f"{decoder.skipped} bytes came that belong to no request of this connection"
            if frames and not greeted:
                greeted = True
                if decoder.skipped:
                    _log.info("%s: dropped %d stale bytes", self._peer, decoder.skipped)
            for frame in frames:
                self._dispatch(frame)
            if error_text:
                return error_text

    def _dispatch(self, frame: Frame) -> None:
        answered = self._pending.get(frame.id)
        if answered is None or not messages.is_response(frame.type):
            self._tell_of(frame)
        elif not answered.done():
            answered.set_result(frame)

    def _tell_of(self, frame: Frame) -> None:
        """Log what was dropped; not all of a flood."""
        now = asyncio.get_running_loop().time()
        if now - self._told_since > _TOLD_ANEW:
            self._told, self._told_since = 0, now
        self._told += 1
        if self._told > _MOST_TOLD:
            return
        if self._told == _MOST_TOLD:
            _log.warning("%s: much comes unasked, which is not told for a while", self._peer)
            return
        name = type_name(frame.type)
        if frame.type == MessageType.CONTAINER_NOTIFICATION:
            text = printable(frame.payload[:1024].decode(errors="replace"), 512)
            _log.info("%s: container notification: %s", self._peer, text)
        elif not messages.is_response(frame.type):
            _log.warning("%s: dropped a %s, which no guest should send", self._peer, name)
        elif frame.id in self._ids:
            _log.info("%s: dropped a late or second answer, %s", self._peer, name)
        else:
            _log.warning("%s: dropped an answer to unknown id %d, %s", self._peer, frame.id, name)


def read_answer(frame: Frame, kind: int) -> Response:
    """What a frame says to a request of that type.

    Raises:
        MessageError: nothing, or nothing that can be understood; in one line.
    """
    if frame.type != messages.response_type(kind):
        raise MessageError(f"the answer is a {type_name(frame.type)}")
    try:
        return Response.read(frame.payload)
    except MessageError as error:
        text = printable(str(error), 512)
        raise MessageError(f"the answer cannot be read: {text}") from error
