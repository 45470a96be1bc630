"""What a guest is told when its VM starts, and what not when it is met again."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
from support.peer import DEADLINE, Call, Peer, works

from hotlun.bridge import messages, openings
from hotlun.bridge.client import BridgeConnection
from hotlun.bridge.codes import HResult
from hotlun.bridge.frames import DEFAULT_LIMIT, Frame
from hotlun.bridge.keeper import Change
from hotlun.bridge.messages import MessageType
from hotlun.errors import BackendError

if TYPE_CHECKING:
    from pathlib import Path

RUNTIME_ID = "3f2504e0-4f89-11d3-9a0c-0305e82c3301"
BOTH = ("SendHostCreateMessage", "SendHostStartMessage")

CREATE = (
    b'{"ContainerId":"00000000-0000-0000-0000-000000000000",'
    b'"ActivityId":"00000000-0000-0000-0000-000000000000",'
    b'"ContainerConfig":"{\\"SystemType\\":\\"Container\\",\\"TimeZoneInformation\\":null}"}\n'
)
START = (
    b'{"ContainerId":"00000000-0000-0000-0000-000000000000",'
    b'"ActivityId":"00000000-0000-0000-0000-000000000000"}\n'
)
ADDRESSES = (
    b'{"ContainerId":"00000000-0000-0000-0000-000000000000",'
    b'"ActivityId":"00000000-0000-0000-0000-000000000000",'
    b'"Request":{"RequestType":"Update","ResourceType":"HvSocket","Settings":'
    b'{"LocalAddress":"3f2504e0-4f89-11d3-9a0c-0305e82c3301",'
    b'"ParentAddress":"894cc2d6-9d79-424f-93fe-42969ae6d8d1"}}}\n'
)


class Guest(Peer):
    """An agent that says what runs in its guest and what it wants, and answers with `codes`."""

    def __init__(self, path: Path, system: str = "Windows", wants: tuple[str, ...] = BOTH) -> None:
        capabilities: dict[str, Any] = dict.fromkeys(wants, True) | {"RuntimeOsType": system}
        greeting = messages.response(Version=4, Capabilities=capabilities)
        super().__init__(path, greeting=greeting, react=self._react)
        self.codes: dict[int, int | None] = {}
        """By the type of a request, what it is answered with; None leaves it without."""

    def _react(self, call: Call) -> list[Frame]:
        code = self.codes.get(call.frame.type, HResult.OK)
        if call.frame.payload == ADDRESSES:
            code = self.codes.get(0, code)
        return [] if code is None else [call.answer(code, "so it is" if code else "")]

    def told(self) -> list[bytes]:
        """The documents that came since last time, in their order."""
        calls = list(self.calls)
        self.calls.clear()
        kinds = {
            CREATE: MessageType.CREATE,
            START: MessageType.START,
            ADDRESSES: MessageType.MODIFY_SETTINGS,
        }
        for call in calls:
            assert kinds[call.frame.payload] == call.frame.type
        return [call.frame.payload for call in calls]


def connecting(
    guest: Guest, runtime_id: str = RUNTIME_ID, timeout: float = DEADLINE
) -> BridgeConnection:
    """A connection to it, not entered yet."""
    opening = dataclasses.replace(openings.unix(guest.path), runtime_id=runtime_id)
    return BridgeConnection(
        opening, timeout=timeout, request_timeout=DEADLINE, limit=DEFAULT_LIMIT, keepalive=2.0
    )


async def told_when_back(guest: Guest, connection: BridgeConnection) -> list[bytes]:
    """Cut the connection, wait until it has come back, and say what the guest was told then."""
    restored = asyncio.Event()
    connection.watch(lambda change, _: restored.set() if change is Change.RESTORED else None)
    guest.told()
    guest.links[-1].hang_up()
    await asyncio.wait_for(restored.wait(), DEADLINE)
    return guest.told()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.sock"


@pytest.mark.parametrize(
    ("system", "wants", "runtime_id", "told"),
    [
        ("Windows", BOTH, RUNTIME_ID, [CREATE, START, ADDRESSES]),
        ("", BOTH, RUNTIME_ID, [CREATE, START, ADDRESSES]),
        ("Windows", BOTH[:1], RUNTIME_ID, [CREATE, ADDRESSES]),
        ("Windows", BOTH[1:], RUNTIME_ID, [ADDRESSES]),
        ("Windows", (), RUNTIME_ID, [ADDRESSES]),
        ("Windows", BOTH, "", [CREATE, START]),
        ("Linux", BOTH, RUNTIME_ID, [CREATE, START]),
        ("Linux", (), RUNTIME_ID, []),
    ],
)
async def test_a_cold_start(
    path: Path, system: str, wants: tuple[str, ...], runtime_id: str, told: list[bytes]
) -> None:
    """What it wants, then its addresses if it runs Windows (or does not say) and they are known."""
    async with Guest(path, system, wants) as guest, connecting(guest, runtime_id):
        assert guest.told() == told
        assert len(guest.greetings) == 1


@pytest.mark.parametrize("code", [0xC037010F, 0x8037010F])
async def test_a_system_that_is_there_already(path: Path, code: int) -> None:
    """Another process has started it: nothing more is said, whichever family its code is of."""
    async with Guest(path) as guest:
        guest.codes[MessageType.CREATE] = code
        async with connecting(guest):
            assert guest.told() == [CREATE]


@pytest.mark.parametrize("code", [0xC037010F, 0x8037010F, 0x80370105, HResult.INVALID_JSON])
async def test_a_guest_that_is_met_again(path: Path, code: int) -> None:
    """It need not say why it refuses a second Create; it is not told its addresses again."""
    async with Guest(path) as guest, connecting(guest) as connection:
        guest.codes[MessageType.CREATE] = code
        assert await told_when_back(guest, connection) == [CREATE]
        assert not connection.closed


async def test_a_guest_that_is_met_again_and_wants_nothing(path: Path) -> None:
    """Negotiate is all it hears."""
    async with Guest(path, wants=()) as guest, connecting(guest) as connection:
        assert await told_when_back(guest, connection) == []
        assert len(guest.greetings) == 2


async def test_a_guest_that_was_reset_meanwhile(path: Path) -> None:
    """It takes Create, as one does that starts, so it is told all."""
    async with Guest(path) as guest, connecting(guest) as connection:
        assert await told_when_back(guest, connection) == [CREATE, START, ADDRESSES]


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (MessageType.CREATE, [CREATE]),
        (MessageType.START, [CREATE, START]),
        (0, [CREATE, START, ADDRESSES]),
    ],
)
class TestAStepThatDoesNotWork:
    async def test_is_refused(self, path: Path, kind: int, told: list[bytes]) -> None:
        """The guest's words and code; nothing follows, and the connection is closed."""
        async with Guest(path) as guest:
            guest.codes[kind] = HResult.FAIL
            with pytest.raises(BackendError, match="so it is") as caught:
                await connecting(guest).__aenter__()
            assert caught.value.code == HResult.FAIL
            await guest.departure()
            assert guest.told() == told

    async def test_is_not_answered(self, path: Path, kind: int, told: list[bytes]) -> None:
        """The deadline of entering ends it."""
        async with Guest(path) as guest:
            guest.codes[kind] = None
            with pytest.raises(BackendError, match=r"within 1 s"):
                await connecting(guest, timeout=1).__aenter__()
            await guest.departure()
            assert guest.told() == told


async def test_requests_come_behind_it(path: Path) -> None:
    """Nothing is asked of a guest that does not know its addresses yet."""
    async with Guest(path) as guest:
        connection = connecting(guest)
        async with connection:
            assert guest.told() == [CREATE, START, ADDRESSES]
            guest.react = None
            await works(connection, guest)
