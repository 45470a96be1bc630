"""The table of attachments: which disk is which, who may share it, and conflicts.

The twin of `mounts`. What a disk of the host's is known by, `host_paths` says; an
extensible virtual disk is known by provider and path as written.
"""

from __future__ import annotations

import itertools
import os
import secrets
import string
from typing import TYPE_CHECKING, Final, NamedTuple

from hotlun.errors import DiskConflictError
from hotlun.facts import Fact
from hotlun.host_paths import HERE
from hotlun.model import Disk, DiskKind, GuestMount, ImageFormat
from hotlun.slots import SlotState, SlotStatus

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

    from hotlun.host_paths import PathRules
    from hotlun.model import Slot
    from hotlun.records import Identity
    from hotlun.states import DiskState, Handle

_FORMATS: Final = {
    ".raw": ImageFormat.RAW,
    ".img": ImageFormat.RAW,
    ".qcow2": ImageFormat.QCOW2,
    ".vhd": ImageFormat.VHD,
    ".vpc": ImageFormat.VHD,
    ".vhdx": ImageFormat.VHDX,
}
_EXTENSIBLE: Final = "evd://"


class DiskRequest(NamedTuple):
    """A disk that somebody asks for, and what it is known by."""

    disk: Disk
    identity: Identity
    name: str
    """The path as it was given, absolute; another than the canonical one if links lead on."""
    states_format: bool = False


def virtual_disk(
    host_path: str | os.PathLike[str],
    read_only: bool,
    image_format: ImageFormat | None,
    rules: PathRules = HERE,
) -> DiskRequest:
    """An image file; a format that is not stated follows from the canonical path's suffix."""
    name, path, identity = identify(host_path, rules)
    stated = None if image_format is None else ImageFormat(image_format)
    resolved = stated or _FORMATS.get(rules.suffix(path))
    disk = Disk(path, DiskKind.VIRTUAL_DISK, bool(read_only), format=resolved)
    return DiskRequest(disk, identity, name, stated is not None)


def physical_disk(
    host_path: str | os.PathLike[str], read_only: bool, rules: PathRules = HERE
) -> DiskRequest:
    """A block device of the host."""
    name, path, identity = identify(host_path, rules)
    return DiskRequest(Disk(path, DiskKind.PHYSICAL_DISK, bool(read_only)), identity, name)


def extensible_virtual_disk(host_path: str | os.PathLike[str], read_only: bool) -> DiskRequest:
    """`evd://<provider>/<path>`; what follows the provider's slash is kept byte for byte."""
    text = os.fspath(host_path)
    if not isinstance(text, str):
        raise TypeError(f"a host path is a str or os.PathLike[str]: {text!r}")
    provider, slash, path = text.removeprefix(_EXTENSIBLE).partition("/")
    if not (text.startswith(_EXTENSIBLE) and provider and slash and path):
        raise ValueError(f"an extensible virtual disk is evd://<provider>/<path>, not {text!r}")
    disk = Disk(path, DiskKind.EXTENSIBLE_VIRTUAL_DISK, bool(read_only), provider)
    return DiskRequest(disk, ("evd", provider, path), text)


def identify(
    host_path: str | os.PathLike[str], rules: PathRules = HERE
) -> tuple[str, str, Identity]:
    """The path made absolute, the canonical one, and what a disk there is known by."""
    path = os.fspath(host_path)
    if not isinstance(path, str):
        raise TypeError(f"a host path is a str or os.PathLike[str]: {path!r}")
    if not path or "\0" in path:
        raise ValueError(f"a host path is not empty and holds no NUL: {path!r}")
    return rules.find(path)


def unique_names() -> Iterator[str]:
    """Serials and ids: `h`, 11 random characters for whoever asks, and a count."""
    alphabet = string.ascii_lowercase + string.digits
    prefix = "h" + "".join(secrets.choice(alphabet) for _ in range(11))
    return (f"{prefix}{count:x}" for count in itertools.count())


def status(slot: Slot, state: DiskState, mounts: Container[Handle]) -> SlotStatus:
    """A snapshot of the slot that an attachment holds; `mounts` are the handles of Mounts."""
    is_stuck = state.stalled and not state.handles
    things = (state, *state.mounts.values())
    return SlotStatus(
        slot,
        SlotState.QUARANTINED if is_stuck else SlotState.TAKEN,
        state.attachment,
        tuple(
            GuestMount(state.attachment, mount.path, mount.config)
            for mount in state.mounts.values()
            if mount.fact is not Fact.NO
        ),
        holders=sum(handle in mounts for handle in state.handles),
        reason=next((thing.reason for thing in things if thing.reason), ""),
    )


class AttachmentTable:
    """The attachments of one VM, by what their disks are known by.

    Args:
        rules: whose paths theirs are.
    """

    def __init__(self, rules: PathRules = HERE) -> None:
        self._rules = rules
        self._by_identity: dict[Identity, DiskState] = {}
        self._by_path: dict[str, DiskState] = {}
        """By what all spellings of a path have in common."""

    def __iter__(self) -> Iterator[DiskState]:
        """Oldest first; the table may change meanwhile."""
        return iter(list(self._by_identity.values()))

    def __contains__(self, state: DiskState) -> bool:
        return self._by_identity.get(state.identity) is state

    def find(self, request: DiskRequest) -> DiskState | None:
        """The state of the disk asked for, or of another one that was attached by this path."""
        if not request.disk.provider:
            by_path = self._by_path.get(self._rules.fold(request.disk.path))
            if by_path is None and request.name != request.disk.path:
                by_path = self._by_path.get(self._rules.fold(request.name))
            if by_path is not None:
                return by_path
        return self._by_identity.get(request.identity)

    def check_sharing(self, state: DiskState, request: DiskRequest) -> None:
        """Whether a found disk is the one that was asked for, used in the same way.

        Raises:
            DiskConflictError: it is not.
        """
        there, asked = state.attachment.disk, request.disk
        # A path without a file here names no other identity than the one attached by it.
        by_path = self._rules.identity(there.path, None)
        if request.identity not in (state.identity, by_path):
            conflict = f"{request.name} names another file than the one that is attached"
        elif there.kind != asked.kind:
            conflict = f"it is attached as {there.kind}, not {asked.kind}"
        elif there.read_only != asked.read_only:
            conflict = f"it is attached {'read-only' if there.read_only else 'writable'}"
        elif request.states_format and there.format != asked.format:
            conflict = f"it is attached with format {there.format or 'unstated'}"
        else:
            return
        raise DiskConflictError(
            f"disk {there} at slot {state.attachment.slot} is in use: {conflict}; "
            "ask for it in the same way, or release it first",
            operation="attach",
            slot=state.attachment.slot,
            disk=asked,
        )

    def add(self, state: DiskState) -> None:
        """A new attachment."""
        self._by_identity[state.identity] = state
        if not state.attachment.disk.provider:
            self._by_path[self._rules.fold(state.attachment.disk.path)] = state

    def remove(self, state: DiskState) -> None:
        """The attachment is gone with all that hung on it."""
        del self._by_identity[state.identity]
        if not state.attachment.disk.provider:
            del self._by_path[self._rules.fold(state.attachment.disk.path)]
