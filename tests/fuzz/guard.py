"""A second lock on the door: while the agent runs here, this process makes no such calls.

The first is `loading`, which gives the agent no module to make them by. What this
interpreter tells its audit hooks of (sys.addaudithook) is refused to all threads.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

from fuzz.guest.errors import StrayError

if TYPE_CHECKING:
    from collections.abc import Iterator

_FORBIDDEN = frozenset(
    (
        *("ctypes.dlopen", "ctypes.dlsym", "ctypes.dlsym/handle", "fcntl.fcntl", "fcntl.ioctl"),
        *("os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.link", "os.mkdir"),
        *("os.posix_spawn", "os.remove", "os.removexattr", "os.rename", "os.rmdir"),
        *("os.setxattr", "os.spawn", "os.symlink", "os.system", "os.truncate"),
        *("shutil.rmtree", "socket.bind", "socket.connect", "subprocess.Popen"),
    )
)
_is_kept = False


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Refuse such calls for the length of the block."""
    global _is_kept
    if not _hook_is_there:
        _add_hook()
    _is_kept = True
    try:
        yield
    finally:
        _is_kept = False


_hook_is_there = False


def _add_hook() -> None:
    """It cannot be taken away again."""
    global _hook_is_there
    sys.addaudithook(_audit)
    _hook_is_there = True


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _is_kept and (event in _FORBIDDEN or (event == "open" and _writes(arguments))):
        raise StrayError(f"{event} {arguments}, and it came to this machine")


def _writes(arguments: tuple[Any, ...]) -> bool:
    path, _, flags = arguments
    if isinstance(path, (str, bytes)) and os.fsdecode(path).startswith(("/dev/", "/sys/")):
        return True
    return bool(flags & (os.O_ACCMODE | os.O_CREAT | os.O_PATH))
