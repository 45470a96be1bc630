"""What is mounted here, for tests that mount for real."""

from __future__ import annotations

from pathlib import Path

from hotlun.agent import mountinfo, syscalls
from hotlun.agent.kernel import Kernel


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
