"""A journal's documents: who holds a disk has one of its own, and is never there without it."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest
from support.memory import EXT4, VM, XFS, A, B

from hotlun import JournalError, Manager, MountConfig, Slot
from hotlun.backends.memory import MemoryGuestBackend, MemoryHostBackend
from hotlun.journal import MemoryJournal, SQLiteJournal
from hotlun.journal_documents import disk_name, holder_name, names, understood

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from hotlun import Mount


class Noting(MemoryJournal):
    """A journal that keeps what was written, write by write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[Mapping[str, str | None]] = []

    def write(self, changes: Mapping[str, str | None]) -> None:
        super().write(changes)
        self.writes.append(dict(changes))

    def taken(self) -> list[Mapping[str, str | None]]:
        """What was written since last time."""
        taken, self.writes = self.writes, []
        return taken


class TestWhatIsWritten:
    async def test_by_one_more_holder(self) -> None:
        """Its own document and no other, however many hold the disk; and so when it leaves."""
        journal = Noting()
        async with VM(journal=journal) as vm:
            for _ in range(5):
                await vm.add(A, EXT4, owner="somebody")
            journal.taken()
            mount = await vm.add(A, EXT4)
            name = holder_name(mount.id)
            (written,) = journal.taken()
            assert list(written) == [name]
            assert "somebody" not in (written[name] or "")
            await mount.release()
            assert journal.taken() == [{name: None}]
            await vm.manager.release_all()

    async def test_by_a_release_while_a_step_is_under_way(self) -> None:
        """Before it is told: a process that is killed then must not have the Mount again."""
        journal = Noting()
        async with VM(journal=journal) as vm:
            await vm.add(A, EXT4)
            mount = await vm.add(A, EXT4)
            gate = vm.guest.stall("mount")
            adding = vm.start(A, XFS)
            await gate.reached.wait()
            journal.taken()
            await mount.release()
            assert journal.taken() == [{holder_name(mount.id): None}]
            gate.open()
            other = await adding
            (held,) = journal.taken()
            assert list(held) == [disk_name(("path", A, "")), holder_name(other.id)]
            await vm.manager.release_all()

    async def test_by_a_release_while_a_step_is_about_to_be_taken(self) -> None:
        """Nor then, though the worker has not had its turn yet."""
        journal = Noting()
        async with VM(journal=journal) as vm:
            mounts = [await vm.add(A, config) for config in (None, None, EXT4)]

            async def release(mount: Mount) -> None:
                await mount.release()
                assert holder_name(mount.id) not in journal._documents

            await asyncio.gather(*map(release, reversed(mounts[1:])))
            await vm.manager.release_all()

    async def test_by_an_add_and_a_release(self) -> None:
        """A write before each step; what was done comes with what comes next.

        So the holder comes with what its add has done, and goes with the disk.
        """
        journal = Noting()
        async with VM(journal=journal) as vm:
            mount = await vm.add(A, EXT4)
            disk, holder = disk_name(("path", A, "")), holder_name(mount.id)
            assert [list(changes) for changes in journal.taken()] == [
                [disk],  # about to be attached
                [disk],  # about to be mounted
                [disk, holder],
            ]
            await mount.release()
            *steps, gone = journal.taken()
            assert [list(changes) for changes in steps] == [
                [disk],  # about to be unmounted
                [disk, holder],  # which holds the disk alone now; about to be unplugged
                [disk],  # about to be detached
            ]
            assert gone == {disk: None, holder: None}

    async def test_by_what_is_lost(self) -> None:
        """Each who held it says so, in the next process as well."""
        journal = MemoryJournal()
        vm = VM(journal=journal)
        async with vm.manager:
            mounts = [await vm.add(A, config) for config in (EXT4, XFS, None)]
            vm.host.vanish(mounts[0].serial)
            await vm.manager.reconcile()
            lost = [mount.lost for mount in mounts]
            assert all(lost)
            (record,) = understood(journal._documents.values(), "it")
            assert [holder.lost for holder in record.holders] == lost
        async with Manager(vm.host, vm.guest, journal=journal) as manager:
            assert [mount.lost for mount in manager.mounts] == lost
            await manager.release_all()

    async def test_by_a_manager_that_goes_on(self) -> None:
        """The first change of a disk writes it anew, the next ones no more than is needed."""
        journal = Noting()
        vm = VM(journal=journal)
        async with vm.manager:
            for _ in range(3):
                await vm.add(A, EXT4)
            await vm.add(B, EXT4)
        documents = dict(journal._documents)
        journal.taken()
        async with Manager(vm.host, vm.guest, journal=journal) as manager:
            assert journal.taken() == []
            for _ in range(2):
                await (await manager.add_virtual_disk(A, mount=EXT4)).release()
            assert journal._documents == documents
            assert [len(changes) for changes in journal.taken()] == [4, 1, 1, 1, 1]
            await manager.release_all()
        assert journal._documents == {}

    async def test_in_words_that_an_older_hotlun_refuses(self) -> None:
        """By the version, which each of them has."""
        journal = MemoryJournal()
        async with VM(journal=journal) as vm:
            await vm.add(A, EXT4)
            documents = [json.loads(text) for text in journal._documents.values()]
            assert [document["version"] for document in documents] == [2, 2]
            await vm.manager.release_all()


OLD = {
    '["path", "/disks/a.vhdx", ""]': (
        '{"version":1,"serial":"hoh3svwalvuh0","slot":[0,0],"vacated":false,"disk":["/disks/a.vhdx"'
        ',"VirtualDisk",false,"","vhdx"],"identity":["path","/disks/a.vhdx",""],"fact":"yes","reason'
        '":"","grants":[["vm","yes","",1795832170794478962]],"mounts":[["/run/mounts/scsi/m0","yes",'
        'false,{"filesystem":"ext4","options":["noatime"]}]],"holders":[["hoh3svwalvuh1",0,"job 1",'
        'null,"/run/mounts/scsi/m0",""],["hoh3svwalvuh4",2,"",null,null,""],["hoh3svwalvuh5",3,"",'
        'null,"/run/mounts/scsi/m0",""]]}'
    ),
    '["path", "/disks/b.img", ""]': (
        '{"version":1,"serial":"hoh3svwalvuh2","slot":[0,1],"vacated":false,"disk":["/disks/b.img",'
        '"VirtualDisk",true,"","raw"],"identity":["path","/disks/b.img",""],"fact":"yes","reason":""'
        ',"grants":[],"mounts":[],"holders":[["hoh3svwalvuh3",1,"",null,null,""]]}'
    ),
}
"""What hotlun wrote when holders stood in their disk's document, to the letter."""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The file of such a journal."""
    path = tmp_path / "journal"
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE disks (name TEXT NOT NULL UNIQUE, document TEXT NOT NULL)")
    database.executemany("INSERT INTO disks VALUES (?, ?)", OLD.items())
    database.execute("PRAGMA application_id = 1213158476")
    database.execute("PRAGMA user_version = 1")
    database.commit()
    database.close()
    return path


class TestOfBefore:
    """A journal in which holders stand in their disk's document."""

    async def test_it_is_taken_over(self, old: Path) -> None:
        """With every Mount; and each disk is written anew with its first change."""
        host = MemoryHostBackend(surveys=False)  # it cannot be asked, and so has what is said
        guest = MemoryGuestBackend(host, surveys=False)
        config = MountConfig(filesystem="ext4", options=["noatime"])
        async with Manager(host, guest, journal=SQLiteJournal(old)) as manager:
            assert [(m.id, m.slot, m.guest_path, m.owner) for m in manager.mounts] == [
                ("hoh3svwalvuh1", Slot(0, 0), "/run/mounts/scsi/m0", "job 1"),
                ("hoh3svwalvuh3", Slot(0, 1), None, ""),
                ("hoh3svwalvuh4", Slot(0, 0), None, ""),
                ("hoh3svwalvuh5", Slot(0, 0), "/run/mounts/scsi/m0", ""),
            ]
            assert manager.mounts[0].config == config
            before = understood(SQLiteJournal(old).peek(), "it")
            await manager.mounts[2].release()
            a, b = understood(SQLiteJournal(old).peek(), "it")
            assert a == before[0]._replace(holders=before[0].holders[::2])
            assert b == before[1]
            assert versions(old) == [2, 1, 2, 2]
        async with Manager(host, guest, journal=SQLiteJournal(old)) as manager:
            assert len(manager.mounts) == 3
            shared = await manager.add_virtual_disk("/disks/a.vhdx", mount=config)
            assert shared.guest_path == "/run/mounts/scsi/m0"
            await manager.release_all()
        assert SQLiteJournal(old).peek() == []

    def test_every_document_has_the_name_that_it_had(self, old: Path) -> None:
        """Otherwise the one of before would stay."""
        records = understood(SQLiteJournal(old).peek(), "it")
        assert [next(names(record)) for record in records] == list(OLD)


def versions(path: Path) -> list[int]:
    return [json.loads(text)["version"] for text in SQLiteJournal(path).peek()]


DISK: dict[str, Any] = {
    "version": 2,
    "serial": "h1",
    "slot": [0, 0],
    "disk": ["/d", "VirtualDisk", False, "", None],
    "identity": ["path", "/d", ""],
    "vacated": False,
    "fact": "yes",
    "reason": "",
    "grants": [],
    "mounts": [["/m", "yes", False, {}]],
}
HOLDER: dict[str, Any] = {"version": 2, "holds": "h1", "holder": ["h2", 0, "", None, "/m", ""]}


def test_order_is_nobodys_business() -> None:
    """A holder may stand before its disk."""
    (record,) = understood(map(json.dumps, (HOLDER, DISK)), "it")
    assert [(holder.id, holder.path) for holder in record.holders] == [("h2", "/m")]


@pytest.mark.parametrize(
    ("documents", "problem"),
    [
        ([HOLDER], "a holder of disk h1, which is not there"),
        ([DISK, {**HOLDER, "holds": "h9"}], "a holder of disk h9"),
        ([DISK, {**HOLDER, "holds": None}], "a holder of disk None"),
        ([{**DISK, "version": 1, "holders": []}, HOLDER], "has its own"),
        ([DISK, HOLDER, HOLDER], "two holders"),
        ([DISK, DISK, HOLDER], "same serial"),
        ([DISK, {**HOLDER, "holder": ["h2"]}], "no record"),
        ([DISK, {**HOLDER, "holder": ["h2", "0", "", None, "/m", ""]}], "no record"),
        ([DISK, {**HOLDER, "holder": None}], "no record"),
        *(
            ([DISK, {**HOLDER, "holder": [name, 0, "", None, "/m", ""]}], "is ever called")
            for name in ("", "\0", "\ud800", "h2 ", "holder h2")
        ),
        ([DISK, {**HOLDER, "holder": ["h2", -1, "", None, "/m", ""]}], "a number"),
        ([DISK, {**HOLDER, "holder": ["h2", 1 << 63, "", None, "/m", ""]}], "a number"),
        ([DISK, {**HOLDER, "version": 1}], "no record"),
        ([DISK, {**HOLDER, "version": 3}], "its version is 3, not 2"),
        ([{**DISK, "serial": ["h1"]}], "no record"),
        ([{**DISK, "disk": [["/d"], "VirtualDisk", False, "", None]}], "no record"),
        ([{**DISK, "disk": ["/d", "ExtensibleVirtualDisk", False, ["p"], None]}], "no record"),
        ([{**DISK, "version": 1}], "no record"),
        ([{"version": 2}], "no record"),
        ([DISK, "a holder"], "no record"),
        ([[DISK]], "no record"),
    ],
    ids=ascii,
)
def test_what_is_not_understood(documents: list[object], problem: str) -> None:
    """Nothing of it is, whatever is wrong with one of them."""
    assert len(understood(map(json.dumps, (DISK, HOLDER)), "it")) == 1
    with pytest.raises(JournalError, match=rf"it holds what cannot be understood: .*{problem}"):
        understood(map(json.dumps, documents), "it")
