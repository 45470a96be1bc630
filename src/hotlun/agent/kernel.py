"""Where the kernel shows itself: three roots that a test can move."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_PAGE = 4096
"""Bytes, of the smallest page there is."""

_SHORTAGES = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM))


def check_absent(error: OSError) -> None:
    """Let an error pass for "it is not there", unless it tells of us alone.

    Short of descriptors or memory nothing can be looked at; an agent that took that for
    an answer would call every disk unmounted and unplugged.

    Raises:
        OSError: that error.
    """
    if error.errno in _SHORTAGES:
        raise error


class Kernel:
    """The file systems by which the kernel tells about devices, mounts and processes."""

    def __init__(self, sys: str = "/sys", proc: str = "/proc", dev: str = "/dev") -> None:
        self.sys = sys
        self.proc = proc
        self.dev = dev

    def attribute(self, path: str) -> str:
        """An attribute in sysfs, without the newline: one read, as none is over a page.

        Raises:
            OSError: it is not there, or its device is gone (ENODEV).
        """
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # open() does a lot more than that
        try:
            return os.read(file, _PAGE).decode("utf-8", "surrogateescape").strip()
        finally:
            os.close(file)

    def read(self, path: str, limit: float = float("inf")) -> str:
        """A file, without the newline at its end.

        Args:
            limit: bytes after which to read no more of it.

        Raises:
            OSError: it is not there, or what it tells of is gone.
        """
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            content = b""
            while True:
                more = os.read(file, 1 << 16) if len(content) < limit else b""
                if not more:
                    return content.decode("utf-8", "surrogateescape").strip()
                content += more
        finally:
            os.close(file)

    def names(self, path: str, stem: str = "") -> list[str]:
        """What is in a directory, sorted; nothing if it is not there or its process is gone.

        Args:
            stem: what the names begin with, others being left out.

        Raises:
            OSError: as `check_absent`.
        """
        names = self._listed(path)
        return sorted([name for name in names if name.startswith(stem)] if stem else names)

    def exists(self, path: str) -> bool:
        """Whether there is something.

        Raises:
            OSError: as `check_absent`.
        """
        try:
            os.stat(path)
        except OSError as error:
            check_absent(error)
            return False
        return True

    def each_name(self, path: str) -> Iterator[str]:
        """As `names`, but one by one and in no order: where there can be a million."""
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    yield entry.name
        except OSError as error:
            check_absent(error)

    def target(self, path: str) -> str:
        """Where a link in sysfs leads. Such links lead to devices directly, so text will do.

        Resolving every part of the path costs milliseconds in an emulated guest.

        Raises:
            OSError: it is not there, or is no link.
        """
        link = os.readlink(path)
        up = link.count("../")  # which it begins with; normpath would take most of the time
        return os.path.join(path.rsplit("/", up + 1)[0], link[3 * up :])

    def processes(self) -> list[str]:
        """The directories of all processes, our own first, less the kernel's threads.

        They have no files, and are most of the processes of a small guest.
        """
        threads = self._threads()
        names = set(self._listed(self.proc)) - threads  # most of them, before each is looked at
        pids = [int(name) for name in names if name.isdigit()]
        return [f"{self.proc}/{pid}" for pid in ("self", *sorted(pids))]

    def _listed(self, path: str) -> list[str]:
        try:
            return os.listdir(path)
        except OSError as error:
            check_absent(error)
            return []

    def _threads(self) -> set[str]:
        """The kernel's own threads, as far as it says (CONFIG_PROC_CHILDREN): kthreadd's children.

        That has the number 2, except where a container's processes are numbered anew. Unlike
        a program it has no file that it was started from.
        """
        try:
            os.readlink(f"{self.proc}/2/exe")
        except OSError as error:
            check_absent(error)
        else:
            return set()
        try:
            return set(self.read(f"{self.proc}/2/task/2/children").split())
        except OSError as error:
            check_absent(error)
            return set()

    def command(self, process: str) -> str:
        """`1234 (bash)`, for a process's directory."""
        try:
            name = self.read(os.path.join(process, "comm"))
        except OSError:
            name = "?"
        return f"{os.path.basename(process)} ({name})"
