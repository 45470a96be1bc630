"""What a survey asks for, read with suspicion, and what it is answered (`FEATURE_SURVEY`).

The members are those of the requests that mount, as far as they tell which device is to be
where. What only says how it is mounted is passed over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from hotlun.agent.settings import Slot, Verity, checked_path
from hotlun.bridge.documents import MessageError
from hotlun.bridge.messages import MAX_SURVEYED_DISKS, MAX_SURVEYED_MOUNTS

if TYPE_CHECKING:
    from hotlun.bridge.documents import Fields

_LONG = (1 << 64) - 1


class MountQuery(NamedTuple):
    """A path, and what of the disk is to be there."""

    path: str
    partition: int
    block_device: bool
    encrypted: bool
    verity: Verity | None

    @classmethod
    def read(cls, fields: Fields) -> MountQuery:
        """Raises as `DiskQuery.read_all`."""
        path = checked_path(fields.string("MountPath"))
        if not path:
            raise MessageError("a mount without a MountPath is nowhere")
        return cls(
            path,
            fields.integer("Partition", maximum=_LONG),
            fields.boolean("BlockDev"),
            fields.boolean("Encrypted"),
            Verity.read(fields.fields("Verity")) if "Verity" in fields else None,
        )


class DiskQuery(NamedTuple):
    """A slot, the serial of the disk that is to be there (`""`: any), and its mounts."""

    slot: Slot
    serial: str
    mounts: list[MountQuery]

    @classmethod
    def read_all(cls, fields: Fields) -> list[DiskQuery]:
        """From the member Disks.

        Raises:
            MessageError: a member is of another type than it should be, or they are too many.
            RequestError: a value makes no sense.
        """
        disks = fields.objects("Disks")
        mounts = [disk.objects("Mounts") for disk in disks]
        count = sum(map(len, mounts))
        if len(disks) > MAX_SURVEYED_DISKS or count > MAX_SURVEYED_MOUNTS:
            raise MessageError(
                f"{len(disks)} disks with {count} mounts are more than the {MAX_SURVEYED_DISKS} "
                f"and {MAX_SURVEYED_MOUNTS} that can be asked for at once"
            )
        return [
            cls(Slot.read(disk), disk.string("Serial"), [MountQuery.read(mount) for mount in asked])
            for disk, asked in zip(disks, mounts)
        ]


class Found(NamedTuple):
    """What there is of one that was asked for: `""` or one of `messages.DEVICES`; each mount."""

    device: str
    mounts: list[bool]


def answered(found: list[Found], busy: list[bool]) -> dict[str, Any]:
    """Our member of the answer.

    Args:
        busy: of each, whether something is still being done to it.
    """
    disks = []
    for (device, mounts), is_busy in zip(found, busy):
        entry: dict[str, Any] = {"Device": device} if device else {}
        if is_busy:
            entry["Busy"] = True
        if any(mounts):
            entry["Mounts"] = mounts
        disks.append(entry)
    return {"Disks": disks}
