"""What a host backend is about, so that each log line and each error can say it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

from hotlun.errors import HotlunError

if TYPE_CHECKING:
    from hotlun.model import Attachment, Disk, Slot

_Error = TypeVar("_Error", bound=HotlunError)


class Errand(NamedTuple):
    """One call of a backend.

    Args:
        operation: its verb, as errors have it.
        disk: the disk concerned, if there is one.
        slot: the slot concerned, if there is one.
        serial: the attachment's, `""` if there is none.
    """

    operation: str
    disk: Disk | None = None
    slot: Slot | None = None
    serial: str = ""

    @classmethod
    def on(cls, attachment: Attachment, operation: str) -> Errand:
        """An errand on an attachment."""
        return cls(operation, attachment.disk, attachment.slot, attachment.serial)

    def __str__(self) -> str:
        text = self.operation
        if self.disk is not None:
            text += f" {self.disk}"
        if self.slot is not None:
            text += f" at slot {self.slot}"
        if self.serial:
            text += f" as {self.serial}"
        return text

    def error(
        self, kind: type[_Error], message: str, *, code: int | str | None = None, detail: str = ""
    ) -> _Error:
        """An error that tells of this errand."""
        return kind(
            f"cannot {self}: {message}",
            operation=self.operation,
            slot=self.slot,
            disk=self.disk,
            code=code,
            detail=detail,
        )
