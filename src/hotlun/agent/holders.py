"""Who uses a disk, or keeps a mount busy: found out so that a refusal can name them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hotlun.agent import mountinfo

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotlun.agent.kernel import Kernel
    from hotlun.agent.mountinfo import Mount

_ENOUGH = 5
"""How many to name."""


def users(kernel: Kernel, disk: str) -> list[str]:
    """What uses a disk or one of its partitions, in words; empty if nothing is known to.

    Args:
        disk: its directory in sysfs.
    """
    parts = [disk, *(os.path.join(disk, name) for name in partitions(kernel, disk))]
    found = [user for part in parts for user in _stacked(kernel, part)]
    found += _mounts(kernel, parts)
    more = len(found) - _ENOUGH
    return [*found[:_ENOUGH], f"and {more} more"] if more > 0 else found


def partitions(kernel: Kernel, disk: str) -> list[str]:
    """The names of a disk's partitions, which the kernel shows as directories in its own."""
    return [
        name
        for name in kernel.names(disk)
        if name.startswith(os.path.basename(disk))
        and os.path.exists(os.path.join(disk, name, "partition"))
    ]


def keeping_busy(kernel: Kernel, mount: Mount, text: str) -> list[str]:
    """What keeps a mount from being unmounted, in words.

    Args:
        text: the mountinfo that the mount is from.
    """
    found = [
        f"{other.path} is mounted on it"
        for other in mountinfo.parse(text)
        if other.parent == mount.id and other.path != mount.path
    ]
    for process in kernel.processes()[1:]:
        if len(found) >= _ENOUGH:
            break
        use = _use(kernel, process, mount)
        if use:
            found.append(f"{use} of process {kernel.command(process)}")
    return found


def _stacked(kernel: Kernel, device: str) -> Iterator[str]:
    """Devices made of this one, btrfs, swap."""
    name = os.path.basename(device)
    for holder in kernel.names(os.path.join(device, "holders")):
        yield f"{name} is part of {holder}{_device_mapper_name(kernel, holder)}"
    btrfs = os.path.join(kernel.sys, "fs/btrfs")
    for filesystem in kernel.names(btrfs):
        if os.path.exists(os.path.join(btrfs, filesystem, "devices", name)):
            yield f"{name} is part of the mounted btrfs {filesystem}"
    try:
        swaps = kernel.read(os.path.join(kernel.proc, "swaps"))
    except OSError:  # a kernel without swap
        return
    if any(line.split()[:1] == [os.path.join(kernel.dev, name)] for line in swaps.splitlines()):
        yield f"{name} is used as swap"


def _device_mapper_name(kernel: Kernel, holder: str) -> str:
    try:
        return f" ({kernel.read(os.path.join(kernel.sys, 'class/block', holder, 'dm/name'))})"
    except OSError:
        return ""


def _mounts(kernel: Kernel, devices: list[str]) -> list[str]:
    """Mounts of the devices in every mount namespace, each namespace read once."""
    numbers = {}
    for device in devices:
        try:
            numbers[kernel.read(os.path.join(device, "dev"))] = os.path.basename(device)
        except OSError:
            continue
    nodes = {os.path.join(kernel.dev, name): name for name in numbers.values()}
    found: list[str] = []
    seen: set[str] = set()
    for process in kernel.processes():
        try:
            namespace = os.readlink(os.path.join(process, "ns/mnt"))
        except OSError:
            continue
        if namespace in seen:
            continue
        where = f" for process {kernel.command(process)}" if seen else ""
        seen.add(namespace)
        for mount in mountinfo.parse(mountinfo.read(kernel, process)):
            name = numbers.get(mount.number)
            if name is None and mount.number.startswith("0:"):
                name = nodes.get(mount.source)
            if name is not None:
                found.append(f"{name} is mounted at {mount.path}{where}")
    return found


def _use(kernel: Kernel, process: str, mount: Mount) -> str:
    """How a process uses a mount: an open file, its directory, its program; or not at all."""
    descriptors = os.path.join(process, "fdinfo")
    for descriptor in kernel.names(descriptors):
        try:
            info = kernel.read(os.path.join(descriptors, descriptor))
        except OSError:
            continue
        if f"mnt_id:\t{mount.id}" in info.splitlines():
            return "an open file"
    for link, word in (("cwd", "the directory"), ("root", "the root"), ("exe", "the program")):
        try:
            path = os.readlink(os.path.join(process, link))
        except OSError:
            continue
        if path == mount.path or path.startswith(mount.path + "/"):
            return word
    return ""
