"""The agent as shipped, killed after a step of its work. Run in a guest, in the agent's place.

A step is a call through which the agent changes anything outside itself: a system call
about mounts or directories, an order to the device mapper or to sysfs, a program that
begins, works, ends. A request says after which of its steps the agent is to be killed
(`KillAfter`, which the agent itself passes over), and an answer says which steps there
were (`Steps`). The first one of any request is that it was received.

What is killed is a fork of a process that has loaded the agent and done nothing else: a
new one is there in a hundredth of the time that an emulated guest needs to start Python.
"""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import stat
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

SHIPPED = "/run/hotlun/shipped.pyz"
"""Where the agent's file was moved to."""

sys.path.insert(0, SHIPPED)

from hotlun.agent import __main__ as agent  # noqa: E402
from hotlun.agent import keyring, links, programs, server, syscalls  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotlun.bridge.documents import Fields
    from hotlun.bridge.messages import ModifyRequest

_NO_FRAME = bytes(16)
"""Has no size, so the host gives up its connection."""

_MOUNTING = (
    *("mount", "unmount", "detach", "fsopen", "set_parameter", "create_superblock"),
    *("fsmount", "move_mount", "uncovered"),
)
_FILES = ("mkdir", "rmdir", "symlink", "unlink", "setxattr", "removexattr", "pwrite")

_DEVICE_MAPPER = {3: "create", 4: "remove", 6: "resume", 9: "load", 10: "clear"}
_BLKRRPART = 0x125F


class Trap:
    """Counts the steps of the request in hand, and springs at one of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._armed = False
        self._kill_after = -1
        self.steps: list[str] = []

    def arm(self, kill_after: int) -> None:
        """From here on steps count, from 0.

        Args:
            kill_after: the last step of this process's life; -1 for none.
        """
        self.steps, self._kill_after, self._armed = [], kill_after, True
        self.step("received")

    def disarm(self) -> list[str]:
        """The request is done; the steps that it took."""
        self._armed = False
        return self.steps

    def step(self, name: str) -> None:
        """One was done."""
        with self._lock:
            if self._armed:
                self.steps.append(name)
                if len(self.steps) > self._kill_after >= 0:
                    os.kill(os.getpid(), signal.SIGKILL)


TRAP = Trap()
_PORT = links.Port


def main() -> int:
    """Have an agent serve, and the next one when that was killed; the status if one ends."""
    set_traps()
    while True:
        child = os.fork()
        if not child:
            os._exit(agent.main(sys.argv[1:]))
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            return os.WEXITSTATUS(status)
        if links.Port is _PORT:
            _replace(links, "Port", _inherited)


def set_traps() -> None:
    """Put a step behind everything that the agent does."""
    for name in _MOUNTING:
        _replace(syscalls, name, _counted)
    for name in _FILES:
        _replace(os, name, _counted)
    _replace(os, "write", _counted_if_order)
    _replace(fcntl, "ioctl", _counted_if_change)
    _replace(keyring, "_libc", _Keyring)
    _replace(subprocess, "Popen", lambda name, original: _Program)
    _replace(programs, "_read", _counted_before)
    _replace(server, "ModifyRequest", _Requests)
    _replace(server, "_outcome", _reported)


def _replace(owner: Any, name: str, wrapper: Callable[[str, Any], Any]) -> None:
    setattr(owner, name, wrapper(name, getattr(owner, name)))


def _counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        TRAP.step(f"{name}({', '.join(map(_shown, args))})")
        return result

    return call


def _shown(argument: object) -> str:
    return repr(argument) if len(repr(argument)) < 80 else "..."


def _counted_if_order(name: str, original: Callable[..., int]) -> Callable[..., int]:
    """Answers are written to a port, orders to files in sysfs."""

    def call(file: int, data: bytes) -> int:
        written = original(file, data)
        if stat.S_ISREG(os.fstat(file).st_mode):
            TRAP.step(f"{name}({os.readlink(f'/proc/self/fd/{file}')}, {data!r})")
        return written

    return call


def _counted_if_change(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """The device mapper is asked more often than it is told."""

    def call(file: int, request: int, *more: Any) -> Any:
        result = original(file, request, *more)
        command = _DEVICE_MAPPER.get(request & 0xFF, "") if request >> 8 & 0xFF == 0xFD else ""
        if command or request == _BLKRRPART:
            TRAP.step(f"{name}({command or 'BLKRRPART'})")
        return result

    return call


def _counted_before(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """A program has been given all that it gets, and is at work."""

    def call(*args: Any) -> Any:
        TRAP.step("a program is at work")
        return original(*args)

    return call


class _Keyring:
    """libc, whose one function that is used here is syscall(2)."""

    def __init__(self, name: str, original: Any) -> None:
        self.syscall = _counted("syscall", original.syscall)


class _Program(subprocess.Popen):  # type: ignore[type-arg]  # no subscript in 3.8, no need here
    """A program whose beginning and end are steps."""

    def __init__(self, command: list[str], **kwargs: Any) -> None:
        super().__init__(command, **kwargs)
        TRAP.step(f"{os.path.basename(command[0])} has begun")

    def wait(self, timeout: float | None = None) -> int:
        status = super().wait(timeout)
        TRAP.step(f"a program has ended with {status}")
        return status


class _Requests:
    """Reads requests as ModifyRequest does, and what they say to us."""

    def __init__(self, name: str, original: type[ModifyRequest]) -> None:
        self._original = original

    def read(self, document: Fields) -> ModifyRequest:
        request = document.fields("Request")
        TRAP.arm(request.integer("KillAfter", minimum=-1, maximum=1 << 16, default=-1))
        return self._original.read(document)


def _reported(name: str, original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def call(*args: Any) -> dict[str, Any]:
        answer = original(*args)
        return {**answer, "Steps": TRAP.disarm()}

    return call


def _inherited(name: str, original: Callable[[int, int], links.Port]) -> Callable[..., links.Port]:
    """The host does not see that an agent is gone. Its successor says so, when it can be reached.

    Said any earlier, what the host sends next would come while nobody has the port open, or
    the one who is to close it, and be lost.
    """

    def opened(source: int, sink: int) -> links.Port:
        port = original(source, sink)
        os.write(sink, _NO_FRAME)
        return port

    return opened


if __name__ == "__main__":
    sys.exit(main())
