"""Commands in the guest through qemu-guest-agent: the way in that is not the bridge.

The guest is not trusted: what it says is bounded in size and time and only ever
becomes text. Replies are matched by id, so commands may run side by side and a
caller who gives up leaves the connection in order.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import itertools
import json
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hotlun.errors import OutcomeUnknownError
from hotlun.vm.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Sequence

RUN_TIMEOUT = 60.0
"""Seconds for a command, unless the caller says otherwise."""
MAX_REPLY = 64 << 20
"""Bytes of one reply line; the agent itself keeps 16 MiB of a command's output (QEMU 7.2)."""
FIRST_POLL, LAST_POLL = 0.004, 0.1
"""Seconds between two questions whether a command is done: the agent has no event for it."""
SYNC_TIMEOUT = 1.0
"""Seconds until the greeting is sent again: one sent while the guest starts can get lost."""


@dataclass(frozen=True)
class Completed:
    """A command that has ended in the guest. One killed by signal N has returncode -N."""

    returncode: int
    stdout: str
    stderr: str


class GuestExec:
    """A connection to qemu-guest-agent (QEMU: docs/interop/qemu-ga-ref)."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._listener: asyncio.Task[None] | None = None
        self._closed = False

    @classmethod
    async def open(cls, path: str, *, timeout: float) -> GuestExec:
        """Connect to the agent's unix socket and wait until it answers; to be closed.

        Raises:
            MachineError: there was no answer within `timeout` seconds, or the
                VM closed the connection.
        """
        try:
            reader, writer = await asyncio.open_unix_connection(path, limit=MAX_REPLY)
        except OSError as error:
            raise MachineError(f"the VM's socket {path} does not accept: {error}") from error
        agent = cls(reader, writer)
        try:
            async with asyncio.timeout(timeout):
                await agent._synchronise()
        except BaseException as error:
            await agent.close()
            if isinstance(error, TimeoutError):
                raise MachineError(f"the guest did not answer within {timeout:g} s") from error
            raise
        agent._listener = asyncio.create_task(agent._listen())
        return agent

    async def close(self) -> None:
        """Hang up. Whoever still waits for a command gets `OutcomeUnknownError`."""
        self._hang_up()
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def run(self, argv: Sequence[str], *, timeout: float, stdin: bytes = b"") -> Completed:
        """Run a program (an absolute path and its arguments) as root until it ends.

        Raises:
            MachineError: the agent refused, a program that is not there for instance.
            OutcomeUnknownError: it did not end within `timeout` seconds (it goes
                on in the guest), or the VM died meanwhile.
        """
        try:
            async with asyncio.timeout(timeout):
                started = await self._execute(
                    "guest-exec",
                    {
                        "path": argv[0],
                        "arg": list(argv[1:]),
                        "capture-output": True,
                        "input-data": base64.b64encode(stdin).decode(),
                    },
                )
                return await self._ended(_integer(started, "pid"))
        except TimeoutError as error:
            raise OutcomeUnknownError(
                f"the command did not end within {timeout:g} s and may still be running in the "
                f"guest: {' '.join(argv)[:200]}",
                operation="run",
            ) from error

    async def _ended(self, pid: int) -> Completed:
        pause = FIRST_POLL
        while True:
            if self._closed:  # between two polls
                raise _went_away()
            status = await self._execute("guest-exec-status", {"pid": pid})
            if status.get("exited") is True:
                break
            await asyncio.sleep(pause)
            pause = min(1.2 * pause, LAST_POLL)
        code = -_integer(status, "signal") if "signal" in status else _integer(status, "exitcode")
        return Completed(code, _text(status, "out-data"), _text(status, "err-data"))

    async def _execute(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if self._closed:
            raise MachineError("the VM has gone: start it again", operation="run")
        number = next(self._ids)
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = reply
        try:
            self._send({"execute": command, "arguments": arguments, "id": number})
            answer = await reply
        finally:
            del self._waiting[number]
        if isinstance(error := answer.get("error"), dict):
            words = str(error.get("desc", ""))[:500]
            raise MachineError(
                f"the guest agent refused {command}: {words}", operation="run", detail=words
            )
        result = answer.get("return")
        if not isinstance(result, dict):
            raise MachineError(f"the guest agent's answer to {command} makes no sense")
        return result

    def _send(self, message: dict[str, Any]) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")

    async def _synchronise(self) -> None:
        """Have the agent drop what an earlier connection left, and drop its late answers."""
        while True:
            number = secrets.randbits(31)
            greeting = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
            self._writer.write(b"\xff" + json.dumps(greeting).encode() + b"\n")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SYNC_TIMEOUT):
                    while True:
                        answer = _parsed((await self._line()).rpartition(b"\xff")[2])
                        if answer.get("return") == number:
                            return

    async def _line(self) -> bytes:
        try:
            line = await self._reader.readline()
        except (OSError, ValueError) as error:  # ValueError: longer than MAX_REPLY
            raise MachineError(f"the connection to the guest agent broke: {error}") from error
        if not line:
            raise MachineError("the VM closed the guest agent's connection: it has ended")
        return line

    async def _listen(self) -> None:
        try:
            while True:
                answer = _parsed(await self._line())
                number = answer.get("id")
                reply = self._waiting.get(number) if isinstance(number, int) else None
                if reply is not None and not reply.done():
                    reply.set_result(answer)
        except MachineError:
            self._hang_up()

    def _hang_up(self) -> None:
        self._closed = True
        for reply in self._waiting.values():
            if not reply.done():
                reply.set_exception(_went_away())


def _went_away() -> OutcomeUnknownError:
    return OutcomeUnknownError(
        "the VM went away while the command ran: start it again", operation="run"
    )


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _integer(answer: dict[str, Any], name: str) -> int:
    value = answer.get(name)
    if type(value) is not int:
        raise MachineError(f"the guest agent's answer has no number {name!r}", operation="run")
    return value


def _text(answer: dict[str, Any], name: str) -> str:
    value = answer.get(name, "")
    try:
        return base64.b64decode(value, validate=True).decode(errors="replace")
    except (binascii.Error, TypeError, ValueError) as error:
        raise MachineError(f"the guest agent's {name!r} makes no sense", operation="run") from error
