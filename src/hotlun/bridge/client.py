"""The host's end of the bridge: many requests in flight, over a connection that comes back.

What hcsshim's host does by killing the whole bridge (a slow answer, an unknown
id, a notification it did not expect, a reply that is not JSON) costs here at most
the one request. Only a frame whose size cannot be true ends a connection, because
nothing after it can be read.

A connection that is lost is opened again, as long as the VM lives and this end has not
been left. So is the understanding with an agent that was killed and started again
behind a socket that has stayed open: it refuses what it is asked before Negotiate, which
says both that this was not done and that it is another one. What was asked of the one
before it is unknown.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from hotlun.bridge import messages
from hotlun.bridge.frames import DEFAULT_LIMIT
from hotlun.bridge.messages import HResult, MessageError, MessageType, type_name
from hotlun.bridge.session import Session
from hotlun.errors import BackendError, HotlunError, OutcomeUnknownError, VMGoneError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from hotlun.bridge.messages import Response

    Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

CONNECT_TIMEOUT = 120.0
"""Seconds for an agent to answer: a guest may still be booting."""

REQUEST_TIMEOUT = 300.0
"""Seconds for one answer, as hcsshim's host allows."""

KEEPALIVE = 2.0
"""Seconds without an answer, after which the agent is asked whether it is still the same."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
"""Seconds between two attempts to connect again."""

_MOST_AGENTS = 3
"""So many agents in a row a request is sent to: each that has never heard of us refuses it."""

_log = logging.getLogger("hotlun.bridge")


class Change(Enum):
    """What becomes of a connection."""

    LOST = "lost"
    RESTORED = "restored"
    GONE = "gone"
    """The VM has ended: it does not come back."""


class BridgeConnection:
    """A connection to the agent in a guest, open inside its `async with`.

    Entering connects and negotiates. Requests may be made by any number of tasks
    at once; answers are matched by id, in whatever order they come.

    Made by `connect_unix` or `over`.
    """

    def __init__(
        self,
        opener: Callable[[], Awaitable[Streams]],
        peer: str,
        *,
        timeout: float,
        request_timeout: float,
        limit: int,
        keepalive: float,
        comes_back: bool,
    ) -> None:
        self._opener = opener
        self._peer = peer
        self._timeout = timeout
        self._request_timeout = request_timeout
        self._limit = limit
        self._keepalive = keepalive
        self._comes_back = comes_back
        self._next_id = secrets.randbits(62)
        self._session: Session | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._renewal: asyncio.Task[bool] | None = None
        self._entered = False
        self._closed = "it has not been entered with `async with` yet"
        """Why it is of no use any more, or not yet; `""` from entering to leaving."""
        self._is_gone = False
        self._is_usable = asyncio.Event()
        """Set while there is an agent to ask, and when there can be none any more."""
        self._capabilities: messages.Capabilities | None = None  # None until negotiated
        self._listeners: list[Callable[[Change, str], None]] = []

    @classmethod
    def connect_unix(
        cls,
        path: str | os.PathLike[str],
        *,
        timeout: float = CONNECT_TIMEOUT,
        request_timeout: float = REQUEST_TIMEOUT,
        limit: int = DEFAULT_LIMIT,
        keepalive: float = KEEPALIVE,
    ) -> Self:
        """Through a unix socket, such as QEMU's end of a virtio-serial port.

        Args:
            path: the socket.
            timeout: seconds for entering, until the agent in the guest has answered.
            request_timeout: seconds for each answer, unless the request says otherwise.
            limit: the largest frame sent or accepted, in bytes.
            keepalive: seconds without an answer, after which the agent is asked whether it
                is still the one that was asked.
        """
        path = os.fspath(path)

        async def opener() -> Streams:
            return await asyncio.open_unix_connection(path)

        return cls(
            opener,
            path,
            timeout=timeout,
            request_timeout=request_timeout,
            limit=limit,
            keepalive=keepalive,
            comes_back=True,
        )

    @classmethod
    def over(
        cls,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        timeout: float = CONNECT_TIMEOUT,
        request_timeout: float = REQUEST_TIMEOUT,
        limit: int = DEFAULT_LIMIT,
        keepalive: float = KEEPALIVE,
    ) -> Self:
        """Over streams that are open already; leaving closes them, and lost they stay lost.

        As `connect_unix` otherwise.
        """

        async def opener() -> Streams:
            return reader, writer

        return cls(
            opener,
            str(writer.get_extra_info("peername") or "the given streams"),
            timeout=timeout,
            request_timeout=request_timeout,
            limit=limit,
            keepalive=keepalive,
            comes_back=False,
        )

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
        """Whether nothing can be sent now: before entering, after leaving, after a loss."""
        return bool(self._closed) or self._session is None or bool(self._session.lost)

    def watch(self, listener: Callable[[Change, str], None]) -> Callable[[], None]:
        """Call `listener(change, reason)` with what becomes of the connection, in the loop.

        Until the function that is returned is called.
        """
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    async def __aenter__(self) -> Self:
        """Connect, negotiate, and create and start the VM's system if the guest wants that.

        Raises:
            BackendError: nobody listens or answers there, or it speaks another version.
        """
        if self._entered:
            raise self._closed_error("a connection is entered once")
        self._entered = True
        self._closed = ""
        try:
            async with asyncio.timeout(self._timeout):
                await self._open()
        except TimeoutError:
            self._closed = "no agent answered"
            raise BackendError(
                f"no agent answered at {self._peer} within {self._timeout:g} s: is the agent "
                "running in the guest, and is no other client connected to that socket?",
                operation="connect",
            ) from None
        except BaseException as error:
            self._closed = str(error) or type(error).__name__
            raise
        self._is_usable.set()
        self._keeper = asyncio.create_task(self._keep(), name=f"bridge keeper {self._peer}")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the socket; requests still in flight get `OutcomeUnknownError`."""
        self._closed = self._closed or "it was left"
        self._is_usable.set()
        session, self._session = self._session, None
        for task in (self._keeper, self._renewal):
            if task is not None:
                task.cancel()
        if session is not None:
            await session.close()
        tasks = [task for task in (self._keeper, self._renewal) if task is not None]
        if tasks:
            await asyncio.wait(tasks)

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
        name = type_name(kind)
        if self._capabilities is None:
            raise self._closed_error(f"a {name} was not sent")
        timeout = self._request_timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        for agents in range(1, _MOST_AGENTS + 1):
            session = await self._usable_session(name, timeout, deadline)
            era = session.era
            response = await session.exchange(
                kind,
                document,
                max(0.0, deadline - time.monotonic()),
                check=partial(self._is_the_same, session),
                interval=self._keepalive,
            )
            if response.code != HResult.NOT_IMPLEMENTED or agents == _MOST_AGENTS:
                break
            if session.era == era and not await self._renewed(session):
                break  # it knows us, and simply cannot do that
        return response

    async def _usable_session(self, name: str, timeout: float, deadline: float) -> Session:
        """The session that there is, or is going to be before the deadline."""
        while True:
            if self._closed:
                raise self._closed_error(f"a {name} was not sent")
            session = self._session
            if session is not None and not session.lost and self._is_usable.is_set():
                return session
            if not self._comes_back:
                self._closed = "" if session is None else session.lost
                raise self._closed_error(f"a {name} was not sent")
            self._is_usable.clear()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._is_usable.wait()
            except TimeoutError:
                reason = session.lost if session is not None else "it is being opened"
                raise BackendError(
                    f"nothing was sent: the connection to {self._peer} is lost ({reason}), and "
                    f"did not come back within {timeout:g} s; does the guest still run?",
                    detail=reason,
                ) from None

    # --- Is it the same agent? ---

    async def _is_the_same(self, session: Session) -> None:
        """Ask the agent something cheap: one that was started anew shows it by its answer.

        One that does not answer may be busy, or its VM paused: that says nothing.
        """
        era = session.era
        answer = await session.exchange(
            MessageType.GET_PROPERTIES, messages.properties_request({}), self._keepalive
        )
        if answer.code == HResult.NOT_IMPLEMENTED and session.era == era:
            await self._renewed(session)

    async def _renewed(self, session: Session) -> bool:
        """Negotiate with an agent that was started anew; whether it is one."""
        if self._renewal is None or self._renewal.done():
            self._renewal = asyncio.create_task(self._renew(session))
        return await asyncio.shield(self._renewal)

    async def _renew(self, session: Session) -> bool:
        try:
            capabilities = await self._negotiate(session)
        except BackendError as error:
            if error.code != HResult.NOT_IMPLEMENTED:
                _log.warning("%s: %s", self._peer, error)
            return False
        reason = "the agent in the guest was started anew"
        self._capabilities = capabilities
        session.begin_era(reason)
        self._tell(Change.LOST, reason)
        self._tell(Change.RESTORED, "")
        return True

    # --- Coming back ---

    async def _open(self) -> None:
        """A new session, negotiated.

        Raises:
            BackendError: that is not to be had.
        """
        try:
            reader, writer = await self._opener()
        except OSError as error:
            raise BackendError(
                f"cannot connect to the agent's socket {self._peer}: {error}; "
                "is the VM running, and is that its agent socket?",
                operation="connect",
                detail=str(error),
            ) from error
        session = Session(reader, writer, self._peer, limit=self._limit, first_id=self._next_id)
        try:
            self._capabilities = await self._negotiate(session)
        except BaseException:
            self._next_id = session.next_id
            await session.close()
            raise
        self._session = session

    async def _keep(self) -> None:
        """Whenever the session has ended, have another one, as long as there is a VM."""
        while self._session is not None:
            reason = await self._session.ended()
            if self._closed:
                return
            self._is_usable.clear()
            self._next_id = self._session.next_id
            self._tell(Change.LOST, reason)
            if not self._comes_back:
                self._end(reason)
                return
            if not await self._reopened():
                return
            self._is_usable.set()
            self._tell(Change.RESTORED, "")

    async def _reopened(self) -> bool:
        pause = _FIRST_PAUSE
        while True:
            try:
                async with asyncio.timeout(self._timeout):
                    await self._open()
                return True
            except (HotlunError, TimeoutError) as error:
                cause = error.__cause__
                if isinstance(cause, (ConnectionRefusedError, FileNotFoundError)):
                    self._is_gone = True
                    self._end(f"the VM is gone: {cause.strerror}")
                    self._tell(Change.GONE, cause.strerror or "")
                    return False
                _log.debug("%s: not yet: %s", self._peer, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _end(self, reason: str) -> None:
        self._closed = self._closed or reason
        self._is_usable.set()  # whoever waits for it is told

    def _tell(self, change: Change, reason: str) -> None:
        _log.info("%s: %s %s", self._peer, change.value, reason)
        for listener in list(self._listeners):
            try:
                listener(change, reason)
            except Exception:
                _log.exception("a listener has failed")

    def _closed_error(self, what: str) -> BackendError:
        if self._is_gone:
            return VMGoneError(
                f"{what}: nobody listens at {self._peer} any more, the VM is gone, and with it "
                "all that was attached and mounted; forget its disks, or start it anew",
                detail=self._closed,
            )
        reason = self._closed or "it has not been left"
        return BackendError(
            f"{what}: the connection to {self._peer} cannot be used ({reason}); "
            "open a new BridgeConnection",
            detail=reason,
        )

    async def _negotiate(self, session: Session) -> messages.Capabilities:
        """Agree with the agent at the other end; what it says of itself.

        Raises:
            BackendError: it refuses, or does not answer; with its `code` if it has one.
        """
        answer = await self._handshake(
            session, MessageType.NEGOTIATE_PROTOCOL, messages.negotiate_request()
        )
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
            created = await self._handshake(session, MessageType.CREATE, messages.create_request())
            if capabilities.send_start and created.code == HResult.OK:
                await self._handshake(session, MessageType.START, messages.start_request())
        return capabilities

    async def _handshake(
        self, session: Session, kind: MessageType, document: Mapping[str, Any]
    ) -> Response:
        """One step of the greeting. A system that exists already is one met again."""
        try:
            answer = await session.exchange(kind, document, self._timeout)
        except OutcomeUnknownError as error:
            raise _handshake_error(self._peer, error.detail) from error
        met_again = kind is MessageType.CREATE and answer.code == HResult.SYSTEM_ALREADY_EXISTS
        if answer.code != HResult.OK and not met_again:
            raise _handshake_error(
                self._peer,
                f"its answer to a {type_name(kind)} is {messages.code_name(answer.code)}: "
                f"{answer.text or 'no words with it'}",
                answer,
            )
        return answer

    def __repr__(self) -> str:
        state = self._closed or (self._session.lost if self._session else "") or "open"
        return f"<BridgeConnection to {self._peer}: {state}>"


def _handshake_error(peer: str, problem: str, answer: Response | None = None) -> BackendError:
    return BackendError(
        f"cannot work with the agent at {peer}: {problem}; check that the VM runs, and in it "
        f"hotlun's agent or another that speaks version {messages.PROTOCOL_VERSION}",
        operation="connect",
        code=None if answer is None else answer.code,
        detail=problem if answer is None else answer.text,
    )
