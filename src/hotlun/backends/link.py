"""One connection to a QMP monitor: commands with a deadline, and one end for everything in flight.

`qemu.qmp` carries the protocol. What is added here is what a caller must be able
to rely on: every command is answered within its deadline; once the connection is
gone, everything that waits for it ends at once and nothing more is begun; and
closing never waits for a QEMU that hangs or is dead.

A link is used once. What follows when it has ended is the business of `monitor`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, QMPClient, Runstate
from qemu.qmp.protocol import StateError
from qemu.qmp.qmp_client import BadReplyError

from hotlun.backends.departures import Departures
from hotlun.backends.refusals import Meaning, understand
from hotlun.errors import BackendError, OutcomeUnknownError, SlotTakenError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Collection, Mapping

    from qemu.qmp import Message

    from hotlun.backends.departures import Departure
    from hotlun.backends.errand import Errand
    from hotlun.errors import HotlunError

    Hear = Callable[[Mapping[str, object]], None]

_log = logging.getLogger("hotlun.qemu")
_IN_LINE = 0.05
"""Seconds between two attempts to stand in line for a monitor that others wait for, too."""


class _AtDebug(logging.Filter):
    """qemu.qmp logs as errors what it also raises; we raise it, so a debug line is enough."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


_AT_DEBUG = _AtDebug()


class _Client(QMPClient):
    """`qemu.qmp` puts every message into words for its log, even if nobody reads that.

    With `indent`, which is Python's slow encoder: more than half of all that a command costs.
    """

    def _cb_outbound(self, msg: Message) -> Message:
        return super()._cb_outbound(msg) if self.logger.isEnabledFor(logging.DEBUG) else msg

    def _cb_inbound(self, msg: Message) -> Message:
        return super()._cb_inbound(msg) if self.logger.isEnabledFor(logging.DEBUG) else msg


class Link:
    """A connection that has been made; see `open`.

    Attributes:
        departures: news of devices' removals, for who listens before the command.
    """

    def __init__(
        self,
        client: QMPClient,
        connection: socket.socket,
        timeout: float,
        departures: Departures,
    ) -> None:
        self.departures = departures
        self._client = client
        self._connection = connection
        self._timeout = timeout
        self._is_gone = False
        self._deadlines: set[asyncio.Timeout] = set()
        self._watch = asyncio.create_task(self._wait_until_gone(), name="hotlun-qmp-watch")

    @classmethod
    async def open(cls, path: str, timeout: float, hear: Hear) -> Link:
        """Connect to the monitor's unix socket; whoever is done with it hangs up.

        Args:
            path: the socket.
            timeout: seconds for connecting, and for each command and event.
            hear: is called with every event, in the loop.

        Raises:
            BackendError: nobody answers there; its cause tells why.
        """
        client = _Client("hotlun")
        client.logger.addFilter(_AT_DEBUG)
        departures = Departures()

        def taken(event: Message) -> bool:
            departures.hear(event)
            try:
                hear(event)
            except Exception:
                _log.exception("an event of QEMU's was not understood: %s", event)
            # The client's own listener would keep every event for ever.
            return False

        client.events.event_filter = taken
        return cls(client, await _connect(client, path, timeout), timeout, departures)

    @property
    def is_up(self) -> bool:
        """Whether what is executed now is sent; that may change at the next await."""
        return not self._is_gone and self._client.runstate is Runstate.RUNNING

    async def ended(self) -> str:
        """Wait for its end; why, in words."""
        return await asyncio.shield(self._watch)

    def hang_up(self) -> None:
        """End it, and all that is in flight; see `ended`."""
        # `disconnect` would first wait for QEMU to take what is queued; a shutdown never waits.
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    async def command(
        self,
        errand: Errand,
        name: str,
        arguments: Mapping[str, object],
        *,
        expecting: Collection[Meaning] = (),
    ) -> Meaning | None:
        """Have QEMU change something; a refusal that is `expecting`ed is returned.

        Raises:
            SlotTakenError: another device is at this slot.
            BackendError: QEMU refused, or the command has not been sent.
            OutcomeUnknownError: it has been sent, and was not answered.
        """
        try:
            await self._execute(errand, name, arguments, OutcomeUnknownError)
        except ExecuteError as error:
            refusal = understand(str(error))
            _log.debug("%s: %s refused: %s", errand, name, error)
            if refusal.meaning in expecting:
                return refusal.meaning
            kind = SlotTakenError if refusal.meaning is Meaning.SLOT_TAKEN else BackendError
            raise errand.error(
                kind, refusal.words, code=error.error_class, detail=str(error)
            ) from error
        return None

    async def query(self, errand: Errand, name: str, arguments: Mapping[str, object]) -> object:
        """Ask QEMU for something.

        Raises:
            BackendError: there is no answer; with a `code`, QEMU has none.
        """
        try:
            return await self._execute(errand, name, arguments, BackendError)
        except ExecuteError as error:
            raise errand.error(
                BackendError,
                f"QEMU does not answer {name}: {error}",
                code=error.error_class,
                detail=str(error),
            ) from error

    async def news(self, errand: Errand, departure: Departure) -> str:
        """The name of the event that a device's departure ends with, or fails.

        Raises:
            OutcomeUnknownError: there was none before the deadline, or there can be none.
        """
        try:
            async with self._deadline():
                event = await departure
        except TimeoutError as error:
            raise self._no_answer(errand, OutcomeUnknownError, "the event") from error
        _log.debug("%s: %s", errand, event)
        return event

    async def _execute(
        self, errand: Errand, name: str, arguments: Mapping[str, object], lost: type[HotlunError]
    ) -> object:
        _log.debug("%s: %s %s", errand, name, arguments)
        try:
            if not self._is_gone:
                async with self._deadline():
                    return await self._client.execute(name, arguments)
        except StateError:
            pass
        except (TimeoutError, ExecInterruptedError, BadReplyError) as error:
            raise self._no_answer(errand, lost, name) from error
        raise errand.error(BackendError, f"the monitor went away before {name} was sent; try again")

    def _no_answer(self, errand: Errand, kind: type[HotlunError], what: str) -> HotlunError:
        why = f"none within {self._timeout:g} s" if self.is_up else "the monitor went away"
        return errand.error(
            kind, f"no answer to {what} ({why}); see whether the VM still runs, then undo or retry"
        )

    @asynccontextmanager
    async def _deadline(self) -> AsyncGenerator[None]:
        async with asyncio.timeout(0 if self._is_gone else self._timeout) as deadline:
            self._deadlines.add(deadline)
            try:
                yield
            finally:
                self._deadlines.discard(deadline)

    async def _wait_until_gone(self) -> str:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        self._is_gone = True
        now = asyncio.get_running_loop().time()
        for deadline in self._deadlines:
            if not deadline.expired():
                deadline.reschedule(now)
        try:
            # Raises, as any type, what ended the reader.
            await self._client.disconnect()
        except EOFError:
            return "QEMU has closed it"
        except Exception as error:
            _log.debug("the monitor's connection ended: %r", error)
            return str(error) or type(error).__name__
        return "it was closed"


async def _connect(client: QMPClient, path: str, timeout: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        async with asyncio.timeout(timeout):
            # A line that is full already is a BlockingIOError, which the loop's own
            # `sock_connect` takes for success.
            while not _stands_in_line(connection, path):  # noqa: ASYNC110 - there is no event
                await asyncio.sleep(_IN_LINE)
            await client.connect(connection)
    except TimeoutError as error:
        connection.close()
        raise BackendError(
            f"no greeting from the monitor at {path} within {timeout:g} s; "
            "the VM hangs, or another client has this monitor (it serves one at a time)",
            operation="connect",
        ) from error
    except (OSError, ConnectError) as error:
        connection.close()
        cause = error.exc if isinstance(error, ConnectError) else error
        words = os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else cause
        raise BackendError(
            f"cannot connect to a monitor at {path}: {words or type(cause).__name__}; "
            "start the VM with -qmp unix:PATH,server=on,wait=off, and give that path",
            operation="connect",
            detail=str(cause),
        ) from error
    except BaseException:
        connection.close()
        raise
    return connection


def _stands_in_line(connection: socket.socket, path: str) -> bool:
    try:
        connection.connect(path)
    except BlockingIOError:
        return False
    return True
