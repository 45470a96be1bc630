"""One stream to an agent: requests in flight, answers matched by id, one end for all of them.

A session is used once; what follows when it has ended is the client's. What it lives
through is that the agent at the other end is started anew: under QEMU the host's end of
the port stays open then, and the new agent knows nothing of what the old one was asked.
Each request belongs to the *era* of the agent that it was sent to.

Under QEMU the stream is a unix socket in front of a virtio-serial port:

* Connecting succeeds although nobody in the guest has opened the port yet, and
  an agent that opens it later still finds what was sent. So Negotiate is sent
  once (a second one on the same connection is an error to the original agent) and
  its answer is awaited until the deadline.
* The port may still give out what an agent sent to an *earlier* client, beginning
  anywhere in a frame. So everything up to the answer to this session's own
  Negotiate, which has an id that nobody else used, is dropped.
* An answer to an earlier client's request may come even later than that. So ids are
  never used again, also not in a later session.
"""

from __future__ import annotations

import asyncio
import logging
import time
import warnings
from typing import TYPE_CHECKING, Any

from hotlun.bridge import messages
from hotlun.bridge.frames import Frame, FrameDecoder, FrameError, encode
from hotlun.bridge.messages import MessageError, MessageType, Response, type_name
from hotlun.errors import BackendError, OutcomeUnknownError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

_FLUSH_TIMEOUT = 1.0
"""Seconds that closing waits for a frame to go out whole: half of one would confuse the agent."""

_READ_SIZE = 1 << 16

_log = logging.getLogger("hotlun.bridge")


class Session:
    """The stream, from when it is open to when it is lost or closed.

    Args:
        reader, writer: open.
        peer: whom it leads to, for a person.
        limit: the largest frame sent or accepted, in bytes.
        first_id: the lowest id that is not used yet.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        peer: str,
        *,
        limit: int,
        first_id: int,
    ) -> None:
        self.lost = ""
        """Why nothing can be sent any more; `""` while that is not so."""
        self.era = 0
        """How often an agent that was started anew has been met."""
        self.next_id = first_id
        self._first_id = first_id
        self._writer = writer
        self._peer = peer
        self._limit = limit
        self._pending: dict[int, tuple[int, asyncio.Future[Frame | str]]] = {}
        """By id: the request's era, and where its answer, or why there is none, is awaited."""
        self._receiver = asyncio.create_task(self._receive(reader), name=f"bridge {peer}")

    async def ended(self) -> str:
        """Wait for its end; why, in words."""
        await asyncio.wait((self._receiver,))
        return self.lost

    async def exchange(
        self,
        kind: int,
        document: Mapping[str, Any],
        timeout: float,
        *,
        check: Callable[[], Awaitable[object]] | None = None,
        interval: float = 0.0,
    ) -> Response:
        """Send one request and wait for its answer; what it says is for the caller to judge.

        Args:
            kind: a `MessageType`.
            document: what to send.
            timeout: seconds, sending included.
            check: awaited whenever there has been no answer for another `interval` seconds.
            interval: see `check`.

        Raises:
            BackendError: nothing was sent.
            OutcomeUnknownError: it was sent, and no answer that can be read came in time.
        """
        deadline = time.monotonic() + timeout
        name = type_name(kind)
        number, self.next_id = self.next_id, self.next_id + 1
        data = self._encode(kind, number, document)
        await self._wait_for_room(name, timeout)
        self._check_open(name)
        answered: asyncio.Future[Frame | str] = asyncio.get_running_loop().create_future()
        self._pending[number] = (self.era, answered)
        try:
            self._writer.write(data)
            while not answered.done() and (left := deadline - time.monotonic()) > 0:
                await asyncio.wait((answered,), timeout=min(left, interval) if check else left)
                if check is not None and not answered.done() and time.monotonic() < deadline:
                    await _until(answered, check(), deadline)
        finally:
            del self._pending[number]
        if not answered.done():
            raise OutcomeUnknownError(
                f"{self._peer} did not answer a {name} within {timeout:.3g} s: it may or may not "
                "have been done; the connection stays open",
                detail="no answer in time",
            )
        frame = answered.result()
        if isinstance(frame, str):
            raise OutcomeUnknownError(
                f"{self._peer} will not answer a {name} that was sent ({frame}): it may or may "
                "not have been done; look, then undo or repeat it",
                detail=frame,
            )
        return _read_response(frame, kind, self._peer)

    def begin_era(self, reason: str) -> None:
        """Another agent is there: what the one before it has not answered it never will."""
        self.era += 1
        for era, answered in self._pending.values():
            if era < self.era and not answered.done():
                answered.set_result(reason)

    async def close(self) -> None:
        """End it; requests still in flight get `OutcomeUnknownError`."""
        self._fail("it was left")
        try:
            self._writer.close()
            async with asyncio.timeout(_FLUSH_TIMEOUT):
                await self._writer.wait_closed()
        except (OSError, TimeoutError):
            pass
        finally:
            self._writer.transport.abort()
            self._receiver.cancel()
        await asyncio.wait((self._receiver,))

    def _encode(self, kind: int, number: int, document: Mapping[str, Any]) -> bytes:
        try:
            data = encode(Frame(kind, number, messages.encode_request(document)))
        except (MessageError, FrameError) as error:
            raise BackendError(
                f"nothing was sent: a {type_name(kind)} cannot say that: {error}",
                detail=str(error),
            ) from error
        if len(data) > self._limit:
            raise BackendError(
                f"nothing was sent: the {type_name(kind)} takes {len(data)} bytes, "
                f"{self._limit} are allowed; ask for less, or give the connection a higher limit"
            )
        return data

    async def _wait_for_room(self, name: str, timeout: float) -> None:
        """Wait until a guest that reads slowly has taken what was written before."""
        self._check_open(name)
        try:
            async with asyncio.timeout(timeout):
                await self._writer.drain()
        except TimeoutError:
            raise BackendError(
                f"nothing was sent: {self._peer} has taken no bytes for {timeout:.3g} s; "
                "is the agent stuck, or the VM paused?"
            ) from None
        except OSError as error:
            raise BackendError(
                f"nothing was sent: the connection to {self._peer} is lost ({error})",
                detail=str(error),
            ) from error

    def _check_open(self, name: str) -> None:
        if self.lost:
            raise BackendError(
                f"a {name} was not sent: the connection to {self._peer} is lost ({self.lost})",
                detail=self.lost,
            )

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        """Read frames until that makes no sense any more, then say why to all who wait."""
        greeting = messages.response_type(MessageType.NEGOTIATE_PROTOCOL)
        decoder = FrameDecoder(self._limit, sync_on=(greeting, self._first_id))
        reason = "it was left open when the event loop ended"
        try:
            reason = await self._read_frames(reader, decoder)
        except asyncio.CancelledError:
            if not self.lost:
                warnings.warn(
                    f"unclosed connection to {self._peer}: leave its `async with`",
                    ResourceWarning,
                    stacklevel=1,
                )
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
        name = type_name(frame.type)
        if frame.type == MessageType.CONTAINER_NOTIFICATION:
            text = messages.printable(frame.payload[:1024].decode(errors="replace"), 512)
            _log.info("%s: container notification: %s", self._peer, text)
        elif not messages.is_response(frame.type):
            _log.warning("%s: dropped a %s, which no guest should send", self._peer, name)
        elif frame.id in self._pending:
            _, answered = self._pending[frame.id]
            if not answered.done():
                answered.set_result(frame)
        elif self._first_id <= frame.id < self.next_id:
            _log.info("%s: dropped a late or second answer, %s", self._peer, name)
        else:
            _log.warning("%s: dropped an answer to unknown id %d, %s", self._peer, frame.id, name)

    def _fail(self, reason: str) -> None:
        """Nothing is sent any more, and whoever waits for an answer waits no longer."""
        if self.lost:
            return
        self.lost = reason
        _log.debug("%s: connection closed: %s", self._peer, reason)
        for _, answered in self._pending.values():
            if not answered.done():
                answered.set_result(f"the connection was lost: {reason}")


async def _until(
    answered: asyncio.Future[Frame | str], work: Awaitable[object], deadline: float
) -> None:
    """Wait for the work, but not beyond an answer or the deadline."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait(
            (answered, task),
            timeout=max(0.0, deadline - time.monotonic()),
            return_when=asyncio.FIRST_COMPLETED,
        )
    finally:
        if not task.done():
            task.cancel()
        elif not task.cancelled():
            task.exception()  # that the check failed says nothing about the answer


def _read_response(frame: Frame, kind: int, peer: str) -> Response:
    name = type_name(kind)
    if frame.type != messages.response_type(kind):
        problem = f"the answer is a {type_name(frame.type)}"
    else:
        try:
            return Response.read(frame.payload)
        except MessageError as error:
            problem = f"the answer cannot be read: {messages.printable(str(error), 512)}"
    raise OutcomeUnknownError(
        f"a {name} was sent to {peer} and {problem}; it may or may not have been done",
        detail=problem,
    )
