"""What is mounted, as /proc/<pid>/mountinfo tells it (proc(5)).

Read whole and searched as text first: with hundreds of mounts most lines are
never taken apart.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

from hotlun.agent.kernel import check_absent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotlun.agent.kernel import Kernel

_ESCAPE = r"\\([0-7]{3})"


class Mount(NamedTuple):
    """One line: which mount, on which, of device `major:minor`, where, what."""

    id: str
    parent: str
    number: str
    path: str
    filesystem: str
    source: str

    def is_of(self, number: str, node: str) -> bool:
        """Whether it shows the block device `number`, named `node`.

        btrfs gives its mounts numbers of their own; there the source tells.
        """
        return self.number == number or (self.number.startswith("0:") and self.source == node)


def read(kernel: Kernel, process: str) -> str:
    """The mounts that a process sees, as text; empty if it is gone.

    Args:
        process: its directory, as `Kernel.processes` gives it.

    Raises:
        OSError: as `check_absent`.
    """
    path = os.path.join(process, "mountinfo")
    try:
        return kernel.read(path)
    except OSError as error:
        check_absent(error)
        return ""


def mount_of(kernel: Kernel, descriptor: int) -> str:
    """The id of the mount that an open file of our own is on.

    Raises:
        OSError: the file is not open.
    """
    info = kernel.read(os.path.join(kernel.proc, "self/fdinfo", str(descriptor)))
    return info.partition("mnt_id:")[2].split(maxsplit=1)[0]


def stack(text: str, top: str) -> list[Mount]:
    """The mounts that lie on one another at one path, from the id of the one in sight down."""
    mounts: list[Mount] = []
    while True:
        mount = next(parse(text, f"{top} ", at_start=True), None)
        if mount is None or mount in mounts or (mounts and mount.path != mounts[0].path):
            return mounts
        mounts.append(mount)
        top = mount.parent


def mounted_on(text: str, mount: Mount) -> list[Mount]:
    """The mounts that would go with it if it were detached."""
    return [other for other in parse(text, f" {mount.id} ") if other.parent == mount.id]


def parse(text: str, containing: str = "", *, at_start: bool = False) -> Iterator[Mount]:
    """The mounts, oldest first; with `containing`, those whose line has that in it.

    Args:
        at_start: only at the start of the line.
    """
    for line in text.split("\n"):
        if line.startswith(containing) if at_start else containing in line:
            before, _, after = line.partition(" - ")
            fields, more = before.split(" "), after.split(" ")
            if len(fields) >= 6 and len(more) >= 2:
                yield Mount(
                    fields[0],
                    fields[1],
                    fields[2],
                    _unescape(fields[4]),
                    more[0],
                    _unescape(more[1]),
                )


def _unescape(text: str) -> str:
    return re.sub(_ESCAPE, lambda match: chr(int(match[1], 8)), text) if "\\" in text else text
