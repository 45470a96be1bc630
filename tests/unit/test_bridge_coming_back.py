"""A bridge that is lost comes back, a new agent is met, a VM that ends is gone."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import pytest
from support.peer import DEADLINE, Peer, asking, connect, works

from hotlun.bridge.client import BridgeConnection, Change
from hotlun.bridge.messages import HResult, MessageType
from hotlun.errors import BackendError, OutcomeUnknownError, VMGoneError

if TYPE_CHECKING:
    from pathlib import Path


class Heard:
    """What a listener was told."""

    def __init__(self, connection: BridgeConnection) -> None:
        self.all: list[Change] = []
        self._news = asyncio.Event()
        self.stop = connection.watch(self._hear)

    def _hear(self, change: Change, reason: str) -> None:
        assert reason or change is Change.RESTORED
        self.all.append(change)
        self._news.set()

    async def until(self, change: Change) -> None:
        """It was told this."""
        async with asyncio.timeout(DEADLINE):
            while change not in self.all:
                self._news.clear()
                await self._news.wait()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.sock"


class TestAConnection:
    async def test_comes_back(self, path: Path) -> None:
        """With a new greeting, under ids that were never used before."""
        async with Peer(path) as peer, connect(peer) as connection:
            heard = Heard(connection)
            await works(connection, peer)
            peer.links[0].hang_up()
            await heard.until(Change.RESTORED)
            assert heard.all == [Change.LOST, Change.RESTORED]
            await works(connection, peer)
            assert not connection.closed
            frames = [*peer.greetings, *(call.frame for call in peer.calls)]
            assert len({frame.id for frame in frames}) == len(frames) == 4

    async def test_says_what_the_other_agent_can(self, path: Path) -> None:
        """It may be another version by now."""
        async with Peer(path, features=("one",)) as peer, connect(peer) as connection:
            assert connection.features == {"one"}
            peer.stop_listening()
            path.unlink()
            async with Peer(path, features=("two",)) as other:
                heard = Heard(connection)
                peer.links[0].hang_up()
                await heard.until(Change.RESTORED)
                assert connection.features == {"two"}
                await works(connection, other)

    async def test_requests_wait_for_it(self, path: Path) -> None:
        """As long as they have time; then nothing was sent."""
        async with Peer(path) as peer, connect(peer) as connection:
            heard = Heard(connection)
            peer._greets = False
            peer.links[0].hang_up()
            await heard.until(Change.LOST)
            patient = asking(connection)
            with pytest.raises(BackendError, match=r"nothing was sent.*within 0\.1 s"):
                await asking(connection, timeout=0.1)
            negotiate = await peer.call()
            assert negotiate.frame.type == MessageType.NEGOTIATE_PROTOCOL
            await negotiate.link.send(negotiate.answer(**peer._greeting))
            await (await peer.call()).reply()
            assert (await patient).code == 0

    async def test_a_greeting_that_fails_is_tried_again(self, path: Path) -> None:
        """After a pause, on a connection of its own."""
        async with Peer(path) as peer, connect(peer) as connection:
            heard = Heard(connection)
            greeting = peer._greeting
            peer._greeting = {**greeting, "Version": 7}
            peer.links[0].hang_up()
            while len(peer.links) < 4:
                await peer.departure()
            peer._greeting = greeting
            await heard.until(Change.RESTORED)
            assert heard.all == [Change.LOST, Change.RESTORED]
            await works(connection, peer)

    async def test_leaving_does_not_wait_for_it(self, path: Path) -> None:
        """Nor do requests that waited."""
        async with Peer(path) as peer:
            async with connect(peer) as connection:
                peer._greets = False
                peer.links[0].hang_up()
                await peer.call()
                waiting = asking(connection)
                await asyncio.sleep(0)
            with pytest.raises(BackendError, match="it was left"):
                await waiting

    async def test_given_streams_do_not(self, path: Path) -> None:
        """Nobody here knows where they came from."""
        async with Peer(path) as peer:
            streams = await asyncio.open_unix_connection(path)
            async with BridgeConnection.over(*streams) as connection:
                heard = Heard(connection)
                peer.links[0].hang_up()
                await heard.until(Change.LOST)
                with pytest.raises(BackendError, match="open a new BridgeConnection"):
                    await asking(connection)
                assert connection.closed

    async def test_a_listener_that_fails_hurts_nobody(
        self, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It is logged; others hear, and who has stopped listening does not."""

        def fail(change: Change, reason: str) -> None:
            raise ZeroDivisionError

        async with Peer(path) as peer, connect(peer) as connection:
            stop = connection.watch(fail)
            deaf, heard = Heard(connection), Heard(connection)
            deaf.stop()
            peer.links[0].hang_up()
            await heard.until(Change.RESTORED)
            stop()
            assert deaf.all == []
            assert "ZeroDivisionError" in caplog.text


class TestAVMThatEnds:
    @pytest.mark.parametrize("is_removed", [False, True])
    async def test_is_gone(self, path: Path, is_removed: bool) -> None:
        """Nobody listens any more: who waits is told at once, and so is who comes later."""
        async with Peer(path) as peer, connect(peer) as connection:
            heard = Heard(connection)
            in_flight = asking(connection)
            await peer.call()
            peer.stop_listening()
            if is_removed:
                path.unlink()
            peer.links[0].hang_up()
            with pytest.raises(OutcomeUnknownError):
                await in_flight
            for _ in range(2):
                with pytest.raises(VMGoneError, match=r"the VM is gone.*forget"):
                    await asking(connection)
            assert heard.all == [Change.LOST, Change.GONE]
            assert connection.closed

    async def test_was_never_there(self, path: Path) -> None:
        """On entering it is an ordinary error: the path may be wrong."""
        with pytest.raises(BackendError) as caught:
            await BridgeConnection.connect_unix(path).__aenter__()
        assert not isinstance(caught.value, VMGoneError)


class TestAnAgentThatIsStartedAnew:
    """While the host's end of the socket stays open, as it does under QEMU."""

    async def test_is_met_by_the_next_request(self, path: Path) -> None:
        """It refuses what comes before Negotiate: nothing was done, so it is sent again."""
        async with Peer(path, features=("new",)) as peer, connect(peer) as connection:
            heard = Heard(connection)
            peer.links[0].is_greeted = False
            await works(connection, peer)
            assert heard.all == [Change.LOST, Change.RESTORED]
            assert len(peer.links) == 1
            assert len(peer.greetings) == 2

    async def test_by_many_at_once(self, path: Path) -> None:
        """They negotiate once, and each is answered."""
        answering = Peer(path, react=lambda call: [call.answer()])
        async with answering as peer, connect(peer) as connection:
            peer.links[0].is_greeted = False
            responses = await asyncio.gather(*(asking(connection, n) for n in range(50)))
            assert {response.code for response in responses} == {0}
            assert len(peer.greetings) == 2
            assert len(peer.calls) == 50

    async def test_what_the_old_one_was_asked_is_unknown(self, path: Path) -> None:
        """That is found out without waiting for the request's own deadline."""
        async with Peer(path) as peer, connect(peer, keepalive=0.05) as connection:
            heard = Heard(connection)
            tasks = [asking(connection, number) for number in range(3)]
            for _ in tasks:
                await peer.call()
            peer.links[0].is_greeted = False
            for task in tasks:
                with pytest.raises(OutcomeUnknownError, match=r"agent .* was started anew"):
                    await task
            assert heard.all == [Change.LOST, Change.RESTORED]
            assert len(peer.greetings) == 2
            await works(connection, peer)

    async def test_one_that_is_only_slow_is_asked_and_waited_for(self, path: Path) -> None:
        """Whatever it answers to the question, it is the same."""
        async with Peer(path) as peer, connect(peer, keepalive=0.02) as connection:
            task = asking(connection)
            slow = await peer.call()
            for code in (0, HResult.SYSTEM_NOT_FOUND):
                question = await peer.call()
                assert question.frame.type == MessageType.GET_PROPERTIES
                await question.reply(code)
            await slow.reply(message="at last")
            assert (await task).text == "at last"
            assert len(peer.greetings) == 1

    async def test_one_that_says_nothing_at_all_is_waited_for(self, path: Path) -> None:
        """Its VM may be paused: the request's own deadline decides."""
        async with Peer(path) as peer, connect(peer, keepalive=0.02) as connection:
            with pytest.raises(OutcomeUnknownError, match=r"within 0\.3 s"):
                await asking(connection, timeout=0.3)
            await (await peer.call()).reply()
            assert not connection.closed

    async def test_a_quick_answer_costs_no_question(self, path: Path) -> None:
        """Only what takes long is worth one."""
        async with Peer(path) as peer, connect(peer, keepalive=30.0) as connection:
            for _ in range(5):
                await works(connection, peer)
            assert len(peer.calls) == 5

    async def test_one_that_cannot_do_it_says_so(self, path: Path) -> None:
        """A second Negotiate is refused: it is the same agent, and that was its answer."""
        async with Peer(path) as peer, connect(peer) as connection:
            task = asking(connection)
            await (await peer.call()).reply(HResult.NOT_IMPLEMENTED, "not here")
            response = await task
            assert (response.code, response.text) == (HResult.NOT_IMPLEMENTED, "not here")
            await works(connection, peer)

    async def test_one_that_always_forgets_is_given_up(
        self, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Each greeting works, and no request does: its refusal is the answer."""
        caplog.set_level(logging.CRITICAL)
        async with Peer(path) as peer, connect(peer) as connection:
            task = asking(connection)
            for _ in range(3):
                call = await peer.call()
                call.link.is_greeted = False
                await call.reply(HResult.NOT_IMPLEMENTED)
            assert (await task).code == HResult.NOT_IMPLEMENTED
