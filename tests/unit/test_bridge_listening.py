"""Waiting for a guest to dial, on sockets that block and on others."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import sys
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from support.dialling import Place, check_nothing_is_left, in_turns
from support.peer import DEADLINE, Dialler, asking, works

from hotlun import BackendError, OutcomeUnknownError, UnsupportedError
from hotlun.bridge import messages, openings, transport
from hotlun.bridge.client import BridgeConnection
from hotlun.bridge.codes import HResult
from hotlun.bridge.frames import DEFAULT_LIMIT
from hotlun.bridge.keeper import Change
from hotlun.bridge.listening import Listening
from hotlun.bridge.messages import MessageType

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from support.peer import Call

    from hotlun.bridge.frames import Frame

RUNTIME_ID = "3f2504e0-4f89-11d3-9a0c-0305e82c3301"
WAYS = [True] if sys.platform == "win32" else [True, False]
"""Whether in threads: in the loop it is for vsock, which is Linux's."""
SHORT = 0.1
"""Seconds, for what is to run out."""


@pytest.fixture
async def place() -> Place:
    return Place()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Of threads and sockets."""
    yield
    check_nothing_is_left()


@pytest.fixture(params=WAYS, ids=lambda in_threads: "threads" if in_threads else "loop")
def in_threads(request: pytest.FixtureRequest) -> bool:
    """Whether the sockets block, in threads of their own, or are the event loop's."""
    return bool(request.param)


def listening(
    place: Place,
    in_threads: bool,
    *,
    expects: object = None,
    timeout: float = DEADLINE,
    runtime_id: str = "",
) -> BridgeConnection:
    """A connection that a guest is to dial, not entered yet."""
    opener = Listening(place.listen, "the guest", expects=expects, in_threads=in_threads)
    opening = openings.being_dialled(opener, "the guest", "is it there?", runtime_id=runtime_id)
    return BridgeConnection(
        opening, timeout=timeout, request_timeout=DEADLINE, limit=DEFAULT_LIMIT, keepalive=2.0
    )


@contextlib.asynccontextmanager
async def dialled(
    place: Place, in_threads: bool, **peer: Any
) -> AsyncIterator[tuple[BridgeConnection, Dialler]]:
    """A connection with a guest at its other end."""
    connection = listening(place, in_threads)
    async with Dialler(place.dial, **peer) as guest:
        dialling = asyncio.create_task(guest.dial())
        async with connection:
            await dialling
            yield connection, guest


class TestBeingDialled:
    async def test_works_there_and_back(self, place: Place, in_threads: bool) -> None:
        """As over any connection."""
        async with dialled(place, in_threads) as (connection, guest):
            await works(connection, guest)

    async def test_may_happen_before_it_is_entered(self, place: Place, in_threads: bool) -> None:
        """It listens as soon as there is a connection, so that the VM can be started then."""
        connection = listening(place, in_threads)
        async with Dialler(place.dial) as guest:
            await guest.dial()
            async with connection:
                await works(connection, guest)

    async def test_may_be_tried_again(self, place: Place, in_threads: bool) -> None:
        """A guest that hangs up unasked dials again: it boots, or that was no agent."""
        connection = listening(place, in_threads)
        async with Dialler(place.dial, greets=False) as guest:

            async def enter() -> None:
                async with connection:
                    await works(connection, guest)

            entering = asyncio.create_task(enter())
            for _ in range(3):
                await guest.dial_until_heard()
                (await guest.call()).link.hang_up()
            guest.greets = True
            await guest.dial_until_heard()
            await asyncio.wait_for(entering, DEADLINE)

    async def test_happens_once(self, place: Place, in_threads: bool) -> None:
        """Nobody listens any more when there is a connection."""
        async with dialled(place, in_threads) as (connection, guest):
            with pytest.raises(ConnectionError):
                await place.dial()
            await works(connection, guest)
        assert place.listened == 1

    async def test_many_requests_are_in_flight(self, place: Place, in_threads: bool) -> None:
        """And answered in whatever order."""
        async with dialled(place, in_threads) as (connection, guest):
            tasks = [asking(connection, lun) for lun in range(200)]
            calls = [await guest.call() for _ in tasks]
            for call in reversed(calls):
                await call.reply(message=str(call.document["Request"]["Settings"]["Lun"]))
            answers = [await task for task in tasks]
            assert [answer.text for answer in answers] == [str(lun) for lun in range(200)]

    async def test_large_frames_go_both_ways(self, place: Place, in_threads: bool) -> None:
        """With a guest that takes its time to read."""
        text = "x" * (DEFAULT_LIMIT // 4)
        async with dialled(place, in_threads) as (connection, guest):
            guest.links[0].reading.clear()
            request = {"RequestType": "Add", "Settings": {"MountPath": text}}
            tasks = [asyncio.create_task(connection.modify(request)) for _ in range(8)]
            await asyncio.wait(tasks, timeout=SHORT)
            assert not any(task.done() for task in tasks)
            guest.links[0].reading.set()
            for _ in tasks:
                call = await guest.call()
                assert call.document["Request"]["Settings"]["MountPath"] == text
                await call.reply(Extra=text)
            for task in tasks:
                assert (await task).fields.string("Extra") == text

    async def test_by_another_guest_is_refused(self, place: Place, in_threads: bool) -> None:
        """And the right one is served behind it."""
        connection = listening(place, in_threads, expects="127.0.0.1")
        async with Dialler(partial(place.dial, ("127.0.0.2", 0))) as other:
            await other.dial()
            async with Dialler(place.dial) as guest:
                await guest.dial()
                async with connection:
                    await other.departure()
                    assert other.greetings == []
                    await works(connection, guest)

    async def test_by_another_guest_alone(self, place: Place, in_threads: bool) -> None:
        """The right one is waited for until the deadline."""
        connection = listening(place, in_threads, expects="127.0.0.1", timeout=SHORT)
        async with Dialler(partial(place.dial, ("127.0.0.2", 0))) as other:
            await other.dial()
            with pytest.raises(BackendError, match="no agent answered"):
                async with connection:
                    raise AssertionError("it was entered")
            await other.departure()


async def until_nobody_listens(place: Place) -> None:
    """Soon: a thread that is on its way into accept(2) has to get there before that is closed."""
    async with asyncio.timeout(DEADLINE):
        while True:
            try:
                _, writer = await place.dial()
            except ConnectionError:
                return
            writer.transport.abort()


class TestNobodyDials:
    async def test_in_time(self, place: Place, in_threads: bool) -> None:
        """It says what to look at, and listens no more."""
        with pytest.raises(BackendError, match=r"within 0.1 s: is it there\?"):
            async with listening(place, in_threads, timeout=SHORT):
                raise AssertionError("it was entered")
        await until_nobody_listens(place)

    async def test_for_longer_than_a_moment(self, place: Place, in_threads: bool) -> None:
        """It says that somebody has, and why that was not enough."""
        connection = listening(place, in_threads, timeout=SHORT * 5)
        async with Dialler(place.dial, greets=False) as guest:
            entering = asyncio.create_task(connection.__aenter__())
            await guest.dial_until_heard()
            (await guest.call()).link.hang_up()
            with pytest.raises(BackendError, match=r"has dialled, and .* closed it.* within"):
                await entering

    async def test_before_it_is_given_up(self, place: Place, in_threads: bool) -> None:
        """Nobody listens any more, though it was never entered."""
        connection = listening(place, in_threads)
        connection.stop_listening()
        connection.stop_listening()
        with pytest.raises(ConnectionError):
            await place.dial()

    @pytest.mark.parametrize("turns", [0, 1, 3, 10])
    async def test_before_entering_is_cancelled(
        self, place: Place, in_threads: bool, turns: int
    ) -> None:
        """At once; nobody listens then."""
        connection = listening(place, in_threads)
        entering = asyncio.ensure_future(connection.__aenter__())
        await in_turns(turns)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        if not turns:  # it had not begun to be entered
            connection.stop_listening()
        await until_nobody_listens(place)

    @pytest.mark.parametrize("turns", range(1, 20))
    async def test_but_somebody_just_then(self, place: Place, in_threads: bool, turns: int) -> None:
        """Wherever greeting the guest has come to, the connection is closed."""
        connection = listening(place, in_threads)
        async with Dialler(place.dial) as guest:
            await guest.dial()
            entering = asyncio.ensure_future(connection.__aenter__())
            await in_turns(turns)
            if entering.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await entering
            else:
                await connection.__aexit__(None, None, None)
            await guest.departure()


class TestComingBack:
    async def test_after_a_loss(self, place: Place, in_threads: bool) -> None:
        """The guest dials again, and what was in flight is unknown."""
        async with dialled(place, in_threads) as (connection, guest):
            heard: list[Change] = []
            connection.watch(lambda change, _: heard.append(change))
            task = asking(connection)
            await guest.call()
            guest.links[-1].hang_up()
            with pytest.raises(OutcomeUnknownError):
                await task
            await guest.dial_until_heard()
            await works(connection, guest)
            assert heard == [Change.LOST, Change.RESTORED]
            assert place.listened == 2

    async def test_from_the_middle_of_a_frame(self, place: Place, in_threads: bool) -> None:
        """What was cut short is not read as something else."""
        async with dialled(place, in_threads) as (connection, guest):
            task = asking(connection)
            call = await guest.call()
            await call.link.send(b"\x01\x0a\x10\x20\xff")
            call.link.hang_up()
            with pytest.raises(OutcomeUnknownError):
                await task
            await guest.dial_until_heard()
            await works(connection, guest)

    async def test_not_listening_is_no_word_about_the_vm(
        self, place: Place, in_threads: bool
    ) -> None:
        """Whatever the error, it is tried again."""
        async with dialled(place, in_threads) as (connection, guest):
            place.error = ConnectionRefusedError(errno.ECONNREFUSED, "refused")
            guest.links[-1].hang_up()
            await asyncio.wait_for(place.was_refused.wait(), DEADLINE)
            place.error = None
            await guest.dial_until_heard()
            await works(connection, guest)


def says_of_itself(system: str, **flags: bool) -> dict[str, Any]:
    """A greeting."""
    capabilities = {"RuntimeOsType": system, "GuestDefinedCapabilities": {}, **flags}
    return messages.negotiate_response([]) | {"Capabilities": capabilities}


WANTS = {"SendHostCreateMessage": True, "SendHostStartMessage": True}


class TestAWindowsGuest:
    async def kinds(self, place: Place, **peer: Any) -> list[int]:
        """What such a guest was asked for while the connection was entered."""
        peer.setdefault("react", lambda call: [call.answer()])
        connection = listening(place, True, runtime_id=RUNTIME_ID)
        async with Dialler(place.dial, **peer) as guest:
            await guest.dial()
            async with connection:
                assert len(guest.greetings) == 1
                return [call.frame.type for call in guest.calls]

    @pytest.mark.parametrize("system", ["Windows", ""])
    async def test_is_told_its_addresses_when_it_has_started(
        self, place: Place, system: str
    ) -> None:
        """Behind its creation and its start; one without a name is Windows."""
        assert await self.kinds(place, greeting=says_of_itself(system, **WANTS)) == [
            MessageType.CREATE,
            MessageType.START,
            MessageType.MODIFY_SETTINGS,
        ]

    async def test_is_told_them_without_a_start_that_it_does_not_want(self, place: Place) -> None:
        """As hcsshim does, whatever it wants."""
        greeting = says_of_itself("Windows", SendHostStartMessage=True)
        assert await self.kinds(place, greeting=greeting) == [MessageType.MODIFY_SETTINGS]

    async def test_that_is_met_again_knows_them(self, place: Place) -> None:
        """Its system exists."""

        def react(call: Call) -> list[Frame]:
            return [call.answer(HResult.SYSTEM_ALREADY_EXISTS)]

        greeting = says_of_itself("Windows", **WANTS)
        kinds = await self.kinds(place, greeting=greeting, react=react)
        assert kinds == [MessageType.CREATE]

    @pytest.mark.parametrize("flags", [{}, WANTS])
    async def test_that_dials_again_knows_them(self, place: Place, flags: dict[str, bool]) -> None:
        """Negotiate is all that it needs, and its word on whether it exists."""
        exists = False

        def react(call: Call) -> list[Frame]:
            nonlocal exists
            is_again = call.frame.type == MessageType.CREATE and exists
            exists = True
            return [call.answer(HResult.SYSTEM_ALREADY_EXISTS if is_again else HResult.OK)]

        connection = listening(place, True, runtime_id=RUNTIME_ID)
        greeting = says_of_itself("Windows", **flags)
        async with Dialler(place.dial, greeting=greeting, react=react) as guest:
            await guest.dial()
            restored = asyncio.Event()
            async with connection:
                first = len(guest.calls)
                connection.watch(
                    lambda change, _: restored.set() if change is Change.RESTORED else None
                )
                guest.links[-1].hang_up()
                await guest.dial_until_heard()
                await asyncio.wait_for(restored.wait(), DEADLINE)
                again = [call.frame.type for call in guest.calls[first:]]
        assert again == ([MessageType.CREATE] if flags else [])

    async def test_that_refuses_them_is_not_worked_with(self, place: Place) -> None:
        """It says to what it said no."""

        def react(call: Call) -> list[Frame]:
            is_update = call.frame.type == MessageType.MODIFY_SETTINGS
            return [call.answer(HResult.INVALID_STATE if is_update else HResult.OK, "not now")]

        with pytest.raises(
            BackendError, match=r"a ModifySettings request .*INVALID_STATE\): not now"
        ):
            await self.kinds(place, greeting=says_of_itself("Windows"), react=react)

    async def test_in_linux_nothing_of_the_kind_is_sent(self, place: Place) -> None:
        """Whatever is known of the VM."""
        assert await self.kinds(place, greeting=says_of_itself("Linux", **WANTS)) == [
            MessageType.CREATE,
            MessageType.START,
        ]


class TestAddresses:
    @pytest.mark.parametrize(
        ("os_type", "confidential", "service"),
        [
            ("linux", False, "40000000-facb-11e6-bd58-64006a7986d3"),
            ("linux", True, "40000000-facb-11e6-bd58-64006a7986d3"),
            ("windows", False, "acef5661-84a1-4e44-856b-6245e69f4620"),
            ("windows", True, "ae8da506-a019-4553-a52b-902bc0fa0411"),
        ],
    )
    def test_of_hyper_v(self, os_type: str, confidential: bool, service: str) -> None:
        """Each guest dials a service of its own."""
        opening = openings.hyperv(RUNTIME_ID.upper(), os_type, confidential=confidential)
        assert (opening.runtime_id, service in opening.advice) == (RUNTIME_ID, True)

    def test_of_another_system(self) -> None:
        """There are services for two."""
        with pytest.raises(ValueError, match="'linux' or 'windows'"):
            BridgeConnection.listen_hyperv(RUNTIME_ID, "plan9")

    def test_of_no_vm(self) -> None:
        """An id of the compute service, for instance."""
        with pytest.raises(ValueError, match="UUID"):
            BridgeConnection.listen_hyperv("my-vm", "linux")

    @pytest.mark.parametrize(
        "arguments", [{"port": -1}, {"port": 0xFFFFFFFF}, {"port": 1 << 32}, {"cid": -1}]
    )
    def test_of_no_number_that_can_be(self, arguments: dict[str, int]) -> None:
        """The kernel would take it for any port, or cut it off, and nobody would ever dial."""
        with pytest.raises(ValueError, match=next(iter(arguments))):
            BridgeConnection.listen_vsock(**arguments)

    @pytest.mark.skipif(hasattr(socket, "AF_HYPERV"), reason="there are such sockets here")
    def test_where_there_are_no_hyper_v_sockets(self) -> None:
        """It says what they take."""
        with pytest.raises(UnsupportedError, match=r"they take Windows and Python 3.12"):
            BridgeConnection.listen_hyperv(uuid.UUID(RUNTIME_ID), "windows")

    def test_that_cannot_be_had(self, place: Place) -> None:
        """It says so when it is to listen, before the VM is started."""
        place.error = PermissionError(errno.EACCES, "denied")
        with pytest.raises(BackendError, match=r"cannot listen for the guest: .*administrator"):
            listening(place, True)
        place.error = OSError(errno.EADDRINUSE, "in use")
        with pytest.raises(BackendError, match="another process listens"):
            listening(place, False)


def lacks_vsock(dials: bool) -> str:
    """Why this kernel cannot listen for a guest over vsock, or be dialled by itself."""
    try:
        with transport.listen_vsock(4711):
            if dials:
                with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as client:
                    client.settimeout(1)
                    client.connect((1, 4711))
    except (OSError, NotImplementedError) as error:
        return f"this kernel has no vsock{' loopback' * dials}: {error}"
    return ""


class TestVsock:
    @pytest.mark.skipif(lacks_vsock(False) != "", reason=lacks_vsock(False))
    async def test_is_listened_at_by_one_process(self) -> None:
        """It listens from the beginning, and no more when nobody has come in time."""
        connection = BridgeConnection.listen_vsock(7, port=4712, timeout=SHORT)
        with pytest.raises(BackendError, match=r"vsock \*:4712: .*another process listens"):
            BridgeConnection.listen_vsock(port=4712)
        with pytest.raises(BackendError, match=r"at vsock 7:4712 within 0.1 s.*vhost-vsock-pci"):
            await connection.__aenter__()
        BridgeConnection.listen_vsock(port=4712).stop_listening()

    @pytest.mark.skipif(lacks_vsock(True) != "", reason=lacks_vsock(True))
    @pytest.mark.parametrize("cid", [1, None])
    async def test_is_dialled(self, cid: int | None) -> None:
        """From the CID that is expected: the loopback's is 1."""

        async def dial() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            client = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
            client.setblocking(False)
            await asyncio.get_running_loop().sock_connect(client, (1, 4712))
            return await asyncio.open_connection(sock=client)

        connection = BridgeConnection.listen_vsock(cid, port=4712, timeout=DEADLINE)
        async with Dialler(dial) as guest:
            await guest.dial()
            async with connection:
                await works(connection, guest)
