"""What is done to disks while something dies: adds and releases, as a seed has them."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from support import disks

from hotlun import HotlunError, MountConfig

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence
    from pathlib import Path

    from hotlun import Manager

VM_ID = "65534"
"""Who is granted access to some of the disks."""

_PLAIN = (
    None,
    MountConfig(),
    MountConfig(filesystem="ext4", options=("noatime",)),
    MountConfig(block_device=True),
)
_BLANK = (
    MountConfig(filesystem="ext4", ensure_filesystem=True),
    MountConfig(filesystem="ext4", ensure_filesystem=True, encrypted=True),
)


class Images:
    """The disks: most with an ext4 and a note, one blank, one with two partitions."""

    def __init__(self, folder: Path, paths: Sequence[Path]) -> None:
        self.folder = folder
        self.plain = [path for path in paths if path.name.startswith("plain")]
        self.blank = folder / "blank.raw"
        self.parts = folder / "parts.raw"

    @classmethod
    def make(cls, folder: Path, count: int = 4) -> Images:
        """Make them in a folder."""
        paths = [disks.ext4(folder / f"plain{n}.raw", f"note {n}") for n in range(count)]
        disks.blank(folder / "blank.raw", 48 * disks.MIB)
        disks.partitioned(folder / "parts.raw", "gpt", {1: "one", 2: "two"})
        return cls(folder, paths)

    @classmethod
    def made(cls, folder: Path) -> Images:
        """Those that an earlier process has made there."""
        return cls(folder, sorted(folder.glob("plain*.raw")))

    def choose(self, chance: random.Random) -> tuple[Path, MountConfig | None]:
        """One of them, and how to mount it."""
        draw = chance.random()
        if draw < 0.1:
            return self.blank, chance.choice(_BLANK)
        if draw < 0.25:
            return self.parts, MountConfig(partition=chance.choice((1, 2)))
        return chance.choice(self.plain), chance.choice(_PLAIN)


async def operate(manager: Manager, images: Images, chance: random.Random) -> None:
    """One add or one release; what is refused, fails or stays unknown is for others to judge."""
    mounts = manager.mounts
    with contextlib.suppress(HotlunError):
        if mounts and (chance.random() < 0.45 or len(mounts) > 10):
            await chance.choice(mounts).release()
        else:
            path, config = images.choose(chance)
            await manager.add_virtual_disk(
                path,
                mount=config,
                vm_id=chance.choice(("", "", VM_ID)),
                owner=chance.choice(("", "one", "pid:")),
            )


async def work(manager: Manager, images: Images, chance: random.Random, operations: int) -> None:
    """So many of them, one after another and side by side."""
    done = 0
    while done < operations:
        width = chance.choice((1, 1, 2, 3))
        await asyncio.gather(*(operate(manager, images, chance) for _ in range(width)))
        done += width
