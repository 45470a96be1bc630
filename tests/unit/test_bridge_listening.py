"""Waiting for a guest to dial, on sockets that block and on others."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import socket
import threading
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from support.peer import DEADLINE, Dialler, asking, works

from hotlun import BackendError, OutcomeUnknownError, UnsupportedError
from hotlun.bridge import messages, openings, transport
from hotlun.bridge.client import BridgeConnection
from hotlun.bridge.frames import DEFAULT_LIMIT
from hotlun.bridge.keeper import Change
from hotlun.bridge.listening import Listening
from hotlun.bridge.messages import HResult, MessageType
from hotlun.bridge.openings import Opening

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

RUNTIME_ID = "3f2504e0-4f89-11d3-9a0c-0305e82c3301"
SHORT = 0.1
"""Seconds, for what is to run out."""


class Place:
    """An address of this machine's, the same each time somebody listens there."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as found:
            self.address = found.getsockname()
        self.listened = 0
        self.error: OSError | None = None

    def listen(self) -> socket.socket:
        if self.error is not None:
            raise self.error
        self.listened += 1
        return socket.create_server(self.address)

    async def dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self.address)


@pytest.fixture
def place() -> Place:
    return Place()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Nor a socket, of which its destruction would warn."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("hotlun bridge"):
            thread.join(DEADLINE)
            assert not thread.is_alive(), thread
    gc.collect()


@pytest.fixture(params=[True, False], ids=["threads", "loop"])
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
    opening = Opening(
        opener, "the guest", True, "is it there?", begin=opener.begin, runtime_id=runtime_id
    )
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
            await asyncio.sleep(SHORT)
            assert not any(task.done() for task in tasks)
            guest.links[0].reading.set()
            for _ in tasks:
                call = await guest.call()
                assert call.document["Request"]["Settings"]["MountPath"] == text
                await call.reply(Extra=text)
            for task in tasks:
                assert (await task).fields.string("Extra") == text

    async def test_by_another_guest_is_refused(self, place: Place) -> None:
        """The right one is waited for."""
        connection = listening(place, False, expects="10.0.0.1", timeout=SHORT)
        async with Dialler(place.dial) as guest:
            await guest.dial()
            with pytest.raises(BackendError, match="no agent answered"):
                async with connection:
                    raise AssertionError("it was entered")
            await guest.departure()
            assert guest.greetings == []


class TestNobodyDials:
    async def test_in_time(self, place: Place, in_threads: bool) -> None:
        """It says what to look at, and listens no more."""
        with pytest.raises(BackendError, match=r"within 0.1 s: is it there\?"):
            async with listening(place, in_threads, timeout=SHORT):
                raise AssertionError("it was entered")
        with pytest.raises(ConnectionError):
            await place.dial()

    async def test_before_entering_is_cancelled(self, place: Place, in_threads: bool) -> None:
        """At once; nobody listens then."""
        connection = listening(place, in_threads)
        entering = asyncio.ensure_future(connection.__aenter__())
        await asyncio.sleep(SHORT)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        async with asyncio.timeout(DEADLINE):
            while True:
                try:
                    _, writer = await place.dial()
                except ConnectionError:
                    break
                writer.transport.abort()

    async def test_but_somebody_just_then(self, place: Place, in_threads: bool) -> None:
        """A connection that comes too late is closed."""
        for _ in range(20):
            connection = listening(place, in_threads)
            entering = asyncio.ensure_future(connection.__aenter__())
            await asyncio.sleep(0)
            reader, writer = await place.dial()
            entering.cancel()
            with pytest.raises(asyncio.CancelledError):
                await entering
            async with asyncio.timeout(DEADLINE):
                with contextlib.suppress(ConnectionError):
                    while await reader.read(100):
                        pass
            writer.transport.abort()


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
            await guest.departure()
            await asyncio.sleep(2 * SHORT)
            place.error = None
            await guest.dial_until_heard()
            await works(connection, guest)


class TestAWindowsGuest:
    GREETING = messages.negotiate_response([]) | {
        "Capabilities": {
            "SendHostCreateMessage": True,
            "SendHostStartMessage": True,
            "RuntimeOsType": "Windows",
            "GuestDefinedCapabilities": {},
        }
    }

    @pytest.mark.parametrize(
        ("created", "told"), [(0, True), (HResult.SYSTEM_ALREADY_EXISTS, False)]
    )
    async def test_is_told_its_addresses_when_it_starts(
        self, place: Place, created: int, told: bool
    ) -> None:
        """Behind its creation and its start, and not again when it is met again."""
        connection = listening(place, True, runtime_id=RUNTIME_ID)
        async with Dialler(place.dial, greeting=self.GREETING) as guest:
            await guest.dial()
            entering = asyncio.create_task(connection.__aenter__())
            kinds, documents = [], []
            while not entering.done():
                calling = asyncio.create_task(guest.call())
                await asyncio.wait({entering, calling}, return_when=asyncio.FIRST_COMPLETED)
                if calling.done():
                    call = calling.result()
                    kinds.append(call.frame.type)
                    documents.append(call.frame.payload)
                    is_create = call.frame.type == MessageType.CREATE
                    await call.reply(created if is_create else 0)
                else:
                    calling.cancel()
            await entering
            await connection.__aexit__(None, None, None)
        all_three = [MessageType.CREATE, MessageType.START, MessageType.MODIFY_SETTINGS]
        assert kinds == (all_three if told else all_three[:1])
        if told:
            assert documents[-1] == (
                b'{"ContainerId":"00000000-0000-0000-0000-000000000000",'
                b'"ActivityId":"00000000-0000-0000-0000-000000000000",'
                b'"Request":{"RequestType":"Update","ResourceType":"HvSocket","Settings":'
                b'{"LocalAddress":"3f2504e0-4f89-11d3-9a0c-0305e82c3301",'
                b'"ParentAddress":"894cc2d6-9d79-424f-93fe-42969ae6d8d1"}}}\n'
            )

    async def test_in_linux_nothing_of_the_kind_is_sent(self, place: Place) -> None:
        """Whatever is known of the VM."""
        connection = listening(place, True, runtime_id=RUNTIME_ID)
        async with Dialler(place.dial) as guest:
            await guest.dial()
            async with connection:
                await works(connection, guest)
            assert len(guest.calls) == 1


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


def vsock_loops_back() -> bool:
    """Whether this kernel lets a host dial itself."""
    try:
        with (
            transport.listen_vsock(4711),
            socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as client,
        ):
            client.settimeout(1)
            client.connect((1, 4711))
    except (OSError, NotImplementedError):
        return False
    return True


@pytest.mark.skipif(not vsock_loops_back(), reason="this kernel has no vsock loopback")
async def test_a_guest_dials_over_vsock() -> None:
    """From the CID that is expected: the loopback's is 1."""

    async def dial() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        client = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, (1, 4712))
        return await asyncio.open_connection(sock=client)

    connection = BridgeConnection.listen_vsock(1, port=4712, timeout=DEADLINE)
    async with Dialler(dial) as guest:
        await guest.dial()
        async with connection:
            await works(connection, guest)
