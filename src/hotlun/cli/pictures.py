"""Pictures for a terminal: the map of a VM's slots, and the table of who shares what.

They say the same without colours and, where the terminal knows no others, with
ASCII characters.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from hotlun.slots import SlotState

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console, ConsoleOptions, RenderResult

    from hotlun.slots import SlotStatus

_GROUP = 8
"""LUNs between two gaps, so that they can be counted."""
_LABEL = 4
"""Columns for a controller's number. With it, 64 LUNs take 75 columns."""


class _Mark(NamedTuple):
    sign: str
    ascii_sign: str
    style: str


_MARKS = {
    SlotState.FREE: _Mark("·", ".", "dim"),
    SlotState.TAKEN: _Mark("■", "#", "bold green"),
    SlotState.RESERVED: _Mark("□", "=", "yellow"),
    SlotState.QUARANTINED: _Mark("✗", "!", "bold red"),
}


class SlotMap:
    """A row for each controller, a character for each LUN, and a legend that counts.

    Args:
        slots: what `Manager.slots()` returns.
    """

    def __init__(self, slots: Iterable[SlotStatus]) -> None:
        self._slots = tuple(slots)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = [
            tuple(row)
            for _, row in itertools.groupby(self._slots, lambda status: status.slot.controller)
        ]
        yield Text("LUN".ljust(_LABEL) + _ruler(len(rows[0])), style="dim", no_wrap=True)
        for controller, row in enumerate(rows):
            line = Text(f"{controller}".ljust(_LABEL), no_wrap=True)
            for lun, status in enumerate(row):
                line.append(" " if lun and not lun % _GROUP else "")
                line.append(*_mark(status.state, options))
            yield line
        yield self._legend(options)

    def _legend(self, options: ConsoleOptions) -> Text:
        counts = Counter(status.state for status in self._slots)
        legend = Text(" " * _LABEL, no_wrap=True)
        for state in SlotState:
            legend.append(*_mark(state, options))
            legend.append(f" {state} {counts[state]}   ")
        return legend


def _ruler(luns: int) -> str:
    return " ".join(str(lun).ljust(_GROUP) for lun in range(0, luns, _GROUP)).rstrip()


def _mark(state: SlotState, options: ConsoleOptions) -> tuple[str, str]:
    mark = _MARKS[state]
    return (mark.ascii_sign if options.ascii_only else mark.sign), mark.style


class Share(NamedTuple):
    """A disk at a guest path, and who has it there.

    Args:
        disk: what it is called on the host.
        slot: where it is attached.
        device: what the guest calls the disk, or the partition.
        path: where it is in the guest.
        seen: what the guest says it is there: `ext4, rw`.
        holders: who shares it.
    """

    disk: str
    slot: str
    device: str
    path: str
    seen: str
    holders: Sequence[str]


def share_table(shares: Iterable[Share]) -> Table:
    """Who shares what, a row for each guest mount."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for title in ("disk", "slot", "device", "guest path", "as", "shared by"):
        table.add_column(title, no_wrap=title == "guest path", overflow="fold")
    for share in shares:
        holders = Text(", ".join(share.holders), style="cyan" if len(share.holders) > 1 else "")
        table.add_row(
            Text(share.disk, style="bold"),
            share.slot,
            share.device,
            share.path,
            share.seen,
            holders,
        )
    return table
