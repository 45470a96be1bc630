"""Who has a disk's node open, asked by many at once: one look at all processes serves them.

A look costs milliseconds, more with every process, and disks are often let go by the dozen.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from hotlun.agent import holders

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotlun.agent.holders import Opened
    from hotlun.agent.kernel import Kernel


class Openers:
    """Looks at the processes and loop devices, for whoever asks meanwhile.

    Args:
        kernel: where it shows them.
        look: has the look.
    """

    def __init__(self, kernel: Kernel, look: Callable[[Kernel], Opened] = holders.opened) -> None:
        self._kernel = kernel
        self._look_at = look
        self._changed = threading.Condition()
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
            while self._begun != self._ended and self._ended < wanted:
                self._changed.wait()
            if self._ended >= wanted:
                return self._seen
            self._begun += 1
        seen = None
        try:
            seen = self._look_at(self._kernel)
        finally:
            with self._changed:
                if seen is None:
                    self._begun -= 1  # as if it had not begun: somebody else has to
                else:
                    self._seen = seen
                    self._ended = self._begun
                self._changed.notify_all()
        return seen
