"""The host's end of the bridge: many requests in flight over one connection.

What hcsshim's host does by killing the whole bridge (a slow answer, an unknown
id, a notification it did not expect, a reply that is not JSON) costs here at most
the one request. Only a frame whose size cannot be true ends a connection, because
nothing after it can be read.

Under QEMU the connection is a unix socket in front of a virtio-serial port. That
has three consequences:

* Connecting succeeds although nobody in the guest has opened the port yet, and
  an agent that opens it later still finds what was sent. So Negotiate is sent
  once (a second one on the same connection is an error to the original agent) and
  its answer is awaited until the deadline.
* The port may still give out what an agent sent to an *earlier* client, beginning
  anywhere in a frame. So everything up to the answer to this connection's own
  Negotiate, which has an id that nobody else used, is dropped.
* An answer to an earlier client's request may come even later than that. So every
  connection counts its ids from a random 62-bit number.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
import warnings
from typing import TYPE_CHECKING, Any, Self

from hotlun.bridge import messages
from hotlun.bridge.frames import DEFAULT_LIMIT, Frame, FrameDecoder, FrameError, encode
from hotlun.bridge.messages import MessageError, MessageType, Response, type_name
from hotlun.errors import BackendError, OutcomeUnknownError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    Opener = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]

CONNECT_TIMEOUT = 120.0
"""Seconds for an agent to answer: a guest may still be booting."""

REQUEST_TIMEOUT = 300.0
"""Seconds for one answer, as hcsshim's host allows."""

_FLUSH_TIMEOUT = 1.0
"""Seconds that leaving waits for a frame to go out whole: half of one would confuse the agent."""

_READ_SIZE = 1 << 16

_log = logging.getLogger("hotlun.bridge")


class BridgeConnection:
    """A connection to the agent in a guest, open inside its `async with`.

    Entering connects and negotiates. Requests may be made by any number of tasks
    at once; answers are matched by id, in whatever order they come.

    Made by `connect_unix` or `over`.
    """

    def __init__(
        self, opener: Opener, peer: str, *, timeout: float, request_timeout: float, limit: int
    ) -> None:
        self._opener = opener
        self._peer = peer
        self._timeout = timeout
        self._request_timeout = request_timeout
        self._limit = limit
        self._first_id = secrets.randbits(62)
        self._next_id = self._first_id
        self._pending: dict[int, asyncio.Future[Frame | None]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._receiver: asyncio.Task[None] | None = None
        self._entered = False
        self._lost = "it has not been entered with `async with` yet"  # why not; "" while open
        self._capabilities: messages.Capabilities | None = None  # None until negotiated

    @classmethod
    def connect_unix(
        cls,
        path: str | os.PathLike[str],
        *,
        timeout: float = CONNECT_TIMEOUT,
        request_timeout: float = REQUEST_TIMEOUT,
        limit: int = DEFAULT_LIMIT,
    ) -> Self:
        """Through a unix socket, such as QEMU's end of a virtio-serial port.

        Args:
            path: the socket.
            timeout: seconds for entering, until the agent in the guest has answered.
            request_timeout: seconds for each answer, unless the request says otherwise.
            limit: the largest frame sent or accepted, in bytes.
        """
        path = os.fspath(path)

        async def opener() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            return await asyncio.open_unix_connection(path)

        return cls(opener, path, timeout=timeout, request_timeout=request_timeout, limit=limit)

    @classmethod
    def over(
        cls,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        timeout: float = CONNECT_TIMEOUT,
        request_timeout: float = REQUEST_TIMEOUT,
        limit: int = DEFAULT_LIMIT,
    ) -> Self:
        """Over streams that are open already; leaving closes them. As `connect_unix` otherwise."""

        async def opener() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            return reader, writer

        peer = str(writer.get_extra_info("peername") or "the given streams")
        return cls(opener, peer, timeout=timeout, request_timeout=request_timeout, limit=limit)

    @property
    def capabilities(self) -> messages.Capabilities:
        """What the guest said of itself.

        Raises:
            BackendError: the connection has not been entered.
        """
        if self._capabilities is None:
            raise self._closed_error("the guest was not asked what it can do")
        return self._capabilities

    @property
    def features(self) -> frozenset[str]:
        """The parts of our extension that the agent has; none for an agent not ours."""
        return self.capabilities.features

    @property
    def os_type(self) -> str:
        """What runs in the guest, in lower case, as it says."""
        return self.capabilities.os_type

    @property
    def closed(self) -> bool:
        """Whether nothing can be sent: before entering, after leaving, after a loss."""
        return bool(self._lost)

    async def __aenter__(self) -> Self:
        """Connect, negotiate, and create and start the VM's system if the guest wants that.

        Raises:
            BackendError: nobody listens or answers there, or it speaks another version.
        """
        if self._entered:
            raise self._closed_error("a connection is entered once")
        self._entered = True
        try:
            async with asyncio.timeout(self._timeout):
                try:
                    reader, self._writer = await self._opener()
                except OSError as error:
                    raise BackendError(
                        f"cannot connect to the agent's socket {self._peer}: {error}; "
                        "is the VM running, and is that its agent socket?",
                        operation="connect",
                        detail=str(error),
                    ) from error
                self._lost = ""
                self._receiver = asyncio.create_task(
                    self._receive(reader), name=f"bridge {self._peer}"
                )
                await self._negotiate()
        except TimeoutError:
            await self._close()
            raise BackendError(
                f"no agent answered at {self._peer} within {self._timeout:g} s: is the agent "
                "running in the guest, and is no other client connected to that socket?",
                operation="connect",
            ) from None
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the socket; requests still in flight get `OutcomeUnknownError`."""
        await self._close()

    async def modify(self, request: Mapping[str, Any], *, timeout: float | None = None) -> Response:
        """Have the guest change something; what it answered, refusals included.

        Args:
            request: `{"RequestType": ..., "ResourceType": ..., "Settings": {...}}`.
            timeout: seconds for the answer.

        Raises:
            BackendError, OutcomeUnknownError: as `request`.
        """
        return await self.request(
            MessageType.MODIFY_SETTINGS, messages.modify_request(request), timeout=timeout
        )

    async def request(
        self, kind: int, document: Mapping[str, Any], *, timeout: float | None = None
    ) -> Response:
        """Send one request and wait for its answer; what it says is for the caller to judge.

        Cancelling leaves the connection as it is; the answer is then dropped.

        Args:
            kind: a `MessageType`.
            document: what to send, members in their order.
            timeout: seconds, sending included; None for the connection's own.

        Raises:
            BackendError: nothing was sent: the connection is closed, the guest takes no
                more bytes, or the document cannot be sent.
            OutcomeUnknownError: it was sent, and no answer that can be read came in time.
        """
        if self._capabilities is None:
            raise self._closed_error(f"a {type_name(kind)} was not sent")
        timeout = self._request_timeout if timeout is None else timeout
        return await self._exchange(kind, document, timeout)

    async def _exchange(self, kind: int, document: Mapping[str, Any], timeout: float) -> Response:
        deadline = time.monotonic() + timeout
        name = type_name(kind)
        number, self._next_id = self._next_id, self._next_id + 1
        data = self._encode(kind, number, document)
        await self._wait_for_room(name, timeout)
        answered: asyncio.Future[Frame | None] = asyncio.get_running_loop().create_future()
        self._pending[number] = answered
        try:
            self._open_writer(name).write(data)
            await asyncio.wait((answered,), timeout=max(0.0, deadline - time.monotonic()))
        finally:
            del self._pending[number]
        if not answered.done():
            raise OutcomeUnknownError(
                f"{self._peer} did not answer a {name} within {timeout:g} s: it may or may not "
                "have been done; the connection stays open",
                detail="no answer in time",
            )
        frame = answered.result()
        if frame is None:
            raise OutcomeUnknownError(
                f"the connection to {self._peer} was lost ({self._lost}) after a {name} was sent: "
                "it may or may not have been done; open a new connection and see",
                detail=self._lost,
            )
        return _read_response(frame, kind, self._peer)

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
        try:
            async with asyncio.timeout(timeout):
                await self._open_writer(name).drain()
        except TimeoutError:
            raise BackendError(
                f"nothing was sent: {self._peer} has taken no bytes for {timeout:g} s; "
                "is the agent stuck, or the VM paused?"
            ) from None
        except OSError as error:
            raise BackendError(
                f"nothing was sent: the connection to {self._peer} is lost ({error}); "
                "open a new one",
                detail=str(error),
            ) from error

    def _open_writer(self, name: str) -> asyncio.StreamWriter:
        if self._lost or self._writer is None:
            raise self._closed_error(f"a {name} was not sent")
        return self._writer

    def _closed_error(self, what: str) -> BackendError:
        reason = self._lost or "it has not been left"
        return BackendError(
            f"{what}: the connection to {self._peer} cannot be used ({reason}); "
            "open a new BridgeConnection",
            detail=reason,
        )

    async def _negotiate(self) -> None:
        answer = await self._handshake(MessageType.NEGOTIATE_PROTOCOL, messages.negotiate_request())
        try:
            version = answer.fields.integer("Version", maximum=(1 << 32) - 1)
            capabilities = messages.Capabilities.read(answer.fields.fields("Capabilities"))
        except MessageError as error:
            raise _handshake_error(self._peer, f"its greeting cannot be read: {error}") from error
        if version != messages.PROTOCOL_VERSION:
            raise _handshake_error(
                self._peer,
                f"it speaks version {version} of the protocol, not {messages.PROTOCOL_VERSION}",
            )
        if capabilities.send_create:
            created = await self._handshake(MessageType.CREATE, messages.create_request())
            if capabilities.send_start and created.code == messages.HResult.OK:
                await self._handshake(MessageType.START, messages.start_request())
        self._capabilities = capabilities

    async def _handshake(self, kind: MessageType, document: Mapping[str, Any]) -> Response:
        """One step of the greeting. A system that exists already is one met again."""
        try:
            answer = await self._exchange(kind, document, self._timeout)
        except OutcomeUnknownError as error:
            raise _handshake_error(self._peer, error.detail) from error
        met_again = kind is MessageType.CREATE and (
            answer.code == messages.HResult.SYSTEM_ALREADY_EXISTS
        )
        if answer.code != messages.HResult.OK and not met_again:
            raise _handshake_error(
                self._peer,
                f"its answer to a {type_name(kind)} is {messages.code_name(answer.code)}: "
                f"{answer.text or 'no words with it'}",
                answer,
            )
        return answer

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        """Read frames until that makes no sense any more, then say why to all who wait."""
        greeting = messages.response_type(MessageType.NEGOTIATE_PROTOCOL)
        decoder = FrameDecoder(self._limit, sync_on=(greeting, self._first_id))
        reason = "it was left open when the event loop ended"
        try:
            reason = await self._read_frames(reader, decoder)
        except asyncio.CancelledError:
            if not self._lost:
                warnings.warn(
                    f"unclosed {self!r}: leave its `async with`", ResourceWarning, stacklevel=1
                )
            raise
        finally:
            self._fail(reason)
            if self._writer is not None and not self._writer.is_closing():
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
            answered = self._pending[frame.id]
            if not answered.done():
                answered.set_result(frame)
        elif self._first_id <= frame.id < self._next_id:
            _log.info("%s: dropped a late or second answer, %s", self._peer, name)
        else:
            _log.warning("%s: dropped an answer to unknown id %d, %s", self._peer, frame.id, name)

    def _fail(self, reason: str) -> None:
        """Nothing is sent any more, and whoever waits for an answer waits no longer."""
        if self._lost:
            return
        self._lost = reason
        _log.debug("%s: connection closed: %s", self._peer, reason)
        for answered in self._pending.values():
            if not answered.done():
                answered.set_result(None)

    async def _close(self) -> None:
        receiver, writer = self._receiver, self._writer
        if writer is None:
            return
        self._fail("it was left")
        try:
            writer.close()
            async with asyncio.timeout(_FLUSH_TIMEOUT):
                await writer.wait_closed()
        except (OSError, TimeoutError):
            pass
        finally:
            writer.transport.abort()
            if receiver is not None:
                receiver.cancel()
        if receiver is not None:
            await asyncio.wait((receiver,))

    def __repr__(self) -> str:
        return f"<BridgeConnection to {self._peer}: {self._lost or 'open'}>"


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


def _handshake_error(peer: str, problem: str, answer: Response | None = None) -> BackendError:
    return BackendError(
        f"cannot work with the agent at {peer}: {problem}; check that the VM runs, and in it "
        f"hotlun's agent or another that speaks version {messages.PROTOCOL_VERSION}",
        operation="connect",
        code=None if answer is None else answer.code,
        detail=problem if answer is None else answer.text,
    )
