"""Disks mounted and unmounted by the agent in the guest, over the bridge.

What the guest answers is for `answers` to judge; no answer is unknown. An agent that would
do less than it was asked, without a word, is not asked: which agent it is shows in the features
that it announced.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from hotlun.backends import answers, requests, surveys
from hotlun.bridge.codes import HResult, code_name
from hotlun.bridge.documents import MessageError
from hotlun.bridge.keeper import Change
from hotlun.bridge.messages import FEATURE_SURVEY, MessageType
from hotlun.errors import (
    BackendError,
    HotlunError,
    OutcomeUnknownError,
    UnsupportedError,
    VMGoneError,
)
from hotlun.events import ConnectionLost, ConnectionRestored, VMGone

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from hotlun.backends.base import Listener, OSType
    from hotlun.bridge.client import BridgeConnection
    from hotlun.model import Attachment, Disk, GuestMount, GuestSurvey, MountConfig

_log = logging.getLogger(__name__)


class BridgeGuestBackend:
    """A `GuestBackend` over a connection that somebody else opens and closes.

    Args:
        connection: an entered `BridgeConnection`.
        os_type: `"linux"` or `"windows"`: whose documents are sent.
        timeout: seconds for each request; None for the connection's own.

    Raises:
        ValueError: another `os_type`.
    """

    def __init__(
        self, connection: BridgeConnection, os_type: OSType, *, timeout: float | None = None
    ) -> None:
        if os_type not in requests.CONTROLLERS:
            raise ValueError(f"a guest's os_type is 'linux' or 'windows', not {os_type!r}")
        self._connection = connection
        self._timeout = timeout
        self.os_type: OSType = os_type
        self.controllers = requests.CONTROLLERS[os_type]

    def check(self, disk: Disk, config: MountConfig, path: str) -> None:
        """Refuse what this guest cannot do, or would do only in part.

        Raises:
            UnsupportedError: that, naming what cannot be done.
            BackendError: the connection has never been entered, so nobody knows.
        """
        self._check_system("mount", disk, f" at {path!r}")
        requests.check(disk, config, path, self.os_type, self._connection.features)

    async def mount(self, mount: GuestMount) -> None:
        """Mount (a partition of) the attachment at the guest path.

        Raises:
            UnsupportedError: as `check`, or a slot that the guest cannot be told of.
            WrongKeyError: the encrypted volume does not open with the config's key.
            BackendError: the guest refused, or could not be asked.
            VMGoneError: it could not, because the VM has ended.
            OutcomeUnknownError: it was asked, and no telling answer came.
        """
        self._check_system("mount", mount.attachment.disk, f" at {mount.path!r}")
        request = requests.mount_request(mount, self.os_type, self._connection.features)
        await self._send("mount", request, mount.attachment, f" at {mount.path!r}")

    async def unmount(self, mount: GuestMount) -> None:
        """Undo `mount`. Raises as `mount` does."""
        self._check_system("unmount", mount.attachment.disk, f" from {mount.path!r}")
        request = requests.unmount_request(mount, self.os_type, self._connection.features)
        await self._send("unmount", request, mount.attachment, f" from {mount.path!r}")

    async def unplug(self, attachment: Attachment) -> None:
        """Have the guest let go of the device. Windows needs no telling. Raises as `mount` does."""
        self._check_system("unplug", attachment.disk, "")
        request = requests.unplug_request(attachment, self.os_type)
        if request is not None:
            await self._send("unplug", request, attachment, "")

    async def survey(
        self, attachments: Collection[Attachment], mounts: Collection[GuestMount]
    ) -> GuestSurvey | None:
        """What of these the guest has now; None if its agent cannot say.

        Raises:
            BackendError: it could not be asked, or gave no answer that makes sense.
        """
        if FEATURE_SURVEY not in self._connection.features:
            return None
        answers = []
        for survey in surveys.over(attachments, mounts):
            try:
                answer = await self._connection.request(
                    MessageType.GET_PROPERTIES, survey.document, timeout=self._timeout
                )
                if answer.code != HResult.OK:
                    words = f"{answer.text or 'no reason given'} [{code_name(answer.code)}]"
                    raise _not_surveyed(words, answer.code, answer.text)
                answers.append(survey.read(answer.fields))
            except MessageError as error:
                raise _not_surveyed(f"its answer makes no sense: {error}") from error
            except OutcomeUnknownError as error:  # what was only asked changes nothing
                raise _not_surveyed(str(error), error.code, error.detail) from error
        return surveys.together(answers)

    def watch(self, listener: Listener) -> Callable[[], None]:
        """Call `listener(event)` when the guest is lost, back, or gone with its VM.

        Until the function that is returned is called.
        """

        def tell(change: Change, reason: str) -> None:
            match change:
                case Change.LOST:
                    listener(ConnectionLost("guest", reason))
                case Change.RESTORED:
                    listener(ConnectionRestored("guest"))
                case Change.GONE:
                    listener(VMGone(reason))

        return self._connection.watch(tell)

    def _check_system(self, operation: str, disk: Disk, where: str) -> None:
        """Refuse to send the documents of one system to a guest that runs another.

        A Linux agent takes an unmount in Windows' words for one of nothing, and Windows is not
        even told of an unplug: the disk would be detached while it is mounted.
        """
        if self._connection.os_type != self.os_type:
            raise UnsupportedError(
                f"cannot {operation} {disk}{where}: the guest says that it runs "
                f"{self._connection.os_type}, and this backend was made for {self.os_type}: "
                "make it for the right one",
                operation=operation,
                disk=disk,
            )

    async def _send(
        self, operation: str, request: requests.Request, attachment: Attachment, where: str
    ) -> None:
        slot, disk = attachment.slot, attachment.disk
        what = f"{operation} {disk} (slot {slot}){where}"

        def problem(
            kind: type[BackendError | OutcomeUnknownError],
            message: str,
            code: int | str | None,
            detail: str,
        ) -> HotlunError:
            return kind(
                message, operation=operation, slot=slot, disk=disk, code=code, detail=detail
            )

        _log.debug("%s, serial %s", what, attachment.serial)
        try:
            answer = await self._connection.modify(
                request, timeout=self._timeout, meant_for=self._connection.capabilities
            )
        except OutcomeUnknownError as error:
            message = f"no telling whether the guest did {what}: {error}"
            raise problem(OutcomeUnknownError, message, error.code, error.detail) from error
        except BackendError as error:
            message = f"the guest was not asked to {what}: {error}"
            refusal = VMGoneError if isinstance(error, VMGoneError) else BackendError
            raise problem(refusal, message, error.code, error.detail) from error
        if answer.code == HResult.OK:
            return
        raise answers.judge(operation, attachment, where, answer.code, answer.text)


def _not_surveyed(why: str, code: int | str | None = None, detail: str = "") -> BackendError:
    return BackendError(
        f"the guest did not say what it has: {why}; ask again",
        operation="survey",
        code=code,
        detail=detail,
    )
