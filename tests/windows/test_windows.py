"""What the rig runs its tests on is what it is said to be."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys


async def test_it_is_windows_python() -> None:
    """With Windows' paths, its own event loop, and the ABI of its 64-bit programs."""
    assert (sys.platform, os.name, os.sep) == ("win32", "nt", "\\")
    assert type(asyncio.get_running_loop()).__name__ == "ProactorEventLoop"
    sizes = [ctypes.sizeof(kind) for kind in (ctypes.c_void_p, ctypes.c_long, ctypes.c_wchar)]
    assert sizes == [8, 4, 2]


def test_on_wine() -> None:
    """So what is proved here is proved of Wine's Windows, and of no other."""
    assert hasattr(ctypes.CDLL("ntdll.dll"), "wine_get_version")
