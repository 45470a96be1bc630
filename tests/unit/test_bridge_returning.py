"""A connection to an agent that comes back: after a loss, after the agent, not after the VM."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import os
import random
import socket
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from support.peer import DEADLINE, MODIFY_RESPONSE, Call, Peer, asking, connect, header, works

from hotlun.bridge import messages, openings
from hotlun.bridge.client import BridgeConnection
from hotlun.bridge.codes import HResult
from hotlun.bridge.documents import encode_response
from hotlun.bridge.frames import DEFAULT_LIMIT, Frame, encode
from hotlun.bridge.keeper import Change
from hotlun.bridge.messages import MessageType
from hotlun.errors import BackendError, OutcomeUnknownError, VMGoneError

if TYPE_CHECKING:
    from pathlib import Path

    from hotlun.bridge.threaded import Streams

SOON = 0.05
"""Seconds of a keepalive, in tests that wait for it."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.sock"


class Told:
    """What a connection tells of itself."""

    def __init__(self, connection: BridgeConnection) -> None:
        self._changes: asyncio.Queue[Change] = asyncio.Queue()
        self.unsubscribe = connection.watch(lambda change, _: self._changes.put_nowait(change))

    async def next(self) -> Change:
        return await asyncio.wait_for(self._changes.get(), DEADLINE)

    async def loss(self) -> None:
        """The other end has hung up, and the connection has seen it."""
        while await self.next() is not Change.LOST:
            pass

    @property
    def count(self) -> int:
        return self._changes.qsize()

    @property
    def nothing(self) -> bool:
        return self.count == 0


# A connection that was lost.


async def test_requests_wait_for_the_connection(path: Path) -> None:
    """Made while it is away, they are sent when it is back, once each."""
    async with Peer(path) as peer, connect(peer) as connection:
        told = Told(connection)
        peer.greets = False
        peer.links[0].hang_up()
        greeting = await peer.call()
        assert connection.closed
        tasks = [asking(connection, number) for number in range(3)]
        await asyncio.sleep(0)
        await greeting.reply(Version=4, Capabilities={"RuntimeOsType": "Linux"})
        for _ in tasks:
            await (await peer.call()).reply()
        assert {answer.code for answer in await asyncio.gather(*tasks)} == {0}
        assert len(peer.links) == 2
        assert [await told.next(), await told.next()] == [Change.LOST, Change.RESTORED]


async def test_a_request_waits_as_long_as_for_an_answer(path: Path) -> None:
    """Then it was not sent, and says what is the matter and that it may be tried again."""
    async with Peer(path) as peer, connect(peer) as connection:
        peer.greets = False
        peer.links[0].hang_up()
        await peer.call()  # the greeting
        with pytest.raises(BackendError, match=r"nothing was sent.*0\.1 s.*closed it.*try again"):
            await connection.modify({}, timeout=0.1)
        peer.greets = True
        peer.links[-1].hang_up()
        await works(connection, peer)


async def test_a_waiting_request_can_be_cancelled(path: Path) -> None:
    """And is not sent when the connection is back."""
    async with Peer(path) as peer, connect(peer) as connection:
        peer.greets = False
        peer.links[0].hang_up()
        greeting = await peer.call()
        task = asking(connection)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await greeting.reply(Version=4, Capabilities={})
        await works(connection, peer)
        assert len(peer.calls) == 2


async def test_it_comes_back_again_and_again(path: Path) -> None:
    """No id is used twice, greetings included."""
    async with Peer(path) as peer, connect(peer) as connection:
        told = Told(connection)
        for _ in range(4):
            await works(connection, peer)
            peer.links[-1].hang_up()
            await told.loss()
        await works(connection, peer)
        ids = [frame.id for frame in peer.greetings] + [call.frame.id for call in peer.calls]
        assert len(peer.links) == 5
        assert len(set(ids)) == len(ids) == 10


async def test_an_old_answer_on_the_new_connection(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The agent may see a request through and answer whoever is there: that fits nothing."""
    caplog.set_level(logging.INFO, "hotlun.bridge")
    async with Peer(path) as peer, connect(peer) as connection:
        task = asking(connection)
        old = await peer.call()
        old.link.hang_up()
        with pytest.raises(OutcomeUnknownError):
            await task
        task = asking(connection)
        new = await peer.call()
        await new.link.send(old.answer(message="old"), new.answer(message="new"))
        assert (await task).text == "new"
    assert "late or second answer" in caplog.text


async def test_stale_bytes_on_the_new_connection(path: Path) -> None:
    """The port gives out what was meant for the connection before, from anywhere in a frame."""
    stale = encode(Frame(MODIFY_RESPONSE, 5, b'{"Result":0}' * 9))[7:]
    async with Peer(path, before_greeting=stale) as peer, connect(peer) as connection:
        told = Told(connection)
        peer.links[0].hang_up()
        await told.loss()
        await works(connection, peer)


async def test_another_agent_is_asked_anew_what_it_can_do(path: Path) -> None:
    """What was made for the one before is not sent to it."""
    async with Peer(path, features=("options", "keys")) as peer, connect(peer) as connection:
        told = Told(connection)
        before = connection.capabilities
        await works(connection, peer)
        peer.links[0].hang_up()
        await told.loss()
        task = asyncio.create_task(connection.modify({}, meant_for=before))
        await (await peer.call()).reply()
        assert (await task).code == 0
        peer.greeting = messages.negotiate_response(["options"])
        peer.links[1].hang_up()
        await told.loss()
        with pytest.raises(BackendError, match=r"nothing was sent: the agent.* is another one now"):
            await connection.modify({}, meant_for=before)
        assert connection.features == frozenset({"options"})
        await works(connection, peer)


async def test_an_agent_that_cannot_be_worked_with_for_a_while(path: Path) -> None:
    """It is tried again until one is there that can."""
    async with Peer(path) as peer, connect(peer) as connection:
        told = Told(connection)
        good, peer.greeting = peer.greeting, messages.response(Version=3, Capabilities={})
        peer.links[0].hang_up()
        await told.loss()
        async with asyncio.timeout(DEADLINE):
            while len(peer.links) < 3:
                await asyncio.sleep(0)
        with pytest.raises(BackendError, match="it speaks version 3"):
            await connection.modify({}, timeout=0.1)
        peer.greeting = good
        await works(connection, peer)


async def test_a_guest_that_hangs_up_all_the_time(path: Path) -> None:
    """It keeps nobody busy: connections are further and further apart."""
    async with Peer(path) as peer, connect(peer) as connection:
        told = Told(connection)
        clock = asyncio.get_running_loop().time
        begin = clock()
        for _ in range(5):
            peer.links[-1].hang_up()
            assert [await told.next(), await told.next()] == [Change.LOST, Change.RESTORED]
        assert clock() - begin > 0.05 + 0.1 + 0.2 + 0.4
        assert len(peer.links) == 6
        await works(connection, peer)


async def test_waiting_for_a_guest_to_dial_has_no_pauses(path: Path) -> None:
    """It might dial in one: what an attempt has waited counts as the pause behind it."""
    clock = asyncio.get_running_loop().time
    dial = openings.unix(path).opener
    waits: list[list[float]] = []
    enough = asyncio.Event()

    async def opener() -> Streams:
        if not peer.links:
            return await dial()
        waits.append([clock()])
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            waits[-1].append(clock())
            if len(waits) == 5:
                enough.set()
        raise AssertionError

    opening = dataclasses.replace(openings.unix(path), opener=opener)
    connection = BridgeConnection(
        opening, timeout=0.5, request_timeout=DEADLINE, limit=DEFAULT_LIMIT, keepalive=2.0
    )
    async with Peer(path) as peer, connection:
        peer.links[0].hang_up()
        await asyncio.wait_for(enough.wait(), DEADLINE)
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(waits)]
    assert sum(gaps) < 0.05 + 0.1 + 0.2 + 0.4, gaps  # which pauses are at least


async def test_leaving_while_it_is_away(path: Path) -> None:
    """Ends the attempts and who waits for them, promptly."""
    async with Peer(path) as peer:
        async with connect(peer) as connection:
            told = Told(connection)
            peer.greets = False
            peer.links[0].hang_up()
            await peer.call()
            waiting = asking(connection)
            await asyncio.sleep(0)
        with pytest.raises(BackendError, match="it was left"):
            await waiting
        assert connection.closed
        await peer.departure()
        await peer.departure()
        assert await told.next() is Change.LOST
        assert told.nothing


async def test_streams_that_were_given_do_not_come_back(path: Path) -> None:
    """Nobody can open them again; what to do is said."""
    async with Peer(path) as peer:
        reader, writer = await asyncio.open_unix_connection(path)
        async with BridgeConnection.over(reader, writer, timeout=DEADLINE) as connection:
            told = Told(connection)
            task = asking(connection)
            (await peer.call()).link.hang_up()
            with pytest.raises(OutcomeUnknownError):
                await task
            assert connection.closed
            with pytest.raises(BackendError, match=r"closed it.*open a new BridgeConnection"):
                await connection.modify({})
            assert await told.next() is Change.LOST
        assert told.nothing


# A VM that has ended.


@pytest.mark.skipif(os.name == "nt", reason="nobody at a port of TCP is no VM that has ended")
@pytest.mark.parametrize("leftover", ["socket", "nothing"])
async def test_the_vm_is_gone(path: Path, leftover: str) -> None:
    """Whoever waits, and whoever comes later, is told at once; nothing is tried any more."""
    async with Peer(path) as peer, connect(peer) as connection:
        told = Told(connection)
        peer.greets = False
        peer.links[0].hang_up()
        await peer.call()
        waiting = [asking(connection, number) for number in range(3)]
        await asyncio.sleep(0)
        peer.stop_listening()
        if leftover == "nothing":
            path.unlink()
        peer.links[-1].hang_up()
        for task in waiting:
            with pytest.raises(
                VMGoneError, match=r"was not sent: the VM is gone.*forget its disks"
            ):
                await task
        with pytest.raises(VMGoneError):
            await connection.modify({})
        assert connection.closed
        assert [await told.next(), await told.next()] == [Change.LOST, Change.GONE]
    with pytest.raises(VMGoneError):
        await connection.modify({})
    assert told.nothing
    assert len(peer.links) == 2


# An agent that was started anew, behind a socket that stayed open.


async def test_an_agent_started_anew_is_negotiated_with_again(path: Path) -> None:
    """The caller does not notice; whoever watches does."""
    async with Peer(path) as peer, connect(peer) as connection:
        told = Told(connection)
        peer.restart()
        await works(connection, peer)
        assert (len(peer.links), len(peer.greetings)) == (1, 2)
        assert [await told.next(), await told.next()] == [Change.LOST, Change.RESTORED]
        assert peer.greetings[0].id != peer.greetings[1].id
        assert not connection.closed


async def test_many_requests_share_one_negotiation(path: Path) -> None:
    """Each is refused, and sent once more; none of them is done twice or reported as unknown."""
    async with Peer(path) as peer, connect(peer) as connection:
        peer.restart()
        tasks = [asking(connection, number) for number in range(20)]
        calls = [await peer.call() for _ in tasks]
        for call in calls:
            await call.reply()
        assert {answer.code for answer in await asyncio.gather(*tasks)} == {0}
        assert len(peer.greetings) == 2
        luns = [call.document["Request"]["Settings"]["Lun"] for call in calls]
        assert sorted(luns) == list(range(20))


async def test_an_agent_that_cannot_do_it(path: Path) -> None:
    """Is not negotiated with again; its answer is the caller's, and the others go on."""
    async with Peer(path) as peer, connect(peer) as connection:
        told = Told(connection)
        other, task = asking(connection), asking(connection)
        calls = [await peer.call(), await peer.call()]
        await calls[1].reply(HResult.NOT_IMPLEMENTED, "never heard of")
        answer = await task
        assert (answer.code, answer.text) == (HResult.NOT_IMPLEMENTED, "never heard of")
        assert (len(peer.greetings), len(peer.probes)) == (1, 1)
        await calls[0].reply()
        assert (await other).code == 0
        await works(connection, peer)
        assert told.nothing


async def test_an_agent_that_can_do_hardly_anything(path: Path) -> None:
    """It refuses the question whether it lives, too: that it refuses Negotiate tells."""
    async with (
        Peer(path, greets=False) as peer,
        asyncio.TaskGroup() as group,
    ):
        connection = connect(peer, keepalive=SOON)
        entering = group.create_task(connection.__aenter__())
        await (await peer.call()).reply(Version=4, Capabilities={})
        await entering
        peer.shows_life = False
        told = Told(connection)
        for _ in range(2):
            other, task = asking(connection), asking(connection)
            first, second = await peer.call(), await peer.call()
            await second.reply(HResult.NOT_IMPLEMENTED, "never heard of")
            if peer.probes:  # of this it was asked once, in the first round
                negotiation = await peer.call()
            else:
                while not peer.probes:
                    await asyncio.sleep(0)
                probe = (
                    second.link,
                    peer.probes[-1]._replace(
                        type=messages.response_type(MessageType.GET_PROPERTIES),
                        payload=encode_response(messages.response(HResult.NOT_IMPLEMENTED)),
                    ),
                )
                await probe[0].send(probe[1])
                negotiation = await peer.call()
            assert negotiation.frame.type == MessageType.NEGOTIATE_PROTOCOL
            await negotiation.reply(HResult.NOT_IMPLEMENTED)
            assert (await task).text == "never heard of"
            await first.reply()
            assert (await other).code == 0
        assert told.nothing
        await connection.__aexit__()


async def test_what_the_agent_before_was_at_is_unknown(path: Path) -> None:
    """Nobody will answer that; it is noticed soon, and not at the request's deadline."""
    async with Peer(path) as peer, connect(peer, keepalive=SOON) as connection:
        told = Told(connection)
        tasks = [asking(connection, number, timeout=600) for number in range(3)]
        for _ in tasks:
            await peer.call()
        peer.restart()
        for task in tasks:
            with pytest.raises(OutcomeUnknownError, match="the agent in the guest was started"):
                await asyncio.wait_for(task, DEADLINE)
        await works(connection, peer)
        assert (len(peer.links), len(peer.greetings)) == (1, 2)
        assert [await told.next(), await told.next()] == [Change.LOST, Change.RESTORED]


async def test_an_agent_that_is_busy_is_left_alone(path: Path) -> None:
    """It shows that it lives as often as it is asked, and its answer counts when it comes."""
    clock = asyncio.get_running_loop().time
    async with Peer(path) as peer, connect(peer, keepalive=SOON) as connection:
        begin = clock()
        tasks = [asking(connection, number) for number in range(10)]
        calls = [await peer.call() for _ in tasks]
        async with asyncio.timeout(DEADLINE):
            while len(peer.probes) < 10:
                await asyncio.sleep(0)
        assert len(peer.probes) <= (clock() - begin) / SOON + 1
        for call in calls:
            await call.reply()
        assert {answer.code for answer in await asyncio.gather(*tasks)} == {0}
        probes = len(peer.probes)
        await asyncio.sleep(3 * SOON)
        assert len(peer.probes) <= probes + 1  # which was under way


async def test_a_vm_that_is_paused_is_left_alone(path: Path) -> None:
    """It shows nothing for as long as it likes; the request's own deadline decides."""
    async with Peer(path, shows_life=False) as peer, connect(peer, keepalive=0.001) as connection:
        task, late = asking(connection), asking(connection, timeout=0.3)
        call = await peer.call()
        with pytest.raises(OutcomeUnknownError, match=r"within 0\.3 s"):
            await late
        async with asyncio.timeout(DEADLINE):
            while len(peer.probes) <= 32:
                await asyncio.sleep(0)
        await call.reply()
        assert (await task).code == 0
        assert not connection.closed


async def test_who_is_met_and_answers_slowly_is_known_all_the_same(path: Path) -> None:
    """Each answer comes when the next question has been asked already."""
    async with Peer(path, shows_life=False) as peer, connect(peer, keepalive=0.01) as connection:
        task = asking(connection)
        call = await peer.call()
        await call.reply(HResult.NOT_IMPLEMENTED)
        answered = 0
        async with asyncio.timeout(DEADLINE / 4):
            while connection.closed or not answered:
                await asyncio.sleep(0)
                for probe in peer.probes[answered:-1]:
                    await Call(call.link, probe).reply()
                    answered += 1
        assert (await task).code == HResult.NOT_IMPLEMENTED
        assert len(peer.greetings) == 1


async def test_who_is_met_and_takes_nothing_is_not_asked_for_ever(path: Path) -> None:
    """What is written to a VM that is paused stays in this process."""
    async with Peer(path, shows_life=False) as peer, connect(peer, keepalive=1e-3) as connection:
        task = asking(connection)
        call = await peer.call()
        call.link.reading.clear()
        await call.reply(HResult.NOT_IMPLEMENTED)
        wire = connection._keeper.wire
        assert wire is not None
        transport = wire._writer.transport
        for end, buffer in (
            (transport, socket.SO_SNDBUF),
            (call.link._writer, socket.SO_RCVBUF),
        ):
            end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, buffer, 4096)
        most = stuck = 0
        async with asyncio.timeout(DEADLINE):
            while stuck < 1000:  # Windows' loop has all that is written unwritten for some turns
                await asyncio.sleep(0)
                unwritten = transport.get_write_buffer_size()
                most = max(most, unwritten)
                stuck = stuck + 1 if unwritten else 0
        peer.shows_life = True
        call.link.reading.set()
        assert (await task).code == HResult.NOT_IMPLEMENTED
        assert most <= max(len(encode(probe)) for probe in peer.probes)


async def test_nothing_is_asked_for_quick_answers(path: Path) -> None:
    """Nor at a deadline that is sooner."""
    async with Peer(path) as peer, connect(peer) as connection:
        await works(connection, peer)
        with pytest.raises(OutcomeUnknownError):
            await asking(connection, timeout=0.05)
        await (await peer.call()).reply()
        await works(connection, peer)
        assert peer.probes == []


async def test_an_agent_that_dies_while_it_is_met(path: Path) -> None:
    """Nobody knows whether it has read Negotiate: the connection is opened anew."""
    async with Peer(path) as peer, connect(peer, timeout=1.0) as connection:
        told = Told(connection)
        peer.greets_again = False
        peer.restart()
        await works(connection, peer)
        assert await peer.departure() is peer.links[0]
        assert len(peer.links) == 2
        assert [await told.next(), await told.next()] == [Change.LOST, Change.RESTORED]


@pytest.mark.parametrize("size", [17, 300, 600])
async def test_an_agent_that_dies_in_the_middle_of_an_answer(path: Path, size: int) -> None:
    """What its successor says is taken for the rest of it, until that cannot be true any more."""
    async with Peer(path) as peer, connect(peer, keepalive=SOON) as connection:
        task = asking(connection, timeout=600)
        call = await peer.call()
        await call.link.send(header(MODIFY_RESPONSE, size, call.frame.id))
        peer.restart()
        with pytest.raises(OutcomeUnknownError):
            await asyncio.wait_for(task, DEADLINE)
        await works(connection, peer)


# Whatever happens.


@pytest.mark.parametrize("seed", range(6))
async def test_a_storm(path: Path, seed: int) -> None:
    """Links that are cut, agents that die having done it or not: what the caller hears is true.

    Done means once, an error that says so means never, unknown means at most once.
    """
    chance = random.Random(seed)
    done: Counter[int] = Counter()

    def react(call: Call) -> list[Frame]:
        match chance.randrange(40):
            case 0:
                call.link.hang_up()
                return []
            case 1:
                peer.restart()
                return []
        done[call.document["Request"]["Settings"]["Lun"]] += 1
        match chance.randrange(40):
            case 0:
                call.link.hang_up()
                return []
            case 1:
                peer.restart()
                return []
        return [call.answer()]

    async def ask(number: int) -> None:
        await asyncio.sleep(chance.random())
        try:
            answer = await asking(connection, number, timeout=5.0)
        except OutcomeUnknownError:
            assert done[number] <= 1
            outcomes["unknown"] += 1
        except BackendError:
            assert done[number] == 0
            outcomes["not done"] += 1
        else:
            expected = 0 if answer.code == HResult.NOT_IMPLEMENTED else 1
            assert done[number] == expected
            outcomes[f"answered {answer.code}"] += 1

    outcomes: Counter[str] = Counter()
    async with Peer(path, react=react) as peer, connect(peer, keepalive=SOON) as connection:
        told = Told(connection)
        await asyncio.gather(*map(ask, range(100)))
        assert outcomes.total() == 100
        assert outcomes["answered 0"] > 10
        assert outcomes["unknown"]
        assert len(peer.links) > 1
        peer.react = None
        await works(connection, peer)
        history = [await told.next() for _ in range(told.count)]
        assert set(history[::2]) == {Change.LOST}
        assert set(history[1::2]) == {Change.RESTORED}


# Watching.


async def test_a_listener_that_fails_hurts_nobody(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged; the others hear, and the connection comes back."""
    async with Peer(path) as peer, connect(peer) as connection:

        def fails(change: Change, reason: str) -> None:
            raise RuntimeError("a listener's own trouble")

        connection.watch(fails)
        told = Told(connection)
        peer.links[0].hang_up()
        assert [await told.next(), await told.next()] == [Change.LOST, Change.RESTORED]
        await works(connection, peer)
    lines = [line.getMessage() for line in caplog.records if "a listener failed" in line.message]
    assert len(lines) == 2


async def test_a_listener_can_leave_off(path: Path) -> None:
    """In the middle of being told, too, and twice."""
    async with Peer(path) as peer, connect(peer) as connection:
        heard: list[Change] = []

        def once(change: Change, reason: str) -> None:
            heard.append(change)
            unsubscribe()

        unsubscribe = connection.watch(once)
        told = Told(connection)
        peer.links[0].hang_up()
        assert [await told.next(), await told.next()] == [Change.LOST, Change.RESTORED]
        unsubscribe()
        assert heard == [Change.LOST]


@pytest.mark.parametrize("keepalive", [0, -1, float("nan")])
def test_a_keepalive_is_some_time(path: Path, keepalive: float) -> None:
    """Anything else is a mistake."""
    with pytest.raises(ValueError, match="keepalive"):
        BridgeConnection.connect_unix(path, keepalive=keepalive)
