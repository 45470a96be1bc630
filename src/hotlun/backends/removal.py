"""Taking a device and its block node out of a VM, however far that has got already.

Removing a device is a request: QEMU replies at once and frees the node about 50
ms later (an RCU grace period; measured with 7.2), when it sends `DEVICE_DELETED`.
So the listener is there before the command, and each disk waits for its own
event: taking out 64 takes as long as one.

The event comes once, on the connection that there is then. A device that is absent and
still has its node is about to send it; one that has let go of the node has sent it,
to an earlier connection maybe (QEMU lets go first: `object_finalize` in qom/object.c), and
is not waited for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotlun.backends.refusals import Meaning
from hotlun.errors import BackendError, OutcomeUnknownError, VMGoneError

if TYPE_CHECKING:
    from hotlun.backends.errand import Errand
    from hotlun.backends.link import Link
    from hotlun.backends.monitor import Monitor


async def remove_device(monitor: Monitor, errand: Errand, name: str) -> None:
    """Remove the device and the node of this name, as far as they are there.

    Raises:
        BackendError: QEMU or the guest refused; the device is still there.
        OutcomeUnknownError: it may have been done, all or in part; try again.
    """
    # The event is heard on the connection that the command was sent on, and on no other.
    link = await monitor.link(errand)
    with link.departures.of(name) as departure:
        refusal = await link.command(
            errand,
            "device_del",
            {"id": name},
            expecting=(Meaning.DEVICE_ABSENT, Meaning.BEING_UNPLUGGED),
        )
        is_removed = refusal is Meaning.DEVICE_ABSENT and (
            await remove_node(monitor, errand, name) or not await _is_held(link, errand, name)
        )
        if not is_removed and await link.news(errand, departure) != "DEVICE_DELETED":
            raise errand.error(
                BackendError,
                "the guest refuses to let the device go; unplug it there first, then retry",
                code="DEVICE_UNPLUG_GUEST_ERROR",
            )
    try:
        is_free = await remove_node(monitor, errand, name)
    except VMGoneError:
        raise
    except BackendError as error:
        raise errand.error(
            OutcomeUnknownError,
            f"the device is gone, but not its block node; try again ({error})",
            code=error.code,
            detail=error.detail,
        ) from error
    if not is_free:
        raise errand.error(
            OutcomeUnknownError,
            "the device is gone, but something in QEMU still uses the block node; "
            "end the block job or export on it, then retry",
        )


async def remove_node(monitor: Monitor, errand: Errand, name: str) -> bool:
    """Whether the node is gone; if not, something still uses it.

    Raises:
        BackendError: QEMU refused.
        OutcomeUnknownError: it may have been done.
    """
    refusal = await monitor.command(
        errand,
        "blockdev-del",
        {"node-name": name},
        expecting=(Meaning.NODE_ABSENT, Meaning.NODE_IN_USE),
    )
    return refusal is not Meaning.NODE_IN_USE


async def _is_held(link: Link, errand: Errand, name: str) -> bool:
    """Whether a device, even one that cannot be named any more, has the node."""
    try:
        blocks = await link.query(errand, "query-block", {})
    except BackendError as error:
        raise errand.error(
            OutcomeUnknownError,
            f"the device is on its way out, and there is no telling how far; try again ({error})",
            code=error.code,
            detail=error.detail,
        ) from error
    return isinstance(blocks, list) and any(
        (block.get("inserted") or {}).get("node-name") == name for block in blocks
    )
