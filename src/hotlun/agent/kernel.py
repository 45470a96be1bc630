"""Where the kernel shows itself: three roots that a test can move."""

from __future__ import annotations

import errno
import os

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

    def read(self, path: str) -> str:
        """An attribute, without the newline.

        Raises:
            OSError: it is not there, or its device is gone (ENODEV).
        """
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # open() does a lot more than that
        try:
            content = b""
            while True:
                more = os.read(file, 1 << 16)
                if not more:
                    return content.decode("utf-8", "surrogateescape").strip()
                content += more
        finally:
            os.close(file)

    def names(self, path: str) -> list[str]:
        """What is in a directory, sorted; nothing if it is not there or its process is gone.

        Raises:
            OSError: as `check_absent`.
        """
        try:
            return sorted(os.listdir(path))
        except OSError as error:
            check_absent(error)
            return []

    def target(self, path: str) -> str:
        """Where a link in sysfs leads. Such links lead to devices directly, so text will do.

        Resolving every part of the path costs milliseconds in an emulated guest.

        Raises:
            OSError: it is not there, or is no link.
        """
        return os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))

    def processes(self) -> list[str]:
        """The directories of all processes, our own first."""
        pids = sorted((name for name in self.names(self.proc) if name.isdigit()), key=int)
        return [os.path.join(self.proc, pid) for pid in ("self", *pids)]

    def command(self, process: str) -> str:
        """`1234 (bash)`, for a process's directory."""
        try:
            name = self.read(os.path.join(process, "comm"))
        except OSError:
            name = "?"
        return f"{os.path.basename(process)} ({name})"
