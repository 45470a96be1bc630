"""Who a Mount is held for: free text, or a process that can be seen to have ended.

`pid:1234` names a process, `pid:` this one. Numbers are used again, so what is kept is
also when the process was born (proc(5): field 22 of /proc/PID/stat, clock ticks since the
host's boot); a number that another process has by now is a dead owner's. Where there is no
/proc, on Windows for instance, owners are free text alone.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import Final, NamedTuple

from hotlun.errors import UnsupportedError

_PROC: Final = "" if os.name == "nt" else "/proc"
_PROCESS = re.compile(r"pid:(\d*)")


class Owner(NamedTuple):
    """A holder's name; of a process, also when it was born."""

    name: str = ""
    born: int | None = None

    @classmethod
    def named(cls, name: str, proc: str = _PROC) -> Owner:
        """Whom the text names.

        Args:
            name: the text.
            proc: where processes are to be seen.

        Raises:
            TypeError: it is no text.
            ValueError: it names a process that does not exist.
            UnsupportedError: it names a process, and processes are not to be seen here.
        """
        if not isinstance(name, str):
            raise TypeError(f"owner is a string: {name!r}")
        if not name:
            return NOBODY
        if not name.startswith("pid:"):
            return cls(name)
        match = _PROCESS.fullmatch(name)
        if match is None:
            raise ValueError(f"an owner that is a process is pid: or pid:NUMBER, not {name!r}")
        if not os.path.isdir(proc):
            raise UnsupportedError(
                "an owner cannot be a process here, as there is no /proc to see whether it lives:"
                f" give an owner of another name than {name!r}, and release what it holds by that"
            )
        pid = int(match[1] or os.getpid())
        born = _birth(pid, proc)
        if born is None:
            raise ValueError(f"no process {pid} runs here to be an owner")
        return cls(f"pid:{pid}", born)

    @classmethod
    def read(cls, name: object, born: object) -> Owner:
        """What was written down of one.

        Raises:
            ValueError: it is none.
        """
        if not isinstance(name, str) or (born is not None and type(born) is not int):
            raise ValueError("an owner that is none")
        if born is not None and not re.fullmatch(r"pid:[0-9]{1,20}", name):
            raise ValueError(f"an owner that was born and is no process: {name[:40]!r}")
        return cls(name, born)

    def has_ended(self, proc: str = _PROC) -> bool:
        """Whether it is a process, and that is seen to have ended."""
        if self.born is None or not os.path.isdir(proc):
            return False
        return _birth(int(self.name[len("pid:") :]), proc) != self.born


def this_process() -> str:
    """The name of this process as an owner."""
    return f"pid:{os.getpid()}"


NOBODY = Owner()
"""Of a Mount that was added without saying whom it is for."""


def _birth(pid: int, proc: str) -> int | None:
    """When a process was born; None if it has ended, reaped or not."""
    with contextlib.suppress(OSError, ValueError), open(f"{proc}/{pid}/stat", "rb") as file:
        # The second field is the program's name, in parentheses, and may hold anything.
        state, *fields = file.read().rpartition(b")")[2].split()
        return None if state in b"ZX" else int(fields[18])
    return None
