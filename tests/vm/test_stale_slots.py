"""The worst trap of hot-plugging: a slot's new disk, and the guest reads the old one's bytes.

A device that leaves QEMU while the guest's kernel still has it, and another at its
LUN: most guest devices stay the old ones, cached pages included. So a release has
to take the guest's device first, see it gone, and only then QEMU's.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from support.guest_shell import shell

from hotlun import Manager, MountConfig

if TYPE_CHECKING:
    from pathlib import Path

    from hotlun import Mount
    from hotlun.vm import Machine

pytestmark = pytest.mark.asyncio(loop_scope="module")

DISKS = 32
ROUNDS = 10
SECTOR = 512
LINK = MountConfig(block_device=True)


def made(path: Path, words: str, sectors: int) -> Path:
    """A raw disk that has its name at the beginning and at the end."""
    sector = words.encode().ljust(SECTOR)
    with path.open("wb") as file:
        file.write(sector)
        file.truncate((sectors - 1) * SECTOR)
        file.seek(0, 2)
        file.write(sector)
    return path


async def read(vm: Machine, mounts: list[Mount]) -> list[list[str]]:
    """Of each disk, by its path in the guest: first sector, last sector, size in sectors."""
    script = (
        "import os, sys\n"
        "for path in sys.argv[1:]:\n"
        "    disk = os.open(path, os.O_RDONLY)\n"
        "    size = os.lseek(disk, 0, os.SEEK_END)\n"
        f"    ends = [os.pread(disk, {SECTOR}, at).decode() for at in (0, size - {SECTOR})]\n"
        f"    print(*ends, size // {SECTOR})\n"
    )
    paths = " ".join(str(mount.guest_path) for mount in mounts)
    said = await shell(vm, f"python3 -IS - {paths} <<'END'\n{script}END")
    return [line.split() for line in said.splitlines()]


async def test_a_slots_new_disk_is_the_one_that_is_read(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """32 releases at once, 32 adds at once on the same slots, ten times: 32 of 32 are the new."""
    mounts: list[Mount] = []
    slots = None
    for turn in range(ROUNDS + 1):  # before the first, there is nothing to release
        wanted = [[f"{turn}-{n}", f"{turn}-{n}", f"{2048 + 64 * turn + n}"] for n in range(DISKS)]
        paths = [made(tmp_path / f"{w[0]}.raw", w[0], int(w[2])) for w in wanted]
        await asyncio.gather(*(mount.release() for mount in mounts))
        mounts = list(
            await asyncio.gather(*(manager.add_virtual_disk(p, mount=LINK) for p in paths))
        )
        assert slots in (None, {mount.slot for mount in mounts})
        slots = {mount.slot for mount in mounts}
        assert await read(shared_vm, mounts) == wanted


async def test_newcomers_that_do_not_wait_for_the_releases(
    shared_vm: Machine, manager: Manager, tmp_path: Path
) -> None:
    """Releases and adds all at once: each add takes what is free at its moment, and is right."""
    mounts: list[Mount] = []
    for turn in range(2):
        wanted = [[f"{turn}-{n}", f"{turn}-{n}", f"{2048 + 64 * turn + n}"] for n in range(DISKS)]
        paths = [made(tmp_path / f"{w[0]}.raw", w[0], int(w[2])) for w in wanted]
        releases = [asyncio.create_task(mount.release()) for mount in mounts]
        mounts = list(
            await asyncio.gather(*(manager.add_virtual_disk(p, mount=LINK) for p in paths))
        )
        await asyncio.gather(*releases)
        assert await read(shared_vm, mounts) == wanted
