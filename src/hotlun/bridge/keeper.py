"""Keeps a connection to the agent in a guest: opens it, notices its loss, opens it again.

Under QEMU the connection is a unix socket in front of a virtio-serial port. That
has these consequences:

* Connecting succeeds although nobody in the guest has opened the port yet, and
  an agent that opens it later still finds what was sent. So Negotiate is sent
  once (a second one on the same connection is an error to the original agent) and
  its answer is awaited until the deadline.
* The port may still give out what an agent sent to an *earlier* client, beginning
  anywhere in a frame. So everything up to the answer to this connection's own
  Negotiate, which has an id that nobody else used, is dropped.
* The socket stays open when an agent ends. One that is started in its place has
  negotiated with nobody, and refuses everything with NOT_IMPLEMENTED, as the original
  one does. So does an agent that cannot do what it is asked. They are told apart by
  GetProperties, which either answers at once, whatever else it is at: hotlun's agent from
  the thread that reads, the original one from a goroutine of its own.
* What the agent before it was at is never answered. So GetProperties is asked on the
  side, too, while an answer takes long. That this is not answered either means nothing:
  a paused VM answers nothing.
* A socket where nobody listens, or that is not there any more, after it has been
  connected to: QEMU has ended, and there is nothing to come back to.

The host's end only, and of hotlun it knows nothing but the bridge.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import functools
import logging
import warnings
from collections import deque
from typing import TYPE_CHECKING

from hotlun.bridge import messages
from hotlun.bridge.codes import HResult
from hotlun.bridge.documents import MessageError, encode_request
from hotlun.bridge.frames import Frame, encode
from hotlun.bridge.greeting import Greeting, GreetingError
from hotlun.bridge.messages import MessageType
from hotlun.bridge.wire import Ids, Wire, read_answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotlun.bridge.openings import Opening
    from hotlun.bridge.responses import Capabilities
    from hotlun.bridge.wire import Answered

    ChangeListener = Callable[["Change", str], None]

_PATIENCE = 5.0
"""Seconds for an answer to Negotiate when connecting again, doubled each time there is none:
an agent that died having read it never answers, a guest that boots does so later."""

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
"""Seconds between the beginnings of attempts to connect again; the first is made at once.

What an attempt has waited counts: a guest that dials finds nobody who listens in a pause, and
one in Windows need not try twice.
"""

_MOST_PROBES = 32
"""How many may be without an answer; older ones are given up."""

_PROBE = encode_request(messages.properties_request({}))

_log = logging.getLogger("hotlun.bridge")


class Change(enum.Enum):
    """What a listener is told of."""

    LOST = "lost"
    """The agent cannot be reached, or was started anew: what was in flight is unknown."""
    RESTORED = "restored"
    """There is an agent again, and it has been negotiated with."""
    GONE = "gone"
    """The VM has ended."""


class State(enum.Enum):
    """Whether requests can be sent."""

    OUTSIDE = "not opened yet, closed, or lost for good"
    OPEN = "they are sent"
    AWAY = "they wait for the connection, or for the agent, to be there again"
    GONE = "the VM has ended"


class HungUpError(GreetingError):
    """The connection was lost before anybody had answered there."""


class Keeper:
    """The one connection that there is at a time, and what is known of the agent at its end.

    Args:
        opening: where the connection comes from.
        timeout: seconds for the agent to answer Negotiate.
        limit: the largest frame accepted, in bytes.
        keepalive: seconds between questions whether the agent still is the same.

    Attributes:
        state: whether requests can be sent on `wire`.
        why: why they cannot; `""` while they can.
        wire: the connection; None until there has been one.
        session: how often an agent has been negotiated with.
        capabilities: what the last one said of itself; None until one did.
        silence: how far the last attempt to connect has got, for one that took too long.
    """

    def __init__(
        self,
        opening: Opening,
        *,
        timeout: float,
        limit: int,
        keepalive: float,
    ) -> None:
        if not keepalive > 0:
            raise ValueError(f"keepalive is a number of seconds above 0, not {keepalive!r}")
        self.keepalive = keepalive
        self.ids = Ids()
        self.state = State.OUTSIDE
        self.why = "it has not been entered with `async with` yet"
        self.wire: Wire | None = None
        self.session = 0
        self.capabilities: Capabilities | None = None
        self.silence = ""
        self._opening = opening
        self._peer = opening.peer
        self._timeout = timeout
        self._limit = limit
        self._task: asyncio.Task[None] | None = None
        self._trouble = asyncio.Event()  # set: the task has something to do
        self._settled = asyncio.Event()  # set in every state but AWAY
        self._settled.set()
        self._opened_at = 0.0
        self._pause = 0.0  # from one attempt to connect again to the next
        self._listeners: dict[object, ChangeListener] = {}
        self._is_told = False  # whether the listeners know that it is lost
        self._was_refused = False  # a probe of this session was
        self._can_probe = True
        self._next_probe = 0.0
        self._probes: deque[int] = deque()

    def watch(self, listener: ChangeListener) -> Callable[[], None]:
        """Call `listener(change, reason)`, in the loop, until the returned function is called."""
        key = object()
        self._listeners[key] = listener

        def unsubscribe() -> None:
            self._listeners.pop(key, None)

        return unsubscribe

    async def open(self) -> None:
        """Connect and negotiate, once; from then on it is kept open.

        Raises:
            OSError: nobody listens there.
            TimeoutError: nobody answers there.
            GreetingError: the agent cannot be worked with.
        """
        try:
            async with asyncio.timeout(self._timeout):
                await self._connect_first()
        except BaseException:
            self.why = "entering it failed"
            raise
        self._set(State.OPEN)
        self._task = asyncio.create_task(self._keep(), name=f"keeper of bridge {self._peer}")

    async def _connect_first(self) -> None:
        """As `_connect`, and again where a guest dials that has hung up: it boots, for instance."""
        pause, lost = 0.0, ""
        while True:
            try:
                await self._connect()
                return
            except HungUpError as error:
                if not self._opening.is_dialled:
                    raise
                self.silence = lost = f"a guest has dialled, and {error}"
            except asyncio.CancelledError:
                self.silence = f"{lost}; then {self.silence}" if lost else self.silence
                raise
            await asyncio.sleep(pause)
            pause = min(max(2 * pause, _SHORTEST_PAUSE), _LONGEST_PAUSE)

    async def close(self) -> None:
        """End it, for good. Who still waits for an answer is told that none will come."""
        if self.state is not State.GONE:
            self._set(State.OUTSIDE, "it was left")
        if self._task is None or self.wire is None:
            return
        self._task.cancel()
        await self.wire.close(self.why)
        await asyncio.wait((self._task,))

    async def wait_until_settled(self, deadline: float) -> bool:
        """Whether it is known, at a time of the loop's clock, if something can be sent."""
        try:
            async with asyncio.timeout_at(deadline):
                while self.state is State.AWAY:
                    await self._settled.wait()
        except TimeoutError:
            return False
        return True

    # Is it still the same agent?

    def probe(self, wire: Wire) -> None:
        """Ask on the side, unless that was done just now, or the guest takes nothing anyway."""
        now = asyncio.get_running_loop().time()
        is_useful = self._can_probe and wire is self.wire and self.state is State.OPEN
        if not is_useful or not wire.is_idle or now < self._next_probe:
            return
        self._next_probe = now + self.keepalive
        if len(self._probes) == _MOST_PROBES:
            wire.forget(self._probes.popleft())
        number, answered = self._send_probe(wire)
        self._probes.append(number)
        answered.add_done_callback(functools.partial(self._probed, wire, number, self.session))

    def doubt(self) -> None:
        """Somebody has answered as an agent does that was started anew: find out."""
        if self.state is State.OPEN:
            self._set(State.AWAY, "the agent in the guest seems to have been started anew")
            self._trouble.set()

    def _probed(self, wire: Wire, number: int, session: int, answered: Answered) -> None:
        wire.forget(number)
        if session == self.session and _is_refused(answered.result()):
            self._was_refused = True
            self.doubt()

    def _send_probe(self, wire: Wire) -> tuple[int, Answered]:
        number = self.ids.take()
        return number, wire.send(number, encode(Frame(MessageType.GET_PROPERTIES, number, _PROBE)))

    async def _meet(self, wire: Wire) -> None:
        """Find out which agent is there; negotiate with one that was started anew.

        The wire is open afterwards, and the agent can be asked; or it is lost.
        """
        if self._can_probe and await self._knows_us(wire):
            return
        if wire.lost:
            return
        try:
            async with asyncio.timeout(min(_PATIENCE, self._timeout)):
                greeting = self._greeting(wire)
                answer = await greeting.negotiate(self.ids.take())
                if answer.code == HResult.NOT_IMPLEMENTED:
                    # That was negotiated with already. It cannot say so when it is probed.
                    self._was_refused, self._can_probe = False, False
                    return
                capabilities = await greeting.agree(answer)
        except TimeoutError:
            wire.drop("the agent was started anew, and does not answer")
        except GreetingError as error:
            wire.drop(f"the agent was started anew, and {error}")
        else:
            reason = "the agent in the guest was started anew"
            self._tell(Change.LOST, reason)
            wire.abandon(reason)
            self._begin_session(wire, capabilities)

    async def _knows_us(self, wire: Wire) -> bool:
        """Whether the agent has been negotiated with, once it has answered that; or it is lost.

        An answer may take longer than the pause between questions; so each of them counts.
        """
        asked: dict[int, Answered] = {}
        try:
            while not (self._was_refused or wire.lost):
                if not asked or wire.is_idle:
                    if len(asked) == _MOST_PROBES:
                        oldest = next(iter(asked))
                        wire.forget(oldest)
                        del asked[oldest]
                    number, answered = self._send_probe(wire)
                    asked[number] = answered
                done, _ = await asyncio.wait(
                    asked.values(), timeout=self.keepalive, return_when=asyncio.FIRST_COMPLETED
                )
                if done and not wire.lost:
                    self._was_refused = any(_is_refused(one.result()) for one in done)
                    if not self._was_refused:
                        return True
        finally:
            for number in asked:
                wire.forget(number)
        return False

    # Keeping it open.

    async def _keep(self) -> None:
        """Have a connection, and an agent at its end, until it is closed or the VM is gone."""
        try:
            while self.state in (State.OPEN, State.AWAY):
                await self._trouble.wait()
                self._trouble.clear()
                if self.wire is not None and self.state is State.AWAY:
                    await self._restore(self.wire)
        except asyncio.CancelledError:
            if self.state in (State.OPEN, State.AWAY):
                warnings.warn(
                    f"unclosed <BridgeConnection to {self._peer}>: leave its `async with`",
                    ResourceWarning,
                    stacklevel=1,
                )
            raise
        except Exception as error:
            _log.exception("%s: the connection is given up", self._peer)
            self._set(State.OUTSIDE, f"{type(error).__name__}: {error}")

    async def _restore(self, wire: Wire) -> None:
        if not wire.lost:
            await self._meet(wire)
        if wire.lost and self.state is State.AWAY:
            await wire.close(wire.lost)
            await self._reopen()
        if self.state is State.AWAY:
            self._set(State.OPEN)
            if self._is_told:
                self._tell(Change.RESTORED, "")

    async def _reopen(self) -> None:
        """Try until there is a connection again, or no VM any more."""
        lost, clock = self.why, asyncio.get_running_loop().time
        patience = min(_PATIENCE, self._timeout)
        if clock() - self._opened_at > _LONGEST_PAUSE:
            self._pause = 0.0  # else it is a guest that keeps us busy
        began = clock()
        while self.state is State.AWAY:
            await asyncio.sleep(began + self._pause - clock())
            began = clock()
            self._pause = min(max(2 * self._pause, _SHORTEST_PAUSE), _LONGEST_PAUSE)
            try:
                async with asyncio.timeout(patience):
                    await self._connect()
                return
            except TimeoutError:
                problem = f"{self.silence} within {patience:g} s"
                patience = min(2 * patience, self._timeout)
            except OSError as error:
                problem = str(error)
                if error.errno in (errno.ECONNREFUSED, errno.ENOENT):
                    self._set(State.GONE, f"nobody listens at {self._peer}: {error}")
                    self._tell(Change.GONE, self.why)
                    return
            except GreetingError as error:
                problem = str(error)
            self.why = f"{lost}; and connecting again: {problem}"
            _log.debug("%s: %s", self._peer, self.why)

    async def _connect(self) -> None:
        self.silence = "there was no connection, and no agent answered"
        streams = await self._opening.opener()
        self.silence = "no agent answered"
        number = self.ids.take()
        wire = Wire(
            streams,
            self._peer,
            limit=self._limit,
            ids=self.ids,
            greeting=number,
            on_loss=self._on_loss,
        )
        greeting = self._greeting(wire)
        try:
            try:
                answer = await greeting.negotiate(number)
            except GreetingError as error:
                raise (HungUpError(str(error)) if wire.lost else error) from None
            capabilities = await greeting.agree(answer)
            if wire.lost:
                raise GreetingError(f"the connection was lost ({wire.lost})")
        except BaseException:
            await wire.close("negotiating with the agent failed")
            raise
        self._opened_at = asyncio.get_running_loop().time()
        self._begin_session(wire, capabilities)

    def _greeting(self, wire: Wire) -> Greeting:
        return Greeting(
            wire, self.ids, runtime_id=self._opening.runtime_id, is_first=not self.session
        )

    def _begin_session(self, wire: Wire, capabilities: Capabilities) -> None:
        self.wire, self.capabilities = wire, capabilities
        self.session += 1
        self._was_refused, self._can_probe = False, True
        self._probes.clear()

    def _on_loss(self, wire: Wire) -> None:
        if wire is not self.wire or self.state not in (State.OPEN, State.AWAY):
            return
        self._set(State.AWAY if self._opening.reopens else State.OUTSIDE, wire.lost)
        self._trouble.set()
        self._tell(Change.LOST, wire.lost)

    def _set(self, state: State, why: str = "") -> None:
        self.state, self.why = state, why
        if state is State.AWAY:
            self._settled.clear()
        else:
            self._settled.set()

    def _tell(self, change: Change, reason: str) -> None:
        if change is Change.LOST and self._is_told:
            return
        self._is_told = change is not Change.RESTORED
        _log.info("%s: %s%s", self._peer, change.value, f": {reason}" * bool(reason))
        for listener in tuple(self._listeners.values()):
            try:
                listener(change, reason)
            except Exception:
                _log.exception("%s: a listener failed at %s", self._peer, change)


def _is_refused(frame: Frame | str) -> bool:
    """Whether a probe was answered by somebody with whom nobody has negotiated."""
    if isinstance(frame, str):
        return False
    try:
        answer = read_answer(frame, MessageType.GET_PROPERTIES)
    except MessageError:
        return False
    return answer.code == HResult.NOT_IMPLEMENTED
