"""A program for a Manager that takes every kind of step: the same each time, so that it can end
at each of its points in turn."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from hotlun import HotlunError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotlun import Manager, Mount, MountConfig


async def run_script(
    manager: Manager, paths: Sequence[str], config: MountConfig, vm_id: str
) -> None:
    """Add, share, release in part, release, add again; what is left is left.

    Args:
        paths: three disks.
        config: how they are mounted.
        vm_id: who is granted access to the first of them.
    """
    a, b, c = paths
    one = await manager.add_virtual_disk(a, mount=config, vm_id=vm_id, owner="one")
    same = await manager.add_virtual_disk(a, mount=config, owner="same")
    bare = await manager.add_virtual_disk(b, owner="bare")
    both = await asyncio.gather(
        manager.add_virtual_disk(b, mount=config, owner="late"),
        manager.add_virtual_disk(c, mount=config, owner="other"),
    )
    await one.release()
    await both[0].release()
    await asyncio.gather(same.release(), both[1].release())
    await manager.add_virtual_disk(a, mount=config, owner="again")
    await bare.release()
    await manager.add_virtual_disk(c, owner="last")


async def drain(mounts: Sequence[Mount]) -> None:
    """Release what is there."""
    for mount in mounts:
        with contextlib.suppress(HotlunError):
            await mount.release()
