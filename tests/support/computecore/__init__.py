"""A computecore.dll of one's own: a real library in C, which checks each call that it gets.

Under Windows it has to be there already, as `computecore.dll`, where hotlun looks for one.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import subprocess
import tempfile
from contextlib import contextmanager
from ctypes import c_char_p, c_int, c_int32, c_void_p
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hotlun.hcs.computecore import ComputeCore

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
SOURCES = [HERE / f"{name}.c" for name in ("text", "json", "vm", "script", "operations")]
FLAGS = (
    *("-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror"),
    *("-fPIC", "-fvisibility=hidden", "-shared", "-pthread"),
)
VM, RUNTIME_ID = "vm-1", "3f2504e0-4f89-11d3-9a0c-0305e82c3301"
DEADLINE_MS = 20_000

_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []
"""With what was built: gone with this process."""


class Call(IntEnum):
    """What can be scripted."""

    OPEN = 0
    CREATE = 1
    MODIFY = 2
    PROPERTIES = 3
    ENUMERATE = 4
    GRANT = 5
    REVOKE = 6


class When(IntEnum):
    """At which moment the script has its say."""

    AT_START = 0
    AT_END = 1
    UNTIL_TOLD = 2
    LATE_WAITS = 3
    AFTERWARDS = 4


class Disk(NamedTuple):
    """An attachment, as the fake has it."""

    controller: int
    lun: int
    path: str
    read_only: bool
    is_unplugged: bool


class State(NamedTuple):
    """What a system has."""

    disks: list[Disk]
    mounts: dict[str, tuple[int, int]]
    grants: set[tuple[str, str]]


class Libraries(NamedTuple):
    """Paths: the one with all, vmcompute's part, and one without the functions for access."""

    core: str
    older: str
    without_access: str


@functools.cache
def build(*flags: str) -> Libraries:
    """Have the system's compiler make them, for as long as this process lives."""
    folder = tempfile.TemporaryDirectory(prefix="hotlun-computecore-")
    _FOLDERS.append(folder)
    core, older, without = (
        str(Path(folder.name, f"{name}.so")) for name in ("computecore", "vmcompute", "without")
    )
    for target, sources in (
        (core, SOURCES),
        (without, ["-DWITHOUT_ACCESS", *SOURCES]),
        (older, [HERE / "vmcompute.c", without, "-Wl,-rpath,$ORIGIN"]),
    ):
        subprocess.run(["cc", *FLAGS, *flags, "-o", target, *map(str, sources)], check=True)
    return Libraries(core, older, without)


class FakeComputeCore:
    """The fake, and what a test does with it.

    Args:
        library: the one with all functions.
        core: what is tested with it; None for what hotlun makes of the library.
    """

    def __init__(self, library: ctypes.CDLL, core: ComputeCore | None = None) -> None:
        self._library = library
        self.core = core or ComputeCore(library, library)
        for name in ("fake_violations", "fake_documents", "fake_state"):
            getattr(library, name).restype = c_void_p
        library.fake_state.argtypes = [c_char_p]
        library.fake_free.argtypes = [c_void_p]
        library.fake_script.argtypes = [c_int, c_int, c_int32, c_char_p, c_int]
        library.fake_finish.argtypes = [c_int32, c_char_p]
        library.fake_attach.argtypes = [c_char_p, c_int, c_int, c_char_p]
        library.fake_tells.argtypes = [c_char_p, c_char_p, c_int]

    def script(
        self, call: Call, when: When, code: int = 0, document: str = "", milliseconds: int = 0
    ) -> None:
        """What is to become of the next call of a kind that has no turn yet."""
        words = document.encode() or None
        self._library.fake_script(call, when, code & 0xFFFFFFFF, words, milliseconds)

    def calm(self) -> None:
        """No call that is yet to come has a turn any more."""
        self._library.fake_calm()

    def finish(self, code: int = 0, document: str = "") -> None:
        """The oldest operation that waits to be told ends."""
        self._library.fake_finish(code & 0xFFFFFFFF, document.encode() or None)

    def wait_pending(self, count: int = 1) -> None:
        """Until so many operations wait to be told."""
        assert self._library.fake_wait_pending(count, DEADLINE_MS)

    def add_system(self, name: str, runtime_id: str = RUNTIME_ID, os_type: str = "Linux") -> None:
        """Another VM that runs."""
        self._library.fake_system(name.encode(), runtime_id.encode(), os_type.encode())

    def terminate(self, name: str = VM) -> None:
        """The VM ends."""
        self._library.fake_terminate(name.encode())

    def attach(self, controller: int, lun: int, path: str) -> None:
        """A disk of the VM's own."""
        self._library.fake_attach(VM.encode(), controller, lun, path.encode())

    def tells(self, connection: Any = None, *, disks: bool = True) -> None:
        """What the service says of the guest, and whether it says anything of disks."""
        text = None if connection is None else json.dumps(connection).encode()
        self._library.fake_tells(VM.encode(), text, disks)

    @property
    def documents(self) -> list[str]:
        """What `modify` was given, in order."""
        return [json.loads(line) for line in self._take("fake_documents").splitlines()]

    @property
    def state(self) -> State:
        """What the VM has."""
        found = json.loads(self._take("fake_state", VM.encode()))
        return State(
            [Disk(c, lun, path, bool(ro), bool(un)) for c, lun, path, ro, un in found["disks"]],
            {path: (controller, lun) for path, controller, lun in found["mounts"]},
            {(vm_id, path) for vm_id, path in found["grants"]},
        )

    def take_violations(self) -> list[str]:
        """What was done that nobody may do; each is told once."""
        return self._take("fake_violations").splitlines()

    @property
    def alive(self) -> dict[str, int]:
        """How many there are that somebody has to close, free or end."""
        names = ("systems", "operations", "strings", "threads")
        return {name: self._library.fake_alive(n) for n, name in enumerate(names)}

    def check(self) -> None:
        """Nothing was breached, and nothing is left open."""
        assert self.take_violations() == []
        assert not any(self.alive.values()), self.alive
        assert self._library.fake_unused_turns() == 0

    def reset(self) -> None:
        """As if nothing had ever been."""
        self._library.fake_reset()
        self.take_violations()

    def _take(self, name: str, *arguments: object) -> str:
        address = getattr(self._library, name)(*arguments)
        try:
            return ctypes.string_at(address).decode("utf-8", "surrogatepass")
        finally:
            self._library.fake_free(address)


def load() -> FakeComputeCore:
    """The fake: as hotlun finds it under Windows, or built here."""
    if os.name == "nt":
        return FakeComputeCore(ctypes.CDLL("computecore.dll"), ComputeCore.load())
    return FakeComputeCore(ctypes.CDLL(build().core))


@contextmanager
def fake_computecore() -> Iterator[FakeComputeCore]:
    """The fake, with a VM that runs: every call was right, and nothing is left, or it fails."""
    fake = load()
    fake.reset()
    fake.add_system(VM)
    try:
        yield fake
        fake.check()
    finally:
        fake.reset()


def sanitized_environment() -> dict[str, str]:
    """In which a Python can load what is built with `-fsanitize=address,undefined`."""
    runtimes = [
        subprocess.run(
            ["cc", f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }
