"""What can go wrong with a VM of our own: it does not start, it does not answer, it died.

A VM that *cannot* be had here (a tool is missing, another architecture) is an
`UnsupportedError`, like everything else that was refused before it was begun.
"""

from __future__ import annotations

from hotlun.errors import HotlunError


class MachineError(HotlunError):
    """The VM did not start, did not answer or has died; `detail` has QEMU's last words."""


class StaleSnapshotError(MachineError):
    """A snapshot that QEMU does not load, or whose guest does not wake up: take another."""
