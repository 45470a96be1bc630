"""A VM moves to another QEMU while it runs, and a Manager there goes on with its disks."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest
from support import disks
from support.clients import Clients
from support.counting import COUNT, STOP
from support.guest_shell import shell
from support.machine import eventually, look

from hotlun import Manager, MountConfig, NotInitializedError, SlotState
from hotlun.events import DisagreementSettled
from hotlun.journal import SQLiteJournal
from hotlun.vm import Machine, MachineError

if TYPE_CHECKING:
    from pathlib import Path

    from hotlun import Mount

EXT4 = MountConfig(filesystem="ext4", ensure_filesystem=True)
SCRATCH = MountConfig(filesystem="ext4", ensure_filesystem=True, encrypted=True)


async def filled(manager: Manager, folder: Path) -> list[Mount]:
    """A disk that two share, one that is encrypted under a key nobody keeps, and a plain one."""
    shared = disks.ext4(folder / "shared.raw", "moved")
    return [
        await manager.add_virtual_disk(shared, mount=MountConfig(), owner="one"),
        await manager.add_virtual_disk(shared, mount=MountConfig(), owner="two"),
        await manager.add_virtual_disk(disks.blank(folder / "scratch.raw"), mount=SCRATCH),
        await manager.add_virtual_disk(disks.image(folder / "log.qcow2", "qcow2"), mount=EXT4),
    ]


async def test_its_mounts_go_with_it(tmp_path: Path) -> None:
    """A program writes all the while, and loses no line; what is released there is gone there."""
    uri = f"unix:{tmp_path}/migration.sock"
    async with AsyncExitStack() as stack:
        source = await stack.enter_async_context(Machine.start(connect=False))
        bare = await look(source)
        here = await stack.enter_async_context(Clients.of(source))
        journal = SQLiteJournal(tmp_path / "source.journal")
        manager = await stack.enter_async_context(Manager(here.host, here.guest, journal=journal))
        mounts = await filled(manager, tmp_path)
        data, scratch = mounts[0].guest_path, mounts[2].guest_path
        await shell(source, f"echo kept >{scratch}/file; sync {scratch}/file")
        await shell(source, COUNT.format(path=f"{data}/count"))

        document = json.loads(json.dumps(await manager.save()))
        destination = await stack.enter_async_context(
            Machine.start(incoming=uri, extra_arguments=here.host.device_arguments())
        )
        await source.migrate(uri)
        await destination.arrived()
        await manager.forget()
        assert journal.peek() == []

        there = await stack.enter_async_context(Clients.of(destination))
        restored = Manager.restore(
            document,
            there.host,
            there.guest,
            journal=SQLiteJournal(tmp_path / "destination.journal"),
        )
        events = restored.events()
        async with restored:
            assert [(m.id, m.slot, m.serial, m.guest_path, m.owner) for m in restored.mounts] == [
                (m.id, m.slot, m.serial, m.guest_path, m.owner) for m in mounts
            ]
            assert await shell(destination, f"cat {scratch}/file") == "kept\n"
            seen = len((await shell(destination, f"cat {data}/count")).split())
            await shell(
                destination,
                f'until [ "$(wc -l <{data}/count)" -gt {seen + 20} ]; do sleep 0.1; done',
            )
            await shell(destination, STOP)
            lines = (await shell(destination, f"cat {data}/count")).split()
            assert lines == [str(number) for number in range(len(lines))]
            sharing = await restored.add_virtual_disk(tmp_path / "shared.raw", mount=MountConfig())
            assert sharing.guest_path == data
            for mount in (*restored.mounts,):
                await mount.release()
            assert {status.state for status in restored.slots()} == {SlotState.FREE}
        assert not [event async for event in events if isinstance(event, DisagreementSettled)]
        assert await eventually(destination, bare) == bare
    assert disks.ext4_file(tmp_path / "shared.raw", "count").split() == lines
    disks.check(tmp_path / "log.qcow2", "qcow2")


async def test_one_that_fails_goes_on_at_home(bare_vm: Machine, tmp_path: Path) -> None:
    """Frozen until it is thawed; then everything is as before."""
    async with Clients.of(bare_vm) as clients, Manager(clients.host, clients.guest) as manager:
        mounts = await filled(manager, tmp_path)
        await manager.save()
        with pytest.raises(MachineError):
            await bare_vm.migrate(f"unix:{tmp_path}/nobody.sock")
        with pytest.raises(NotInitializedError, match="thaw"):
            await mounts[0].release()
        manager.thaw()
        assert await manager.reconcile() == ()
        await mounts[0].release()
        note = await shell(bare_vm, f"cat {mounts[1].guest_path}/note")
        assert note == "moved"
