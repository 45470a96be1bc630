"""Calls that block: seen through in threads, whatever becomes of those who wait for them."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, cast

import pytest

from hotlun.errors import BackendError, OutcomeUnknownError, UnsupportedError
from hotlun.hcs import StillRunningError, System, SystemInfo, enumerate_systems, open_system
from hotlun.hcs.computecore import CallError, ComputeCore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from hotlun.hcs.compute_system import ComputeSystem

DEADLINE = 20.0
SHORT = 0.05
"""Seconds, for what is to run out."""


class Core:
    """A library whose calls a test can hold, and which notes what is done with handles."""

    def __init__(self) -> None:
        self.answer = ""
        self.error: Exception | None = None
        self.open_handles: list[int] = []
        self.closed: list[int] = []
        self.inside = 0
        self.closed_under_a_call = False
        self.begun = threading.Semaphore(0)
        self._gate: threading.Event | None = None
        self._lock = threading.Lock()

    def hold(self) -> threading.Event:
        """Have every call wait for this."""
        self._gate = threading.Event()
        return self._gate

    async def wait_until_begun(self) -> None:
        """Until one more call is inside."""
        async with asyncio.timeout(DEADLINE):
            while not self.begun.acquire(blocking=False):
                await asyncio.sleep(0.001)

    async def wait_until_closed(self, count: int = 1) -> None:
        """Until so many handles have been closed."""
        async with asyncio.timeout(DEADLINE):
            while len(self.closed) < count:
                await asyncio.sleep(0.001)

    def open_system(self, system_id: str) -> int:
        self._call()
        handle = 7 + len(self.open_handles)
        self.open_handles.append(handle)
        return handle

    def close_system(self, system: int) -> None:
        with self._lock:
            self.closed_under_a_call |= self.inside > 0
        self.closed.append(system)

    def modify(self, system: int, document: str) -> str:
        return self._call(system)

    def properties(self, system: int, query: str) -> str:
        return self._call(system)

    def enumerate(self, query: str) -> str:
        self.query = query
        return self._call()

    def grant(self, vm_id: str, path: str) -> None:
        self._call()

    def revoke(self, vm_id: str, path: str) -> None:
        self._call()

    def _call(self, system: int | None = None) -> str:
        assert system not in self.closed
        with self._lock:
            self.inside += 1
        self.begun.release()
        if self._gate is not None:
            assert self._gate.wait(DEADLINE)
        with self._lock:
            self.inside -= 1
        if self.error is not None:
            raise self.error
        return self.answer


@pytest.fixture
def core() -> Core:
    """A library that answers at once."""
    return Core()


def as_library(core: Core) -> ComputeCore:
    return cast("ComputeCore", core)


@asynccontextmanager
async def opened(core: Core, timeout: float = DEADLINE) -> AsyncIterator[ComputeSystem]:
    async with open_system("vm", timeout=timeout, core=as_library(core)) as system:
        core.begun = threading.Semaphore(0)
        yield system


async def test_it_is_a_system(core: Core) -> None:
    """Open inside its `async with`, and closed once behind it."""
    async with opened(core) as system:
        assert isinstance(system, System)
        await system.modify({})
        await system.grant_vm_access("vm", "C:\\x")
        await system.revoke_vm_access("vm", "C:\\x")
        assert core.closed == []
    assert core.closed == [7]
    await system.close()
    assert core.closed == [7]


async def test_after_closing_nothing_is_called(core: Core) -> None:
    """It says what to do."""
    async with opened(core) as system:
        pass
    with pytest.raises(BackendError, match="open it again"):
        await system.modify({})
    assert core.begun.acquire(blocking=False) is False


async def test_properties_are_a_document(core: Core) -> None:
    """Read from JSON."""
    core.answer = '{"Id":"vm","Ä":[1]}'
    async with opened(core) as system:
        assert await system.properties({}) == {"Id": "vm", "Ä": [1]}


@pytest.mark.parametrize("answer", ["", "[]", "{", "3", "[" * 100_000])
async def test_an_answer_without_sense_is_an_error(core: Core, answer: str) -> None:
    """Not an exception of the JSON reader's."""
    async with opened(core) as system:
        core.answer = answer
        with pytest.raises(BackendError, match="makes no sense"):
            await system.properties({})


async def test_a_refusal_has_the_code_and_the_words(core: Core) -> None:
    """Those of the result document."""
    async with opened(core) as system:
        core.error = CallError(0x80370105, '{"ErrorMessage":"paused"}')
        with pytest.raises(BackendError, match="says: paused") as caught:
            await system.modify({})
        assert (caught.value.code, caught.value.detail) == (0x80370105, "paused")
        assert caught.value.__cause__ is core.error


async def test_calls_run_side_by_side(core: Core) -> None:
    """None waits for another one."""
    async with opened(core) as system:
        gate = core.hold()
        async with asyncio.timeout(DEADLINE), asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(system.modify({}))
            for _ in range(20):
                await core.wait_until_begun()
            assert core.inside == 20
            gate.set()


class TestTimeRunsOut:
    async def test_and_the_end_is_known_later(self, core: Core) -> None:
        """Unknown for who waits, with a future for who goes on waiting."""
        async with opened(core, timeout=SHORT) as system:
            gate = core.hold()
            with pytest.raises(StillRunningError, match="goes on") as caught:
                await system.modify({})
            assert isinstance(caught.value, OutcomeUnknownError)
            assert not caught.value.outcome.done()
            gate.set()
            async with asyncio.timeout(DEADLINE):
                assert await caught.value.outcome is None

    async def test_and_it_may_fail_later(self, core: Core) -> None:
        """With the error that it would have had."""
        async with opened(core, timeout=SHORT) as system:
            gate = core.hold()
            with pytest.raises(StillRunningError) as caught:
                await system.modify({})
            core.error = CallError(0x80070020)
            gate.set()
            async with asyncio.timeout(DEADLINE):
                late = await caught.value.outcome
            assert isinstance(late, BackendError)
            assert late.code == 0x80070020

    async def test_and_the_handle_outlives_the_call(self, core: Core) -> None:
        """The last call closes it, whoever left before."""
        async with opened(core, timeout=SHORT) as system:
            gate = core.hold()
            for _ in range(2):
                with pytest.raises(StillRunningError):
                    await system.modify({})
        assert core.closed == []
        gate.set()
        await core.wait_until_closed()
        assert core.closed == [7]
        assert not core.closed_under_a_call

    async def test_while_it_is_opened(self, core: Core) -> None:
        """A handle that comes too late is closed."""
        gate = core.hold()
        with pytest.raises(OutcomeUnknownError, match="cannot open the VM vm"):
            async with opened(core, timeout=SHORT):
                raise AssertionError("it was not opened")
        gate.set()
        await core.wait_until_closed()
        assert core.closed == core.open_handles


class TestCancelling:
    async def test_leaves_the_call_alone(self, core: Core) -> None:
        """The caller is gone at once; the handle stays open under the call."""
        async with opened(core) as system:
            gate = core.hold()
            task = asyncio.ensure_future(system.modify({}))
            await core.wait_until_begun()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert core.inside == 1
        assert core.closed == []
        gate.set()
        await core.wait_until_closed()
        assert not core.closed_under_a_call

    async def test_while_it_is_opened(self, core: Core) -> None:
        """The handle is closed when it comes."""
        gate = core.hold()
        stack = opened(core)
        task = asyncio.ensure_future(stack.__aenter__())
        await core.wait_until_begun()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.set()
        await core.wait_until_closed()
        assert core.closed == core.open_handles


@pytest.mark.skipif(sys.platform == "win32", reason="there every stack that can be said fits")
class TestWithoutThreads:
    """There can be no more of them."""

    async def test_a_call_is_refused_and_the_handle_is_closed(self, core: Core) -> None:
        """Leaving hides no error of what was done inside, and leaves nothing open."""
        with no_more_threads() as end, pytest.raises(BackendError, match="no thread to be had"):
            async with opened(core) as system:
                end()
                await system.modify({})
        assert core.closed == [7]

    async def test_leaving_is_quiet(self, core: Core) -> None:
        """It closes the handle itself."""
        with no_more_threads() as end:
            async with opened(core):
                end()
        assert core.closed == [7]

    async def test_a_handle_that_comes_too_late_is_closed(self, core: Core) -> None:
        """By whoever learns of it."""
        gate = core.hold()
        with pytest.raises(OutcomeUnknownError):
            async with opened(core, timeout=SHORT):
                raise AssertionError("it was not opened")
        with no_more_threads() as end:
            end()
            gate.set()
            await core.wait_until_closed()
        assert core.closed == core.open_handles


@contextmanager
def no_more_threads() -> Iterator[Callable[[], None]]:
    """From the call of what it gives, until it is left."""
    usual = threading.stack_size()
    try:
        yield lambda: cast("None", threading.stack_size(1 << 46))  # more than there is
    finally:
        threading.stack_size(usual)


def test_a_call_may_outlive_the_loop(core: Core) -> None:
    """It is seen through, and the handle closed, with nobody left to tell."""
    gate = core.hold()

    async def leave_it_behind() -> None:
        gate.set()
        async with opened(core, timeout=SHORT) as system:
            core.hold()
            with pytest.raises(StillRunningError):
                await system.modify({})

    asyncio.run(leave_it_behind())
    assert core.closed == []
    assert core._gate is not None
    core._gate.set()
    for thread in threading.enumerate():
        if thread.name.startswith("hotlun "):
            thread.join(DEADLINE)
    assert core.closed == [7]


class TestOpening:
    @pytest.mark.parametrize("system_id", ["", "a\0b"])
    async def test_an_id_that_cannot_be(self, core: Core, system_id: str) -> None:
        """Is refused before anything is called."""
        with pytest.raises(ValueError, match="no VM has this id"):
            async with open_system(system_id, core=as_library(core)):
                raise AssertionError("it was not opened")
        assert core.open_handles == []

    @pytest.mark.parametrize("timeout", [0, -1, float("nan")])
    async def test_a_timeout_that_cannot_be(self, core: Core, timeout: float) -> None:
        """So is that."""
        with pytest.raises(ValueError, match="seconds, more than 0"):
            async with open_system("vm", timeout=timeout, core=as_library(core)):
                raise AssertionError("it was not opened")

    async def test_refused_says_what_could_not_be_done(self, core: Core) -> None:
        """And what to do."""
        core.error = CallError(0x8037010E)
        with pytest.raises(
            BackendError, match=r"cannot open the VM vm.*enumerate_systems"
        ) as caught:
            async with opened(core):
                raise AssertionError("it was not opened")
        assert caught.value.code == 0x8037010E

    @pytest.mark.skipif(os.name == "nt", reason="there may be one there")
    async def test_where_there_is_no_such_service(self) -> None:
        """Says what it takes."""
        with pytest.raises(UnsupportedError, match="Windows"):
            async with open_system("vm"):
                raise AssertionError("it was not opened")
        with pytest.raises(UnsupportedError, match="Windows"):
            await enumerate_systems()


class TestEnumerating:
    async def test_asks_for_virtual_machines(self, core: Core) -> None:
        """With what the service says of each; what it does not say is empty."""
        core.answer = (
            '[{"Id":"a","SystemType":"VirtualMachine","RuntimeId":"r","RuntimeOsType":"Linux",'
            '"Owner":"WSL","State":"Running"},{"Id":"b","State":3},7]'
        )
        assert await enumerate_systems(core=as_library(core)) == [
            SystemInfo("a", "VirtualMachine", "r", "linux", "WSL", "Running"),
            SystemInfo("b"),
        ]
        assert core.query == '{"Types":["VirtualMachine"]}'

    async def test_of_one_owner_or_of_every_kind(self, core: Core) -> None:
        """What is not asked for is left out of the query."""
        core.answer = "[]"
        assert await enumerate_systems(kind="", owner="me", core=as_library(core)) == []
        assert core.query == '{"Owners":["me"]}'
        await enumerate_systems(kind="", core=as_library(core))
        assert core.query == "{}"

    async def test_that_fails_says_so(self, core: Core) -> None:
        """With what could not be done in front."""
        core.error = CallError(0x8037011B)
        with pytest.raises(BackendError, match=r"cannot list the VMs: .*Hyper-V Administrators"):
            await enumerate_systems(core=as_library(core))


def test_info_reads_only_text() -> None:
    """Whatever else the members are."""
    told: dict[str, Any] = {"Id": "a", "Owner": None, "RuntimeOsType": ["x"]}
    assert SystemInfo.read(told) == SystemInfo("a")
