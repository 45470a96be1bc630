"""Whether a process grows while it does the same over and over."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from typing import NamedTuple

_PAGE = os.sysconf("SC_PAGE_SIZE")
_trim_heap = ctypes.CDLL(None).malloc_trim

THREADS_MORE = 2
"""Lanes keep up to sixteen, and the warm-up may have come to fewer at the same time."""
_MEMORY_MORE = 16 << 20
_OBJECTS_MORE = 2000


class Size(NamedTuple):
    """What a process has of all that can leak."""

    threads: int
    files: int
    memory: int
    """Bytes that are resident and in use: what one huge input has needed is free again, and
    would be resident still."""
    objects: int
    """Those that Python's collector knows of."""

    @classmethod
    def now(cls) -> Size:
        gc.collect()
        _trim_heap(0)
        with open("/proc/self/statm") as file:
            memory = int(file.read().split()[1]) * _PAGE
        return cls(
            threading.active_count(),
            len(os.listdir("/proc/self/fd")),
            memory,
            len(gc.get_objects()),
        )

    def __str__(self) -> str:
        return (
            f"{self.threads} threads, {self.files} files, {self.memory / (1 << 20):.1f} MiB, "
            f"{self.objects} objects"
        )

    def grown(self, before: Size) -> list[str]:
        """What of it has grown beyond what comes and goes."""
        limits = Size(THREADS_MORE, 0, _MEMORY_MORE, _OBJECTS_MORE)
        return [
            f"{name} grew from {old} to {new}"
            for name, old, new, more in zip(self._fields, before, self, limits, strict=True)
            if new > old + more
        ]
