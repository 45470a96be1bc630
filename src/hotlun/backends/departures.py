"""Who waits for which device to leave the VM, so that QEMU's news of one reaches those alone.

`qemu.qmp` shows every event to every listener, one after another: while n devices leave, each
of n events would be looked at n times.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Departure = asyncio.Future[str]
    """The name of the event, good or bad."""

_NEWS: Final = frozenset({"DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR"})


class Departures:
    """Those of one connection."""

    def __init__(self) -> None:
        self._awaited: dict[str, list[Departure]] = {}

    @contextmanager
    def of(self, device: str) -> Iterator[Departure]:
        """Wait for the first news of the device's removal, from now on."""
        departure: Departure = asyncio.get_running_loop().create_future()
        awaited = self._awaited.setdefault(device, [])
        awaited.append(departure)
        try:
            yield departure
        finally:
            awaited.remove(departure)
            if not awaited:
                self._awaited.pop(device)

    def hear(self, event: Mapping[str, object]) -> None:
        """Tell whom it is for, if it is news of a removal."""
        if event.get("event") not in _NEWS:
            return
        data = event.get("data")
        device = data.get("device") if isinstance(data, dict) else None
        for departure in self._awaited.get(device, ()) if isinstance(device, str) else ():
            if not departure.done():
                departure.set_result(str(event["event"]))
