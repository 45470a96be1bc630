"""The host's end of the bridge: many requests in flight, over a connection that comes back.

What hcsshim's host does by killing the whole bridge (a slow answer, an unknown
id, a notification it did not expect, a reply that is not JSON) costs here at most
the one request. What is known of connections and agents that end, and begin again, is
in `keeper`; here is what that means for requests.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Self

from hotlun.bridge import messages, openings
from hotlun.bridge.codes import HResult
from hotlun.bridge.documents import MessageError, encode_request
from hotlun.bridge.frames import DEFAULT_LIMIT, Frame, FrameError, encode
from hotlun.bridge.greeting import GreetingError
from hotlun.bridge.keeper import Keeper, State
from hotlun.bridge.messages import MessageType, type_name
from hotlun.bridge.transport import VSOCK_PORT
from hotlun.bridge.wire import read_answer
from hotlun.errors import BackendError, OutcomeUnknownError, VMGoneError

if TYPE_CHECKING:
    import os
    import uuid
    from collections.abc import Callable, Mapping

    from hotlun.bridge.keeper import ChangeListener
    from hotlun.bridge.openings import Opening
    from hotlun.bridge.responses import Capabilities, Response
    from hotlun.bridge.wire import Answered, Wire

CONNECT_TIMEOUT = 120.0
"""Seconds for an agent to answer: a guest may still be booting."""

REQUEST_TIMEOUT = 300.0
"""Seconds for one answer, as hcsshim's host allows."""

KEEPALIVE = 2.0
"""Seconds without an answer after which the agent is asked whether it still is the same."""

_SENDS = 3
"""How often one request is sent: again only to an agent that was started anew meanwhile."""


class BridgeConnection:
    """A connection to the agent in a guest, open inside its `async with`.

    Entering connects and negotiates. Requests may be made by any number of tasks
    at once; answers are matched by id, in whatever order they come.

    One made by anything but `over` comes back by itself after it was lost, for as long as
    there is a VM. Requests that were in flight end at once with `OutcomeUnknownError`;
    those that are made meanwhile wait for it. So it is when the agent was started anew.
    One made by `over` cannot come back from the end of its streams.
    """

    def __init__(
        self,
        opening: Opening,
        *,
        timeout: float,
        request_timeout: float,
        limit: int,
        keepalive: float,
    ) -> None:
        self._peer = opening.peer
        self._advice = opening.advice
        self._request_timeout = request_timeout
        self._timeout = timeout
        self._limit = limit
        self._keeper = Keeper(opening, timeout=timeout, limit=limit, keepalive=keepalive)
        self._entered = False
        self._stop_listening = opening.stop
        opening.begin()

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
            keepalive: seconds without an answer after which, and at which intervals, the
                agent is asked whether it still is the one that was asked.

        Raises:
            ValueError: a keepalive that is not above 0.
            UnsupportedError: there are no unix sockets here: on Windows.
        """
        return cls(
            openings.unix(path),
            timeout=timeout,
            request_timeout=request_timeout,
            limit=limit,
            keepalive=keepalive,
        )

    @classmethod
    def listen_hyperv(
        cls,
        runtime_id: str | uuid.UUID,
        os_type: str,
        *,
        confidential: bool = False,
        timeout: float = CONNECT_TIMEOUT,
        request_timeout: float = REQUEST_TIMEOUT,
        limit: int = DEFAULT_LIMIT,
        keepalive: float = KEEPALIVE,
    ) -> Self:
        """Be dialled by a guest of Hyper-V. Takes Windows, Python 3.12 and an administrator.

        It listens from now on, so start the VM between this and entering: a Linux guest tries
        for ever, another one need not. If it does not start, `stop_listening`. The VM's
        document has to allow it (HvSocketConfig).

        Args:
            runtime_id: the VM's RuntimeId, which is not its id of the compute service.
            os_type: what runs in it, `"linux"` or `"windows"`.
            confidential: it is a confidential VM, where for Windows another agent dials.
            timeout: seconds for entering, until the guest has dialled and answered.
            request_timeout, limit, keepalive: as `connect_unix`.

        Raises:
            ValueError: no runtime id, another os_type, or a keepalive that is not above 0.
            UnsupportedError: there are no such sockets here.
            BackendError: it cannot listen: no administrator, or another process does.
        """
        return cls(
            openings.hyperv(runtime_id, os_type, confidential=confidential),
            timeout=timeout,
            request_timeout=request_timeout,
            limit=limit,
            keepalive=keepalive,
        )

    @classmethod
    def listen_vsock(
        cls,
        cid: int | None = None,
        *,
        port: int = VSOCK_PORT,
        timeout: float = CONNECT_TIMEOUT,
        request_timeout: float = REQUEST_TIMEOUT,
        limit: int = DEFAULT_LIMIT,
        keepalive: float = KEEPALIVE,
    ) -> Self:
        """Be dialled by a guest with a vsock device; this Linux host listens from now on.

        Args:
            cid: the guest's; others are hung up on. None for whichever dials first.
            port: that it dials.
            timeout: seconds for entering, until the guest has dialled and answered.
            request_timeout, limit, keepalive: as `connect_unix`.

        Raises:
            ValueError: a cid or port that cannot be, or a keepalive that is not above 0.
            UnsupportedError: there are no such sockets here.
            BackendError: it cannot listen: another process does, or the kernel has no vsock.
        """
        return cls(
            openings.vsock(cid, port),
            timeout=timeout,
            request_timeout=request_timeout,
            limit=limit,
            keepalive=keepalive,
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
        """Over streams that are open already; leaving closes them. As `connect_unix` otherwise."""
        return cls(
            openings.given(reader, writer),
            timeout=timeout,
            request_timeout=request_timeout,
            limit=limit,
            keepalive=keepalive,
        )

    @property
    def capabilities(self) -> Capabilities:
        """What the guest said of itself when it was negotiated with last.

        Raises:
            BackendError: the connection has not been entered.
        """
        if self._keeper.capabilities is None:
            raise self._closed_error("the guest was not asked what it can do")
        return self._keeper.capabilities

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
        """Whether nothing can be sent now.

        So it is before entering and after leaving, when the VM is gone, and for as long
        as a lost connection, or an agent that was started anew, is not there again.
        """
        return self._keeper.state is not State.OPEN

    def watch(self, listener: ChangeListener) -> Callable[[], None]:
        """Call `listener(change, reason)`, in the loop, until the returned function is called.

        A connection that comes back is told as LOST and RESTORED, and so is an agent that
        was started anew; of a VM that has ended, LOST and GONE. Leaving is not told.
        """
        return self._keeper.watch(listener)

    async def __aenter__(self) -> Self:
        """Connect, negotiate, and create and start the VM's system if the guest wants that.

        Raises:
            BackendError: nobody listens or answers there, or it speaks another version.
        """
        if self._entered:
            raise self._closed_error("a connection is entered once")
        self._entered = True
        try:
            await self._keeper.open()
        except TimeoutError:
            raise BackendError(
                f"{self._keeper.silence} at {self._peer} within {self._timeout:g} s: "
                f"{self._advice}",
                operation="connect",
            ) from None
        except OSError as error:
            raise BackendError(
                f"cannot connect to the agent's socket {self._peer}: {error}; "
                "is the VM running, and is that its agent socket?",
                operation="connect",
                detail=str(error),
            ) from error
        except GreetingError as error:
            raise BackendError(
                f"cannot work with the agent at {self._peer}: {error}; check that the VM runs, "
                "and in it hotlun's agent or another that speaks version "
                f"{messages.PROTOCOL_VERSION}",
                operation="connect",
                code=error.code,
                detail=error.detail,
            ) from error
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the socket; requests still in flight get `OutcomeUnknownError`."""
        await self._keeper.close()

    def stop_listening(self) -> None:
        """Give up a connection that will not be entered, as when the VM did not start.

        For one that listens already; nothing happens for others, nor once it is entered.
        """
        self._stop_listening()

    async def modify(
        self,
        request: Mapping[str, Any],
        *,
        timeout: float | None = None,
        meant_for: Capabilities | None = None,
    ) -> Response:
        """Have the guest change something; what it answered, refusals included.

        Args:
            request: `{"RequestType": ..., "ResourceType": ..., "Settings": {...}}`.
            timeout, meant_for: as `request`.

        Raises:
            BackendError, VMGoneError, OutcomeUnknownError: as `request`.
        """
        return await self.request(
            MessageType.MODIFY_SETTINGS,
            messages.modify_request(request),
            timeout=timeout,
            meant_for=meant_for,
        )

    async def request(
        self,
        kind: int,
        document: Mapping[str, Any],
        *,
        timeout: float | None = None,
        meant_for: Capabilities | None = None,
    ) -> Response:
        """Send one request and wait for its answer; what it says is for the caller to judge.

        Cancelling leaves the connection as it is; the answer is then dropped.

        Args:
            kind: a `MessageType`.
            document: what to send, members in their order.
            timeout: seconds, waiting for a lost connection and sending included; None
                for the connection's own.
            meant_for: send it to an agent with this system and these features only.

        Raises:
            BackendError: it was not done: the connection is closed, or was not there
                again in time, the guest takes no more bytes, the agent is another one
                than it was meant for, or the document cannot be sent.
            VMGoneError: the same, because the VM has ended.
            OutcomeUnknownError: it was sent, and no answer that can be read came in time.
        """
        timeout = self._request_timeout if timeout is None else timeout
        deadline = asyncio.get_running_loop().time() + timeout
        keeper = self._keeper
        for _ in range(_SENDS):
            wire = await self._wait_for_room(type_name(kind), deadline, timeout)
            self._check_is_for(meant_for, type_name(kind))
            session = keeper.session
            answer = await self._exchange(wire, kind, document, deadline, timeout)
            if answer.code != HResult.NOT_IMPLEMENTED:
                break
            if session == keeper.session:
                keeper.doubt()
            is_settled = await keeper.wait_until_settled(deadline)
            if not is_settled or (session == keeper.session and keeper.state is State.OPEN):
                break  # this agent cannot do that, as far as anybody can tell
        return answer

    async def _wait_for_room(self, name: str, deadline: float, timeout: float) -> Wire:
        """The wire, once there is one, and a guest that reads slowly has taken what is in it."""
        keeper = self._keeper
        while True:
            if keeper.state is State.AWAY and not await keeper.wait_until_settled(deadline):
                raise BackendError(
                    f"nothing was sent: a {name} has waited {timeout:g} s for the agent at "
                    f"{self._peer} to be there again ({keeper.why}); it is still tried to reach: "
                    "see whether it runs in the guest, and try again",
                    detail=keeper.why,
                )
            wire = keeper.wire
            if keeper.state is not State.OPEN or wire is None:
                raise self._closed_error(f"a {name} was not sent")
            if wire.has_room:
                return wire
            try:
                async with asyncio.timeout_at(deadline):
                    await wire.drain()
            except TimeoutError:
                raise BackendError(
                    f"nothing was sent: {self._peer} has taken no bytes for {timeout:g} s; "
                    "is the agent stuck, or the VM paused?"
                ) from None
            except OSError as error:
                wire.drop(f"writing failed: {error}")
            if wire is keeper.wire and keeper.state is State.OPEN:
                return wire

    def _check_is_for(self, meant_for: Capabilities | None, name: str) -> None:
        now = self.capabilities
        if meant_for is None or (now.os_type, now.features) == (
            meant_for.os_type,
            meant_for.features,
        ):
            return
        raise BackendError(
            f"nothing was sent: the agent at {self._peer} is another one now, with other "
            f"features than this {name} was made for; try again, which makes it for this one"
        )

    async def _exchange(
        self, wire: Wire, kind: int, document: Mapping[str, Any], deadline: float, timeout: float
    ) -> Response:
        name, number = type_name(kind), self._keeper.ids.take()
        answered = wire.send(number, self._encode(kind, number, document))
        waiting = _Waiting(answered, self._keeper, wire, deadline)
        try:
            frame = await answered
        except TimeoutError:
            raise OutcomeUnknownError(
                f"{self._peer} did not answer a {name} within {timeout:g} s: it may or may not "
                "have been done; the connection stays open",
                detail="no answer in time",
            ) from None
        finally:
            waiting.end()
            wire.forget(number)
        if isinstance(frame, str):
            raise OutcomeUnknownError(
                f"a {name} was sent to {self._peer}, and no answer will come: {frame}; it may or "
                "may not have been done: look before you try again",
                detail=frame,
            )
        try:
            return read_answer(frame, kind)
        except MessageError as error:
            raise OutcomeUnknownError(
                f"a {name} was sent to {self._peer} and {error}; it may or may not have been done",
                detail=str(error),
            ) from error

    def _encode(self, kind: int, number: int, document: Mapping[str, Any]) -> bytes:
        try:
            data = encode(Frame(kind, number, encode_request(document)))
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

    def _closed_error(self, what: str) -> BackendError:
        why = self._keeper.why or "it has not been left"
        if self._keeper.state is State.GONE:
            return VMGoneError(
                f"{what}: the VM is gone ({why}), and every attachment with it: forget its "
                "disks, or start it anew and connect to that",
                detail=why,
            )
        return BackendError(
            f"{what}: the connection to {self._peer} cannot be used ({why}); "
            "open a new BridgeConnection",
            detail=why,
        )

    def __repr__(self) -> str:
        return f"<BridgeConnection to {self._peer}: {self._keeper.why or 'open'}>"


class _Waiting:
    """Asks now and then whether the agent still is the same, while there is no answer.

    At the deadline what waits for one gets a TimeoutError. (To have asyncio.wait() do this
    takes longer than all the rest of a request.)
    """

    __slots__ = ("_answered", "_deadline", "_keeper", "_loop", "_timer", "_wire")

    def __init__(self, answered: Answered, keeper: Keeper, wire: Wire, deadline: float) -> None:
        self._answered = answered
        self._keeper = keeper
        self._wire = wire
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._go_on()

    def end(self) -> None:
        """There is an answer, or nobody waits for it any more."""
        self._timer.cancel()

    def _go_on(self) -> None:
        due = self._loop.time() + self._keeper.keepalive
        if due < self._deadline:
            self._timer = self._loop.call_at(due, self._ask)
        else:
            self._timer = self._loop.call_at(self._deadline, self._give_up)

    def _ask(self) -> None:
        if not self._answered.done():
            self._keeper.probe(self._wire)
            self._go_on()

    def _give_up(self) -> None:
        if not self._answered.done():
            self._answered.set_exception(TimeoutError())
