"""A guest's agent as a script: it answers on a unix socket what the test tells it to."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from hotlun.bridge import messages
from hotlun.bridge.client import BridgeConnection
from hotlun.bridge.frames import Frame, FrameDecoder, encode
from hotlun.bridge.messages import HResult, MessageType, Response

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MODIFY_RESPONSE = messages.response_type(MessageType.MODIFY_SETTINGS)

DEADLINE = 20.0
"""Seconds after which something that should have happened has not."""


class Link:
    """One connection that a client made to the peer."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.decoder = FrameDecoder()
        self.is_greeted = False
        """Somebody has negotiated; an agent that is started anew knows nothing of it."""
        self.reading = asyncio.Event()
        """Cleared: the peer takes no more bytes."""
        self.reading.set()

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
        return dict(messages.decode(self.frame.payload).document)

    def answer(self, code: int = 0, message: str = "", **more: Any) -> Frame:
        """The frame that answers it."""
        payload = messages.encode_response(messages.response(code, message, **more))
        return self.frame._replace(type=messages.response_type(self.frame.type), payload=payload)

    async def reply(self, code: int = 0, message: str = "", **more: Any) -> None:
        await self.link.send(self.answer(code, message, **more))


class Peer:
    """Listens at `path` until its `async with` is left.

    Args:
        path: the unix socket to make.
        features: those of our extension that its greeting lists.
        greeting: the answer to Negotiate, instead of one that lists the features.
        greets: False leaves Negotiate to the test.
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
        before_greeting: bytes = b"",
        react: Callable[[Call], list[Frame]] | None = None,
    ) -> None:
        self.path = path
        self.links: list[Link] = []
        self.calls: list[Call] = []
        """All requests so far, greetings left out."""
        self.greetings: list[Frame] = []
        self._greeting = (
            messages.negotiate_response(list(features)) if greeting is None else greeting
        )
        self._greets = greets
        self._before_greeting = before_greeting
        self._react = react
        self._unseen: asyncio.Queue[Call] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._gone: asyncio.Queue[Link] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

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
        negotiates = call.frame.type == MessageType.NEGOTIATE_PROTOCOL
        if self._greets and negotiates == call.link.is_greeted:
            await call.reply(HResult.NOT_IMPLEMENTED, "not now")
            return
        call.link.is_greeted = True
        if negotiates and self._greets:
            self.greetings.append(call.frame)
            payload = messages.encode_response(self._greeting)
            greeting = call.frame._replace(
                type=messages.response_type(call.frame.type), payload=payload
            )
            await call.link.send(self._before_greeting, greeting)
            return
        self.calls.append(call)
        if self._react is None:
            self._unseen.put_nowait(call)
        else:
            await call.link.send(*self._react(call))


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
