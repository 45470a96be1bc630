"""The code that calls computecore.dll, against a real library that checks each call."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.computecore import (
    DEADLINE_MS,
    RUNTIME_ID,
    VM,
    Call,
    FakeComputeCore,
    When,
    build,
    fake_computecore,
    sanitized_environment,
)

from hotlun import Attachment, Disk, DiskKind, Slot
from hotlun.backends.hcs import revoke_after_the_end
from hotlun.errors import BackendError, OutcomeUnknownError, UnsupportedError
from hotlun.hcs import StillRunningError, SystemInfo, documents, enumerate_systems, open_system
from hotlun.hcs.computecore import CallError, ComputeCore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DISK = Disk("C:\\Größe \U0001f4be \udc80\\a.vhdx", DiskKind.VIRTUAL_DISK)
ADD = documents.add_document(Attachment(Slot(0, 3), DISK, "h1"))
REMOVE = documents.remove_document(Attachment(Slot(0, 3), DISK, "h1"))
TEXT = json.dumps(ADD, separators=(",", ":"), ensure_ascii=False)
TESTS = Path(__file__).parent.parent


@pytest.fixture
def fake() -> Iterator[FakeComputeCore]:
    """A VM, and a check of every call that was made."""
    with fake_computecore() as fake:
        yield fake


@pytest.fixture
def core(fake: FakeComputeCore) -> ComputeCore:
    return fake.core


class TestOneCall:
    def test_opens_and_closes(self, core: ComputeCore) -> None:
        """The system has to be there."""
        core.close_system(core.open_system(VM))
        with pytest.raises(CallError) as caught:
            core.open_system("nobody")
        assert caught.value.code == 0x8037010E

    def test_sends_the_document_as_it_is(self, fake: FakeComputeCore, core: ComputeCore) -> None:
        """Every character of it: in the plane above 16 bits, and half of a pair too."""
        system = core.open_system(VM)
        assert core.modify(system, TEXT) == ""
        assert fake.documents == [TEXT]
        assert fake.state.disks[0].path == DISK.path
        core.close_system(system)

    def test_reads_the_result_whole(self, fake: FakeComputeCore, core: ComputeCore) -> None:
        """And frees it, once."""
        system = core.open_system(VM)
        for text in ("x", '{"Größe":"\U0001f4be"}', "y" * 100_000):
            fake.script(Call.MODIFY, When.AT_END, document=text)
            assert core.modify(system, TEXT) == text
            core.modify(system, json.dumps(REMOVE, separators=(",", ":")))
        core.close_system(system)

    @pytest.mark.parametrize("when", [When.AT_START, When.AT_END])
    @pytest.mark.parametrize("document", ["", '{"ErrorMessage":"so"}', "no JSON \U0001f4be"])
    @pytest.mark.parametrize("code", [0x80370105, 0xC0370110, 0x80070005])
    def test_that_fails_has_its_code_and_document(
        self, fake: FakeComputeCore, core: ComputeCore, when: When, document: str, code: int
    ) -> None:
        """Whether it never began or ended that way, with a document or without."""
        system = core.open_system(VM)
        calls: dict[Call, Callable[[], str]] = {
            Call.MODIFY: lambda: core.modify(system, TEXT),
            Call.PROPERTIES: lambda: core.properties(system, "{}"),
            Call.ENUMERATE: lambda: core.enumerate("{}"),
        }
        for call, function in calls.items():
            fake.script(call, when, code, document)
            with pytest.raises(CallError) as caught:
                function()
            assert (caught.value.code, caught.value.document) == (code, document)
        core.close_system(system)

    @pytest.mark.parametrize("code", [0x80370117, 0x80370118])
    def test_that_ends_with_a_code_of_waiting_has_ended(
        self, fake: FakeComputeCore, core: ComputeCore, code: int
    ) -> None:
        """As a guest may answer; who waits again for that gets the same at once, and for ever."""
        system = core.open_system(VM)
        fake.script(Call.MODIFY, When.AT_END, code, '{"ErrorMessage":"so"}')
        ended: list[CallError] = []

        def modify() -> None:
            with pytest.raises(CallError) as caught:
                core.modify(system, TEXT)
            ended.append(caught.value)

        thread = threading.Thread(target=modify, daemon=True)
        thread.start()
        thread.join(DEADLINE_MS / 1000)
        assert [(one.code, one.document) for one in ended] == [(code, '{"ErrorMessage":"so"}')]
        core.close_system(system)

    def test_without_an_operation_to_be_had(
        self, fake: FakeComputeCore, core: ComputeCore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """There is no memory for one. What else has failed last is no word about a disk."""
        system = core.open_system(VM)
        fake.script(Call.CREATE, When.AT_START)
        monkeypatch.setattr(ctypes, "get_last_error", lambda: 0x490, raising=False)
        with pytest.raises(CallError) as caught:
            core.modify(system, TEXT)
        assert caught.value.code == 0x8007000E
        core.close_system(system)

    def test_waits_again_when_a_wait_runs_out(
        self, fake: FakeComputeCore, core: ComputeCore
    ) -> None:
        """The operation is the same."""
        system = core.open_system(VM)
        fake.script(Call.MODIFY, When.LATE_WAITS, milliseconds=3)
        core.modify(system, TEXT)
        assert len(fake.state.disks) == 1
        core.close_system(system)

    def test_of_a_failing_open(self, fake: FakeComputeCore, core: ComputeCore) -> None:
        """There is no handle to close."""
        fake.script(Call.OPEN, When.AT_START, 0x8037011B)
        with pytest.raises(CallError):
            core.open_system(VM)

    @pytest.mark.parametrize("text", ["a\0b", "\0"])
    def test_refuses_a_nul(self, core: ComputeCore, text: str) -> None:
        """Windows would take it for the end."""
        calls: list[Callable[[], object]] = [
            lambda: core.open_system(text),
            lambda: core.enumerate(text),
            lambda: core.grant(VM, text),
            lambda: core.revoke(text, "C:\\x"),
        ]
        for call in calls:
            with pytest.raises(ValueError, match="NUL"):
                call()


class TestAccess:
    def test_is_granted_and_revoked(self, fake: FakeComputeCore, core: ComputeCore) -> None:
        """By the id and the path."""
        core.grant(VM, DISK.path)
        assert fake.state.grants == {(VM, DISK.path)}
        core.revoke(VM, DISK.path)
        assert fake.state.grants == set()

    def test_refused_has_its_code(self, core: ComputeCore) -> None:
        """There is no document here."""
        with pytest.raises(CallError) as caught:
            core.grant(VM, "C:\\missing.vhdx")
        assert caught.value.code == 0x80070002

    @pytest.mark.parametrize("code", [0x80004001, 0x8007007F])
    @pytest.mark.skipif(os.name == "nt", reason="hotlun finds its libraries by name there")
    def test_falls_back_where_it_is_not_implemented(self, fake: FakeComputeCore, code: int) -> None:
        """To vmcompute.dll's own; any other refusal is one."""
        libraries = build()
        older = ctypes.CDLL(libraries.older)
        without = FakeComputeCore(ctypes.CDLL(libraries.without_access))
        without.add_system(VM)
        mixed = ComputeCore(
            ctypes.CDLL(libraries.core), ctypes.CDLL(libraries.core), ctypes.CDLL(libraries.older)
        )
        fake.script(Call.GRANT, When.AT_START, code)
        mixed.grant(VM, "C:\\x")
        assert without.state.grants == {(VM, "C:\\x")}
        assert fake.state.grants == set()
        fake.script(Call.GRANT, When.AT_START, 0x80070005)
        with pytest.raises(CallError):
            mixed.grant(VM, "C:\\y")
        assert older is not None
        without.reset()

    @pytest.mark.skipif(os.name == "nt", reason="hotlun finds its libraries by name there")
    def test_falls_back_where_it_is_missing(self) -> None:
        """And says so where nobody has it."""
        libraries = build()
        library = ctypes.CDLL(libraries.without_access)
        without = FakeComputeCore(library)
        without.reset()
        without.add_system(VM)
        mixed = ComputeCore(library, library, ctypes.CDLL(libraries.older))
        mixed.grant(VM, "C:\\x")
        assert without.state.grants == {(VM, "C:\\x")}
        mixed.revoke(VM, "C:\\x")
        assert without.state.grants == set()
        with pytest.raises(CallError) as caught:
            without.core.grant(VM, "C:\\x")
        assert caught.value.code == 0x8007007F
        without.check()
        without.reset()


@pytest.mark.skipif(os.name == "nt", reason="there is nothing of the kind there")
def test_another_library_is_not_taken_for_it() -> None:
    """It says what is missing."""
    with pytest.raises(UnsupportedError, match=r"too old: .*HcsOpenComputeSystem"):
        ComputeCore(ctypes.CDLL(None), ctypes.CDLL(None))


class TestASystem:
    """The asynchronous side, over the library."""

    async def test_is_changed_and_asked(self, fake: FakeComputeCore) -> None:
        """The whole way there and back."""
        async with open_system(VM, core=fake.core) as system:
            await system.modify(ADD)
            assert [(d.controller, d.lun, d.path) for d in fake.state.disks] == [(0, 3, DISK.path)]
            told = await system.properties(documents.PROPERTY_QUERY)
            assert documents.attached_paths(told) == {Slot(0, 3): DISK.path}
            assert SystemInfo.read(told).runtime_id == RUNTIME_ID
            await system.modify(REMOVE)
            with pytest.raises(BackendError) as caught:
                await system.modify(REMOVE)
            assert (caught.value.code, caught.value.detail) == (
                0x80070490,
                "there is no attachment at this LUN",
            )

    async def test_is_found(self, fake: FakeComputeCore) -> None:
        """With the others that run."""
        fake.add_system("vm-2", os_type="Windows")
        found = await enumerate_systems(core=fake.core)
        assert [(one.id, one.os_type) for one in found] == [("vm-2", "windows"), (VM, "linux")]
        assert await enumerate_systems(owner="nobody", core=fake.core) == []

    @pytest.mark.parametrize(("code", "succeeds"), [(0, True), (0x80070020, False)])
    async def test_that_takes_too_long_is_seen_through(
        self, fake: FakeComputeCore, code: int, succeeds: bool
    ) -> None:
        """The operation, its result and the handle live until it has ended, well or not."""
        fake.script(Call.MODIFY, When.UNTIL_TOLD)
        async with open_system(VM, core=fake.core, timeout=0.05) as system:
            with pytest.raises(StillRunningError) as caught:
                await system.modify(ADD)
            assert isinstance(caught.value, OutcomeUnknownError)
        assert fake.alive["systems"] == fake.alive["operations"] == 1
        fake.finish(code, '{"ErrorMessage":"late"}')
        late = await asyncio.wait_for(caught.value.outcome, 20)
        assert (late is None) == succeeds
        assert bool(fake.state.disks) == succeeds
        await ended()

    async def test_that_was_cancelled_is_seen_through(self, fake: FakeComputeCore) -> None:
        """Nobody closes anything under it."""
        fake.script(Call.MODIFY, When.UNTIL_TOLD)
        async with open_system(VM, core=fake.core) as system:
            task = asyncio.ensure_future(system.modify(ADD))
            await asyncio.sleep(0)
            await asyncio.to_thread(fake.wait_pending)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert fake.alive["systems"] == fake.alive["operations"] == 1
        fake.finish()
        await ended()
        assert fake.alive["systems"] == 0

    async def test_takes_many_calls_at_once(self, fake: FakeComputeCore) -> None:
        """Each has an operation of its own."""
        async with open_system(VM, core=fake.core) as system:
            for _ in range(64):
                fake.script(Call.MODIFY, When.UNTIL_TOLD)
            attachments = [
                Attachment(Slot(lun % 4, lun // 4), Disk(f"C:\\{lun}.vhd", DISK.kind), f"h{lun}")
                for lun in range(64)
            ]
            async with asyncio.TaskGroup() as group:
                for attachment in attachments:
                    group.create_task(system.modify(documents.add_document(attachment)))
                await asyncio.to_thread(fake.wait_pending, 64)
                for _ in range(64):
                    fake.finish()
            assert len(fake.state.disks) == 64

    async def test_of_a_vm_that_ended(self, fake: FakeComputeCore) -> None:
        """Is refused with the code for it."""
        async with open_system(VM, core=fake.core) as system:
            fake.terminate()
            with pytest.raises(BackendError) as caught:
                await system.modify(ADD)
            assert caught.value.code == 0x80370110


async def ended() -> None:
    """Until no thread of a call is left."""
    async with asyncio.timeout(20):
        while any(thread.name.startswith("hotlun ") for thread in threading.enumerate()):
            await asyncio.sleep(0.001)


@pytest.mark.skipif(os.name == "nt", reason="the compiler's sanitizers are Linux' here")
class TestUnderAddressSanitizer:
    """All of this file, with every access to the library's memory checked."""

    def run(self, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        library = build("-fsanitize=address,undefined").core
        environment = sanitized_environment() | {"PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(
            [sys.executable, "-c", code, library, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=50,
        )

    def test_a_read_beyond_a_string_is_seen(self) -> None:
        """That it would be is worth a test."""
        done = self.run("import ctypes, sys; ctypes.CDLL(sys.argv[1]).fake_misbehave()")
        assert done.returncode != 0
        assert "heap-buffer-overflow" in done.stderr

    @pytest.mark.parametrize(
        ("path", "chosen"),
        [
            (Path(__file__), "TestOneCall or TestASystem or granted or refused"),
            (TESTS / "contract" / "test_backend_contract.py", "library"),
            (TESTS / "model" / "test_compute_storms.py", "storm"),
        ],
        ids=["these tests", "the contract", "storms"],
    )
    def test_nothing_is_wrong(self, path: Path, chosen: str) -> None:
        """With what is done in other tests, each of them once more."""
        done = self.run(
            "import sys, pytest, support.computecore as c;"
            "c.build = lambda *_: c.Libraries(sys.argv[1], '', '');"
            "chosen = ['-q', '-p', 'no:cacheprovider', sys.argv[2], '-k', sys.argv[3]];"
            "sys.exit(pytest.main(chosen))",
            str(path),
            chosen,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "passed" in done.stdout
        assert "AddressSanitizer" not in done.stderr


async def test_access_is_revoked_after_the_vm_has_ended(
    fake: FakeComputeCore, core: ComputeCore
) -> None:
    """For whoever forgets it: nothing is opened for that, and a file that is gone is fine."""
    core.grant("ended", DISK.path)
    core.grant("another", DISK.path)
    gone = Disk("C:\\missing.vhdx", DiskKind.VIRTUAL_DISK)
    await revoke_after_the_end([(gone, "ended"), (DISK, "ended")], core=core)
    assert fake.state.grants == {("another", DISK.path)}


async def test_what_cannot_be_revoked_does_not_keep_the_rest(
    fake: FakeComputeCore, core: ComputeCore
) -> None:
    """All are tried, and the first refusal is told, with the others as notes."""
    disks = [Disk(f"C:\\{name}.vhdx", DiskKind.VIRTUAL_DISK) for name in "abcd"]
    for disk in disks:
        core.grant("ended", disk.path)
    for _ in range(2):
        fake.script(Call.REVOKE, When.AT_START, 0x80070005)
    with pytest.raises(BackendError, match=r"a\.vhdx.*access is denied") as caught:
        await revoke_after_the_end([(disk, "ended") for disk in disks], core=core)
    (note,) = caught.value.__notes__
    assert "b.vhdx" in note
    assert fake.state.grants == {("ended", disk.path) for disk in disks[:2]}
