"""What QEMU's events mean to us: the table from QMP's names to `hotlun.events`.

What is not here, or is about a device that we do not know, is nobody's news.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

from hotlun.events import (
    DiskFailed,
    GuestReset,
    GuestShutdown,
    UnplugRefused,
    VMPaused,
    VMResumed,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hotlun.events import Event
    from hotlun.model import Attachment

    Data = Mapping[str, object]

_log = logging.getLogger("hotlun.qemu")


class News:
    """Turns QEMU's events into ours.

    Args:
        find: a device's or block node's id -> the attachment that it is, if it is ours.
    """

    def __init__(self, find: Callable[[str], Attachment | None]) -> None:
        self._find = find
        self._why_paused = ""
        """What is going to be the reason of the next STOP."""
        self._table: Mapping[str, Callable[[Data], Event | None]] = {
            "RESET": lambda data: GuestReset(data.get("guest") is True),
            "SHUTDOWN": lambda data: GuestShutdown(
                data.get("guest") is True, _text(data, "reason")
            ),
            "STOP": self._paused,
            "RESUME": self._resumed,
            "DEVICE_UNPLUG_GUEST_ERROR": self._unplug_refused,
            "BLOCK_IO_ERROR": self._disk_failed,
            "GUEST_PANICKED": self._panicked,
            "WATCHDOG": self._watched,
        }

    def of(self, message: Mapping[str, object]) -> Event | None:
        """Our event for one of QEMU's, if it is news."""
        tell = self._table.get(str(message.get("event")))
        if tell is None:
            return None
        data = message.get("data")
        event = tell(cast("Data", data) if isinstance(data, dict) else {})
        _log.debug("QEMU says: %s", message)
        return event

    def _paused(self, _: Data) -> Event:
        reason, self._why_paused = self._why_paused, ""
        return VMPaused(reason)

    def _resumed(self, _: Data) -> Event:
        self._why_paused = ""
        return VMResumed()

    def _unplug_refused(self, data: Data) -> Event | None:
        attachment = self._find(_text(data, "device"))
        return UnplugRefused(attachment) if attachment else None

    def _disk_failed(self, data: Data) -> Event | None:
        # The device's own word for itself is empty where it has been given a node.
        names = [_text(data, key).rpartition("/")[2] for key in ("node-name", "device", "qom-path")]
        attachment = next(filter(None, map(self._find, names)), None)
        operation, no_space = _text(data, "operation"), data.get("nospace") is True
        pauses, reason = data.get("action") == "stop", _text(data, "reason")
        if pauses:
            where = (
                f"the disk {attachment.disk} at slot {attachment.slot}"
                if attachment
                else f"the VM's own disk {next(filter(None, names), '')}".rstrip()
            )
            cure = (
                "the host has no space left for it; make room, then `cont`"
                if no_space
                else f"{reason or 'no reason given'}; mend the disk's storage, then `cont`"
            )
            self._why_paused = f"a {operation} of {where} failed: {cure}"
        if attachment is None:
            return None
        return DiskFailed(attachment, operation, no_space, pauses, reason)

    def _panicked(self, data: Data) -> None:
        if data.get("action") == "pause":
            self._why_paused = "the guest's kernel has panicked; look at its console, then reset it"

    def _watched(self, data: Data) -> None:
        if data.get("action") == "pause":
            self._why_paused = "the guest did not feed its watchdog; see what it does, then `cont`"


def _text(data: Data, key: str) -> str:
    value = data.get(key)
    return value if isinstance(value, str) else ""
