"""How a connection to an agent begins: the greeting, who may be there, and what is left over."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING, Any

import pytest
from support.peer import DEADLINE, MODIFY_RESPONSE, Call, Peer, asking, connect, header, works

from hotlun.bridge import messages
from hotlun.bridge.client import BridgeConnection
from hotlun.bridge.codes import HResult
from hotlun.bridge.documents import encode_request
from hotlun.bridge.frames import Frame, encode
from hotlun.bridge.messages import MessageType
from hotlun.errors import BackendError, OutcomeUnknownError

if TYPE_CHECKING:
    from pathlib import Path

NEGOTIATE_RESPONSE = messages.response_type(MessageType.NEGOTIATE_PROTOCOL)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.sock"


async def test_entering_negotiates_and_no_more(path: Path) -> None:
    """A Linux guest gets Negotiate 4 to 4 as its first message, and no Create or Start."""
    async with Peer(path, features=("options",)) as peer, connect(peer) as connection:
        (greeting,) = peer.greetings
        assert greeting.payload == encode_request(messages.negotiate_request())
        assert peer.calls == []
        assert connection.os_type == "linux"
        assert connection.features == frozenset({"options"})
        assert not connection.closed


@pytest.mark.parametrize(
    ("flags", "kinds"),
    [
        (("SendHostCreateMessage",), [MessageType.CREATE]),
        (
            ("SendHostCreateMessage", "SendHostStartMessage"),
            [MessageType.CREATE, MessageType.START],
        ),
        (("SendHostStartMessage",), []),
    ],
)
async def test_create_and_start_only_when_asked_for(
    path: Path, flags: tuple[str, ...], kinds: list[MessageType]
) -> None:
    """Create if the guest wants it, Start if it wants both; the bytes are hcsshim's."""
    greeting = messages.response(
        Version=4, Capabilities=dict.fromkeys(flags, True) | {"RuntimeOsType": ""}
    )

    def react(call: Call) -> list[Frame]:
        return [call.answer()]

    async with Peer(path, greeting=greeting, react=react) as peer, connect(peer) as connection:
        assert [call.frame.type for call in peer.calls] == kinds
        documents = [messages.create_request(), messages.start_request()]
        for call, document in zip(peer.calls, documents, strict=False):
            assert call.frame.payload == encode_request(document)
        assert connection.os_type == "windows"


async def test_system_that_exists_already_is_met_again(path: Path) -> None:
    """A second client of the same guest is told so by Create, and goes on without Start."""
    flags = {"SendHostCreateMessage": True, "SendHostStartMessage": True}
    greeting = messages.response(Version=4, Capabilities=flags)

    def react(call: Call) -> list[Frame]:
        return [call.answer(HResult.SYSTEM_ALREADY_EXISTS, "exists")]

    async with Peer(path, greeting=greeting, react=react) as peer, connect(peer) as connection:
        assert [call.frame.type for call in peer.calls] == [MessageType.CREATE]
        assert not connection.closed


@pytest.mark.parametrize(
    ("greeting", "words", "code"),
    [
        (messages.response(Version=5, Capabilities={}), "version 5", None),
        (messages.response(Capabilities={}), "version 0", None),
        (
            messages.response(HResult.UNSUPPORTED_PROTOCOL_VERSION, "4 only"),
            "4 only",
            HResult.UNSUPPORTED_PROTOCOL_VERSION,
        ),
        ({"Version": 4}, "Result is null", None),
        (messages.response(Version="4"), "Version is a string", None),
        (messages.response(Version=4, Capabilities=[]), "Capabilities is an array", None),
    ],
)
async def test_agent_that_cannot_be_worked_with(
    path: Path, greeting: dict[str, Any], words: str, code: int | None
) -> None:
    """Another version, a refusal, a greeting that makes no sense: an error that says which."""
    async with Peer(path, greeting=greeting) as peer:
        connection = connect(peer)
        with pytest.raises(BackendError, match=words) as caught:
            await connection.__aenter__()
        assert caught.value.code == code
        assert str(path) in str(caught.value)
        assert connection.closed
        await peer.departure()


async def test_refused_create_ends_it(path: Path) -> None:
    """A guest that wants Create and then refuses it cannot be worked with."""
    greeting = messages.response(Version=4, Capabilities={"SendHostCreateMessage": True})

    def react(call: Call) -> list[Frame]:
        return [call.answer(HResult.INVALID_JSON, "bad schema")]

    async with Peer(path, greeting=greeting, react=react) as peer:
        with pytest.raises(BackendError, match=r"Create request.*INVALID_JSON.*bad schema"):
            await connect(peer).__aenter__()


async def test_no_socket(path: Path) -> None:
    """An address where nobody listens is an error at once."""
    with pytest.raises(BackendError, match="is the VM running") as caught:
        await BridgeConnection.connect_unix(path).__aenter__()
    assert isinstance(caught.value.__cause__, FileNotFoundError)


async def test_socket_of_a_dead_vm(path: Path) -> None:
    """A socket file that nobody listens at any more is an error at once."""
    async with Peer(path):
        pass
    if not path.exists():
        await asyncio.to_thread(_leave_dead_socket, path)
    with pytest.raises(BackendError, match="cannot connect"):
        await BridgeConnection.connect_unix(path).__aenter__()


def _leave_dead_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


async def test_nobody_answers(path: Path) -> None:
    """QEMU accepts without an agent in the guest: the deadline ends it, saying what to check."""
    async with Peer(path, greets=False) as peer:
        with pytest.raises(BackendError, match=r"no agent answered at .* within 0\.2 s"):
            await connect(peer, timeout=0.2).__aenter__()
        await peer.departure()


async def test_agent_comes_later(path: Path) -> None:
    """What was sent before an agent opened the port is read by it then; it is sent once."""
    async with Peer(path, greets=False) as peer:
        entering = asyncio.create_task(connect(peer).__aenter__())
        call = await peer.call()
        await asyncio.sleep(0.1)
        await call.link.send(call.answer(Version=4, Capabilities={"RuntimeOsType": "Linux"}))
        connection = await entering
        assert [call.frame.type for call in peer.calls] == [MessageType.NEGOTIATE_PROTOCOL]
        await connection.__aexit__()


async def test_hang_up_before_the_greeting(path: Path) -> None:
    """A VM that dies while connecting: an error at once, not the deadline."""
    async with Peer(path, greets=False) as peer:
        entering = asyncio.create_task(connect(peer).__aenter__())
        (await peer.call()).link.hang_up()
        with pytest.raises(BackendError, match="the other end closed it"):
            await entering


async def test_cancelled_while_entering(path: Path) -> None:
    """The socket is closed."""
    async with Peer(path, greets=False) as peer:
        entering = asyncio.create_task(connect(peer).__aenter__())
        await peer.call()
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        await peer.departure()


async def test_streams_that_are_open_already(path: Path) -> None:
    """`over` speaks through any streams, and leaving closes them."""
    async with Peer(path) as peer:
        reader, writer = await asyncio.open_unix_connection(path)
        async with BridgeConnection.over(reader, writer, timeout=DEADLINE) as connection:
            await works(connection, peer)
        assert writer.is_closing()
        await peer.departure()


# What an earlier client left behind.


@pytest.mark.parametrize(
    "stale",
    [
        b"x",
        encode(Frame(MODIFY_RESPONSE, 5, b'{"Result":0}')),
        encode(Frame(MODIFY_RESPONSE, 5, b'{"Result":0}'))[7:],
        encode(Frame(NEGOTIATE_RESPONSE, 5, b'{"Result":0,"Version":9}')),
        encode(Frame(MODIFY_RESPONSE, 5, b"x" * 100_000))[20:],
        header(MODIFY_RESPONSE, 1 << 20, 5),
        header(NEGOTIATE_RESPONSE, 0xFFFFFFFF, 5),
        bytes(300),
    ],
    ids=["byte", "frame", "half", "greeting", "long", "head", "huge", "zeros"],
)
async def test_stale_bytes_come_first(
    path: Path, stale: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """The rest of an earlier client's answers, from anywhere in a frame, is dropped and told."""
    caplog.set_level(logging.INFO, "hotlun.bridge")
    async with Peer(path, before_greeting=stale) as peer, connect(peer) as connection:
        await works(connection, peer)
    assert f"dropped {len(stale)} stale bytes" in caplog.text


async def test_endless_garbage_instead_of_a_greeting(path: Path) -> None:
    """A guest that sends anything but an answer is given up after a few frames' worth."""
    async with Peer(path, greets=False) as peer:
        entering = asyncio.create_task(connect(peer, limit=4096).__aenter__())
        call = await peer.call()
        await call.link.send(b"garbage" * 4096)
        with pytest.raises(BackendError, match="belong to no request"):
            await entering


async def test_ids_are_not_used_again_by_the_next_connection(path: Path) -> None:
    """The agent may answer an old request to a new client: the answer must fit nothing."""
    seen: set[int] = set()
    async with Peer(path) as peer:
        for _ in range(20):
            async with connect(peer) as connection:
                for _ in range(5):
                    await works(connection, peer)
        numbers = [frame.id for frame in peer.greetings] + [call.frame.id for call in peer.calls]
        seen.update(numbers)
    assert len(seen) == len(numbers) == 120
    assert max(seen) < 1 << 63


async def test_answer_to_an_earlier_connection(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It comes late, on the new connection, and is dropped with a log line."""
    async with Peer(path) as peer:
        async with connect(peer) as connection:
            task = asking(connection)
            old = await peer.call()
        with pytest.raises(OutcomeUnknownError, match="it was left"):
            await task
        async with connect(peer) as connection:
            await peer.links[-1].send(old.answer())
            await works(connection, peer)
    assert f"unknown id {old.frame.id}" in caplog.text
