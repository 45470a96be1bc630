"""Devices to mount and what is mounted, for tests that mount for real."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from hotlun.agent import mountinfo, syscalls
from hotlun.agent.block_devices import BlockDevice
from hotlun.agent.kernel import Kernel
from hotlun.agent.settings import Slot

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def loop_device(image: Path, lun: int = 1) -> Iterator[BlockDevice]:
    """Have an image be a device of the real kernel."""
    command = ["losetup", "--find", "--show", str(image)]
    node = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    sysfs = Path("/sys/class/block") / node.name
    try:
        number = (sysfs / "dev").read_text().strip()
        yield BlockDevice(Slot(0, lun), node.name, str(node), number, str(sysfs))
    finally:
        subprocess.run(["losetup", "--detach", node], check=True)


def mounts() -> list[mountinfo.Mount]:
    return list(mountinfo.parse(mountinfo.read(Kernel(), "/proc/self")))


def mounted_at(path: Path) -> list[tuple[str, str]]:
    """Type and source of each, the oldest first."""
    return [(mount.filesystem, mount.source) for mount in mounts() if mount.path == str(path)]


def options_at(path: Path) -> set[str]:
    """Of the mount, of its propagation, and of its filesystem."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    line = next(line for line in lines if f" {path} " in line)
    before, _, after = line.partition(" - ")
    return {*before.split()[5].split(","), *before.split()[6:], *after.split()[2].split(",")}


def unmount_all(below: Path) -> None:
    while inside := [mount for mount in mounts() if mount.path.startswith(f"{below}/")]:
        syscalls.unmount(inside[-1].path)
