"""Mounts by a guest of the Windows Host Compute Service, which relays what it is asked."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Self, cast

from hotlun.backends import answers, requests
from hotlun.backends.errand import Errand
from hotlun.backends.hcs_errors import meaning_of, told_as, told_of
from hotlun.backends.unfinished import PATIENCE, Unfinished
from hotlun.bridge.codes import HResult
from hotlun.bridge.documents import Fields, MessageError, printable
from hotlun.bridge.responses import Capabilities
from hotlun.errors import (
    BackendError,
    HotlunError,
    OutcomeUnknownError,
    UnsupportedError,
    VMGoneError,
)
from hotlun.hcs import documents
from hotlun.hcs.documents import LUNS
from hotlun.hcs.results import Meaning, understand
from hotlun.hcs.system import SystemInfo, check_system

if TYPE_CHECKING:
    from collections.abc import Collection

    from hotlun.backends.base import OSType
    from hotlun.hcs.system import System
    from hotlun.model import Attachment, Disk, GuestMount, MountConfig

_log = logging.getLogger("hotlun.hcs")

_CONNECTION_QUERY = {"PropertyTypes": ["GuestConnection"]}
_FAMILY, _SERVICES_OWN = 0xFFFF0000, 0x80370000
"""Of codes: those that the service gives itself. A guest's answer comes with its own code."""


class HCSGuestBackend:
    """A `GuestBackend` for one VM of the Host Compute Service, which relays the requests.

    The service must hold the connection to the guest itself (`VirtualMachine.GuestConnection`
    in the VM's document). Where it does not, listen for the guest with a `BridgeConnection`.

    Args:
        system: the VM, open for as long as this is used.
        os_type: `"linux"` or `"windows"`: whose documents are sent.
        features: what the guest's agent has of our extension; `connect` asks for them.
        timeout: seconds to wait for what was asked of the same disk before.

    Raises:
        TypeError: `system` is none.
        ValueError: another `os_type`.
    """

    def __init__(
        self,
        system: System,
        os_type: OSType,
        *,
        features: Collection[str] = (),
        timeout: float = PATIENCE,
    ) -> None:
        check_system(system)
        if os_type not in requests.CONTROLLERS:
            raise ValueError(f"a guest's os_type is 'linux' or 'windows', not {os_type!r}")
        self._system = system
        self._features = frozenset(features)
        self._unfinished = Unfinished(timeout)
        self.os_type: OSType = os_type
        self.controllers = requests.CONTROLLERS[os_type]

    @classmethod
    async def connect(cls, system: System, os_type: OSType, *, timeout: float = PATIENCE) -> Self:
        """Ask what the guest's agent can do, as far as the service has heard, and use it.

        Args:
            system, os_type, timeout: as above.

        Raises:
            TypeError, ValueError: as above.
            UnsupportedError: the guest runs another system.
            BackendError: the service does not answer, or not with what can be understood.
        """
        plain = cls(system, os_type, timeout=timeout)
        found, features = await _asked(system, Errand("ask the guest what it can do"))
        runs = printable(SystemInfo.read(found).os_type, 32)
        if runs not in ("", os_type):
            raise UnsupportedError(
                f"the service says that the guest runs {runs}, and this backend was to be for "
                f"{os_type}: make it for the right one"
            )
        return cls(system, os_type, features=features, timeout=timeout) if features else plain

    def check(self, disk: Disk, config: MountConfig, path: str) -> None:
        """Refuse what this guest cannot do, or would do only in part.

        Raises:
            UnsupportedError: that, naming what cannot be done.
        """
        requests.check(disk, config, path, self.os_type, self._features)

    async def mount(self, mount: GuestMount) -> None:
        """Mount (a partition of) the attachment at the guest path.

        Raises:
            UnsupportedError: as `check`, or a slot that the guest cannot be told of.
            WrongKeyError: the encrypted volume does not open with the config's key.
            BackendError: the guest or the service refused.
            VMGoneError: the VM has ended.
            OutcomeUnknownError: it was asked, and no telling answer came.
        """
        request = requests.mount_request(mount, self.os_type, self._features, max_lun=LUNS - 1)
        await self._check_still_can(mount)
        await self._send("mount", request, mount.attachment, f" at {mount.path!r}")

    async def unmount(self, mount: GuestMount) -> None:
        """Undo `mount`. Raises as `mount` does."""
        request = requests.unmount_request(mount, self.os_type, self._features, max_lun=LUNS - 1)
        await self._send("unmount", request, mount.attachment, f" from {mount.path!r}")

    async def unplug(self, attachment: Attachment) -> None:
        """Have the guest let go of the device. Windows needs no telling. Raises as `mount` does."""
        request = requests.unplug_request(attachment, self.os_type, max_lun=LUNS - 1)
        if request is not None:
            await self._send("unplug", request, attachment, "")

    async def _check_still_can(self, mount: GuestMount) -> None:
        """Refuse what takes our extension, if there is another agent by now, without it.

        Raises:
            BackendError: that; or the service does not answer.
        """
        try:
            requests.check(mount.attachment.disk, mount.config, mount.path, self.os_type, ())
            return
        except UnsupportedError:
            errand = Errand.on(mount.attachment, "mount")
        try:
            found, features = await _asked(self._system, errand)
        except OutcomeUnknownError as error:  # what was only asked changes nothing
            raise errand.error(BackendError, f"nothing was sent: {error.__cause__}") from error
        lost = sorted(self._features - features) if found.get("GuestConnectionInfo") else ()
        if lost:
            raise errand.error(
                BackendError,
                f"the agent in the guest is another one now, without {', '.join(lost)}, and would "
                "do less than that; nothing was sent: make the backend anew, or run hotlun's agent",
            )

    async def _send(
        self, operation: str, request: requests.Request, attachment: Attachment, where: str
    ) -> None:
        errand, document = Errand.on(attachment, operation), documents.guest_document(request)
        _log.debug("%s%s", errand, where)
        try:
            await self._unfinished.run(attachment.slot, lambda: self._system.modify(document))
        except BackendError as error:
            if not _is_the_guests(error):
                raise await self._confirmed(errand, error) from error
            code = cast("int", error.code)
            raise answers.judge(operation, attachment, where, code, error.detail) from error
        except OutcomeUnknownError as error:
            raise told_as(errand, error) from error

    async def _confirmed(self, errand: Errand, error: BackendError) -> HotlunError:
        """The error for what the service says; that the VM has ended is asked of itself.

        For a guest can answer with the code for that, and who believes it lets go of its disks.
        """
        told = told_as(errand, error)
        if not isinstance(told, VMGoneError) or await self._has_ended():
            return told
        name = understand(cast("int", error.code)).name
        said = f"; with it came: {error.detail}" if error.detail else ""
        return errand.error(
            BackendError,
            f"the answer was {name}, and the service does not say that the VM has ended when it "
            "is asked: it may be the guest's, and the disks are still attached; see whether the "
            f"VM runs, and try again{said}",
            code=error.code,
            detail=error.detail,
        )

    async def _has_ended(self) -> bool:
        try:
            found = await self._system.properties(documents.PROPERTY_QUERY)
        except BackendError as error:
            return meaning_of(error) is Meaning.VM_GONE
        except OutcomeUnknownError:
            return False
        return found.get("Stopped") is True


async def _asked(system: System, errand: Errand) -> tuple[dict[str, Any], frozenset[str]]:
    """What the service tells of the guest, and what the agent there has of our extension.

    Raises:
        BackendError, OutcomeUnknownError: the service does not answer, or what makes no sense.
    """
    with told_of(errand):
        found = await system.properties(_CONNECTION_QUERY)
        try:
            return found, Capabilities.read(Fields(found).fields("GuestConnectionInfo")).features
        except MessageError as error:
            raise BackendError(f"what the service tells of it makes no sense: {error}") from error


def _is_the_guests(error: BackendError) -> bool:
    """Whether the code is the guest's own answer, as far as it can be told from the service's.

    The service relays the guest's code. Its own family is 0x8037nnnn, of which a guest has
    INVALID_STATE alone, and says then what is in the way.
    """
    code = error.code
    if code == HResult.INVALID_STATE:
        return bool(error.detail)
    return isinstance(code, int) and code & _FAMILY != _SERVICES_OWN
