"""A Manager is saved, and another one goes on with its disks, on another host."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
from support.memory import EXT4, VM, A, B, C, start, turns

from hotlun import (
    BackendError,
    DiskConflictError,
    JournalError,
    Manager,
    MountConfig,
    NotInitializedError,
    OutcomeUnknownError,
    Secret,
    SlotState,
)
from hotlun.host_paths import moved
from hotlun.journal import MemoryJournal
from hotlun.journal_documents import understood

if TYPE_CHECKING:
    from pathlib import Path

LOCKED = MountConfig(encrypted=True, key=Secret("sesame"))


async def carried(document: dict[str, Any]) -> dict[str, Any]:
    """As text, to another host."""
    text = json.dumps(document)
    assert "sesame" not in text
    return json.loads(text)  # type: ignore[no-any-return]


async def test_the_same_mounts_are_there() -> None:
    """Ids, slots, paths, owners, references; what is released there is released."""
    vm = VM(controllers=2, luns_per_controller=8, guest_mount_format="/srv/%d")
    async with vm.manager:
        before = [
            await vm.add(A, EXT4, owner="one"),
            await vm.add(A, EXT4),
            await vm.add(B, LOCKED),
            await vm.add(C, None),
        ]
        document = await carried(await vm.manager.save())
    async with Manager.restore(document, vm.host, vm.guest) as manager:
        assert [(m.id, m.slot, m.guest_path, m.owner) for m in manager.mounts] == [
            (m.id, m.slot, m.guest_path, m.owner) for m in before
        ]
        assert len(manager.slots()) == 16
        assert (await manager.add_virtual_disk(B, mount=LOCKED)).guest_path == before[2].guest_path
        new = await manager.add_virtual_disk("/disks/d", mount=EXT4)
        assert new.guest_path == "/srv/2"
        vm.said()
        await manager.mounts[0].release()
        assert vm.said() == []
    vm.assert_backends_empty()


async def test_a_key_is_sealed_as_over_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same salt, and so in a thread, before it is compared: that takes too long."""
    vm = VM()
    async with vm.manager:
        await vm.add(A, LOCKED)
        document = await vm.manager.save()
    main, in_loop = threading.get_ident(), []
    scrypt = hashlib.scrypt

    def watched(*arguments: Any, **more: Any) -> bytes:
        in_loop.append(threading.get_ident() == main)
        return scrypt(*arguments, **more)

    monkeypatch.setattr(hashlib, "scrypt", watched)
    async with Manager.restore(document, vm.host, vm.guest) as manager:
        again = MountConfig(encrypted=True, key=Secret("sesame"))
        await manager.add_virtual_disk(A, mount=again)
    assert in_loop == [False]
    vm.assert_backends_empty()


async def test_nothing_changes_meanwhile() -> None:
    """Neither adds nor releases, nor leaving; what was under way has ended before."""
    vm = VM()
    async with vm.manager:
        mount = await vm.add(A, EXT4)
        gate = vm.host.stall("attach")
        adding = vm.start(B)
        await gate.reached.wait()
        saving = start(vm.manager.save())
        await turns()
        assert not saving.done()
        gate.open()
        document = await saving
        with pytest.raises(NotInitializedError, match="thaw"):
            await adding
        assert [disk["disk"][0] for disk in document["disks"]] == [A]
        vm.said()
        for work in (
            *(vm.add(B), mount.release(), vm.manager.release_all()),
            *(vm.manager.save(), vm.manager.reconcile()),
        ):
            with pytest.raises(NotInitializedError, match="thaw"):
                await work
    assert vm.said() == []
    assert vm.host.attached
    async with Manager.restore(document, vm.host, vm.guest):
        pass
    vm.assert_backends_empty()


async def test_one_that_is_thawed_before_it_was_saved(vm: VM) -> None:
    """There is no document of what changes on."""
    gate = vm.host.stall("attach")
    adding = vm.start(A)
    await gate.reached.wait()
    saving = start(vm.manager.save())
    await turns()
    vm.manager.thaw()
    gate.open()
    for work in (saving, adding):
        with pytest.raises(NotInitializedError):
            await work


async def test_a_saving_that_is_cancelled_while_it_is_left() -> None:
    """It is cancelled, and says nothing else; leaving waits for what is under way."""
    journal = MemoryJournal()
    vm = VM(journal=journal)
    await vm.manager.__aenter__()
    gate = vm.host.stall("attach")
    adding = vm.start(A)
    await gate.reached.wait()
    saving = start(vm.manager.save())
    await turns()
    leaving = start(vm.manager.__aexit__(None, None, None))
    await turns()
    assert not leaving.done()
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    gate.open()
    with pytest.raises(NotInitializedError):
        await adding
    await leaving
    vm.assert_empty()
    assert journal.open() == []


async def test_a_vm_that_stays(vm: VM) -> None:
    """After thaw() everything is as before."""
    mount = await vm.add(A, EXT4)
    await vm.manager.save()
    vm.manager.thaw()
    with pytest.raises(NotInitializedError, match="not frozen"):
        vm.manager.thaw()
    sharing = await vm.add(A, EXT4)
    await sharing.release()
    await mount.release()


async def test_the_old_side_forgets() -> None:
    """Without touching what is the other side's now, grants included."""
    journal = MemoryJournal()
    vm = VM(journal=journal)
    async with vm.manager:
        await vm.add(A, EXT4, vm_id="one")
        document = await vm.manager.save()
        vm.said()
        await vm.manager.forget()
        assert vm.said() == []
    assert journal.open() == []
    journal.close()
    async with Manager.restore(document, vm.host, vm.guest):
        pass
    vm.assert_backends_empty()


async def test_a_journal_on_the_other_side() -> None:
    """Has it all at once, and must not have anything before."""
    vm, journal = VM(), MemoryJournal()
    async with vm.manager:
        mount = await vm.add(A, EXT4)
        document = await vm.manager.save()
    async with Manager.restore(document, vm.host, vm.guest, journal=journal):
        pass
    with pytest.raises(JournalError, match="give an empty one"):
        await Manager.restore(document, vm.host, vm.guest, journal=journal).__aenter__()
    async with Manager(vm.host, vm.guest, journal=journal) as manager:
        assert [m.id for m in manager.mounts] == [mount.id]
        await manager.release_all()
    vm.assert_backends_empty()


async def test_a_journal_that_is_full_on_the_other_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is left there, and it can be tried again."""
    vm, journal = VM(), MemoryJournal()
    async with vm.manager:
        for path in (A, B):
            await vm.add(path, EXT4)
        document = await vm.manager.save()

    def refuse(_: object) -> None:
        raise JournalError("no room")

    monkeypatch.setattr(journal, "write", refuse)
    manager = Manager.restore(document, vm.host, vm.guest, journal=journal)
    with pytest.raises(JournalError, match="no room"):
        await manager.__aenter__()
    assert journal._documents == {}
    monkeypatch.undo()
    async with manager:
        assert len(manager.mounts) == len(understood(journal._documents.values(), "it")) == 2
        await manager.release_all()
    vm.assert_backends_empty()


async def test_what_is_stuck_goes_along() -> None:
    """And is undone over there."""
    vm = VM()
    async with vm.manager:
        vm.host.lose("attach", happened=True)
        vm.guest.fail("unplug", BackendError("no"))
        with pytest.raises(OutcomeUnknownError):
            await vm.add(A, None)
        document = await vm.manager.save()
    async with Manager.restore(document, vm.host, vm.guest) as manager:
        assert {status.state for status in manager.slots()} == {SlotState.FREE}
    vm.assert_backends_empty()


async def test_images_that_have_moved(tmp_path: Path) -> None:
    """They are known by what they are at their new place."""
    for folder in ("there", "here"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.img").write_text(folder)
    vm = VM()
    async with vm.manager:
        await vm.add(str(tmp_path / "there" / "a.img"), EXT4)
        await vm.add(B, EXT4)
        document = await vm.manager.save()
    paths = {str(tmp_path / "there"): str(tmp_path / "here")}
    manager = Manager.restore(document, vm.host, vm.guest, paths=paths)
    async with manager:
        assert [mount.disk.path for mount in manager.mounts] == [
            str(tmp_path / "here" / "a.img"),
            B,
        ]
        with pytest.raises(DiskConflictError):
            await manager.add_virtual_disk(tmp_path / "here" / "a.img", read_only=True)


@pytest.mark.skipif(
    os.name == "nt", reason="these are paths of Linux; Windows' are test_host_paths'"
)
@pytest.mark.parametrize(
    ("path", "there"),
    [
        ("/a/b.img", "/x/b.img"),
        ("/a/c.img", "/y"),
        ("/a/d/e.img", "/z/e.img"),
        ("/ab/c.img", "/ab/c.img"),
        ("/q/a", "/q/a"),
        ("/s/a.img", "/t/a.img"),
    ],
)
def test_where_a_path_has_moved(path: str, there: str) -> None:
    """The path itself, or the folder that it lies below; the longest counts."""
    assert moved(path, {"/a": "/x", "/a/c.img": "/y", "/a/d": "/z", "/s/": "/t/"}) == there


async def test_two_disks_that_are_one_file_there(tmp_path: Path) -> None:
    """Attached twice already, it cannot be taken for one: that is refused."""
    vm = VM()
    async with vm.manager:
        for path in (A, B):
            await vm.add(path, EXT4)
        document = await vm.manager.save()
        (tmp_path / "image").touch()
        paths = dict.fromkeys((A, B), str(tmp_path / "image"))
        with pytest.raises(ValueError, match="the same file"):
            Manager.restore(document, vm.host, vm.guest, paths=paths)
        vm.manager.thaw()
        await vm.manager.release_all()
    vm.assert_backends_empty()


@pytest.mark.parametrize(
    "document",
    [
        *({}, {"hotlun": 2}, {"hotlun": 1}, {"hotlun": 1, "disks": [{}]}, [], None),
        {"hotlun": 1, "controllers": "4", "luns_per_controller": 64, "disks": []},
        {"hotlun": 1, "controllers": 4, "luns_per_controller": 64, "disks": []},
    ],
    ids=str,
)
def test_what_is_no_saved_manager(document: Any) -> None:
    """It is refused before anything is made of it."""
    vm = VM()
    with pytest.raises(ValueError, match=r"no saved Manager|version"):
        Manager.restore(document, vm.host, vm.guest)
