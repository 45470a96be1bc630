"""The system calls that the agent makes for a request, recorded once and made again without it.

Every way out of the agent's code into the kernel is a function of `os` or `fcntl`, or one of
libc's in its module `syscalls`; those are wrapped while it does what it is asked, here in this
process. Replayed in the same order they get the same descriptors, as the kernel gives the
lowest that is free. For requests that need no program.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from typing import TYPE_CHECKING, Any

from hotlun.agent import syscalls
from hotlun.agent.devmapper import DeviceMapper
from hotlun.agent.disks import Disks
from hotlun.agent.kernel import Kernel
from hotlun.agent.mappings import Mappings
from hotlun.agent.mounts import Mounts
from hotlun.agent.scsi import ScsiDisks
from hotlun.agent.settings import DiskSettings, Slot
from hotlun.agent.threads import Threads
from hotlun.agent.uevents import Uevents
from hotlun.bridge.documents import Fields

if TYPE_CHECKING:
    from collections.abc import Callable

    Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

_OS = (
    *("open", "close", "read", "write", "pread", "lseek", "stat", "fstat", "access"),
    *("listdir", "scandir", "readlink", "mkdir", "rmdir", "symlink", "unlink"),
    *("setxattr", "getxattr", "removexattr"),
)
_SYSCALLS = (
    *("_openat2", "_open_tree", "_move_mount"),
    *("_fsopen", "_fsconfig", "_fsmount", "_statx"),
)
_LIBC = ("mount", "umount2", "sync_file_range")


class Recorder:
    """An agent in this process, less its server, which nothing ever happens to."""

    def __init__(self) -> None:
        kernel = Kernel()
        self._silence, source = socket.socketpair()
        uevents = Uevents(source)
        mappings = Mappings(kernel, DeviceMapper(kernel), uevents)
        scsi = ScsiDisks(kernel, uevents, Threads("order"))
        self._disks = Disks(kernel, scsi, mappings, Mounts(kernel))

    def record(self, request: Any) -> list[Call]:
        """Have it done; by which calls."""
        calls: list[Call] = []
        with contextlib.ExitStack() as wrapped:
            for owner, names in (
                (os, _OS),
                (fcntl, ("ioctl",)),
                (syscalls, _SYSCALLS),
                (syscalls._libc, _LIBC),
            ):
                for name in names:
                    _wrap(owner, name, calls, wrapped)
            self._do(request)
        return calls

    def _do(self, request: Any) -> None:
        fields = Fields(request["Settings"])
        if request["ResourceType"] == "SCSIDevice":
            self._disks.unplug(Slot.read(fields))
        elif request["RequestType"] == "Add":
            self._disks.mount(DiskSettings.read(fields, adding=True), lambda: True)
        else:
            self._disks.unmount(DiskSettings.read(fields, adding=False))


def replay(calls: list[Call]) -> None:
    """Make the calls again. Those that fail do so as they did."""
    suppressed = contextlib.suppress(OSError)
    for function, arguments, more in calls:
        with suppressed:
            function(*arguments, **more)


def copied(calls: list[Call]) -> list[Call]:
    """For one replay: the kernel writes into some of the arguments."""
    return [
        (function, tuple(bytearray(a) if isinstance(a, bytearray) else a for a in arguments), more)
        for function, arguments, more in calls
    ]


def _wrap(owner: Any, name: str, calls: list[Call], stack: contextlib.ExitStack) -> None:
    function = getattr(owner, name)

    def wrapper(*arguments: Any, **more: Any) -> Any:
        calls.extend(copied([(function, arguments, more)]))
        return function(*arguments, **more)

    setattr(owner, name, wrapper)
    stack.callback(setattr, owner, name, function)
