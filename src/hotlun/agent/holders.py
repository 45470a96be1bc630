"""Who uses a disk, or keeps a mount busy: found out so that a refusal can name them.

A refusal is awaited, and processes can be many, and can have many files: those that
cannot be looked at in a short time are not.
"""

from __future__ import annotations

import os
import re
import stat
import time
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from hotlun.agent import mountinfo, partitions
from hotlun.agent.kernel import check_absent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from hotlun.agent.kernel import Kernel
    from hotlun.agent.mountinfo import Mount

_Found = TypeVar("_Found")

_ENOUGH = 5
"""How many to name."""

_PATIENCE = 1.0
"""Seconds to look at processes."""

_MOST_MAPPED = 1 << 20
"""Bytes to read of what a process has mapped: some ten thousand mappings."""

_NO_DISKS = ("null", "zero", "full", "random", "urandom", "tty", "console", "ptmx")
"""Nodes that are never a disk's (devices.txt in the kernel's documentation)."""

_MAPPING = r"(?m)^\S+ \S+ \S+ ([0-9a-f]+):([0-9a-f]+) \d+ +(/.*)$"
"""A line of /proc/<pid>/maps (proc(5)): a device, in hexadecimal, and a file on it."""


class Opened(NamedTuple):
    """Which block devices are open, by whom.

    Args:
        nodes: each by its device's number (`8:1`), the process's directory, and the path that
            it was opened by. Our own process is left out.
        is_all: whether there was time to look at every process.
        loops: the loop devices in use, each with the path of its file.
    """

    nodes: tuple[tuple[str, str, str], ...] = ()
    is_all: bool = True
    loops: tuple[tuple[str, str], ...] = ()


def users(kernel: Kernel, disk: str) -> list[str]:
    """What uses a disk or one of its partitions, in words; empty if nothing is known to.

    Args:
        disk: its directory in sysfs.
    """
    parts = _parts(kernel, disk)
    found = [user for part in parts for user in _stacked(kernel, part)]
    return _named([*found, *loops(kernel, disk), *_mounts(kernel, parts), *_openers(kernel, disk)])


def loops(kernel: Kernel, disk: str, used: tuple[tuple[str, str], ...] | None = None) -> list[str]:
    """The loop devices on a disk or its partitions, in words.

    Args:
        used: those that there are; None to have a look.
    """
    used = tuple(_loops(kernel)) if used is None else used
    if not used:
        return []
    names = {f"{kernel.dev}/{name}": name for name in map(_name, _parts(kernel, disk))}
    return [f"{names[file]} is part of {loop}" for loop, file in used if file in names]


def openers(kernel: Kernel, disk: str, opened: Opened | None = None) -> list[str]:
    """The processes, less our own, that have a disk's or a partition's node open, in words.

    Args:
        opened: what they have open; None to have a look.
    """
    return _named(_openers(kernel, disk, opened))


def opened(kernel: Kernel) -> Opened:
    """One look at all processes and loop devices."""
    nodes, is_all = _open_nodes(kernel)
    return Opened(tuple(nodes), is_all, tuple(_loops(kernel)))


def _open_nodes(kernel: Kernel) -> tuple[list[tuple[str, str, str]], bool]:
    dev = f"{kernel.dev}/"
    usual = {f"{dev}{name}" for name in _NO_DISKS}
    our_own = f"{kernel.proc}/{os.getpid()}"

    def look(process: str, end: float) -> Iterator[tuple[str, str, str]]:
        if process == our_own:
            return
        for descriptor, path in _descriptors(kernel, process, end):
            # A container's, too. What nearly everybody has open is not asked for its number.
            if path.startswith(dev) and path not in usual:
                number = _number_of_node(descriptor)
                if number:
                    yield number, process, path

    return _at_processes(kernel, look)


def _openers(kernel: Kernel, disk: str, opened: Opened | None = None) -> list[str]:
    found, is_all = (opened.nodes, opened.is_all) if opened else _open_nodes(kernel)
    if not found:  # as mostly
        return []
    numbers = {_number(kernel, part) for part in _parts(kernel, disk)} - {""}
    ours = {process: path for number, process, path in reversed(found) if number in numbers}
    words = [f"process {kernel.command(process)} has {ours[process]} open" for process in ours]
    return _with_doubt(words[::-1], is_all)


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
    found += [f"{loop} is made of {file}" for loop, file in _loops(kernel) if _is_on(mount, file)]
    found += [f"{file} is used as swap" for file in _swaps(kernel) if _is_on(mount, file)]
    namespace = _namespace(os.path.join(kernel.proc, "self"))

    def look(process: str, end: float) -> Iterator[str]:
        use = _use(kernel, process, mount, end, ours=_namespace(process) == namespace)
        if use:
            word, path = use
            yield f"{word} of process {kernel.command(process)}: {path}"

    return _named([*found, *_with_doubt(*_at_processes(kernel, look))])


def _named(found: list[str]) -> list[str]:
    more = len(found) - _ENOUGH
    return [*found[:_ENOUGH], f"and {more} more"] if more > 0 else found


def _parts(kernel: Kernel, disk: str) -> list[str]:
    """A disk's directory in sysfs, and those of its partitions."""
    return [disk, *(f"{disk}/{name}" for name in partitions.names(kernel, disk))]


def _name(device: str) -> str:
    return device.rpartition("/")[2]


def _stacked(kernel: Kernel, device: str) -> Iterator[str]:
    """Devices made of this one (dm, LVM, RAID), btrfs, swap."""
    name = os.path.basename(device)
    for holder in kernel.names(os.path.join(device, "holders")):
        yield f"{name} is part of {holder}{_device_mapper_name(kernel, holder)}"
    btrfs = os.path.join(kernel.sys, "fs/btrfs")
    for filesystem in kernel.names(btrfs):
        if os.path.exists(os.path.join(btrfs, filesystem, "devices", name)):
            yield f"{name} is part of the mounted btrfs {filesystem}"
    if os.path.join(kernel.dev, name) in _swaps(kernel):
        yield f"{name} is used as swap"


def _swaps(kernel: Kernel) -> list[str]:
    """The devices and files that memory is swapped to."""
    try:
        text = kernel.read(os.path.join(kernel.proc, "swaps"))
    except OSError as error:  # a kernel without swap
        check_absent(error)
        return []
    return [line.split()[0] for line in text.splitlines()[1:] if line]


def _loops(kernel: Kernel) -> Iterator[tuple[str, str]]:
    """The loop devices in use, each with the path of its file."""
    virtual = f"{kernel.sys}/devices/virtual/block"  # in class/block are all disks, too
    for name in kernel.names(virtual, "loop"):
        file = f"{virtual}/{name}/loop/backing_file"
        if kernel.exists(file):  # sooner than a failed read
            try:
                yield name, kernel.attribute(file)
            except OSError as error:  # no longer
                check_absent(error)


def _device_mapper_name(kernel: Kernel, holder: str) -> str:
    try:
        return f" ({kernel.read(os.path.join(kernel.sys, 'class/block', holder, 'dm/name'))})"
    except OSError:
        return ""


def _mounts(kernel: Kernel, devices: list[str]) -> list[str]:
    """Mounts of the devices in every mount namespace, each namespace read once."""
    numbers = {_number(kernel, device): os.path.basename(device) for device in devices}
    nodes = {os.path.join(kernel.dev, name): name for name in numbers.values()}
    seen: set[str] = set()

    def look(process: str, _: float) -> Iterator[str]:
        namespace = _namespace(process)
        if not namespace or namespace in seen:
            return
        where = f" for process {kernel.command(process)}" if seen else ""
        seen.add(namespace)
        for mount in mountinfo.parse(mountinfo.read(kernel, process)):
            name = numbers.get(mount.number)
            if name is None and mount.number.startswith("0:"):
                name = nodes.get(mount.source)
            if name is not None:
                yield f"{name} is mounted at {mount.path}{where}"

    return _with_doubt(*_at_processes(kernel, look, ours_first=True))


def _at_processes(
    kernel: Kernel, look: Callable[[str, float], Iterable[_Found]], *, ours_first: bool = False
) -> tuple[list[_Found], bool]:
    """What there is to say of each process, and whether there was time to look at all.

    Args:
        look: is given a process's directory, and when to raise `_OutOfTimeError`.
        ours_first: begin with our own, as `self`.
    """
    end = time.monotonic() + _PATIENCE
    found: list[_Found] = []
    try:
        for process in kernel.processes()[0 if ours_first else 1 :]:
            _check_time(end)
            found += look(process, end)
    except _OutOfTimeError:
        return found, False
    return found, True


def _with_doubt(found: list[str], is_all: bool) -> list[str]:
    if is_all or not found:
        return found
    return [*found, "maybe more, as not every process was looked at"]


class _OutOfTimeError(Exception):
    """There is no time to look any further."""


def _check_time(end: float) -> None:
    if time.monotonic() > end:
        raise _OutOfTimeError


def _use(
    kernel: Kernel, process: str, mount: Mount, end: float, *, ours: bool
) -> tuple[str, str] | None:
    """How a process uses a mount, and which file of it; None if it does not.

    Args:
        ours: whether the process is in our mount namespace. In another one it can have
            files of this one open, but its directories went there with it.
    """
    for descriptor, path in _descriptors(kernel, process, end):
        if _is_on(mount, path) and _mount_of(kernel, descriptor) == mount.id:
            return "an open file", path
    links = [("exe", "the program")]
    if ours:
        links += [("cwd", "the directory"), ("root", "the root")]
    for link, word in links:
        path = _link(os.path.join(process, link))
        if _is_on(mount, path):
            return word, path
    try:
        maps = kernel.read(os.path.join(process, "maps"), _MOST_MAPPED)
    except OSError as error:
        check_absent(error)
        return None
    for major, minor, path in re.findall(_MAPPING, maps):
        number = f"{int(major, 16)}:{int(minor, 16)}"
        # btrfs has numbers of its own, for its mounts and for its files.
        if _is_on(mount, path) and (number == mount.number or number.startswith("0:")):
            return "a mapped file", path
    return None


def _is_on(mount: Mount, path: str) -> bool:
    return path == mount.path or path.startswith(mount.path + "/")


def _descriptors(kernel: Kernel, process: str, end: float) -> Iterator[tuple[str, str]]:
    """A process's open files: the link in /proc, and where it leads."""
    folder = f"{process}/fd"
    for descriptor in kernel.each_name(folder):
        _check_time(end)
        link = f"{folder}/{descriptor}"
        yield link, _link(link)


def _link(path: str) -> str:
    """Where a link of a process leads; `""` if the process is gone, or a thread of the kernel."""
    try:
        return os.readlink(path)
    except OSError as error:
        check_absent(error)
        return ""


def _namespace(process: str) -> str:
    return _link(os.path.join(process, "ns/mnt"))


def _mount_of(kernel: Kernel, descriptor: str) -> str:
    """The mount that an open file was opened through, by its number."""
    process, number = os.path.dirname(os.path.dirname(descriptor)), os.path.basename(descriptor)
    try:
        info = kernel.read(os.path.join(process, "fdinfo", number))
    except OSError as error:
        check_absent(error)
        return ""
    return next((line.split()[1] for line in info.splitlines() if line.startswith("mnt_id:\t")), "")


def _number(kernel: Kernel, device: str) -> str:
    """`8:1`, of a directory in sysfs; `""` if it is gone."""
    try:
        return kernel.attribute(f"{device}/dev")
    except OSError as error:
        check_absent(error)
        return ""


def _number_of_node(path: str) -> str:
    """`8:1`, of what a path leads to; `""` if that is no block device."""
    try:
        status = os.stat(path)
    except OSError as error:
        check_absent(error)
        return ""
    if not stat.S_ISBLK(status.st_mode):
        return ""
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
