"""What a VM looks like from outside our code: the guest's mounts and devices, QEMU's nodes."""

from __future__ import annotations

import asyncio
import json
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hotlun.vm import Machine

FIRST_CONTROLLER = 0x10
"""The PCI device number of `scsi0`; the others follow."""

_LOOK = r"""
cat /proc/self/mountinfo
echo =
readlink -f /sys/bus/scsi/devices/[0-9]*:*
echo =
echo /sys/bus/scsi/devices/[0-9]*:*/block/*
echo =
echo /sys/block/*
echo =
echo /sys/class/block/dm-*
"""
"""A program costs an emulated guest more than all the rest, so there are two.

A pattern that matches nothing stays as it is.
"""


@dataclass(frozen=True)
class MountInfo:
    """One line of /proc/self/mountinfo (proc(5)), less its numbers."""

    path: str
    device: str
    root: str
    filesystem: str
    options: frozenset[str]
    super_options: frozenset[str]
    propagation: tuple[str, ...]


@dataclass(frozen=True, order=True)
class ScsiDevice:
    """A SCSI device as the guest's kernel has it; `block` is sda, for instance."""

    controller: int
    lun: int
    block: str


@dataclass(frozen=True)
class Seen:
    """Everything about a VM that attaching and mounting change."""

    mounts: tuple[MountInfo, ...]
    scsi: tuple[ScsiDevice, ...]
    block: tuple[str, ...]
    mapped: tuple[str, ...]
    nodes: tuple[str, ...]
    devices: tuple[str, ...]
    fdsets: tuple[int, ...]

    def mount_at(self, path: str) -> MountInfo | None:
        """What is mounted at `path` (the topmost, if several are)."""
        return next((mount for mount in reversed(self.mounts) if mount.path == path), None)


async def look(vm: Machine) -> Seen:
    """Ask the guest and QEMU; neither through the bridge nor through the user's monitor."""
    # One after another: the side monitor serves one client at a time.
    nodes = _dicts(await vm.query("query-named-block-nodes", {"flat": True}))
    devices = _dicts(await vm.query("qom-list", {"path": "/machine/peripheral"}))
    fdsets = _dicts(await vm.query("query-fdsets"))
    done = await vm.run(_LOOK)
    mounts, scsi, disks, block, mapped = done.stdout.split("=\n")
    names = {os.path.dirname(os.path.dirname(path)): path for path in disks.split()}
    return Seen(
        mounts=tuple(mount_info(line) for line in mounts.splitlines()),
        scsi=tuple(sorted(_scsi(path, names) for path in _matches(scsi) if _is_resolved(path))),
        block=tuple(map(os.path.basename, _matches(block))),
        mapped=tuple(map(os.path.basename, _matches(mapped))),
        nodes=tuple(sorted(node["node-name"] for node in nodes)),
        devices=tuple(sorted(device["name"] for device in devices)),
        fdsets=tuple(sorted(fdset["fdset-id"] for fdset in fdsets)),
    )


async def mounted(vm: Machine, path: str) -> MountInfo | None:
    """What the guest says is mounted at `path`."""
    done = await vm.run("cat /proc/self/mountinfo")
    found = [mount for mount in map(mount_info, done.stdout.splitlines()) if mount.path == path]
    return found[-1] if found else None


async def eventually(vm: Machine, expected: Seen, *, timeout: float = 20.0) -> Seen:
    """Look until the VM is as expected, or the deadline has passed; what was seen last.

    The guest's kernel may still be taking a device apart when the last release returns
    (its block device's directory goes after the device itself).
    """
    deadline = asyncio.get_running_loop().time() + timeout
    while (seen := await look(vm)) != expected:
        if asyncio.get_running_loop().time() > deadline:
            break
    return seen


def _dicts(answer: object) -> list[dict[str, Any]]:
    assert isinstance(answer, list), json.dumps(answer)
    return answer


def mount_info(line: str) -> MountInfo:
    """A line of /proc/self/mountinfo, read."""
    before, _, after = line.partition(" - ")
    _, _, _, root, path, options, *propagation = before.split(" ")
    filesystem, device, super_options = after.split(" ", 2)
    return MountInfo(
        path=_unescaped(path),
        device=_unescaped(device),
        root=_unescaped(root),
        filesystem=filesystem,
        options=frozenset(options.split(",")),
        super_options=frozenset(super_options.split(",")),
        propagation=tuple(field.partition(":")[0] for field in propagation),
    )


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field)


def _matches(paths: str) -> list[str]:
    return [path for path in paths.split() if "*" not in path]


def _is_resolved(path: str) -> bool:
    """Whether it is a device's own; that of a link which goes at that moment stays as it is."""
    return not path.startswith("/sys/bus/")


def _scsi(path: str, names: Mapping[str, str]) -> ScsiDevice:
    controller = re.search(r"/0000:00:([0-9a-f]{2})\.0/", path)
    assert controller is not None, path
    address = os.path.basename(path)
    block = names.get(f"/sys/bus/scsi/devices/{address}", "")
    return ScsiDevice(
        int(controller[1], 16) - FIRST_CONTROLLER,
        int(address.rpartition(":")[2]),
        os.path.basename(block),
    )
