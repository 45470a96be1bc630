"""The host's end of the bridge, against a scripted agent on a unix socket."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING

import pytest
from support.peer import MODIFY_RESPONSE, Call, Peer, asking, connect, header, works

from hotlun.bridge.codes import HResult
from hotlun.bridge.frames import Frame, encode
from hotlun.bridge.messages import MessageType
from hotlun.errors import BackendError, OutcomeUnknownError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.sock"


def lun(call: Call) -> int:
    value = call.document["Request"]["Settings"]["Lun"]
    assert isinstance(value, int)
    return value


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
    "frame",
    [
        Frame(MODIFY_RESPONSE, 12345, b""),
        Frame(0, 0, b""),
        Frame(MessageType.CONTAINER_NOTIFICATION, 0, b""),
    ],
)
async def test_a_flood_of_unasked_frames_is_told_in_part(
    path: Path, frame: Frame, caplog: pytest.LogCaptureFixture
) -> None:
    """A guest does not fill the host's log; and what comes among them is found."""
    caplog.set_level(logging.INFO, "hotlun.bridge")
    async with Peer(path) as peer, connect(peer) as connection:
        task = asking(connection)
        call = await peer.call()
        await call.link.send(*[frame] * 20_000, call.answer())
        assert (await task).code == 0
        await works(connection, peer)
    assert 10 < len(caplog.records) < 200
    assert sum("not told" in record.getMessage() for record in caplog.records) == 1


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


@pytest.mark.skipif(os.name == "nt", reason="TCP has other buffers")
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
    """All that were sent and not answered are unknown, at once; then it comes back."""
    async with Peer(path) as peer, connect(peer) as connection:
        tasks = [asking(connection, number) for number in range(3)]
        calls = [await peer.call() for _ in tasks]
        await calls[1].reply()
        assert (await tasks[1]).code == 0
        calls[0].link.hang_up()
        for task in (tasks[0], tasks[2]):
            with pytest.raises(OutcomeUnknownError, match=r"lost .the other end closed it.*look"):
                await task
        assert connection.closed
        assert connection.features == frozenset()
        await works(connection, peer)
        assert not connection.closed


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
    """Answers before it count; those who still wait do not know; a new socket is opened."""
    async with Peer(path) as peer, connect(peer) as connection:
        answered, waiting = asking(connection, 1), asking(connection, 2)
        call = await peer.call()
        await peer.call()
        await call.link.send(call.answer(), header(MODIFY_RESPONSE, size, call.frame.id))
        assert (await answered).code == 0
        with pytest.raises(OutcomeUnknownError, match=f"claims {size} bytes"):
            await waiting
        assert await peer.departure() is call.link
        await works(connection, peer)
        assert len(peer.links) == 2


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
