"""What tests do and see in a guest, beside what they ask our code for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from support.machine import look, mounted

if TYPE_CHECKING:
    from support.machine import MountInfo

    from hotlun import Mount
    from hotlun.vm import Machine


async def shell(vm: Machine, command: str) -> str:
    """What a command in the guest said; it must succeed."""
    done = await vm.run(f"set -e\n{command}")
    assert done.returncode == 0, f"{command}: {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


async def mounted_at(vm: Machine, mount: Mount) -> MountInfo:
    """The guest's own word on a mount that must be there."""
    assert mount.guest_path is not None
    info = await mounted(vm, mount.guest_path)
    assert info is not None, f"nothing is mounted at {mount.guest_path}"
    return info


async def note_in(vm: Machine, mount: Mount) -> str:
    """What the image's note says, read in the guest."""
    return await shell(vm, f"cat '{mount.guest_path}/note'")


async def block_name(vm: Machine, mount: Mount) -> str:
    """The guest's name (`sda`) of the disk in the mount's slot, found by its address."""
    return next(
        device.block
        for device in (await look(vm)).scsi
        if (device.controller, device.lun) == (mount.controller, mount.lun)
    )
