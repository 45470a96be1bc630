"""The compute service's library as Windows loads it: from where, and freed by whom.

The library is the tests' own (tests/support/computecore), in the place of Windows'. What it is
asked and answers is test_computecore's; here it is what only Windows' loader and heap can show.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_size_t, c_uint32, c_void_p, c_wchar_p
from typing import TYPE_CHECKING

import pytest
from support.computecore import FakeComputeCore, fake_computecore

from hotlun.hcs.computecore import ComputeCore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def fake() -> Iterator[FakeComputeCore]:
    """The library, as hotlun loads it."""
    with fake_computecore() as fake:
        yield fake


def test_only_windows_own_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of that name in the current folder is not even looked at."""
    for name in ("computecore.dll", "vmcompute.dll"):
        (tmp_path / name).write_bytes(b"no library")
    monkeypatch.chdir(tmp_path)
    path = ctypes.create_unicode_buffer(1024)
    ask = ctypes.CDLL("kernel32.dll").GetModuleFileNameW
    ask.argtypes = (c_void_p, c_wchar_p, c_uint32)
    assert ask(ComputeCore.load()._core._handle, path, len(path))
    assert os.path.dirname(path.value).lower() == r"c:\windows\system32"


def test_every_result_goes_back_to_windows(fake: FakeComputeCore) -> None:
    """What Windows' heap has handed out is freed there: 300 times 400 KB leave nothing."""
    before = _held()
    for _ in range(300):
        fake.reset()  # it keeps what was closed until then
        fake.add_system("x" * 200_000)
        assert len(fake.core.enumerate("{}")) > 200_000
    assert _held() - before < 30_000_000


class _Counters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of psapi.h."""

    _fields_ = (
        ("cb", c_uint32),
        ("PageFaultCount", c_uint32),
        *((name, c_size_t) for name in ("PeakWorkingSetSize", "WorkingSetSize")),
        *((f"Quota{number}", c_size_t) for number in range(4)),
        *((name, c_size_t) for name in ("PagefileUsage", "PeakPagefileUsage")),
    )


def _held() -> int:
    """Bytes of memory that this process has of Windows."""
    kernel = ctypes.CDLL("kernel32.dll")
    kernel.GetCurrentProcess.restype = c_void_p
    ask = kernel.K32GetProcessMemoryInfo
    ask.argtypes = (c_void_p, c_void_p, c_uint32)
    counters = _Counters(cb=ctypes.sizeof(_Counters))
    assert ask(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.cb)
    return int(counters.WorkingSetSize)
