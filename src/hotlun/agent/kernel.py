"""Where the kernel shows itself: three roots that a test can move."""

from __future__ import annotations

import os


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
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().strip()

    def names(self, path: str) -> list[str]:
        """What is in a directory, sorted; nothing if it is not there or its process is gone."""
        try:
            return sorted(os.listdir(path))
        except OSError:
            return []

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
