"""What the guest's kernel and QEMU say about disks, asked without going through the library."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hotlun.cli.report import CheckFailedError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hotlun.vm import Machine

_LOOK = """
set -- /sys/block/sd*/device/vpd_pg80
[ -e "$1" ] || set --
echo "$@"
echo /sys/class/block/*
exec cat "$@" /proc/self/mountinfo
"""
"""One process for everything: under TCG, starting one costs more than all the rest."""
_SERIAL = re.compile(r"\0.\0([\0-\x24])", re.DOTALL)
"""VPD page 0x80: 0, the page's number, 0, the length of the serial that follows (SPC-4)."""


@dataclass(frozen=True)
class Seen:
    """A VM at one moment, as the guest's kernel and QEMU have it.

    Attributes:
        mounts: the lines of the guest's /proc/self/mountinfo.
        disks: the guest's SCSI disks, as (name, serial).
        block: the guest's block devices, partitions included.
        nodes: QEMU's block nodes.
        devices: QEMU's devices that have an id.
    """

    mounts: tuple[str, ...]
    disks: tuple[tuple[str, str], ...]
    block: tuple[str, ...]
    nodes: tuple[str, ...]
    devices: tuple[str, ...]

    def disk_with(self, serial: str) -> str:
        """The guest's name for the disk of this serial, `""` if it has none."""
        return next((name for name, its in self.disks if its == serial), "")

    def is_in_qemu(self, serial: str) -> bool:
        """Whether QEMU has a node or device of an attachment."""
        return any(name.endswith(serial) for name in (*self.nodes, *self.devices))


@dataclass(frozen=True)
class Place:
    """What is at a path in the guest: a device less its `/dev/`, its filesystem, ro or rw."""

    device: str
    kind: str
    mode: str

    def __str__(self) -> str:
        return f"{self.device}, {self.kind}, {self.mode}"


async def look(vm: Machine) -> Seen:
    """Ask the guest and QEMU's monitor, over ways of their own."""
    nodes = await vm.query("query-named-block-nodes", {"flat": True})
    devices = await vm.query("qom-list", {"path": "/machine/peripheral"})
    pages, block, rest = (await say(vm, _LOOK)).split("\n", 2)
    disks = []
    for page in pages.split():
        header = _SERIAL.match(rest)
        if header is None:
            raise CheckFailedError(f"{page} in the guest is no serial: {rest[:40]!r}")
        end = header.end() + ord(header[1])
        disks.append((page.split("/")[3], rest[header.end() : end]))
        rest = rest[end:]
    return Seen(
        mounts=tuple(rest.splitlines()),
        disks=tuple(disks),
        block=tuple(map(os.path.basename, block.split())),
        nodes=_names(nodes, "node-name"),
        devices=_names(devices, "name"),
    )


async def place(vm: Machine, seen: Seen, path: str) -> Place | None:
    """What is at the path: mounted there, or a link to a device; None if nothing is."""
    for line in reversed(seen.mounts):
        where, there = _parse(line)
        if where == path:
            return there
    linked = await vm.run(
        f"device=$(readlink {shlex.quote(path)}) && device=${{device##*/}} && "
        'read -r read_only <"/sys/class/block/$device/ro" && echo "$device $read_only"'
    )
    if linked.returncode:
        return None
    device, read_only = linked.stdout.split()
    return Place(device, "device", "ro" if read_only == "1" else "rw")


async def existing(vm: Machine, paths: Iterable[str]) -> set[str]:
    """Which of the paths there are in the guest, as whatever."""
    names = " ".join(map(shlex.quote, paths))
    tests = 'if [ -e "$path" ] || [ -L "$path" ]; then echo "$path"; fi'
    return set((await say(vm, f"for path in {names}; do {tests}; done")).splitlines())


async def say(vm: Machine, command: str) -> str:
    """What a command in the guest prints.

    Raises:
        CheckFailedError: it failed.
    """
    done = await vm.run(command)
    if done.returncode:
        raise CheckFailedError(
            f"a command in the guest failed ({done.returncode}): {command.strip()}",
            detail=done.stderr.strip(),
        )
    return done.stdout


def is_running(pid: int) -> bool:
    """Whether the process is there and has not ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            state = file.read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def _names(answer: object, member: str) -> tuple[str, ...]:
    if not isinstance(answer, list):
        raise CheckFailedError(f"QEMU answered no list: {answer!r}")
    return tuple(sorted(str(thing[member]) for thing in answer))


def _parse(line: str) -> tuple[str, Place]:
    """Path and place of a line of mountinfo (proc(5))."""
    before, _, after = line.partition(" - ")
    _, _, _, _, path, options, *_ = before.split(" ")
    filesystem, device, _ = after.split(" ", 2)
    mode = "ro" if "ro" in options.split(",") else "rw"
    path = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), path)
    return path, Place(os.path.basename(device), filesystem, mode)
