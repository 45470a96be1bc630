"""A guest's agent as a script: it answers on a unix socket what the test tells it to.

Negotiate and GetProperties it answers by itself, as an agent does, and it refuses
whatever comes before it was negotiated with.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from hotlun.bridge import messages
from hotlun.bridge.client import BridgeConnection
from hotlun.bridge.codes import HResult
from hotlun.bridge.documents import decode, encode_response
from hotlun.bridge.frames import Frame, FrameDecoder, encode
from hotlun.bridge.messages import MessageType

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hotlun.bridge.responses import Response

MODIFY_RESPONSE = messages.response_type(MessageType.MODIFY_SETTINGS)

DEADLINE = 20.0
"""Seconds after which something that should have happened has not."""


class Link:
    """One connection that a client made to the peer."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.decoder = FrameDecoder()
        self.reading = asyncio.Event()
        """Cleared: the peer takes no more bytes."""
        self.reading.set()
        self.knows_host = False
        """Whether it has been negotiated with; an agent that has not refuses everything."""
        self.has_greeted = False

    async def send(self, *parts: bytes | Frame) -> None:
        """Send bytes and frames as one piece."""
        data = b"".join(encode(part) if isinstance(part, Frame) else part for part in parts)
        self._writer.write(data)
        await self._writer.drain()

    def hang_up(self) -> None:
        """Close without a word."""
        self._writer.close()


@dataclass
class Call:
    """A request that a client made."""

    link: Link
    frame: Frame

    @property
    def document(self) -> dict[str, Any]:
        return dict(decode(self.frame.payload).document)

    def answer(self, code: int = 0, message: str = "", **more: Any) -> Frame:
        """The frame that answers it."""
        payload = encode_response(messages.response(code, message, **more))
        return self.frame._replace(type=messages.response_type(self.frame.type), payload=payload)

    async def reply(self, code: int = 0, message: str = "", **more: Any) -> None:
        await self.link.send(self.answer(code, message, **more))


class Peer:
    """Listens at `path` until its `async with` is left.

    Args:
        path: the unix socket to make.
        features: those of our extension that its greeting lists.
        greeting: the answer to Negotiate, instead of one that lists the features.
        greets: False leaves Negotiate, and what comes before it, to the test.
        shows_life: False leaves GetProperties without an answer.
        before_greeting: bytes that come before the answer.
        react: called with each request, its frames are sent; None leaves requests to the test.
    """

    def __init__(
        self,
        path: Path,
        *,
        features: tuple[str, ...] = (),
        greeting: dict[str, Any] | None = None,
        greets: bool = True,
        shows_life: bool = True,
        before_greeting: bytes = b"",
        react: Callable[[Call], list[Frame]] | None = None,
    ) -> None:
        self.path = path
        self.links: list[Link] = []
        self.calls: list[Call] = []
        """All requests so far, greetings, probes and what was refused as too early left out."""
        self.greetings: list[Frame] = []
        self.probes: list[Frame] = []
        self.refused: list[Call] = []
        """What came before Negotiate."""
        self.greets = greets
        self.greets_again = True
        """False leaves a link's second Negotiate without an answer."""
        self.shows_life = shows_life
        self.greeting = (
            messages.negotiate_response(list(features)) if greeting is None else greeting
        )
        self._before_greeting = before_greeting
        self.react = react
        self._unseen: asyncio.Queue[Call] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._gone: asyncio.Queue[Link] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        if sys.version_info >= (3, 13):
            # Who is killed leaves a socket where nobody listens; a server that is closed would not.
            self._server = await asyncio.start_unix_server(
                self._serve, self.path, cleanup_socket=False
            )
        else:
            self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    def restart(self) -> None:
        """Be another agent behind the same sockets, as one is that was started anew in a guest."""
        for link in self.links:
            link.knows_host = False

    def stop_listening(self) -> None:
        """Take no more clients."""
        self._server.close()

    async def __aexit__(self, *_: object) -> None:
        self.stop_listening()
        for link in self.links:
            link.hang_up()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._wait_stopped()

    async def _wait_stopped(self) -> None:
        await self._server.wait_closed()

    async def call(self) -> Call:
        """The next request that nobody has answered."""
        return await asyncio.wait_for(self._unseen.get(), DEADLINE)

    async def departure(self) -> Link:
        """The next link that its client has closed."""
        return await asyncio.wait_for(self._gone.get(), DEADLINE)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        link = Link(writer)
        self.links.append(link)
        try:
            while data := await reader.read(1 << 16):
                for frame in link.decoder.feed(data):
                    await self._take(Call(link, frame))
                await link.reading.wait()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._gone.put_nowait(link)
            writer.transport.abort()

    async def _take(self, call: Call) -> None:
        kind, link = call.frame.type, call.link
        if self.greets and (kind == MessageType.NEGOTIATE_PROTOCOL) == link.knows_host:
            self.refused.append(call)
            await call.reply(HResult.NOT_IMPLEMENTED, "not before Negotiate, and that once")
            return
        if kind == MessageType.NEGOTIATE_PROTOCOL and self.greets:
            self.greetings.append(call.frame)
            if link.has_greeted and not self.greets_again:
                return
            link.knows_host = link.has_greeted = True
            payload = encode_response(self.greeting)
            greeting = call.frame._replace(type=messages.response_type(kind), payload=payload)
            await link.send(self._before_greeting, greeting)
            return
        if kind == MessageType.GET_PROPERTIES and call.document.get("Query") == "{}":
            self.probes.append(call.frame)
            if self.shows_life:
                await call.reply()
            return
        self.calls.append(call)
        if self.react is None:
            self._unseen.put_nowait(call)
        else:
            await call.link.send(*self.react(call))


class Dialler(Peer):
    """The same agent, in a guest that dials its host.

    Args:
        dial: opens a connection to it.
        arguments: as `Peer` has them.
    """

    def __init__(
        self,
        dial: Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]],
        **arguments: Any,
    ) -> None:
        super().__init__(Path(), **arguments)
        self._dial = dial

    async def __aenter__(self) -> Self:
        return self

    async def dial(self) -> None:
        """Dial once, and serve whoever answers, on the side."""
        streams = await self._dial()
        self._tasks.add(asyncio.create_task(self._serve(*streams)))

    async def dial_until_heard(self) -> None:
        """As agents do, until somebody listens."""
        async with asyncio.timeout(DEADLINE):
            while True:
                try:
                    await self.dial()
                except ConnectionError:
                    await asyncio.sleep(0.02)
                else:
                    return

    def stop_listening(self) -> None:
        """It never has."""

    async def _wait_stopped(self) -> None: ...


def header(kind: int, size: int, number: int) -> bytes:
    """A frame's header with any size."""
    return struct.pack("<IIQ", kind, size, number)


def connect(peer: Peer, **arguments: Any) -> BridgeConnection:
    """A client's connection to the peer, not entered yet."""
    return BridgeConnection.connect_unix(peer.path, **{"timeout": DEADLINE, **arguments})


def asking(
    connection: BridgeConnection, lun: int = 0, timeout: float | None = DEADLINE
) -> asyncio.Task[Response]:
    """A modify request that is being made."""
    return asyncio.create_task(
        connection.modify({"RequestType": "Add", "Settings": {"Lun": lun}}, timeout=timeout)
    )


async def works(connection: BridgeConnection, peer: Peer) -> None:
    """One request there and back."""
    task = asking(connection)
    await (await peer.call()).reply()
    assert (await task).code == 0
