"""Who has a disk's node open, asked by many at once: one look at all processes serves them.

A look costs milliseconds, more with every process, and disks are often let go by the dozen.
They are asked about one shortly after the other, so whoever is to look waits for that.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from hotlun.agent import holders

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotlun.agent.holders import Opened
    from hotlun.agent.kernel import Kernel


_QUIET = 6
"""Times to give way without anybody's coming. Each costs microseconds, and lets another thread
get to its next system call, of which there are about so many before it asks."""


def _give_way() -> None:
    time.sleep(0)


class Openers:
    """Looks at the processes and loop devices, for whoever asks meanwhile.

    Args:
        kernel: where it shows them.
        look: has the look.
        give_way: lets other threads go on for a moment.
    """

    def __init__(
        self,
        kernel: Kernel,
        look: Callable[[Kernel], Opened] = holders.opened,
        give_way: Callable[[], None] = _give_way,
    ) -> None:
        self._kernel = kernel
        self._look_at = look
        self._give_way = give_way
        self._changed = threading.Condition()
        self._is_somebodys = False
        """Whether somebody is about to have a look, or has one."""
        self._came = 0
        """How often somebody has begun to wait."""
        self._begun = 0
        """How many looks."""
        self._ended = 0
        self._seen = holders.Opened()
        """By the last look that ended."""

    def of(self, disk: str) -> list[str]:
        """The loop devices and processes, less our own, that have it or a part open, in words.

        What is told was seen after this was called, never before.

        Args:
            disk: its directory in sysfs.
        """
        seen = self._seen_now()
        # Partitions are looked for after that: somebody may have added one meanwhile.
        return [
            *holders.loops(self._kernel, disk, seen.loops),
            *holders.openers(self._kernel, disk, seen),
        ]

    def _seen_now(self) -> Opened:
        with self._changed:
            wanted = self._begun + 1  # one that is under way may have gone past already
            while self._is_somebodys and self._ended < wanted:
                self._came += 1
                self._changed.wait()
            if self._ended >= wanted:
                return self._seen
            self._is_somebodys = True
        seen = None
        try:
            self._let_others_come()
            with self._changed:
                self._begun += 1
            seen = self._look_at(self._kernel)
        finally:
            with self._changed:
                self._is_somebodys = False
                if seen is None:
                    self._begun = self._ended  # as if it had not begun: somebody else has to
                else:
                    self._seen = seen
                    self._ended = self._begun
                self._changed.notify_all()
        return seen

    def _let_others_come(self) -> None:
        """Give way as long as somebody comes to ask: one look will do for them, too."""
        quiet = 0
        while quiet < _QUIET:
            came = self._came
            self._give_way()
            quiet = quiet + 1 if self._came == came else 0
