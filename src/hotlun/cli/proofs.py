"""What the demo claims of its mounts, held against what the guest and QEMU say."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hotlun.cli.pictures import Share
from hotlun.cli.witness import existing, look, place

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hotlun import Disk, Manager, Mount
    from hotlun.cli.report import Report
    from hotlun.cli.witness import Place
    from hotlun.vm import Machine


class Proofs:
    """Makes checks of a report.

    Args:
        report: is told what was found.
        vm: the VM that is asked.
    """

    def __init__(self, report: Report, vm: Machine) -> None:
        self._report = report
        self._vm = vm

    async def are_there(self, mounts: Iterable[Mount]) -> None:
        """Each mount's disk is in QEMU and in the guest, and is at its path as its config says."""
        seen = await look(self._vm)
        for mount in mounts:
            there = await place(self._vm, seen, _path(mount))
            disk = seen.disk_with(mount.serial)
            self._report.check(
                seen.is_in_qemu(mount.serial)
                and there is not None
                and disk
                and _is_as_asked(mount, there, disk),
                f"{_path(mount)}: {there}, serial {mount.serial}",
            )

    async def are_gone(self, mounts: Iterable[Mount]) -> None:
        """Nothing of the mounts and their disks is in the guest or in QEMU."""
        mounts = tuple(mounts)
        seen = await look(self._vm)
        still_there = await existing(self._vm, map(_path, mounts))
        for mount in mounts:
            self._report.check(
                _path(mount) not in still_there
                and not seen.disk_with(mount.serial)
                and not seen.is_in_qemu(mount.serial),
                f"gone from guest and QEMU: {_path(mount)}, serial {mount.serial}",
            )

    async def shares(self, manager: Manager, holders: Mapping[str, Mount]) -> list[Share]:
        """What the Manager says is shared, and what the guest says of each."""
        seen = await look(self._vm)
        shares = []
        for status in manager.slots():
            for mount in status.guest_mounts:
                there = await place(self._vm, seen, mount.path)
                shares.append(
                    Share(
                        disk=_name(mount.attachment.disk),
                        slot=str(status.slot),
                        device=there.device if there else "?",
                        path=mount.path,
                        seen=f"{there.kind}, {there.mode}" if there else "not there",
                        holders=[
                            name
                            for name, held in holders.items()
                            if (held.slot, held.guest_path) == (status.slot, mount.path)
                        ],
                    )
                )
        return shares


def _name(disk: Disk) -> str:
    if disk.provider:
        return f"{disk.provider} {disk.path.rpartition(':')[2]}"
    return os.path.basename(disk.path)


def _path(mount: Mount) -> str:
    if mount.guest_path is None:
        raise ValueError(f"only attached: {mount}")
    return mount.guest_path


def _is_as_asked(mount: Mount, there: Place, disk: str) -> bool:
    config = mount.config
    return config is not None and (
        there.device.startswith("dm-" if config.encrypted else disk)
        and there.mode == ("ro" if mount.disk.read_only else "rw")
        and (there.kind == "device") == config.block_device
        and (not config.filesystem or there.kind == config.filesystem)
    )
