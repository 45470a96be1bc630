"""The host's end of the bridge, against a scripted agent on a unix socket."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any, TYPE_CHECKING

import pytest
from support.peer import Call, DEADLINE, header, Peer

from hotlun.bridge import messages
from hotlun.bridge.client import BridgeConnection
from hotlun.bridge.frames import encode, Frame
from hotlun.bridge.messages import HResult, MessageType, Response
from hotlun.errors import BackendError, OutcomeUnknownError

if TYPE_CHECKING:
    from pathlib import Path

MODIFY_RESPONSE = messages.response_type(MessageType.MODIFY_SETTINGS)
NEGOTIATE_RESPONSE = messages.response_type(MessageType.NEGOTIATE_PROTOCOL)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.sock"


def connect(peer: Peer, **arguments: Any) -> BridgeConnection:
    return BridgeConnection.connect_unix(peer.path, **{"timeout": DEADLINE, **arguments})


def asking(
    connection: BridgeConnection, lun: int = 0, timeout: float | None = DEADLINE
) -> asyncio.Task[Response]:
    return asyncio.create_task(
        connection.modify({"RequestType": "Add", "Settings": {"Lun": lun}}, timeout=timeout)
    )


async def works(connection: BridgeConnection, peer: Peer) -> None:
    """One request there and back."""
    task = asking(connection)
    await (await peer.call()).reply()
    assert (await task).code == 0


def lun(call: Call) -> int:
    value = call.document["Request"]["Settings"]["Lun"]
    assert isinstance(value, int)
    return value


# Entering.


async def test_entering_negotiates_and_no_more(path: Path) -> None:
    """A Linux guest gets Negotiate 4 to 4 as its first message, and no Create or Start."""
    async with Peer(path, features=("options",)) as peer, connect(peer) as connection:
        (greeting,) = peer.greetings
        assert greeting.payload == messages.encode_request(messages.negotiate_request())
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
            assert call.frame.payload == messages.encode_request(document)
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


# Requests.


async def test_answers_in_any_order(path: Path) -> None:
    """Each caller gets the answer to its own request."""
    async with Peer(path) as peer, connect(peer) as connection:
        tasks = [asking(connection, number) for number in range(5)]
        calls = [await peer.call() for _ in tasks]
        for call in reversed(calls):
            await call.reply(message=f"lun {lun(call)}")
        assert [response.text for response in await asyncio.gather(*tasks)] == [
            f"lun {number}" for number in range(5)
        ]


async def test_two_hundred_in_flight(path: Path) -> None:
    """All sent before the first is answered, all answered in one piece, none mixed up."""
    async with Peer(path) as peer, connect(peer) as connection:
        tasks = [asking(connection, number) for number in range(200)]
        calls = [await peer.call() for _ in tasks]
        assert len({call.frame.id for call in calls}) == 200
        answers = [call.answer(message=str(lun(call))) for call in calls]
        await calls[0].link.send(*answers[1::2], *answers[::2])
        responses = await asyncio.gather(*tasks)
        assert [response.text for response in responses] == [str(number) for number in range(200)]


async def test_answer_byte_by_byte(path: Path) -> None:
    """However the bytes come."""
    async with Peer(path) as peer, connect(peer) as connection:
        task = asking(connection)
        call = await peer.call()
        for byte in encode(call.answer(message="ü")):
            await call.link.send(bytes([byte]))
            await asyncio.sleep(0)
        assert (await task).text == "ü"


async def test_refusal_is_an_answer(path: Path) -> None:
    """The code and the words come back; what they mean is the caller's business."""
    async with Peer(path) as peer, connect(peer) as connection:
        task = asking(connection)
        await (await peer.call()).reply(HResult.FAIL, "mkfs:\n\x1b[1mno\x07")
        response = await task
        assert response.code == HResult.FAIL
        assert response.text == r"mkfs:; \x1b[1mno\x07"


async def test_deadline_costs_one_request(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It may or may not have happened; the bridge lives, and the late answer is dropped."""
    caplog.set_level(logging.INFO, "hotlun.bridge")
    async with Peer(path) as peer, connect(peer) as connection:
        slow = asking(connection, timeout=0.1)
        other = asking(connection)
        calls = [await peer.call(), await peer.call()]
        with pytest.raises(OutcomeUnknownError, match=r"did not answer .* within 0\.1 s"):
            await slow
        for call in calls:
            await call.reply()
        assert (await other).code == 0
        await works(connection, peer)
        assert not connection.closed
    assert "late or second answer" in caplog.text


async def test_connection_has_a_deadline_of_its_own(path: Path) -> None:
    """For requests that state none."""
    async with Peer(path) as peer, connect(peer, request_timeout=0.1) as connection:
        with pytest.raises(OutcomeUnknownError):
            await connection.modify({})


async def test_cancelled_caller(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Cancelling ends the waiting at once and nothing else."""
    caplog.set_level(logging.INFO, "hotlun.bridge")
    async with Peer(path) as peer, connect(peer) as connection:
        task = asking(connection)
        call = await peer.call()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await call.reply()
        await works(connection, peer)
    assert "late or second answer" in caplog.text


async def test_answered_twice(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first answer counts, also when both come in one piece."""
    caplog.set_level(logging.INFO, "hotlun.bridge")
    async with Peer(path) as peer, connect(peer) as connection:
        task = asking(connection)
        call = await peer.call()
        await call.link.send(call.answer(message="first"), call.answer(HResult.FAIL, "second"))
        assert (await task).text == "first"
        await works(connection, peer)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (Frame(MODIFY_RESPONSE, 12345, b"{}"), "unknown id 12345"),
        (Frame(MODIFY_RESPONSE, 2**64 - 1, b"\xff"), "unknown id"),
        (Frame(MessageType.MODIFY_SETTINGS, 0, b"{}"), "no guest should send"),
        (Frame(0x30100201, 0, b"{}"), "no guest should send"),
        (Frame(0, 0, b""), "no guest should send"),
        (
            Frame(MessageType.CONTAINER_NOTIFICATION, 0, b'{"Type":"GracefulExit","x":"\x1b[2J"}'),
            r'container notification: {"Type":"GracefulExit","x":"\x1b[2J"}',
        ),
        (Frame(MessageType.CONTAINER_NOTIFICATION, 0, b"\xff" * 100_000), "notification"),
    ],
)
async def test_unasked_frames_are_dropped_and_told(
    path: Path, frame: Frame, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Unknown ids, notifications, requests from the guest: a printable log line each."""
    caplog.set_level(logging.INFO, "hotlun.bridge")
    async with Peer(path) as peer, connect(peer) as connection:
        task = asking(connection)
        call = await peer.call()
        await call.link.send(frame, call.answer())
        assert (await task).code == 0
        await works(connection, peer)
    (line,) = [record.getMessage() for record in caplog.records if words in record.getMessage()]
    assert line.isprintable()
    assert len(line) < 1000


@pytest.mark.parametrize(
    "payload", [b"", b"\xff", b"{", b"[" * 100_000, b"{}", b'{"Result":"ok"}', b"5"]
)
async def test_answer_that_cannot_be_read_costs_one_request(path: Path, payload: bytes) -> None:
    """It was sent, so nobody knows; the bridge lives."""
    async with Peer(path) as peer, connect(peer) as connection:
        task = asking(connection)
        call = await peer.call()
        await call.link.send(call.answer()._replace(payload=payload))
        with pytest.raises(OutcomeUnknownError, match="the answer cannot be read"):
            await task
        await works(connection, peer)


async def test_answer_of_another_type(path: Path) -> None:
    """The right id on the wrong type is no answer to go by."""
    async with Peer(path) as peer, connect(peer) as connection:
        task = asking(connection)
        call = await peer.call()
        await call.link.send(call.answer()._replace(type=0x20100C01))
        with pytest.raises(OutcomeUnknownError, match="DumpStacks response"):
            await task
        await works(connection, peer)


async def test_what_cannot_be_sent_is_not_sent(path: Path) -> None:
    """Half a surrogate pair, or more than a frame holds: nothing went out, nothing is lost."""
    async with Peer(path) as peer, connect(peer, limit=4096) as connection:
        with pytest.raises(BackendError, match="nothing was sent"):
            await connection.modify({"Settings": "\udc80"})
        with pytest.raises(BackendError, match="4096 are allowed"):
            await connection.modify({"Settings": "x" * 5000})
        await works(connection, peer)
        assert len(peer.calls) == 1


async def test_peer_that_takes_nothing(path: Path) -> None:
    """What is half written is unknown, what has not begun was not sent; neither hangs."""
    async with Peer(path) as peer, connect(peer) as connection:
        peer.links[0].reading.clear()
        big = {"Settings": "x" * (3 << 20)}
        with pytest.raises(OutcomeUnknownError, match=r"within 0\.2 s"):
            await connection.modify(big, timeout=0.2)
        for _ in range(2):
            with pytest.raises(BackendError, match=r"has taken no bytes for 0\.1 s"):
                await connection.modify({}, timeout=0.1)
        waiting = [asking(connection, number) for number in range(20)]
        await asyncio.sleep(0)
        peer.links[0].reading.set()
        first = await peer.call()
        assert first.document["Request"] == big
        for _ in waiting:
            await (await peer.call()).reply()
        assert {response.code for response in await asyncio.gather(*waiting)} == {0}


async def test_leaving_a_peer_that_takes_nothing(path: Path) -> None:
    """Leaving does not wait for it for long."""
    async with Peer(path) as peer:
        async with connect(peer) as connection:
            peer.links[0].reading.clear()
            with pytest.raises(OutcomeUnknownError):
                await connection.modify({"Settings": "x" * (3 << 20)}, timeout=0.1)
        assert connection.closed
        peer.links[0].reading.set()
        await peer.departure()


# Losing the connection.


async def test_hang_up_with_requests_in_flight(path: Path) -> None:
    """All that were sent are unknown; later ones are not sent, and say what to do."""
    async with Peer(path) as peer, connect(peer) as connection:
        tasks = [asking(connection, number) for number in range(3)]
        calls = [await peer.call() for _ in tasks]
        await calls[1].reply()
        assert (await tasks[1]).code == 0
        calls[0].link.hang_up()
        for task in (tasks[0], tasks[2]):
            with pytest.raises(OutcomeUnknownError, match="the other end closed it"):
                await task
        assert connection.closed
        with pytest.raises(BackendError, match="open a new BridgeConnection"):
            await connection.modify({})
        assert connection.features == frozenset()


@pytest.mark.parametrize("share", [1, 15, 16, 20])
async def test_hang_up_in_the_middle_of_an_answer(path: Path, share: int) -> None:
    """Half an answer is none."""
    async with Peer(path) as peer, connect(peer) as connection:
        task = asking(connection)
        call = await peer.call()
        await call.link.send(encode(call.answer())[:share])
        call.link.hang_up()
        with pytest.raises(OutcomeUnknownError, match="lost"):
            await task


async def test_answer_and_hang_up_in_one_go(path: Path) -> None:
    """What came whole before the end counts."""
    async with Peer(path) as peer, connect(peer) as connection:
        task = asking(connection)
        call = await peer.call()
        await call.link.send(call.answer())
        call.link.hang_up()
        assert (await task).code == 0


@pytest.mark.parametrize("size", [0, 15, (4 << 20) + 1, 0xFFFFFFFF])
async def test_frame_that_cannot_be_trusted_ends_it(path: Path, size: int) -> None:
    """Answers before it count; those who still wait do not know; the socket is closed."""
    async with Peer(path) as peer, connect(peer) as connection:
        answered, waiting = asking(connection, 1), asking(connection, 2)
        call = await peer.call()
        await peer.call()
        await call.link.send(call.answer(), header(MODIFY_RESPONSE, size, call.frame.id))
        assert (await answered).code == 0
        with pytest.raises(OutcomeUnknownError, match=f"claims {size} bytes"):
            await waiting
        with pytest.raises(BackendError, match="cannot be trusted"):
            await connection.modify({})
        await peer.departure()


async def test_large_answer(path: Path) -> None:
    """Beyond hcsshim's 64 KiB, up to the limit."""
    async with Peer(path) as peer, connect(peer) as connection:
        task = asking(connection)
        await (await peer.call()).reply(Stacks="x" * 3_000_000)
        assert len((await task).fields.string("Stacks")) == 3_000_000


# Leaving.


async def test_before_and_after(path: Path) -> None:
    """Outside its `async with` a connection is closed, and says so."""
    async with Peer(path) as peer:
        connection = connect(peer)
        assert connection.closed
        with pytest.raises(BackendError, match="not been entered"):
            await connection.modify({})
        with pytest.raises(BackendError, match="not been entered"):
            _ = connection.capabilities
        async with connection:
            with pytest.raises(BackendError, match="entered once"):
                await connection.__aenter__()
            await works(connection, peer)
        assert connection.closed
        with pytest.raises(BackendError, match="it was left"):
            await connection.modify({})
        with pytest.raises(BackendError, match="entered once"):
            await connection.__aenter__()
        await peer.departure()


async def test_leaving_cancelled(path: Path) -> None:
    """The socket is closed all the same."""
    async with Peer(path) as peer:
        connection = await connect(peer).__aenter__()
        peer.links[0].reading.clear()
        with pytest.raises(OutcomeUnknownError):
            await connection.modify({"Settings": "x" * (3 << 20)}, timeout=0.1)
        leaving = asyncio.create_task(connection.__aexit__())
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert connection.closed
        peer.links[0].reading.set()
        await peer.departure()


def test_left_open_is_told(path: Path) -> None:
    """A connection that nobody left warns when the loop ends."""

    async def forgetful() -> None:
        peer = await Peer(path).__aenter__()
        await connect(peer).__aenter__()
        peer.stop_listening()

    with pytest.warns(ResourceWarning, match="unclosed <BridgeConnection"):
        asyncio.run(forgetful())
